// Gated activations and their gradients, float32 inside, one rounding at the end.
//
//   out = act(gate) * up
//   grad_gate = grad_out * up * act'(gate)     grad_up = grad_out * act(gate)
//
// act: silu = z sigmoid(z); gelu = z Phi(z), Phi the normal distribution's;
// gelu_tanh = z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/index.cuh"
#include "common/vec.cuh"
#include "gated_activation.h"

namespace warploom::activation {

// Elements are dealt out in vectors of kVector along a row; a thread takes kItems of them at a
// time, so that all its loads are under way at once.
template <typename Element_, int kVector_>
struct GatedTraits {
    using Element = Element_;
    static constexpr int kVector = kVector_;
    static constexpr int kThreads = 256;
    static constexpr int kItems = 2;
    static constexpr int kVectorsPerBlock = kThreads * kItems;
};

struct ValueAndSlope {
    float value;
    float slope;
};

// act(z)
template <Activation kActivation>
WARPLOOM_DEVICE float activate(float z) {
    if constexpr (kActivation == Activation::silu) {
        return z / (1.0f + expf(-z));
    } else if constexpr (kActivation == Activation::gelu) {
        constexpr float kInverseSqrtTwo = 0.70710678118654752f;
        return 0.5f * z * (1.0f + erff(z * kInverseSqrtTwo));
    } else {
        constexpr float kTwoSqrtTwoOverPi = 1.5957691216057308f;
        // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), without its cancellation.
        const float twice = kTwoSqrtTwoOverPi * (z + 0.044715f * z * z * z);
        return z / (1.0f + expf(-twice));
    }
}

// act(z) and act'(z)
template <Activation kActivation>
WARPLOOM_DEVICE ValueAndSlope activate_with_slope(float z) {
    if constexpr (kActivation == Activation::silu) {
        const float sigmoid = 1.0f / (1.0f + expf(-z));
        return {z * sigmoid, sigmoid * (1.0f + z * (1.0f - sigmoid))};
    } else if constexpr (kActivation == Activation::gelu) {
        constexpr float kInverseSqrtTwo = 0.70710678118654752f;
        constexpr float kInverseSqrtTwoPi = 0.39894228040143268f;
        const float distribution = 0.5f * (1.0f + erff(z * kInverseSqrtTwo));
        const float density = kInverseSqrtTwoPi * expf(-0.5f * z * z);
        return {z * distribution, distribution + z * density};
    } else {
        constexpr float kTwoSqrtTwoOverPi = 1.5957691216057308f;
        const float square = z * z;
        const float twice = kTwoSqrtTwoOverPi * (z + 0.044715f * z * square);
        const float twice_slope = kTwoSqrtTwoOverPi * (1.0f + 3.0f * 0.044715f * square);
        const float sigmoid = 1.0f / (1.0f + expf(-twice));
        // sigmoid (1 - sigmoid) is 0 where square may be infinite.
        const float sigmoid_slope = sigmoid * (1.0f - sigmoid);
        return {z * sigmoid,
                sigmoid + (sigmoid_slope > 0.0f ? z * sigmoid_slope * twice_slope : 0.0f)};
    }
}

// Calls visit.template operator()<kActivation>(): one branch of the whole grid, not of a thread.
template <typename Visit>
WARPLOOM_DEVICE void visit_activation(Activation activation, Visit&& visit) {
    switch (activation) {
        case Activation::silu:
            return visit.template operator()<Activation::silu>();
        case Activation::gelu:
            return visit.template operator()<Activation::gelu>();
        default:
            return visit.template operator()<Activation::gelu_tanh>();
    }
}

struct Place {
    std::int64_t row;
    std::int64_t column;
};

// Where vector `vector` lies: the tensor's vectors are numbered row by row.
template <typename Traits>
WARPLOOM_DEVICE Place place_of(std::int64_t vector, std::int64_t vectors_per_row) {
    const Division division = divide(vector, vectors_per_row);
    return {division.quotient, division.remainder * Traits::kVector};
}

// The number of a thread's item in the tensor.
template <typename Traits>
WARPLOOM_DEVICE std::int64_t vector_of(std::int64_t block, int item) {
    return block * Traits::kVectorsPerBlock + item * Traits::kThreads +
           static_cast<int>(threadIdx.x);
}

// grid [ceil(vectors / kVectorsPerBlock)], vectors beyond by a stride of the grid
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 4)
gated_activation_kernel(WARPLOOM_GRID_CONSTANT GatedActivationParams params) {
    visit_activation(params.activation, [&]<Activation kActivation>() {
        using T = typename Traits::Element;
        constexpr int kVector = Traits::kVector;
        const std::int64_t vectors_per_row = params.columns / kVector;
        const std::int64_t vectors = params.rows * vectors_per_row;
        const T* gate = static_cast<const T*>(params.gate);
        const T* up = static_cast<const T*>(params.up);
        WARPLOOM_NO_UNROLL
        for (std::int64_t block = blockIdx.x; block * Traits::kVectorsPerBlock < vectors;
             block += gridDim.x) {
            Packed<T, kVector> gates[Traits::kItems];
            Packed<T, kVector> ups[Traits::kItems];
            WARPLOOM_UNROLL
            for (int item = 0; item < Traits::kItems; ++item) {
                const std::int64_t vector = vector_of<Traits>(block, item);
                gates[item] = zero_packed<T, kVector>();
                ups[item] = zero_packed<T, kVector>();
                if (vector < vectors) {
                    const Place place = place_of<Traits>(vector, vectors_per_row);
                    gates[item] = load_packed<kVector>(gate + place.row * params.gate_row_stride +
                                                       place.column);
                    ups[item] =
                        load_packed<kVector>(up + place.row * params.up_row_stride + place.column);
                }
            }
            WARPLOOM_UNROLL
            for (int item = 0; item < Traits::kItems; ++item) {
                const std::int64_t vector = vector_of<Traits>(block, item);
                if (vector < vectors) {
                    float values[kVector];
                    float factors[kVector];
                    unpack(gates[item], values);
                    unpack(ups[item], factors);
                    WARPLOOM_UNROLL
                    for (int index = 0; index < kVector; ++index) {
                        values[index] = activate<kActivation>(values[index]) * factors[index];
                    }
                    store_packed(static_cast<T*>(params.out) + vector * kVector,
                                 pack_floats<T>(values));
                }
            }
        }
    });
}

