// A linear map with a low-rank update: what the seam hands to the code that computes it.
//
//   shrunk = drop(x) A^T                                            lora_shrink
//   out = column_scale (x W^T + scaling shrunk B^T) + bias          lora_linear
//
// and, of its gradients, with g = column_scale grad_out,
//
//   g and grad_column_scale = sum of the rows of grad_out unscaled  lora_scale_backward
//   grad_shrunk = scaling g B                                       lora_grad_shrunk
//   grad_x = g W + drop(grad_shrunk A)                              lora_grad_x
//   grad_a = grad_shrunk^T drop(x),   grad_b = scaling g^T shrunk   lora_adapter_grad
//
// drop() draws element (i, j) by philox(seed; j / 4, i, 0, 0), number j % 4, and divides what stays
// by 1 - dropout_p. Sums are float32 (float64 for float64), in fixed orders, without atomics.
//
// On the CPU the large products are PyTorch's: `out` and `grad_x` come with x W^T and g W in them,
// and the functions here do the rest in one pass. shrunk and grad_shrunk are wide where they are
// read, and so are lora_a and the transpose of lora_b, [rank, cpu_factor_stride(columns)].
//
// On a GPU where lora_products_are_pytorchs_cuda(), all products are PyTorch's but those with a
// quantised weight or a dropped x.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dispatch.h"
#include "common/launch.h"

namespace warploom::lora {

// How a weight [N, K] is stored. All but dense ones have float32 scales [N, K / block] beside them.
enum class WeightFormat {
    dense,     // [N, K] of x's type
    nf4,       // [N, K / 2] bytes, the first of two columns in the upper four bits: places in kNf4
    int8,      // [N, K]
    fp8_e4m3,  // [N, K]
};

// QLoRA's table, as reference/quantization.py has it.
constexpr float kNf4[16] = {-1.0f,
                            -0.6961928009986877f,
                            -0.5250730514526367f,
                            -0.39491748809814453f,
                            -0.28444138169288635f,
                            -0.18477343022823334f,
                            -0.09105003625154495f,
                            0.0f,
                            0.07958029955625534f,
                            0.16093020141124725f,
                            0.24611230194568634f,
                            0.33791524171829224f,
                            0.44070982933044434f,
                            0.5626170039176941f,
                            0.7229568362236023f,
                            1.0f};

// Rows have a contiguous last dimension, all else is contiguous. Addresses are multiples of the
// element size and no more. Adapters have x's type here; the seam converts others. "Wide" is
// float32, float64 beside float64, which the CPU alone has; scalars are double for its sake.

// On the CPU: columns that are taken at once. Rows of a factor end in zeros up to a multiple of it,
// and 64 bytes more, lest all begin at one place of the first cache.
constexpr int kCpuColumns = 128;
constexpr std::int64_t cpu_factor_stride(std::int64_t columns) {
    return ceil_divide(columns, kCpuColumns) * kCpuColumns + 16;
}

struct Weight {
    const void* values;
    const float* scale;  // [N, K / scale_block]; null for dense weights
    int scale_block;     // columns, even
    WeightFormat format;
};

struct Dropout {
    const std::int64_t* seed;  // one element on the device; null: nothing is dropped
    double p;                  // [0, 1)
};

struct LoraShrinkParams {
    const void* x;       // [rows, in_features], rows x_row_stride apart
    const void* lora_a;  // [rank, in_features]
    void* shrunk;        // [rows, rank]
    Dropout dropout;
    std::int64_t x_row_stride;
    int rows;
    int in_features;
    int rank;
    DType dtype;
};

struct LoraLinearParams {
    const void* x;             // [rows, in_features], rows x_row_stride apart
    Weight weight;             // [out_features, in_features]
    const void* bias;          // [out_features] or null
    const void* shrunk;        // [rows, rank], rows shrunk_row_stride apart
    const void* lora_b;        // [out_features, rank]
    const void* column_scale;  // wide [out_features] or null
    void* out;                 // [rows, out_features]
    void* unscaled;            // as out, what column_scale is multiplied with; null without it
    std::int64_t x_row_stride;
    std::int64_t shrunk_row_stride;
    double scaling;
    int rows;
    int in_features;
    int out_features;
    int rank;  // 0: no update
    DType dtype;
};

struct LoraScaleBackwardParams {
    const void* grad_out;      // [rows, columns], rows grad_row_stride apart
    const void* unscaled;      // [rows, columns]
    const void* column_scale;  // wide [columns]
    void* grad;                // [rows, columns]: column_scale grad_out
    void* grad_column_scale;   // wide [columns]; null: not asked for
    void* workspace;           // wide [lora_scale_partials(rows), columns]
    std::int64_t grad_row_stride;
    int rows;
    int columns;
    DType dtype;
};

// Parts that the rows are dealt out to, whose sums are then added up in order: a function of the
// shape alone, so that two runs agree bit for bit.
constexpr int lora_scale_partials(int rows) {
    return rows < 64 ? 1 : rows < 64 * 64 ? rows / 64 : 64;
}

struct LoraGradShrunkParams {
    const void* grad;    // [rows, out_features], rows grad_row_stride apart
    const void* lora_b;  // [out_features, rank]
    void* grad_shrunk;   // [rows, rank]
    std::int64_t grad_row_stride;
    double scaling;
    int rows;
    int out_features;
    int rank;
    DType dtype;
};

struct LoraGradXParams {
    const void* grad;         // [rows, out_features], rows grad_row_stride apart; null: no g W
    Weight weight;            // [out_features, in_features]
    const void* grad_shrunk;  // [rows, rank], rows grad_shrunk_row_stride apart
    const void* lora_a;       // [rank, in_features]
    void* grad_x;             // [rows, in_features]
    Dropout dropout;
    std::int64_t grad_row_stride;
    std::int64_t grad_shrunk_row_stride;
    int rows;
    int in_features;
    int out_features;  // 0 without grad
    int rank;          // 0: no update
    DType dtype;
};

// out = scaling wide^T narrow, or its transpose.
struct LoraAdapterGradParams {
    const void* wide;    // [rows, columns], rows wide_row_stride apart: x, or g
    const void* narrow;  // [rows, rank], rows narrow_row_stride apart: grad_shrunk, or shrunk
    void* out;        // wide; transposed: [rank, columns] (grad_a); else [columns, rank] (grad_b)
    Dropout dropout;  // of wide
    std::int64_t wide_row_stride;
    std::int64_t narrow_row_stride;
    double scaling;
    bool transposed;
    int rows;
    int columns;
    int rank;
    DType dtype;
};

// A rectangle of a quantised weight, for PyTorch's product on the CPU.
struct DequantizeParams {
    Weight weight;  // [any number of rows, in_features]
    void* out;      // [rows, columns]
    int in_features;
    int first_row;
    int first_column;  // even
    int rows;
    int columns;
    DType dtype;      // that elements are rounded to
    DType out_dtype;  // dtype, or float32
};

WARPLOOM_DECLARE_CPU(lora_shrink_cpu, LoraShrinkParams)
WARPLOOM_DECLARE_CPU(lora_linear_cpu, LoraLinearParams)
WARPLOOM_DECLARE_CPU(lora_scale_backward_cpu, LoraScaleBackwardParams)
WARPLOOM_DECLARE_CPU(lora_grad_shrunk_cpu, LoraGradShrunkParams)
WARPLOOM_DECLARE_CPU(lora_grad_x_cpu, LoraGradXParams)
WARPLOOM_DECLARE_CPU(lora_adapter_grad_cpu, LoraAdapterGradParams)
WARPLOOM_DECLARE_CPU(dequantize_cpu, DequantizeParams)
bool lora_products_are_pytorchs_cuda();
void lora_shrink_cuda(const LoraShrinkParams& params, Stream stream);
void lora_linear_cuda(const LoraLinearParams& params, Stream stream);
void lora_scale_backward_cuda(const LoraScaleBackwardParams& params, Stream stream);
void lora_grad_shrunk_cuda(const LoraGradShrunkParams& params, Stream stream);
void lora_grad_x_cuda(const LoraGradXParams& params, Stream stream);
void lora_adapter_grad_cuda(const LoraAdapterGradParams& params, Stream stream);

}  // namespace warploom::lora
