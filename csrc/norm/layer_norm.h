// LayerNorm: what its kernels are given.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dispatch.h"
#include "common/launch.h"
#include "norm/rms_norm.h"

namespace warploom::norm {

struct LayerNormParams {
    const void* x;       // [rows, columns], rows x_row_stride elements apart, columns dense
    const void* weight;  // [columns] of weight_dtype
    const void* bias;    // [columns] of weight_dtype
    void* out;           // [rows, columns], contiguous
    void* mean;          // [rows] float32 (float64 for float64 x)
    void* rstd;          // [rows], as mean
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t x_row_stride;
    double eps;
    DType dtype;         // of x, out
    DType weight_dtype;  // of weight and bias: dtype, or float32
};

// Sums of the parameters' gradients as in RmsNormBackwardParams.
struct LayerNormBackwardParams {
    const void* grad_out;  // [rows, columns], rows grad_out_row_stride apart, columns dense
    const void* x;         // [rows, columns], rows x_row_stride apart
    const void* weight;    // [columns] of weight_dtype
    const void* mean;      // [rows] float32 (float64 for float64 x)
    const void* rstd;      // [rows], as mean
    void* grad_x;          // [rows, columns], contiguous
    void* grad_weight;     // [columns] of weight_dtype
    void* grad_bias;       // [columns] of weight_dtype
    void* workspace;       // [2, partials, columns] float32 (float64 for float64 x): weight, bias
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t grad_out_row_stride;
    std::int64_t x_row_stride;
    std::int64_t partials;  // rms_norm_backward_partials(rows)
    DType dtype;
    DType weight_dtype;
};

WARPLOOM_DECLARE_CPU(layer_norm_cpu, LayerNormParams)
WARPLOOM_DECLARE_CPU(layer_norm_backward_cpu, LayerNormBackwardParams)
void layer_norm_cuda(const LayerNormParams& params, Stream stream);
void layer_norm_backward_cuda(const LayerNormBackwardParams& params, Stream stream);

}  // namespace warploom::norm