// grid [ceil(vectors / kThreads)], vectors beyond by a stride of the grid
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 4)
gated_activation_backward_kernel(WARPLOOM_GRID_CONSTANT GatedActivationBackwardParams params) {
    visit_activation(params.activation, [&]<Activation kActivation>() {
        using T = typename Traits::Element;
        constexpr int kVector = Traits::kVector;
        const std::int64_t vectors_per_row = params.columns / kVector;
        const std::int64_t vectors = params.rows * vectors_per_row;
        const T* grad_out = static_cast<const T*>(params.grad_out);
        const T* gate = static_cast<const T*>(params.gate);
        const T* up = static_cast<const T*>(params.up);
        WARPLOOM_NO_UNROLL
        for (std::int64_t vector =
                 static_cast<std::int64_t>(blockIdx.x) * Traits::kThreads + threadIdx.x;
             vector < vectors; vector += static_cast<std::int64_t>(gridDim.x) * Traits::kThreads) {
            const Place place = place_of<Traits>(vector, vectors_per_row);
            const auto grad_packed = load_packed<kVector>(
                grad_out + place.row * params.grad_out_row_stride + place.column);
            const auto gate_packed =
                load_packed<kVector>(gate + place.row * params.gate_row_stride + place.column);
            const auto up_packed =
                load_packed<kVector>(up + place.row * params.up_row_stride + place.column);
            float grads[kVector];
            float gates[kVector];
            float ups[kVector];
            unpack(grad_packed, grads);
            unpack(gate_packed, gates);
            unpack(up_packed, ups);
            WARPLOOM_UNROLL
            for (int index = 0; index < kVector; ++index) {
                const ValueAndSlope activated = activate_with_slope<kActivation>(gates[index]);
                gates[index] = grads[index] * ups[index] * activated.slope;
                ups[index] = grads[index] * activated.value;
            }
            store_packed(static_cast<T*>(params.grad_gate) + vector * kVector,
                         pack_floats<T>(gates));
            store_packed(static_cast<T*>(params.grad_up) + vector * kVector, pack_floats<T>(ups));
        }
    });
}

}  // namespace warploom::activation
