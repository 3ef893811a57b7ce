// Rows of unit length and their gradient.
//
//   rnorm = 1 / sqrt(sum(x^2) + eps)     out = x * rnorm
//   grad_x = rnorm * (grad_out - n * sum(grad_out * n)),  n = x * rnorm
#pragma once

#include "l2_norm.h"
#include "row_group.cuh"

namespace warploom::norm {

template <typename Traits>
struct L2NormPlan {
    RowReducePlan<Traits, 1> reduce;
};

// grid [ceil(rows / kRows)], rows beyond by a stride of the grid
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, Traits::kBlocksPerMultiprocessor)
l2_norm_kernel(WARPLOOM_GRID_CONSTANT L2NormParams params) {
    using T = typename Traits::Element;
    using Vector = typename Traits::Vector;
    constexpr int kVector = Traits::kVector;
    auto& plan = device::shared_memory<L2NormPlan<Traits>>();
    const int columns = static_cast<int>(params.columns);

    WARPLOOM_NO_UNROLL
    for (std::int64_t first_row = static_cast<std::int64_t>(blockIdx.x) * Traits::kRows;
         first_row < params.rows;
         first_row += static_cast<std::int64_t>(gridDim.x) * Traits::kRows) {
        const std::int64_t row = first_row + row_in_block<Traits>();
        // Columns of this thread's row: none past the last row.
        const int end = row < params.rows ? columns : 0;
        const T* x = static_cast<const T*>(params.x) + row * params.x_row_stride;
        T* out = static_cast<T*>(params.out) + row * params.columns;

        Vector held[Traits::kItems];
        load_held<Traits>(x, end, held);
        float squares = 0.0f;
        WARPLOOM_UNROLL
        for (int item = 0; item < Traits::kItems; ++item) {
            squares += sum_of_squares(held[item]);
        }
        // A wide row's remaining columns are read again below.
        WARPLOOM_NO_UNROLL
        for (int column = first_unheld_column<Traits>(end); column < end;
             column += kColumnStep<Traits>) {
            squares += sum_of_squares(load_packed<kVector>(x + column));
        }
        squares = row_reduce_sum<Traits>(squares, plan.reduce);
        const float rnorm = 1.0f / sqrtf(squares + static_cast<float>(params.eps));
        if (end > 0 && thread_in_row<Traits>() == 0) {
            static_cast<float*>(params.rnorm)[row] = rnorm;
        }

        const auto store = [&](const Vector& packed, int column) {
            float values[kVector];
            unpack(packed, values);
            WARPLOOM_UNROLL
            for (int index = 0; index < kVector; ++index) {
                values[index] *= rnorm;
            }
            store_packed(out + column, pack_floats<T>(values));
        };
        WARPLOOM_UNROLL
        for (int item = 0; item < Traits::kItems; ++item) {
            const int column = held_column<Traits>(item);
            if (column < end) {
                store(held[item], column);
            }
        }
        WARPLOOM_NO_UNROLL
        for (int column = first_unheld_column<Traits>(end); column < end;
             column += kColumnStep<Traits>) {
            store(load_packed<kVector>(x + column), column);
        }
    }
}

// grid [ceil(rows / kRows)], rows beyond by a stride of the grid
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, Traits::kBlocksPerMultiprocessor)
l2_norm_backward_kernel(WARPLOOM_GRID_CONSTANT L2NormBackwardParams params) {
    using T = typename Traits::Element;
    using Vector = typename Traits::Vector;
    constexpr int kVector = Traits::kVector;
    auto& plan = device::shared_memory<L2NormPlan<Traits>>();
    const int columns = static_cast<int>(params.columns);

    WARPLOOM_NO_UNROLL
    for (std::int64_t first_row = static_cast<std::int64_t>(blockIdx.x) * Traits::kRows;
         first_row < params.rows;
         first_row += static_cast<std::int64_t>(gridDim.x) * Traits::kRows) {
        const std::int64_t row = first_row + row_in_block<Traits>();
        const int end = row < params.rows ? columns : 0;
        const T* grad_out =
            static_cast<const T*>(params.grad_out) + row * params.grad_out_row_stride;
        const T* x = static_cast<const T*>(params.x) + row * params.x_row_stride;
        T* grad_x = static_cast<T*>(params.grad_x) + row * params.columns;
        const float rnorm = end > 0 ? static_cast<const float*>(params.rnorm)[row] : 0.0f;

        // sum of grad_out * n over one vector
        const auto dot_of = [&](const Vector& upstream, const Vector& values) {
            float a[kVector];
            float b[kVector];
            unpack(upstream, a);
            unpack(values, b);
            float sum = 0.0f;
            WARPLOOM_UNROLL
            for (int index = 0; index < kVector; ++index) {
                sum += a[index] * (b[index] * rnorm);
            }
            return sum;
        };
        Vector held_grad_out[Traits::kItems];
        Vector held_x[Traits::kItems];
        load_held<Traits>(grad_out, end, held_grad_out);
        load_held<Traits>(x, end, held_x);
        float dot = 0.0f;
        WARPLOOM_UNROLL
        for (int item = 0; item < Traits::kItems; ++item) {
            dot += dot_of(held_grad_out[item], held_x[item]);
        }
        WARPLOOM_NO_UNROLL
        for (int column = first_unheld_column<Traits>(end); column < end;
             column += kColumnStep<Traits>) {
            dot +=
                dot_of(load_packed<kVector>(grad_out + column), load_packed<kVector>(x + column));
        }
        dot = row_reduce_sum<Traits>(dot, plan.reduce);

        const auto store = [&](const Vector& upstream, const Vector& values, int column) {
            float gradients[kVector];
            float normalised[kVector];
            unpack(upstream, gradients);
            unpack(values, normalised);
            WARPLOOM_UNROLL
            for (int index = 0; index < kVector; ++index) {
                gradients[index] = rnorm * (gradients[index] - normalised[index] * rnorm * dot);
            }
            store_packed(grad_x + column, pack_floats<T>(gradients));
        };
        WARPLOOM_UNROLL
        for (int item = 0; item < Traits::kItems; ++item) {
            const int column = held_column<Traits>(item);
            if (column < end) {
                store(held_grad_out[item], held_x[item], column);
            }
        }
        WARPLOOM_NO_UNROLL
        for (int column = first_unheld_column<Traits>(end); column < end;
             column += kColumnStep<Traits>) {
            store(load_packed<kVector>(grad_out + column), load_packed<kVector>(x + column),
                  column);
        }
    }
}

}  // namespace warploom::norm
