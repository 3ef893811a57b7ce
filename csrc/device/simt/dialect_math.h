// Host twins of ../ptx/math.cuh, to the accuracy of the C library.
#pragma once

#include "primitives.h"

namespace warploom::device {

WARPLOOM_DEVICE float exp2_approximate(float value) {
    return std::exp2(value);
}
WARPLOOM_DEVICE float log2_approximate(float value) {
    return std::log2(value);
}
WARPLOOM_DEVICE float reciprocal_sqrt(float value) {
    return 1.0f / std::sqrt(value);
}
WARPLOOM_DEVICE float reciprocal_approximate(float value) {
    return 1.0f / value;
}
WARPLOOM_DEVICE float tanh_approximate(float value) {
    return std::tanh(value);
}

WARPLOOM_DEVICE float to_float(float value) {
    return value;
}
WARPLOOM_DEVICE float to_float(bfloat16 value) {
    return bit_cast<float>(static_cast<std::uint32_t>(bit_cast<std::uint16_t>(value)) << 16);
}
WARPLOOM_DEVICE float to_float(half value) {
    return __half2float(value);
}

// Rounds to nearest even.
template <typename T>
WARPLOOM_DEVICE T from_float(float value) {
    static_assert(
        std::is_same_v<T, float> || std::is_same_v<T, bfloat16> || std::is_same_v<T, half>,
        "from_float: float, bfloat16 or half");
    if constexpr (std::is_same_v<T, bfloat16>) {
        const std::uint32_t bits = bit_cast<std::uint32_t>(value);
        const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
        const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
        return bit_cast<bfloat16>(static_cast<std::uint16_t>(is_nan ? 0x7fffu : rounded));
    } else if constexpr (std::is_same_v<T, half>) {
        return __float2half_rn(value);
    } else {
        return value;
    }
}

// Two T, `low` in bits 0-15.
template <typename T>
WARPLOOM_DEVICE std::uint32_t pack(float low, float high) {
    static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, half>, "pack: bfloat16 or half");
    return bit_cast<std::uint16_t>(from_float<T>(low)) |
           static_cast<std::uint32_t>(bit_cast<std::uint16_t>(from_float<T>(high))) << 16;
}

}  // namespace warploom::device
