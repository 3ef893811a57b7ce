// The activations and their slopes, per element, for CPU kernels. Included by <op>_cpu.cpp only
// (see common/cpu.h on namespaces).
#pragma once

#include "activation/gated_activation.h"
#include "common/cpu_float.h"
#include "common/cpu_math.h"

namespace warploom::activation {
namespace WARPLOOM_CPU_ISA {

using namespace ::warploom::WARPLOOM_CPU_ISA;

// act(x) and d act / d x.
template <typename W>
struct ValueAndSlope {
    W value;
    W slope;
};

// sigmoid(x) for results of type T.
template <typename T>
Wide<T> sigmoid_for(Wide<T> x) {
    if constexpr (sizeof(T) == 2) {
        return sigmoid_of_16_bits(x);
    } else {
        return sigmoid(x);
    }
}

template <typename T>
SigmoidPair<Wide<T>> sigmoid_pair_for(Wide<T> x) {
    if constexpr (sizeof(T) == 2) {
        const float value = sigmoid_of_16_bits(x);
        return {value, 1.0f - value};
    } else {
        return sigmoid_pair(x);
    }
}

struct Silu {
    template <typename T, typename W = Wide<T>>
    static W value(W x) {
        return x * sigmoid_for<T>(x);
    }

    template <typename T, typename W = Wide<T>>
    static ValueAndSlope<W> value_and_slope(W x) {
        const SigmoidPair<W> gate = sigmoid_pair_for<T>(x);
        return {x * gate.value, gate.value * (W{1} + x * gate.complement)};
    }
};

// x Phi(x), Phi the normal distribution function.
struct Gelu {
    template <typename W>
    static W distribution(W x) {
        return W{0.5} * (W{1} + error_function(x * W{0.70710678118654752440}));
    }

    template <typename T, typename W = Wide<T>>
    static W value(W x) {
        return x * distribution(x);
    }

    template <typename T, typename W = Wide<T>>
    static ValueAndSlope<W> value_and_slope(W x) {
        const W below = distribution(x);
        const W density = W{0.39894228040143267794} * exponential(W{-0.5} * x * x);
        return {x * below, below + x * density};
    }
};

// 0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
struct GeluTanh {
    static constexpr double kTwiceScale = 1.5957691216057307117;  // 2 sqrt(2 / pi)
    static constexpr double kCubic = 0.044715;

    template <typename W>
    static W twice_inner(W x) {
        return static_cast<W>(kTwiceScale) * x * (W{1} + static_cast<W>(kCubic) * x * x);
    }

    template <typename T, typename W = Wide<T>>
    static W value(W x) {
        return x * sigmoid_for<T>(twice_inner(x));
    }

    // Beyond |x| = 16 the gate is flat; x^2 could overflow there and turn 0 into NaN.
    template <typename T, typename W = Wide<T>>
    static ValueAndSlope<W> value_and_slope(W x) {
        const SigmoidPair<W> gate = sigmoid_pair_for<T>(twice_inner(x));
        const W raised = x < W{-16} ? W{-16} : x;
        const W near = raised > W{16} ? W{16} : raised;
        const W growth =
            static_cast<W>(kTwiceScale) * (W{1} + W{3} * static_cast<W>(kCubic) * near * near);
        return {x * gate.value, gate.value * (W{1} + near * gate.complement * growth)};
    }
};

template <typename Visit>
void visit_activation(Activation activation, Visit&& visit) {
    switch (activation) {
        case Activation::silu:
            visit.template operator()<Silu>();
            break;
        case Activation::gelu:
            visit.template operator()<Gelu>();
            break;
        case Activation::gelu_tanh:
            visit.template operator()<GeluTanh>();
            break;
    }
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::activation
