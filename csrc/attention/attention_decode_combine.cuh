// Where a row of decoding goes, its sink, and the kernel that merges the parts of a row.
#pragma once

#include <cmath>

#include "attention/attention_decode.h"
#include "attention/scores.cuh"
#include "common/reduce.cuh"

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

template <typename T>
struct CombineTraits {
    using Element = T;
    static constexpr int kWarps = 4;
    static constexpr int kThreads = kWarps * device::kWarpSize;
    static constexpr int kColumns = 256;  // The most that a row has.
    static constexpr int kLaneColumns = kColumns / device::kWarpSize;

    struct SharedPlan {
        float outputs[kWarps][kColumns];
    };
};

// Part s is warp s % kWarps's and lane s % 32's, in rising order, so that parts without keys, which
// add 0, change no bit: a row comes out the same however many of them follow.
//
// grid [batch * heads * query_length], as lse
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 8)
attention_decode_combine_kernel(WARPLOOM_GRID_CONSTANT AttentionDecodeParams decode) {
    using T = typename Traits::Element;
    auto& shared = device::shared_memory<typename Traits::SharedPlan>();
    const int lane = device::lane_index();
    const int warp = device::warp_index();
    const int batch_head = static_cast<int>(blockIdx.x) / decode.query_length;
    const DecodeRow row = {batch_head / decode.heads,
                           static_cast<int>(blockIdx.x) % decode.query_length,
                           batch_head % decode.heads};
    const std::int64_t rows = gridDim.x;
    const float* lses = decode.partial_lse + row.lse_place(decode);
    const float* outs = decode.partial_out + row.out_place(decode) * decode.value_dim;

    float maximum = -kInfinity;
    for (int split = lane; split < decode.num_splits; split += device::kWarpSize) {
        maximum = fmaxf(maximum, lses[split * rows]);
    }
    maximum = warp_reduce_max(maximum);
    // A row without keys: every part adds 0.
    const float shift = maximum == -kInfinity ? 0.0f : maximum;
    float sum = 0.0f;
    for (int split = lane; split < decode.num_splits; split += device::kWarpSize) {
        sum += expf(lses[split * rows] - shift);
    }
    sum = warp_reduce_sum(sum);

    float columns[Traits::kLaneColumns] = {};
    for (int split = warp; split < decode.num_splits; split += Traits::kWarps) {
        const float lse = lses[split * rows];
        if (lse == -kInfinity) {
            continue;  // Its output was not written.
        }
        const float weight = expf(lse - shift);
        const float* out = outs + split * rows * decode.value_dim;
        WARPLOOM_UNROLL
        for (int index = 0; index < Traits::kLaneColumns; ++index) {
            const int column = index * device::kWarpSize + lane;
            if (column < decode.value_dim) {
                columns[index] = fmaf(weight, out[column], columns[index]);
            }
        }
    }
    WARPLOOM_UNROLL
    for (int index = 0; index < Traits::kLaneColumns; ++index) {
        shared.outputs[warp][index * device::kWarpSize + lane] = columns[index];
    }
    device::sync_threads();

    const SinkEffect sink =
        add_sink(decode, row.head, sum == 0.0f ? -kInfinity : maximum + logf(sum));
    const float normalizer = sum == 0.0f ? 0.0f : 1.0f / sum;
    if (threadIdx.x == 0) {
        static_cast<float*>(decode.lse)[row.lse_place(decode)] = sink.lse;
    }
    T* result = static_cast<T*>(decode.out) + row.batch * decode.out_strides.batch +
                row.query * decode.out_strides.sequence + row.head * decode.out_strides.head;
    for (int column = static_cast<int>(threadIdx.x); column < decode.value_dim;
         column += Traits::kThreads) {
        float value = shared.outputs[0][column];
        WARPLOOM_UNROLL
        for (int other = 1; other < Traits::kWarps; ++other) {
            value += shared.outputs[other][column];
        }
        result[column] = device::from_float<T>(value * normalizer * sink.factor);
    }
}

}  // namespace warploom::attention
