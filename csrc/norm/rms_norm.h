// RMSNorm: what its kernels are given. One Params for the plain and the fused-residual form.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dispatch.h"
#include "common/launch.h"

namespace warploom::norm {

struct RmsNormParams {
    const void* x;         // [rows, columns], rows x_row_stride elements apart, columns dense
    const void* residual;  // [rows, columns] or null: then x alone is normalised
    const void* weight;    // [columns] of weight_dtype
    void* out;             // [rows, columns], contiguous
    void* sum;   // [rows, columns], contiguous: x + residual, rounded; null without residual
    void* rstd;  // [rows] float32 (float64 for float64 x)
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t x_row_stride;
    std::int64_t residual_row_stride;
    double eps;
    DType dtype;         // of x, residual, out, sum
    DType weight_dtype;  // dtype, or float32
};

// The weight's gradient is summed in two steps, each in a fixed order, so that it needs no atomics:
// the rows are dealt out to `partials` workers, whose float32 sums are then added up.
struct RmsNormBackwardParams {
    const void* grad_out;  // [rows, columns], rows grad_out_row_stride apart, columns dense
    const void* x;         // [rows, columns], rows x_row_stride apart: what was normalised
    const void* weight;    // [columns] of weight_dtype
    const void* rstd;      // [rows] float32 (float64 for float64 x)
    const void* grad_sum;  // [rows, columns], rows grad_sum_row_stride apart, or null
    void* grad_x;          // [rows, columns], contiguous
    void* grad_weight;     // [columns] of weight_dtype
    void* workspace;       // [partials, columns] float32 (float64 for float64 x), uninitialised
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t grad_out_row_stride;
    std::int64_t x_row_stride;
    std::int64_t grad_sum_row_stride;
    std::int64_t partials;  // rms_norm_backward_partials(rows): never depends on the machine's load
    DType dtype;            // of grad_out, x, grad_sum, grad_x
    DType weight_dtype;     // dtype, or float32
};

// Enough workers to fill a large GPU (132 SMs twice over) and few enough that adding up their sums
// is cheap; a function of the shape alone, so that two runs agree bit for bit.
constexpr std::int64_t rms_norm_backward_partials(std::int64_t rows) {
    return std::clamp<std::int64_t>(rows / 4, 1, 256);
}

WARPLOOM_DECLARE_CPU(rms_norm_cpu, RmsNormParams)
WARPLOOM_DECLARE_CPU(rms_norm_backward_cpu, RmsNormBackwardParams)
void rms_norm_cuda(const RmsNormParams& params, Stream stream);
void rms_norm_backward_cuda(const RmsNormBackwardParams& params, Stream stream);

}  // namespace warploom::norm
