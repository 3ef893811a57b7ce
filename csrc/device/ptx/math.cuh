// Conversions between float and the 16-bit types, and the special-function instructions. None
// orders memory.
#pragma once

#include "index.cuh"

namespace warploom::device {

// PTX ISA, Floating Point Instructions: ex2.approx.ftz.f32 (relative error 2^-22)
WARPLOOM_DEVICE float exp2_approximate(float value) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

// PTX ISA, Floating Point Instructions: lg2.approx.ftz.f32 (error 2^-22)
WARPLOOM_DEVICE float log2_approximate(float value) {
    float result;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

// PTX ISA, Floating Point Instructions: rsqrt.approx.f32 (relative error 2^-22.9)
WARPLOOM_DEVICE float reciprocal_sqrt(float value) {
    float result;
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

// PTX ISA, Floating Point Instructions: rcp.approx.ftz.f32 (1 ulp)
WARPLOOM_DEVICE float reciprocal_approximate(float value) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

// PTX ISA, Floating Point Instructions: tanh.approx.f32 (relative error 2^-11)
WARPLOOM_DEVICE float tanh_approximate(float value) {
    float result;
    asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

// PTX ISA, Data Movement and Conversion Instructions: cvt.rn.bf16x2.f32, cvt.rn.f16x2.f32
// Two T, rounded to nearest even, `low` in bits 0-15.
template <typename T>
WARPLOOM_DEVICE std::uint32_t pack(float low, float high) {
    static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, half>, "pack: bfloat16 or half");
    std::uint32_t bits;
    if constexpr (std::is_same_v<T, bfloat16>) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    }
    return bits;
}

// PTX ISA, Data Movement and Conversion Instructions: cvt.f32.bf16, cvt.f32.f16
WARPLOOM_DEVICE float to_float(float value) {
    return value;
}
WARPLOOM_DEVICE float to_float(bfloat16 value) {
    return __bfloat162float(value);
}
WARPLOOM_DEVICE float to_float(half value) {
    return __half2float(value);
}

// PTX ISA, Data Movement and Conversion Instructions: cvt.rn.bf16.f32, cvt.rn.f16.f32
template <typename T>
WARPLOOM_DEVICE T from_float(float value) {
    static_assert(
        std::is_same_v<T, float> || std::is_same_v<T, bfloat16> || std::is_same_v<T, half>,
        "from_float: float, bfloat16 or half");
    if constexpr (std::is_same_v<T, bfloat16>) {
        return __float2bfloat16_rn(value);
    } else if constexpr (std::is_same_v<T, half>) {
        return __float2half_rn(value);
    } else {
        return value;
    }
}

}  // namespace warploom::device
