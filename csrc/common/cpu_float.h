// 16-bit floats on the CPU as integers: the compiler vectorises integer conversions, and not those
// of a class with overloaded operators, nor of _Float16 (GCC 12 turns one at a time). Included by
// <op>_cpu.cpp only (see cpu.h on namespaces).
#pragma once

#include <bit>
#include <cstdint>

#include "cpu.h"
#include "dispatch.h"

#if !defined(WARPLOOM_CPU_ISA)
#error "cpu_float.h belongs to CPU units, which are compiled with WARPLOOM_CPU_ISA"
#endif

namespace warploom {
namespace WARPLOOM_CPU_ISA {

struct BFloat16 {
    std::uint16_t bits;
};

struct Half {
    std::uint16_t bits;
};

// The type that arithmetic on elements of type T happens in.
template <typename T>
struct WideType {
    using Type = float;
};
template <>
struct WideType<double> {
    using Type = double;
};
template <typename T>
using Wide = typename WideType<T>::Type;

inline double widen(double value) {
    return value;
}
inline float widen(float value) {
    return value;
}
inline float widen(BFloat16 value) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}
// The product moves the exponent's bias from 15 to 127, and makes a subnormal number normal.
inline float widen(Half value) {
    const std::uint32_t bits = value.bits;
    const float magnitude = std::bit_cast<float>((bits & 0x7fffu) << 13) * 0x1p112f;
    const bool is_finite = (bits & 0x7c00u) != 0x7c00u;
    const std::uint32_t special = 0x7f800000u | ((bits & 0x3ffu) << 13);
    const std::uint32_t wide = is_finite ? std::bit_cast<std::uint32_t>(magnitude) : special;
    return std::bit_cast<float>(wide | ((bits & 0x8000u) << 16));
}

template <typename T>
inline T narrow(Wide<T> value) {
    return static_cast<T>(value);
}

// Round to nearest, ties to even. A NaN keeps its sign and becomes quiet: its payload must not be
// rounded up into an infinity.
template <>
inline BFloat16 narrow<BFloat16>(float value) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const std::uint32_t quiet = (bits >> 16) | 0x40u;
    const bool is_nan = value != value;
    return BFloat16{static_cast<std::uint16_t>(is_nan ? quiet : rounded)};
}

// As above. Below the least normal number 2^-14 the sum with 0.5, whose last place is float16's
// smallest step 2^-24, does the rounding.
template <>
inline Half narrow<Half>(float value) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    const std::uint32_t normal =
        ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
    const std::uint32_t subnormal =
        std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) -
        std::bit_cast<std::uint32_t>(0.5f);
    std::uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x47800000u ? 0x7c00u : half;
    half = magnitude > 0x7f800000u ? 0x7e00u | ((magnitude >> 13) & 0x3ffu) : half;
    return Half{static_cast<std::uint16_t>(half | ((bits >> 16) & 0x8000u))};
}

// Calls visit.template operator()<T>() with the element type that `dtype` stands for. Unlike
// dispatch_dtype it cannot throw: a CPU kernel takes every dtype, and stays free of std::string.
template <typename Visit>
void visit_element_type(DType dtype, Visit&& visit) {
    switch (dtype) {
        case DType::float32:
            visit.template operator()<float>();
            break;
        case DType::float16:
            visit.template operator()<Half>();
            break;
        case DType::bfloat16:
            visit.template operator()<BFloat16>();
            break;
        case DType::float64:
            visit.template operator()<double>();
            break;
    }
}

// The same for a tensor and its parameters, whose type is the tensor's or float32.
template <typename Visit>
void visit_element_types(DType dtype, DType weight_dtype, Visit&& visit) {
    visit_element_type(dtype, [&]<typename T>() {
        if (weight_dtype == dtype) {
            visit.template operator()<T, T>();
        } else {
            visit.template operator()<T, float>();
        }
    });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom
