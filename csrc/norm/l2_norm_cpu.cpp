// Rows of unit length on the CPU: a row is read, and read again while it is still in the cache.
#include "norm/l2_norm.h"

#include <cmath>
#include <cstdint>

#include "common/cpu_float.h"
#include "common/cpu_loops.h"
#include "common/parallel.h"
#include "norm/rows_cpu.h"

namespace warploom::norm {
namespace WARPLOOM_CPU_ISA {
namespace {

template <typename T>
void forward(const L2NormParams& params) {
    using W = Wide<T>;
    const std::int64_t columns = params.columns;
    parallel_for(params.rows, grain_of(columns), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) {
            const T* x = static_cast<const T*>(params.x) + row * params.x_row_stride;
            T* out = static_cast<T*>(params.out) + row * columns;
            const W squares = sum_elements<T>(columns, [](W value) { return value * value; }, x);
            const W rnorm = W{1} / std::sqrt(squares + static_cast<W>(params.eps));
            static_cast<W*>(params.rnorm)[row] = rnorm;
            for_each_element<T>(
                columns, [rnorm](W value) { return value * rnorm; },
                [out](std::int64_t i, auto... results) { store<T>(out + i, results...); }, x);
        }
    });
}

template <typename T>
void backward(const L2NormBackwardParams& params) {
    using W = Wide<T>;
    const std::int64_t columns = params.columns;
    parallel_for(params.rows, grain_of(columns), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) {
            const T* grad_out =
                static_cast<const T*>(params.grad_out) + row * params.grad_out_row_stride;
            const T* x = static_cast<const T*>(params.x) + row * params.x_row_stride;
            T* grad_x = static_cast<T*>(params.grad_x) + row * columns;
            const W rnorm = static_cast<const W*>(params.rnorm)[row];
            const W dot = sum_elements<T>(
                columns, [rnorm](W upstream, W value) { return upstream * (value * rnorm); },
                grad_out, x);
            for_each_element<T>(
                columns,
                [rnorm, dot](W upstream, W value) {
                    return rnorm * (upstream - value * rnorm * dot);
                },
                [grad_x](std::int64_t i, auto... results) { store<T>(grad_x + i, results...); },
                grad_out, x);
        }
    });
}

}  // namespace

void l2_norm_cpu(const L2NormParams& params) {
    visit_element_type(params.dtype, [&]<typename T>() { forward<T>(params); });
}

void l2_norm_backward_cpu(const L2NormBackwardParams& params) {
    visit_element_type(params.dtype, [&]<typename T>() { backward<T>(params); });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::norm
