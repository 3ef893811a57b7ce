// RMSNorm on the CPU: every tensor crosses the memory bus once. A row is read, and read again for
// the output while it is still in the first or second level of cache.
#include "norm/rms_norm.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/cpu_float.h"
#include "common/cpu_loops.h"
#include "common/parallel.h"
#include "norm/rows_cpu.h"

namespace warploom::norm {
namespace WARPLOOM_CPU_ISA {
namespace {

template <typename T, typename WeightT>
void forward_row(const T* x, const WeightT* weight, double eps, std::int64_t columns, T* out,
                 Wide<T>* rstd_out, const T* next_x) {
    using W = Wide<T>;
    const W squares = sum_elements<T>(columns, [](W value) { return value * value; }, x);
    const W rstd = W{1} / std::sqrt(squares / static_cast<W>(columns) + static_cast<W>(eps));
    *rstd_out = rstd;
    for_each_chunk(columns, [=](std::int64_t first, std::int64_t count) {
        prefetch(next_x + first, count);
        for_each_element<T>(
            count, [rstd](W value, W scale) { return value * rstd * scale; },
            [to = out + first](std::int64_t i, auto... results) { store<T>(to + i, results...); },
            x + first, weight + first);
    });
}

template <typename T, typename WeightT>
void forward(const RmsNormParams& params) {
    const std::int64_t columns = params.columns;
    const auto* weight = static_cast<const WeightT*>(params.weight);
    auto* rstd = static_cast<Wide<T>*>(params.rstd);
    const bool has_residual = params.residual != nullptr;
    parallel_for(params.rows, grain_of(columns), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) {
            const T* x = static_cast<const T*>(params.x) + row * params.x_row_stride;
            T* out = static_cast<T*>(params.out) + row * columns;
            const T* next_x = row + 1 < end ? x + params.x_row_stride : x;
            if (has_residual) {
                const T* residual =
                    static_cast<const T*>(params.residual) + row * params.residual_row_stride;
                T* sum = static_cast<T*>(params.sum) + row * columns;
                for_each_element<T>(
                    columns, [](Wide<T> value, Wide<T> added) { return value + added; },
                    [sum](std::int64_t i, auto... results) { store<T>(sum + i, results...); }, x,
                    residual);
                x = sum;
            }
            forward_row(x, weight, params.eps, columns, out, rstd + row, next_x);
        }
    });
}

// One row: grad_x, and the row's share of the weight's gradient added to `partial`.
template <bool kHasGradSum, typename T, typename WeightT>
void backward_row(const T* grad_out, const T* x, const WeightT* weight, const T* grad_sum,
                  Wide<T> rstd, std::int64_t columns, T* grad_x, Wide<T>* partial,
                  const T* next_grad_out, const T* next_x) {
    using W = Wide<T>;
    const W dot = sum_elements<T>(
        columns, [](W upstream, W scale, W value) { return upstream * scale * value; }, grad_out,
        weight, x);
    // Of x in grad_x, without a square of rstd, which could overflow.
    const W slope = rstd * (rstd * (rstd * dot / static_cast<W>(columns)));
    struct Gradients {
        W x;
        W weight;
    };
    const auto compute = [=](W upstream, W scale, W value, W sum, auto... added) {
        const W scaled = rstd * upstream;
        const W grad = scaled * scale - slope * value;
        return Gradients{(grad + ... + added), sum + scaled * value};
    };
    for_each_chunk(columns, [=](std::int64_t first, std::int64_t count) {
        prefetch(next_grad_out + first, count);
        prefetch(next_x + first, count);
        const auto write = [=](std::int64_t i, auto... gradients) {
            store<T>(grad_x + first + i, gradients.x...);
            store<W>(partial + first + i, gradients.weight...);
        };
        if constexpr (kHasGradSum) {
            for_each_element<T>(count, compute, write, grad_out + first, weight + first, x + first,
                                partial + first, grad_sum + first);
        } else {
            for_each_element<T>(count, compute, write, grad_out + first, weight + first, x + first,
                                partial + first);
        }
    });
}

template <typename T, typename WeightT>
void backward(const RmsNormBackwardParams& params) {
    using W = Wide<T>;
    const std::int64_t columns = params.columns;
    const auto* weight = static_cast<const WeightT*>(params.weight);
    const auto* rstd = static_cast<const W*>(params.rstd);
    W* sums = static_cast<W*>(params.workspace);
    const std::int64_t partials = partials_of(params.rows, params.partials);
    for_each_partial(
        params.rows, partials, [&](std::int64_t partial, std::int64_t begin, std::int64_t end) {
            W* sum = sums + partial * columns;
            std::fill_n(sum, columns, W{0});
            for (std::int64_t row = begin; row < end; ++row) {
                const T* grad_out =
                    static_cast<const T*>(params.grad_out) + row * params.grad_out_row_stride;
                const T* x = static_cast<const T*>(params.x) + row * params.x_row_stride;
                T* grad_x = static_cast<T*>(params.grad_x) + row * columns;
                const bool last = row + 1 == end;
                const T* next_grad_out = last ? grad_out : grad_out + params.grad_out_row_stride;
                const T* next_x = last ? x : x + params.x_row_stride;
                if (params.grad_sum == nullptr) {
                    backward_row<false, T>(grad_out, x, weight, nullptr, rstd[row], columns, grad_x,
                                           sum, next_grad_out, next_x);
                } else {
                    const T* grad_sum =
                        static_cast<const T*>(params.grad_sum) + row * params.grad_sum_row_stride;
                    backward_row<true, T>(grad_out, x, weight, grad_sum, rstd[row], columns, grad_x,
                                          sum, next_grad_out, next_x);
                }
            }
        });
    add_partials(sums, partials, columns, static_cast<WeightT*>(params.grad_weight));
}

}  // namespace

void rms_norm_cpu(const RmsNormParams& params) {
    visit_element_types(params.dtype, params.weight_dtype,
                        [&]<typename T, typename WeightT>() { forward<T, WeightT>(params); });
}

void rms_norm_backward_cpu(const RmsNormBackwardParams& params) {
    visit_element_types(params.dtype, params.weight_dtype,
                        [&]<typename T, typename WeightT>() { backward<T, WeightT>(params); });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::norm
