// Rows of unit length: what their kernels are given.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dispatch.h"
#include "common/launch.h"

namespace warploom::norm {

struct L2NormParams {
    const void* x;  // [rows, columns], rows x_row_stride elements apart, columns dense
    void* out;      // [rows, columns], contiguous
    void* rnorm;    // [rows] float32 (float64 for float64 x)
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t x_row_stride;
    double eps;
    DType dtype;  // of x, out
};

struct L2NormBackwardParams {
    const void* grad_out;  // [rows, columns], rows grad_out_row_stride apart, columns dense
    const void* x;         // [rows, columns], rows x_row_stride apart
    const void* rnorm;     // [rows] float32 (float64 for float64 x)
    void* grad_x;          // [rows, columns], contiguous
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t grad_out_row_stride;
    std::int64_t x_row_stride;
    DType dtype;  // of grad_out, x, grad_x
};

WARPLOOM_DECLARE_CPU(l2_norm_cpu, L2NormParams)
WARPLOOM_DECLARE_CPU(l2_norm_backward_cpu, L2NormBackwardParams)
void l2_norm_cuda(const L2NormParams& params, Stream stream);
void l2_norm_backward_cuda(const L2NormBackwardParams& params, Stream stream);

}  // namespace warploom::norm
