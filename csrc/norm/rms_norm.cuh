// RMSNorm, its fused-residual form and its gradients.
//
//   rstd = 1 / sqrt(mean(x^2) + eps)     out = x * rstd * weight
//
// with x + residual, rounded to the element type, in the place of x in the fused form. With
// n = x * rstd and g = grad_out * weight:
//
//   grad_x = rstd * (g - n * mean(g * n)) (+ grad_sum)     grad_weight = sum over rows of grad_out
//   * n
#pragma once

#include "rms_norm.h"
#include "row_group.cuh"

namespace warploom::norm {

// x + residual, rounded to their type.
template <typename T, int kCount>
WARPLOOM_DEVICE Packed<T, kCount> add_rounded(const Packed<T, kCount>& x,
                                              const Packed<T, kCount>& residual) {
    float sums[kCount];
    float added[kCount];
    unpack(x, sums);
    unpack(residual, added);
    WARPLOOM_UNROLL
    for (int index = 0; index < kCount; ++index) {
        sums[index] += added[index];
    }
    return pack_floats<T>(sums);
}

// out[column ...] = x * rstd * weight[column ...], rounded once.
template <typename Traits>
WARPLOOM_DEVICE void store_scaled(const RmsNormParams& params, const typename Traits::Vector& x,
                                  float rstd, int column, typename Traits::Element* out) {
    float weights[Traits::kVector];
    load_parameter<Traits>(params.weight, params.weight_dtype, column, weights);
    float values[Traits::kVector];
    unpack(x, values);
    WARPLOOM_UNROLL
    for (int index = 0; index < Traits::kVector; ++index) {
        values[index] = values[index] * rstd * weights[index];
    }
    store_packed(out + column, pack_floats<typename Traits::Element>(values));
}

template <typename Traits>
struct RmsNormPlan {
    RowReducePlan<Traits, 1> reduce;
};

// grid [ceil(rows / kRows)], rows beyond by a stride of the grid
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, Traits::kBlocksPerMultiprocessor)
rms_norm_kernel(WARPLOOM_GRID_CONSTANT RmsNormParams params) {
    using T = typename Traits::Element;
    using Vector = typename Traits::Vector;
    constexpr int kVector = Traits::kVector;
    auto& plan = device::shared_memory<RmsNormPlan<Traits>>();
    const int columns = static_cast<int>(params.columns);
    const bool has_residual = params.residual != nullptr;

    WARPLOOM_NO_UNROLL
    for (std::int64_t first_row = static_cast<std::int64_t>(blockIdx.x) * Traits::kRows;
         first_row < params.rows;
         first_row += static_cast<std::int64_t>(gridDim.x) * Traits::kRows) {
        const std::int64_t row = first_row + row_in_block<Traits>();
        // Columns of this thread's row: none past the last row.
        const int end = row < params.rows ? columns : 0;
        const T* x = static_cast<const T*>(params.x) + row * params.x_row_stride;
        const T* residual = nullptr;
        T* sum = nullptr;
        if (has_residual) {
            residual = static_cast<const T*>(params.residual) + row * params.residual_row_stride;
            sum = static_cast<T*>(params.sum) + row * params.columns;
        }
        T* out = static_cast<T*>(params.out) + row * params.columns;

        // What is normalised: x, or the rounded sum.
        Vector held[Traits::kItems];
        load_held<Traits>(x, end, held);
        if (has_residual) {
            Vector added[Traits::kItems];
            load_held<Traits>(residual, end, added);
            WARPLOOM_UNROLL
            for (int item = 0; item < Traits::kItems; ++item) {
                held[item] = add_rounded(held[item], added[item]);
                const int column = held_column<Traits>(item);
                if (column < end) {
                    store_packed(sum + column, held[item]);
                }
            }
        }

        float squares = 0.0f;
        WARPLOOM_UNROLL
        for (int item = 0; item < Traits::kItems; ++item) {
            squares += sum_of_squares(held[item]);
        }
        // A wide row's remaining columns are read again below.
        WARPLOOM_NO_UNROLL
        for (int column = first_unheld_column<Traits>(end); column < end;
             column += kColumnStep<Traits>) {
            Vector values = load_packed<kVector>(x + column);
            if (has_residual) {
                values = add_rounded(values, load_packed<kVector>(residual + column));
                store_packed(sum + column, values);
            }
            squares += sum_of_squares(values);
        }

        squares = row_reduce_sum<Traits>(squares, plan.reduce);
        const float rstd =
            1.0f / sqrtf(squares / static_cast<float>(columns) + static_cast<float>(params.eps));
        if (end > 0 && thread_in_row<Traits>() == 0) {
            static_cast<float*>(params.rstd)[row] = rstd;
        }

        WARPLOOM_UNROLL
        for (int item = 0; item < Traits::kItems; ++item) {
            const int column = held_column<Traits>(item);
            if (column < end) {
                store_scaled<Traits>(params, held[item], rstd, column, out);
            }
        }
        // The thread that stored a part of the sum is the one that reads it.
        const T* normalised = has_residual ? sum : x;
        WARPLOOM_NO_UNROLL
        for (int column = first_unheld_column<Traits>(end); column < end;
             column += kColumnStep<Traits>) {
            store_scaled<Traits>(params, load_packed<kVector>(normalised + column), rstd, column,
                                 out);
        }
    }
}

// The loaded columns of one row, and the gradients of x that follow from them.
template <typename Traits>
struct RmsNormGradient {
    static constexpr int kVector = Traits::kVector;
    float grad_out[kVector];
    float normalised[kVector];

