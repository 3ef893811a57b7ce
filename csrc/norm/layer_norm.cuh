// LayerNorm and its gradients.
//
//   rstd = 1 / sqrt(mean((x - mean(x))^2) + eps)     out = (x - mean(x)) * rstd * weight + bias
//
// With n = (x - mean(x)) * rstd and g = grad_out * weight:
//
//   grad_x = rstd * (g - mean(g) - n * mean(g * n))
//   grad_weight = sum over rows of grad_out * n     grad_bias = sum over rows of grad_out
#pragma once

#include "layer_norm.h"
#include "row_group.cuh"

namespace warploom::norm {

template <typename T, int kCount>
WARPLOOM_DEVICE float sum_of(const Packed<T, kCount>& packed) {
    float values[kCount];
    unpack(packed, values);
    float sum = 0.0f;
    WARPLOOM_UNROLL
    for (int index = 0; index < kCount; ++index) {
        sum += values[index];
    }
    return sum;
}

// Adds the sums of x - mean and of its square.
template <typename T, int kCount>
WARPLOOM_DEVICE void add_moments(const Packed<T, kCount>& x, float mean, float (&moments)[2]) {
    float values[kCount];
    unpack(x, values);
    WARPLOOM_UNROLL
    for (int index = 0; index < kCount; ++index) {
        const float centred = values[index] - mean;
        moments[0] += centred;
        moments[1] += centred * centred;
    }
}

// out[column ...] = (x - mean) * rstd * weight[column ...] + bias[column ...], rounded once.
template <typename Traits>
WARPLOOM_DEVICE void store_normalised(const LayerNormParams& params,
                                      const typename Traits::Vector& x, float mean, float rstd,
                                      int column, typename Traits::Element* out) {
    float weights[Traits::kVector];
    float values[Traits::kVector];
    float biases[Traits::kVector];
    load_parameter<Traits>(params.weight, params.weight_dtype, column, weights);
    load_parameter<Traits>(params.bias, params.weight_dtype, column, biases);
    unpack(x, values);
    WARPLOOM_UNROLL
    for (int index = 0; index < Traits::kVector; ++index) {
        values[index] = (values[index] - mean) * rstd * weights[index] + biases[index];
    }
    store_packed(out + column, pack_floats<typename Traits::Element>(values));
}

template <typename Traits>
struct LayerNormPlan {
    RowReducePlan<Traits, 1> sum;
    RowReducePlan<Traits, 2> moments;
};

// grid [ceil(rows / kRows)], rows beyond by a stride of the grid. The variance is that of x minus a
// first mean, so a large mean costs it no digits; the sum of those differences, 0 but for rounding,
// then corrects both.
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, Traits::kBlocksPerMultiprocessor)
layer_norm_kernel(WARPLOOM_GRID_CONSTANT LayerNormParams params) {
    using T = typename Traits::Element;
    constexpr int kVector = Traits::kVector;
    auto& plan = device::shared_memory<LayerNormPlan<Traits>>();
    const int columns = static_cast<int>(params.columns);
    const float count = static_cast<float>(columns);

    WARPLOOM_NO_UNROLL
    for (std::int64_t first_row = static_cast<std::int64_t>(blockIdx.x) * Traits::kRows;
         first_row < params.rows;
         first_row += static_cast<std::int64_t>(gridDim.x) * Traits::kRows) {
        const std::int64_t row = first_row + row_in_block<Traits>();
        // Columns of this thread's row: none past the last row.
        const int end = row < params.rows ? columns : 0;
        const T* x = static_cast<const T*>(params.x) + row * params.x_row_stride;
        T* out = static_cast<T*>(params.out) + row * params.columns;

        typename Traits::Vector held[Traits::kItems];
        load_held<Traits>(x, end, held);
        float sum = 0.0f;
        WARPLOOM_UNROLL
        for (int item = 0; item < Traits::kItems; ++item) {
            sum += sum_of(held[item]);
        }
        // A wide row's remaining columns are read in each of the three passes.
        WARPLOOM_NO_UNROLL
        for (int column = first_unheld_column<Traits>(end); column < end;
             column += kColumnStep<Traits>) {
            sum += sum_of(load_packed<kVector>(x + column));
        }
        float mean = row_reduce_sum<Traits>(sum, plan.sum) / count;

        float moments[2] = {};
        WARPLOOM_UNROLL
        for (int item = 0; item < Traits::kItems; ++item) {
            if (held_column<Traits>(item) < end) {
                add_moments(held[item], mean, moments);
            }
        }
        WARPLOOM_NO_UNROLL
        for (int column = first_unheld_column<Traits>(end); column < end;
             column += kColumnStep<Traits>) {
            add_moments(load_packed<kVector>(x + column), mean, moments);
        }
        row_reduce_sum<Traits, 2>(moments, plan.moments);
        const float correction = moments[0] / count;
        mean += correction;
        const float variance = fmaxf(moments[1] / count - correction * correction, 0.0f);
        const float rstd = 1.0f / sqrtf(variance + static_cast<float>(params.eps));
        if (end > 0 && thread_in_row<Traits>() == 0) {
            static_cast<float*>(params.mean)[row] = mean;
            static_cast<float*>(params.rstd)[row] = rstd;
        }

        WARPLOOM_UNROLL
        for (int item = 0; item < Traits::kItems; ++item) {
            const int column = held_column<Traits>(item);
            if (column < end) {
                store_normalised<Traits>(params, held[item], mean, rstd, column, out);
            }
        }
        WARPLOOM_NO_UNROLL
        for (int column = first_unheld_column<Traits>(end); column < end;
             column += kColumnStep<Traits>) {
            store_normalised<Traits>(params, load_packed<kVector>(x + column), mean, rstd, column,
                                     out);
        }
    }
}

