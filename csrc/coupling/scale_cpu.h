// The scales of couplings on the CPU: log s = L(u), its slope and s, per element, for loops under
// `#pragma omp simd`. Included by <op>_cpu.cpp only (see common/cpu.h on namespaces).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/cpu_math.h"
#include "coupling/affine_coupling.h"

namespace warploom::coupling {
namespace WARPLOOM_CPU_ISA {

using namespace ::warploom::WARPLOOM_CPU_ISA;

inline double logarithm(double x) {
    return std::log(x);
}
// x = 2^n m, m in [sqrt(1/2), sqrt(2)), and log(m) = 2 artanh(h), h = (m - 1) / (m + 1): its power
// series to h^9 is off by 1e-9. For normal numbers, 0, infinity and NaN.
[[gnu::always_inline]] inline float logarithm(float x) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t shifted = bits + (0x3f800000u - 0x3f3504f3u);
    const float n = static_cast<float>(static_cast<std::int32_t>(shifted >> 23) - 127);
    const float m = std::bit_cast<float>((shifted & 0x007fffffu) + 0x3f3504f3u);
    const float h = (m - 1.0f) / (m + 1.0f);
    const float square = h * h;
    float sum = 0.2222222222f;
    sum = fused_multiply_add(sum, square, 0.2857142857f);
    sum = fused_multiply_add(sum, square, 0.4f);
    sum = fused_multiply_add(sum, square, 0.6666666667f);
    const float small = fused_multiply_add(n, 1.42860677e-6f, sum * square * h);
    const float normal = fused_multiply_add(n, 0.693145751953125f, 2.0f * h + small);
    const float special = x == 0.0f ? -std::numeric_limits<float>::infinity() : x;
    return x > 0.0f && x < std::numeric_limits<float>::infinity() ? normal : special;
}

inline double logarithm_of_one_plus(double x) {
    return std::log1p(x);
}
// log(1 + x) for x in [0, 1]: x + x^2 p(x), p with the least maximal relative error of its degree,
// 3e-8 of the logarithm.
[[gnu::always_inline]] inline float logarithm_of_one_plus(float x) {
    float sum = 0.005364816635847092f;
    sum = fused_multiply_add(sum, x, -0.030065763741731644f);
    sum = fused_multiply_add(sum, x, 0.0792044922709465f);
    sum = fused_multiply_add(sum, x, -0.13753798604011536f);
    sum = fused_multiply_add(sum, x, 0.1915365308523178f);
    sum = fused_multiply_add(sum, x, -0.24857163429260254f);
    sum = fused_multiply_add(sum, x, 0.3332132399082184f);
    sum = fused_multiply_add(sum, x, -0.49999648332595825f);
    return fused_multiply_add(x * x, sum, x);
}

// As hyperbolic_tangent, but its argument is bounded last: a constant that enters first lets the
// compiler fold what follows, behind a branch.
inline double bounded_tangent(double x) {
    return hyperbolic_tangent(x);
}
[[gnu::always_inline]] inline float bounded_tangent(float x) {
    const float magnitude = std::fabs(x);
    const Exponential parts = split_exponential(2.0f * magnitude);
    const float e = fused_multiply_add(parts.power, parts.r * parts.slope, parts.power - 1.0f);
    const float ratio = e / (e + 2.0f);
    return std::copysign(magnitude > 10.0f ? 1.0f : ratio, x);
}

inline double arc_tangent(double x) {
    return std::atan(x);
}
// atan(t) of t = |x|, or beyond 1 of 1 / |x|, which is taken off pi / 2: a power series in t^2 with
// the least maximal relative error of its degree, 2e-8. More ranges would need fewer terms, but
// each is a division more: the compiler makes it for all.
[[gnu::always_inline]] inline float arc_tangent(float x) {
    const float magnitude = std::fabs(x);
    const bool beyond = magnitude > 1.0f;
    const float t = beyond ? 1.0f / magnitude : magnitude;
    const float square = t * t;
    float sum = 0.00292068900f;
    sum = fused_multiply_add(sum, square, -0.0163679158f);
    sum = fused_multiply_add(sum, square, 0.0432118422f);
    sum = fused_multiply_add(sum, square, -0.0755221282f);
    sum = fused_multiply_add(sum, square, 0.106660040f);
    sum = fused_multiply_add(sum, square, -0.142110552f);
    sum = fused_multiply_add(sum, square, 0.199937728f);
    sum = fused_multiply_add(sum, square, -0.333331527f);
    const float angle = fused_multiply_add(sum * square, t, t);
    return std::copysign(beyond ? 1.57079633f - angle : angle, x);
}

// The options as numbers of the type W that arithmetic happens in.
template <typename W>
struct Constants {
    W clamp;
    W eps;
    W inverse_limit;  // 1 / |log(clamp)| of softclip
    W params_scale;
    W shift_scale;  // q params_scale
    W log_sign;
    bool add_first;
};

template <typename W>
struct LogScale {
    W value;  // L(u), without the learned weight
    W slope;
};

struct AdditiveScale {
    template <typename W>
    [[gnu::always_inline]] static LogScale<W> log(W, const Constants<W>&) {
        return {W{0}, W{0}};
    }
};
struct ExpScale {
    template <typename W>
    [[gnu::always_inline]] static LogScale<W> log(W u, const Constants<W>&) {
        return {u, W{1}};
    }
};
struct TanhScale {
    template <typename W>
    [[gnu::always_inline]] static LogScale<W> log(W u, const Constants<W>& c) {
        const W tanh = bounded_tangent(u);
        return {c.clamp * tanh, c.clamp * (W{1} - tanh * tanh)};
    }
};
struct WeightedTanhScale : TanhScale {};
struct AtanScale {
    template <typename W>
    [[gnu::always_inline]] static LogScale<W> log(W u, const Constants<W>& c) {
        const W height = c.clamp * static_cast<W>(kAtanSlope);
        return {height * arc_tangent(u), height / (W{1} + u * u)};
    }
};
struct CenteredSigmoidScale {
    template <typename W>
    [[gnu::always_inline]] static LogScale<W> log(W u, const Constants<W>& c) {
        const SigmoidPair<W> sigmoid = sigmoid_pair(u);
        return {c.clamp * (sigmoid.value - sigmoid.complement),
                W{2} * c.clamp * sigmoid.value * sigmoid.complement};
    }
};
// log(sigmoid(u + 2)), finite wherever u is. Of a scale with a factor of its own, s or where
// `reciprocal` 1 / s, that needs no logarithm.
template <bool reciprocal>
struct SigmoidScale {
    template <typename W>
    [[gnu::always_inline]] static LogScale<W> log(W u, const Constants<W>&) {
        const W v = u + W{2};
        return {(v < 0 ? v : W{0}) - logarithm_of_one_plus(decay(v)), sigmoid_pair(v).complement};
    }
    template <typename W>
    [[gnu::always_inline]] static W factor(W u, const Constants<W>&) {
        const W v = u + W{2};
        const W decayed = decay(v);
        return reciprocal ? (W{1} + decayed) / (v < 0 ? decayed : W{1}) : sigmoid_pair(v).value;
    }
};
template <bool reciprocal>
struct RaisedSigmoidScale {
    template <typename W>
    [[gnu::always_inline]] static LogScale<W> log(W u, const Constants<W>& c) {
        const SigmoidPair<W> sigmoid = sigmoid_pair(u + W{2});
        const W raised = sigmoid.value + c.eps;
        return {logarithm(raised), sigmoid.value * sigmoid.complement / raised};
    }
    template <typename W>
    [[gnu::always_inline]] static W factor(W u, const Constants<W>& c) {
        const W raised = sigmoid_pair(u + W{2}).value + c.eps;
        return reciprocal ? W{1} / raised : raised;
    }
};
struct SoftclipScale {
    template <typename W>
    [[gnu::always_inline]] static LogScale<W> log(W u, const Constants<W>& c) {
        const W shrink = W{1} / (W{1} + std::fabs(u) * c.inverse_limit);
        return {u * shrink, shrink * shrink};
    }
};

// s^p: exp(p L), or the scale's own factor.
template <typename Scale, typename W>
[[gnu::always_inline]] inline W factor_of(W raw_scale, W log_scale, const Constants<W>& c) {
    if constexpr (std::is_same_v<Scale, AdditiveScale>) {
        return W{1};
    } else if constexpr (requires { Scale::factor(raw_scale, c); }) {
        return Scale::factor(raw_scale, c);
    } else {
        return exponential(c.log_sign * log_scale);
    }
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::coupling
