// RMSNorm and gated activations that emit the rank-r product of their output while a row is at
// hand: shrunk = out A^T, so that the linear maps behind them need not read out for it.
#pragma once

#include <cstdint>

#include "activation/gated_activation.h"
#include "common/cpu.h"
#include "common/dispatch.h"
#include "common/launch.h"

namespace warploom::lora {

// Rows have a contiguous last dimension, all else is contiguous. The adapter has x's type, any rank
// and at least one column.

// Of fewer rows the CPU kernel takes the products one by one, reading lora_a as it lies; for more
// it turns lora_a round in the workspace: [columns, rank], the ranks filled up to a multiple.
constexpr std::int64_t kFewShrinkRows = 24;
constexpr std::int64_t kShrinkRankMultiple = 16;

constexpr std::int64_t shrink_workspace(std::int64_t rows, std::int64_t columns,
                                        std::int64_t rank) {
    return rows < kFewShrinkRows
               ? 0
               : columns * ceil_divide(rank, kShrinkRankMultiple) * kShrinkRankMultiple;
}

struct RmsNormShrinkParams {
    const void* x;         // [rows, columns], rows x_row_stride apart
    const void* residual;  // [rows, columns], rows residual_row_stride apart, or null
    const void* weight;    // [columns] of weight_dtype
    const void* lora_a;    // [rank, columns]
    void* out;             // [rows, columns] = weight sum rstd
    void* sum;             // [rows, columns] = x + residual, rounded; null without residual
    void* rstd;            // [rows] float32 (float64 for float64 x): 1 / sqrt(mean(sum^2) + eps)
    void* shrunk;          // [rows, rank] = out A^T
    void* workspace;       // shrink_workspace(...) numbers of rstd's type, of the CPU kernel alone
    std::int64_t x_row_stride;
    std::int64_t residual_row_stride;
    double eps;
    int rows;
    int columns;
    int rank;
    DType dtype;         // of x, residual, lora_a, out, sum, shrunk
    DType weight_dtype;  // dtype, or float32
};

struct GatedShrinkParams {
    const void* gate;    // [rows, columns], rows gate_row_stride apart
    const void* up;      // [rows, columns], rows up_row_stride apart
    const void* lora_a;  // [rank, columns]
    void* out;           // [rows, columns] = act(gate) up
    void* shrunk;        // [rows, rank] = out A^T
    void* workspace;     // as in RmsNormShrinkParams
    std::int64_t gate_row_stride;
    std::int64_t up_row_stride;
    activation::Activation activation;
    int rows;
    int columns;
    int rank;
    DType dtype;
};

WARPLOOM_DECLARE_CPU(rms_norm_shrink_cpu, RmsNormShrinkParams)
WARPLOOM_DECLARE_CPU(gated_shrink_cpu, GatedShrinkParams)
void rms_norm_shrink_cuda(const RmsNormShrinkParams& params, Stream stream);
void gated_shrink_cuda(const GatedShrinkParams& params, Stream stream);

}  // namespace warploom::lora