// The loaded columns of one row, and the gradients that follow from them.
template <typename Traits>
struct LayerNormGradient {
    static constexpr int kVector = Traits::kVector;
    float grad_out[kVector];
    float normalised[kVector];

    WARPLOOM_DEVICE LayerNormGradient(const typename Traits::Vector& grad_out_packed,
                                      const typename Traits::Vector& x, float mean, float rstd) {
        unpack(grad_out_packed, grad_out);
        unpack(x, normalised);
        WARPLOOM_UNROLL
        for (int index = 0; index < kVector; ++index) {
            normalised[index] = (normalised[index] - mean) * rstd;
        }
    }

    // Adds the sums of g and of g * n, and this row's term to the sums of grad_bias.
    WARPLOOM_DEVICE void add_dots(const LayerNormBackwardParams& params, int column,
                                  float (&dots)[2], float (&bias_sums)[kVector]) const {
        float weights[kVector];
        load_parameter<Traits>(params.weight, params.weight_dtype, column, weights);
        WARPLOOM_UNROLL
        for (int index = 0; index < kVector; ++index) {
            bias_sums[index] += grad_out[index];
            const float weighted = grad_out[index] * weights[index];
            dots[0] += weighted;
            dots[1] += weighted * normalised[index];
        }
    }

    // Writes grad_x and adds this row's term to the sums of grad_weight. `means` are those of g and
    // of g * n.
    WARPLOOM_DEVICE void finish(const LayerNormBackwardParams& params, std::int64_t row, int column,
                                float rstd, const float (&means)[2],
                                float (&weight_sums)[kVector]) const {
        using T = typename Traits::Element;
        float gradients[kVector];
        load_parameter<Traits>(params.weight, params.weight_dtype, column, gradients);
        WARPLOOM_UNROLL
        for (int index = 0; index < kVector; ++index) {
            gradients[index] = rstd * (grad_out[index] * gradients[index] - means[0] -
                                       normalised[index] * means[1]);
            weight_sums[index] += grad_out[index] * normalised[index];
        }
        store_packed(static_cast<T*>(params.grad_x) + row * params.columns + column,
                     pack_floats<T>(gradients));
    }
};

template <typename Traits>
struct LayerNormBackwardPlan {
    RowReducePlan<Traits, 2> dots;
    alignas(16) float sums[Traits::kRows == 1 ? 4 : Traits::kRows * Traits::kHeldColumns];
};

// grid [partials]: block p takes the rows p, p + partials, ..., kRows of them at a time, and writes
// their terms of grad_weight and grad_bias to workspace[0, p] and workspace[1, p]. The sums of the
// held columns stay in registers until the end; those of a wide row's other columns are kept in the
// workspace itself.
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, Traits::kMayExceedHeld ? 1 : Traits::kBlocksPerMultiprocessor)
layer_norm_backward_kernel(WARPLOOM_GRID_CONSTANT LayerNormBackwardParams params) {
    using T = typename Traits::Element;
    using Gradient = LayerNormGradient<Traits>;
    constexpr int kVector = Traits::kVector;
    auto& plan = device::shared_memory<LayerNormBackwardPlan<Traits>>();
    const int columns = static_cast<int>(params.columns);
    float* weight_partial = static_cast<float*>(params.workspace) + blockIdx.x * params.columns;
    float* bias_partial = weight_partial + params.partials * params.columns;

    float weight_sums[Traits::kItems][kVector] = {};
    float bias_sums[Traits::kItems][kVector] = {};
    WARPLOOM_NO_UNROLL
    for (int column = first_unheld_column<Traits>(columns); column < columns;
         column += kColumnStep<Traits>) {
        const float zeros[kVector] = {};
        store_floats(weight_partial + column, zeros);
        store_floats(bias_partial + column, zeros);
    }

    WARPLOOM_NO_UNROLL
    for (std::int64_t first_row = blockIdx.x; first_row < params.rows;
         first_row += params.partials * Traits::kRows) {
        const std::int64_t row = first_row + row_in_block<Traits>() * params.partials;
        const int end = row < params.rows ? columns : 0;
        const T* grad_out =
            static_cast<const T*>(params.grad_out) + row * params.grad_out_row_stride;
        const T* x = static_cast<const T*>(params.x) + row * params.x_row_stride;
        const float mean = end > 0 ? static_cast<const float*>(params.mean)[row] : 0.0f;
        const float rstd = end > 0 ? static_cast<const float*>(params.rstd)[row] : 0.0f;

        typename Traits::Vector held_grad_out[Traits::kItems];
        typename Traits::Vector held_x[Traits::kItems];
        load_held<Traits>(grad_out, end, held_grad_out);
        load_held<Traits>(x, end, held_x);
        float dots[2] = {};
        WARPLOOM_UNROLL
        for (int item = 0; item < Traits::kItems; ++item) {
            const int column = held_column<Traits>(item);
            if (column < end) {
                Gradient(held_grad_out[item], held_x[item], mean, rstd)
                    .add_dots(params, column, dots, bias_sums[item]);
            }
        }
        WARPLOOM_NO_UNROLL
        for (int column = first_unheld_column<Traits>(end); column < end;
             column += kColumnStep<Traits>) {
            float wide_sums[kVector];
            load_floats(bias_partial + column, wide_sums);
            Gradient(load_packed<kVector>(grad_out + column), load_packed<kVector>(x + column),
                     mean, rstd)
                .add_dots(params, column, dots, wide_sums);
            store_floats(bias_partial + column, wide_sums);
        }
        row_reduce_sum<Traits, 2>(dots, plan.dots);
        const float means[2] = {dots[0] / static_cast<float>(columns),
                                dots[1] / static_cast<float>(columns)};

        WARPLOOM_UNROLL
        for (int item = 0; item < Traits::kItems; ++item) {
            const int column = held_column<Traits>(item);
            if (column < end) {
                Gradient(held_grad_out[item], held_x[item], mean, rstd)
                    .finish(params, row, column, rstd, means, weight_sums[item]);
            }
        }
        WARPLOOM_NO_UNROLL
        for (int column = first_unheld_column<Traits>(end); column < end;
             column += kColumnStep<Traits>) {
            float wide_sums[kVector];
            load_floats(weight_partial + column, wide_sums);
            Gradient(load_packed<kVector>(grad_out + column), load_packed<kVector>(x + column),
                     mean, rstd)
                .finish(params, row, column, rstd, means, wide_sums);
            store_floats(weight_partial + column, wide_sums);
        }
    }
    store_partial<Traits>(weight_sums, weight_partial, columns, plan.sums);
    store_partial<Traits>(bias_sums, bias_partial, columns, plan.sums);
}

}  // namespace warploom::norm
