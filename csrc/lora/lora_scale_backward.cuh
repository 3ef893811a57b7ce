// The gradient of out = column_scale unscaled: grad = column_scale grad_out, and the partial sums
// of grad_column_scale = sum of the rows of grad_out unscaled, in one pass over both.
//
// Grid: [ceil(columns / kColumns), partials]. Part p takes the rows p, p + partials, ... A thread
// keeps to kVector columns, whose sums stay in its registers, and loads kItems rows of them at
// once.
#pragma once

#include <cstdint>

#include "common/vec.cuh"
#include "lora/lora_linear.h"

namespace warploom::lora {

template <typename T, int kVectorElements>
struct ScaleBackwardTraits {
    using Element = T;
    static constexpr int kThreads = 128;
    static constexpr int kVector = kVectorElements;
    static constexpr int kColumns = kThreads * kVector;
    static constexpr int kItems = 4;
};

template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 4)
scale_backward_kernel(WARPLOOM_GRID_CONSTANT LoraScaleBackwardParams params) {
    using T = typename Traits::Element;
    constexpr int kVector = Traits::kVector;
    const std::int64_t column =
        (static_cast<std::int64_t>(blockIdx.x) * Traits::kThreads + threadIdx.x) * kVector;
    if (column >= params.columns) {
        return;
    }
    const bool needs_scale = params.grad_column_scale != nullptr;
    const T* grad_out = static_cast<const T*>(params.grad_out) + column;
    const T* unscaled = static_cast<const T*>(params.unscaled) + column;
    T* grad = static_cast<T*>(params.grad) + column;
    const float* column_scale = static_cast<const float*>(params.column_scale) + column;
    float scales[kVector];
    WARPLOOM_UNROLL
    for (int index = 0; index < kVector; ++index) {
        scales[index] = column_scale[index];
    }
    float sums[kVector] = {};
    const std::int64_t parts = gridDim.y;
    for (std::int64_t first = blockIdx.y; first < params.rows; first += Traits::kItems * parts) {
        Packed<T, kVector> grads[Traits::kItems];
        Packed<T, kVector> values[Traits::kItems];
        WARPLOOM_UNROLL
        for (int item = 0; item < Traits::kItems; ++item) {
            const std::int64_t row = first + item * parts;
            grads[item] = values[item] = zero_packed<T, kVector>();
            if (row < params.rows) {
                grads[item] = load_packed<kVector>(grad_out + row * params.grad_row_stride);
                if (needs_scale) {
                    values[item] = load_packed<kVector>(unscaled + row * params.columns);
                }
            }
        }
        WARPLOOM_UNROLL
        for (int item = 0; item < Traits::kItems; ++item) {
            const std::int64_t row = first + item * parts;
            float products[kVector];
            float factors[kVector];
            unpack(grads[item], products);
            unpack(values[item], factors);
            WARPLOOM_UNROLL
            for (int index = 0; index < kVector; ++index) {
                sums[index] += products[index] * factors[index];
                products[index] *= scales[index];
            }
            if (row < params.rows) {
                store_packed(grad + row * params.columns, pack_floats<T>(products));
            }
        }
    }
    if (needs_scale) {
        float* partial = static_cast<float*>(params.workspace) +
                         blockIdx.y * static_cast<std::int64_t>(params.columns) + column;
        WARPLOOM_UNROLL
        for (int index = 0; index < kVector; ++index) {
            partial[index] = sums[index];
        }
    }
}

}  // namespace warploom::lora
