// Rotary position embedding: what its kernels are given.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dispatch.h"
#include "common/launch.h"

namespace warploom::rope {

struct RotaryParams {
    const void* x;          // [batch, sequence, heads, head_dim], the last dimension dense
    const void* cos;        // [table_rows, rotary_dim / 2] float32 (float64 for float64 x)
    const void* sin;        // as cos
    const void* positions;  // [batch, sequence] int64 or int32, contiguous; null: 0..sequence-1
    void* out;              // [batch, sequence, heads, head_dim], contiguous
    std::int64_t batch;
    std::int64_t sequence;
    std::int64_t heads;
    std::int64_t head_dim;
    std::int64_t rotary_dim;  // even, at most head_dim; the channels after it are copied
    std::int64_t table_rows;
    std::int64_t x_batch_stride;
    std::int64_t x_sequence_stride;
    std::int64_t x_head_stride;
    std::int64_t cos_row_stride;
    std::int64_t sin_row_stride;
    bool positions_are_int32;
    bool interleaved;  // pairs (2i, 2i+1), else (i, i + rotary_dim / 2)
    bool conjugate;    // turn the other way
    DType dtype;       // of x, out
};

WARPLOOM_DECLARE_CPU(apply_rotary_cpu, RotaryParams)
void apply_rotary_cuda(const RotaryParams& params, Stream stream);

}  // namespace warploom::rope
