// Where a row of decoding goes, its sink, and the kernel that merges the parts of a row.
#pragma once

#include <cmath>

#include "attention/attention_decode.h"
#include "attention/scores.cuh"
#include "common/combine_parts.cuh"

namespace warploom::attention {

// One query of one head.
struct DecodeRow {
    int batch;
    int query;
    int head;

    // In [batch, heads, query_length]: of lse.
    WARPLOOM_DEVICE std::int64_t lse_place(const AttentionDecodeParams& decode) const {
        return (static_cast<std::int64_t>(batch) * decode.heads + head) * decode.query_length +
               query;
    }
    // In [batch, query_length, heads]: of a partial output.
    WARPLOOM_DEVICE std::int64_t out_place(const AttentionDecodeParams& decode) const {
        return (static_cast<std::int64_t>(batch) * decode.query_length + query) * decode.heads +
               head;
    }
};

// The log-sum-exp with the sink of the head, and what the output is multiplied with for that: 1
// without sinks.
struct SinkEffect {
    float lse;
    float factor;
};

WARPLOOM_DEVICE SinkEffect add_sink(const AttentionDecodeParams& decode, int head, float lse) {
    if (decode.scoring.sinks == nullptr) {
        return {lse, 1.0f};
    }
    const float sink = static_cast<const float*>(decode.scoring.sinks)[head];
    if (sink == -kInfinity) {
        return {lse, 1.0f};
    }
    const float maximum = fmaxf(lse, sink);
    const float term = expf(lse - maximum);
    const float sum = term + expf(sink - maximum);
    return {maximum + logf(sum), term / sum};
}

using Combine = CombineParts<256>;

// grid [batch * heads * query_length], as lse
template <typename T>
WARPLOOM_KERNEL(Combine::kThreads, 8)
attention_decode_combine_kernel(WARPLOOM_GRID_CONSTANT AttentionDecodeParams decode) {
    auto& shared = device::shared_memory<Combine::SharedPlan>();
    const int batch_head = static_cast<int>(blockIdx.x) / decode.query_length;
    const DecodeRow row = {batch_head / decode.heads,
                           static_cast<int>(blockIdx.x) % decode.query_length,
                           batch_head % decode.heads};
    const std::int64_t rows = gridDim.x;
    const RowParts parts = {.lses = decode.partial_lse + row.lse_place(decode),
                            .outs = decode.partial_out + row.out_place(decode) * decode.value_dim,
                            .lse_stride = rows,
                            .out_stride = rows * decode.value_dim,
                            .count = decode.num_splits,
                            .columns = decode.value_dim};
    const Combine::Result combined = Combine::combine(parts, shared);
    const SinkEffect sink = add_sink(decode, row.head, combined.lse);
    if (threadIdx.x == 0) {
        static_cast<float*>(decode.lse)[row.lse_place(decode)] = sink.lse;
    }
    T* result = static_cast<T*>(decode.out) + row.batch * decode.out_strides.batch +
                row.query * decode.out_strides.sequence + row.head * decode.out_strides.head;
    for (int column = static_cast<int>(threadIdx.x); column < decode.value_dim;
         column += Combine::kThreads) {
        result[column] = device::from_float<T>(Combine::sum_of_column(shared, column) *
                                               combined.normalizer * sink.factor);
    }
}

}  // namespace warploom::attention