    WARPLOOM_DEVICE RmsNormGradient(const typename Traits::Vector& grad_out_packed,
                                    const typename Traits::Vector& x, float rstd) {
        unpack(grad_out_packed, grad_out);
        unpack(x, normalised);
        WARPLOOM_UNROLL
        for (int index = 0; index < kVector; ++index) {
            normalised[index] *= rstd;
        }
    }

    // sum of g * n
    WARPLOOM_DEVICE float dot(const RmsNormBackwardParams& params, int column) const {
        float weights[kVector];
        load_parameter<Traits>(params.weight, params.weight_dtype, column, weights);
        float sum = 0.0f;
        WARPLOOM_UNROLL
        for (int index = 0; index < kVector; ++index) {
            sum += grad_out[index] * weights[index] * normalised[index];
        }
        return sum;
    }

    // Writes grad_x and adds this row's term to the sums of grad_weight.
    WARPLOOM_DEVICE void finish(const RmsNormBackwardParams& params, std::int64_t row, int column,
                                float rstd, float mean, float (&sums)[kVector]) const {
        using T = typename Traits::Element;
        float gradients[kVector];
        load_parameter<Traits>(params.weight, params.weight_dtype, column, gradients);
        WARPLOOM_UNROLL
        for (int index = 0; index < kVector; ++index) {
            gradients[index] =
                rstd * (grad_out[index] * gradients[index] - normalised[index] * mean);
            sums[index] += grad_out[index] * normalised[index];
        }
        if (params.grad_sum != nullptr) {
            float added[kVector];
            load_floats(
                static_cast<const T*>(params.grad_sum) + row * params.grad_sum_row_stride + column,
                added);
            WARPLOOM_UNROLL
            for (int index = 0; index < kVector; ++index) {
                gradients[index] += added[index];
            }
        }
        store_packed(static_cast<T*>(params.grad_x) + row * params.columns + column,
                     pack_floats<T>(gradients));
    }
};

template <typename Traits>
struct RmsNormBackwardPlan {
    RowReducePlan<Traits, 1> reduce;
    alignas(16) float sums[Traits::kRows == 1 ? 4 : Traits::kRows * Traits::kHeldColumns];
};

// grid [partials]: block p takes the rows p, p + partials, ..., kRows of them at a time, and writes
// their term of grad_weight to workspace[p]. The sums of the held columns stay in registers until
// the end; those of a wide row's other columns are kept in workspace[p] itself.
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, Traits::kBlocksPerMultiprocessor)
rms_norm_backward_kernel(WARPLOOM_GRID_CONSTANT RmsNormBackwardParams params) {
    using T = typename Traits::Element;
    using Vector = typename Traits::Vector;
    using Gradient = RmsNormGradient<Traits>;
    constexpr int kVector = Traits::kVector;
    auto& plan = device::shared_memory<RmsNormBackwardPlan<Traits>>();
    const int columns = static_cast<int>(params.columns);
    float* partial = static_cast<float*>(params.workspace) + blockIdx.x * params.columns;

    float sums[Traits::kItems][kVector] = {};
    WARPLOOM_NO_UNROLL
    for (int column = first_unheld_column<Traits>(columns); column < columns;
         column += kColumnStep<Traits>) {
        const float zeros[kVector] = {};
        store_floats(partial + column, zeros);
    }

    WARPLOOM_NO_UNROLL
    for (std::int64_t first_row = blockIdx.x; first_row < params.rows;
         first_row += params.partials * Traits::kRows) {
        const std::int64_t row = first_row + row_in_block<Traits>() * params.partials;
        const int end = row < params.rows ? columns : 0;
        const T* grad_out =
            static_cast<const T*>(params.grad_out) + row * params.grad_out_row_stride;
        const T* x = static_cast<const T*>(params.x) + row * params.x_row_stride;
        const float rstd = end > 0 ? static_cast<const float*>(params.rstd)[row] : 0.0f;

        Vector held_grad_out[Traits::kItems];
        Vector held_x[Traits::kItems];
        load_held<Traits>(grad_out, end, held_grad_out);
        load_held<Traits>(x, end, held_x);
        float dot = 0.0f;
        WARPLOOM_UNROLL
        for (int item = 0; item < Traits::kItems; ++item) {
            const int column = held_column<Traits>(item);
            if (column < end) {
                dot += Gradient(held_grad_out[item], held_x[item], rstd).dot(params, column);
            }
        }
        WARPLOOM_NO_UNROLL
        for (int column = first_unheld_column<Traits>(end); column < end;
             column += kColumnStep<Traits>) {
            dot += Gradient(load_packed<kVector>(grad_out + column),
                            load_packed<kVector>(x + column), rstd)
                       .dot(params, column);
        }
        const float mean = row_reduce_sum<Traits>(dot, plan.reduce) / static_cast<float>(columns);

        WARPLOOM_UNROLL
        for (int item = 0; item < Traits::kItems; ++item) {
            const int column = held_column<Traits>(item);
            if (column < end) {
                Gradient(held_grad_out[item], held_x[item], rstd)
                    .finish(params, row, column, rstd, mean, sums[item]);
            }
        }
        WARPLOOM_NO_UNROLL
        for (int column = first_unheld_column<Traits>(end); column < end;
             column += kColumnStep<Traits>) {
            float wide_sums[kVector];
            load_floats(partial + column, wide_sums);
            Gradient(load_packed<kVector>(grad_out + column), load_packed<kVector>(x + column),
                     rstd)
                .finish(params, row, column, rstd, mean, wide_sums);
            store_floats(partial + column, wide_sums);
        }
    }
    store_partial<Traits>(sums, partial, columns, plan.sums);
}

}  // namespace warploom::norm
