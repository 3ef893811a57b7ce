// Elementary functions for loops under `#pragma omp simd`: float32 without branches or tables, so
// that the compiler vectorises them, and float64 by the C library. float32 results are within 2.5
// units in the last place, and a NaN stays a NaN; exp(x) is 0 where it would be subnormal, below
// 2^-126, and infinite above 2^127.5. Included by <op>_cpu.cpp only (see cpu.h on namespaces).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#if !defined(WARPLOOM_CPU_ISA)
#error "cpu_math.h belongs to CPU units, which are compiled with WARPLOOM_CPU_ISA"
#endif

namespace warploom {
namespace WARPLOOM_CPU_ISA {

inline float fused_multiply_add(float a, float b, float c) {
    return __builtin_fmaf(a, b, c);
}
inline double fused_multiply_add(double a, double b, double c) {
    return __builtin_fma(a, b, c);
}

// exp(x) = power (1 + r slope), power = 2^n, |r| <= log(2) / 2, for x in [-87.3, 88.3]; any number
// beyond. The polynomial has the least maximal error of its degree, 2e-9, before its first two
// coefficients became 1.
struct Exponential {
    float r;
    float slope;
    float power;
};

inline Exponential split_exponential(float x) {
    constexpr float kLogTwoHigh = 0x1.62e4p-1f;  // 15 bits: its product with n is exact
    constexpr float kLogTwoLow = 0x1.7f7d1cp-20f;
    constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer, held in the low bits
    const float shifted = fused_multiply_add(x, 0x1.715476p0f, kRound);
    const float n = shifted - kRound;
    const float r = fused_multiply_add(n, -kLogTwoLow, fused_multiply_add(n, -kLogTwoHigh, x));
    float sum = 0.0013956051824362992f;
    sum = fused_multiply_add(sum, r, 0.008375128580168971f);
    sum = fused_multiply_add(sum, r, 0.0416660836685666f);
    sum = fused_multiply_add(sum, r, 0.16666415481892324f);
    sum = fused_multiply_add(sum, r, 0.500000016837979f);
    sum = fused_multiply_add(sum, r, 1.0f);
    return {r, sum, std::bit_cast<float>((std::bit_cast<std::uint32_t>(shifted) + 127u) << 23)};
}

inline float exponential_in_range(float x) {
    const Exponential parts = split_exponential(x);
    return fused_multiply_add(parts.slope, parts.r, 1.0f) * parts.power;
}

constexpr float kLeastExponent = -87.336544f;    // log(2^-126)
constexpr float kGreatestExponent = 88.376259f;  // log(2^127.5)

inline double exponential(double x) {
    return std::exp(x);
}
inline float exponential(float x) {
    const float scaled = exponential_in_range(x);
    const float raised = x < kLeastExponent ? 0.0f : scaled;
    return x > kGreatestExponent ? std::numeric_limits<float>::infinity() : raised;
}

// exp(x) for x <= 0
inline double exponential_of_negative(double x) {
    return std::exp(x);
}
inline float exponential_of_negative(float x) {
    const float scaled = exponential_in_range(x);
    return x < kLeastExponent ? 0.0f : scaled;
}

inline double hyperbolic_tangent(double x) {
    return std::tanh(x);
}
// e / (e + 2) with e = exp(2 |x|) - 1, taken without cancellation; 1 in float32 beyond 10.
inline float hyperbolic_tangent(float x) {
    const float magnitude = std::fabs(x);
    const float doubled = magnitude > 10.0f ? 20.0f : 2.0f * magnitude;
    const Exponential parts = split_exponential(doubled);
    const float e = fused_multiply_add(parts.power, parts.r * parts.slope, parts.power - 1.0f);
    return std::copysign(e / (e + 2.0f), x);
}

// exp(-|x|)
inline double decay(double x) {
    return std::exp(-std::fabs(x));
}
inline float decay(float x) {
    const float exponent = -std::fabs(x);
    const float scaled = exponential_in_range(exponent);
    return exponent < kLeastExponent ? 0.0f : scaled;
}

// 1 / (1 + exp(-x)), from exp(-|x|), which cannot overflow.
template <typename W>
inline W sigmoid(W x) {
    const W decayed = decay(x);
    return (x < 0 ? decayed : W{1}) / (W{1} + decayed);
}

// sigmoid(x) and 1 - sigmoid(x) = sigmoid(-x), the second without cancellation.
template <typename W>
struct SigmoidPair {
    W value;
    W complement;
};

template <typename W>
inline SigmoidPair<W> sigmoid_pair(W x) {
    const W decayed = decay(x);
    const W larger = W{1} / (W{1} + decayed);
    const W smaller = decayed * larger;
    return {x < 0 ? smaller : larger, x < 0 ? larger : smaller};
}

// sigmoid(x) for results that are rounded to 16 bits, with half the operations. exp(-x) = 2^y =
// 2^n 2^f, |f| <= 1 / 2, is 0 at y = -127 and infinite at y = 128. The polynomial has the least
// maximal relative error of its degree, 2^-18.5.
inline float sigmoid_of_16_bits(float x) {
    constexpr float kRound = 0x1.8p23f + 127.0f;  // leaves n + 127, an exponent, in the low bits
    const float y = x * -0x1.715476p0f;
    const float raised = y > -127.0f ? y : -127.0f;
    const float exponent = raised < 128.0f ? raised : 128.0f;
    const float shifted = exponent + kRound;
    const float f = exponent - (shifted - kRound);
    float power = 0.009570102207362652f;
    power = fused_multiply_add(power, f, 0.05591785907745361f);
    power = fused_multiply_add(power, f, 0.240247443318367f);
    power = fused_multiply_add(power, f, 0.6931217908859253f);
    power = fused_multiply_add(power, f, 0.9999992847442627f);
    power *= std::bit_cast<float>(std::bit_cast<std::uint32_t>(shifted) << 23);
    return 1.0f / (1.0f + power);
}

inline double error_function(double x) {
    return std::erf(x);
}

// Two fits in the least maximal error: erf(x) / x - 1 in powers of x^2 up to 0.9, off by 3e-10, and
// log(erfc(x)) from 0.9 to 4, which puts erf off by 2e-9. Beyond 4, erf is 1 in float32.
inline float error_function(float x) {
    const float magnitude = std::fabs(x);
    const float square = x * x;
    float small = 8.53883918760949e-05f;
    small = fused_multiply_add(small, square, -0.0008181927292054234f);
    small = fused_multiply_add(small, square, 0.00520443602684505f);
    small = fused_multiply_add(small, square, -0.02686075281178047f);
    small = fused_multiply_add(small, square, 0.11283719723084182f);
    small = fused_multiply_add(small, square, -0.37612635310386716f);
    small = fused_multiply_add(small, square, 0.1283791668023566f);
    const float bounded = magnitude > 4.0f ? 4.0f : magnitude;
    float logarithm = 0.0001982207078173948f;
    logarithm = fused_multiply_add(logarithm, bounded, -0.0030654998281714127f);
    logarithm = fused_multiply_add(logarithm, bounded, 0.02231524806315795f);
    logarithm = fused_multiply_add(logarithm, bounded, -0.10411374558644303f);
    logarithm = fused_multiply_add(logarithm, bounded, -0.6369760131174457f);
    logarithm = fused_multiply_add(logarithm, bounded, -1.1277972809243257f);
    logarithm = fused_multiply_add(logarithm, bounded, -0.00016643906996094415f);
    const float large = std::copysign(1.0f - exponential_in_range(logarithm), x);
    return magnitude < 0.9f ? fused_multiply_add(small, x, x) : large;
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom
