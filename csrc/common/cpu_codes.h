// Numbers of one byte on the CPU as integers, which the compiler vectorises. Included by
// <op>_cpu.cpp only (see cpu.h on namespaces).
#pragma once

#include <bit>
#include <cstdint>

#include "cpu.h"

#if !defined(WARPLOOM_CPU_ISA)
#error "cpu_codes.h belongs to CPU units, which are compiled with WARPLOOM_CPU_ISA"
#endif

namespace warploom {
namespace WARPLOOM_CPU_ISA {

// float8_e4m3fn
struct Float8 {
    static constexpr float kLargest = 448.0f;

    // The sum moves the exponent's bias from 7 to 127; subnormal numbers are multiples of 2^-9.
    static float decode(std::uint8_t code) {
        const std::uint32_t magnitude = code & 0x7fu;
        const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(
            static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-9f);
        const std::uint32_t normal = (magnitude << 20) + (120u << 23);
        std::uint32_t bits = magnitude < 8u ? subnormal : normal;
        bits = magnitude == 0x7fu ? 0x7fc00000u : bits;
        return std::bit_cast<float>(bits | (code & 0x80u) << 24);
    }

    // Round to nearest, ties to even, of magnitudes that round to 448 or less; else NaN. Below the
    // least normal number 2^-6 the sum with 2^14, whose last place is the smallest step 2^-9, does
    // the rounding.
    static std::uint8_t encode(float value) {
        const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
        const std::uint32_t magnitude = bits & 0x7fffffffu;
        const std::uint32_t normal =
            ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
        const std::uint32_t subnormal =
            std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0x1p14f) -
            std::bit_cast<std::uint32_t>(0x1p14f);
        std::uint32_t code = magnitude < 0x3c800000u ? subnormal : normal;
        code = magnitude > 0x43e80000u ? 0x7fu : code;
        return static_cast<std::uint8_t>(code | (bits >> 24 & 0x80u));
    }
};

struct Int8 {
    static constexpr float kLargest = 127.0f;

    static float decode(std::uint8_t code) {
        return static_cast<float>(static_cast<std::int8_t>(code));
    }

    static std::uint8_t encode(float value) {
        return static_cast<std::uint8_t>(static_cast<std::int32_t>(__builtin_rintf(value)));
    }
};

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom
