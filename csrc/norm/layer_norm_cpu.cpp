// LayerNorm on the CPU: every tensor crosses the memory bus once. A row is read, and read again for
// its variance and its output while it is still in the first or second level of cache.
#include "norm/layer_norm.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/cpu_float.h"
#include "common/cpu_loops.h"
#include "common/cpu_math.h"
#include "common/parallel.h"
#include "norm/rows_cpu.h"

namespace warploom::norm {
namespace WARPLOOM_CPU_ISA {
namespace {

template <typename T, typename WeightT>
void forward(const LayerNormParams& params) {
    using W = Wide<T>;
    const std::int64_t columns = params.columns;
    const auto* weight = static_cast<const WeightT*>(params.weight);
    const auto* bias = static_cast<const WeightT*>(params.bias);
    parallel_for(params.rows, grain_of(columns), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) {
            const T* x = static_cast<const T*>(params.x) + row * params.x_row_stride;
            T* out = static_cast<T*>(params.out) + row * columns;
            const W count = static_cast<W>(columns);
            const W mean = sum_elements<T>(columns, [](W value) { return value; }, x) / count;
            const W squares = sum_elements<T>(
                columns, [mean](W value) { return (value - mean) * (value - mean); }, x);
            const W rstd = W{1} / std::sqrt(squares / count + static_cast<W>(params.eps));
            static_cast<W*>(params.mean)[row] = mean;
            static_cast<W*>(params.rstd)[row] = rstd;
            for_each_element<T>(
                columns,
                [mean, rstd](W value, W scale, W shift) {
                    return (value - mean) * rstd * scale + shift;
                },
                [out](std::int64_t i, auto... results) { store<T>(out + i, results...); }, x,
                weight, bias);
        }
    });
}

// One row: grad_x, and the row's shares of the parameters' gradients added to the two sums.
template <typename T, typename WeightT>
void backward_row(const T* grad_out, const T* x, const WeightT* weight, Wide<T> mean, Wide<T> rstd,
                  std::int64_t columns, T* grad_x, Wide<T>* weight_sum, Wide<T>* bias_sum) {
    using W = Wide<T>;
    const W count = static_cast<W>(columns);
    const W average =
        sum_elements<T>(
            columns, [](W upstream, W scale) { return upstream * scale; }, grad_out, weight) /
        count;
    const W projection = sum_elements<T>(
                             columns,
                             [=](W upstream, W scale, W value) {
                                 return upstream * scale * ((value - mean) * rstd);
                             },
                             grad_out, weight, x) /
                         count;
    struct Gradients {
        W x;
        W weight;
        W bias;
    };
    for_each_element<T>(
        columns,
        [=](W upstream, W scale, W value, W of_weight, W of_bias) {
            const W normalized = (value - mean) * rstd;
            const W rest = fused_multiply_add(-normalized, projection, upstream * scale) - average;
            return Gradients{rstd * rest, of_weight + upstream * normalized, of_bias + upstream};
        },
        [=](std::int64_t i, auto... gradients) {
            store<T>(grad_x + i, gradients.x...);
            store<W>(weight_sum + i, gradients.weight...);
            store<W>(bias_sum + i, gradients.bias...);
        },
        grad_out, weight, x, weight_sum, bias_sum);
}

template <typename T, typename WeightT>
void backward(const LayerNormBackwardParams& params) {
    using W = Wide<T>;
    const std::int64_t columns = params.columns;
    const auto* weight = static_cast<const WeightT*>(params.weight);
    W* weight_sums = static_cast<W*>(params.workspace);
    W* bias_sums = weight_sums + params.partials * columns;
    const std::int64_t partials = partials_of(params.rows, params.partials);
    for_each_partial(
        params.rows, partials, [&](std::int64_t partial, std::int64_t begin, std::int64_t end) {
            W* weight_sum = weight_sums + partial * columns;
            W* bias_sum = bias_sums + partial * columns;
            std::fill_n(weight_sum, columns, W{0});
            std::fill_n(bias_sum, columns, W{0});
            for (std::int64_t row = begin; row < end; ++row) {
                const T* grad_out =
                    static_cast<const T*>(params.grad_out) + row * params.grad_out_row_stride;
                const T* x = static_cast<const T*>(params.x) + row * params.x_row_stride;
                backward_row(grad_out, x, weight, static_cast<const W*>(params.mean)[row],
                             static_cast<const W*>(params.rstd)[row], columns,
                             static_cast<T*>(params.grad_x) + row * columns, weight_sum, bias_sum);
            }
        });
    add_partials(weight_sums, partials, columns, static_cast<WeightT*>(params.grad_weight));
    add_partials(bias_sums, partials, columns, static_cast<WeightT*>(params.grad_bias));
}

}  // namespace

void layer_norm_cpu(const LayerNormParams& params) {
    visit_element_types(params.dtype, params.weight_dtype,
                        [&]<typename T, typename WeightT>() { forward<T, WeightT>(params); });
}

void layer_norm_backward_cpu(const LayerNormBackwardParams& params) {
    visit_element_types(params.dtype, params.weight_dtype,
                        [&]<typename T, typename WeightT>() { backward<T, WeightT>(params); });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::norm
