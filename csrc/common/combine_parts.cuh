// Attention to disjoint sets of keys, joined: the parts of one row, by one block.
//
//   lse = log(sum of exp(lse_p))     out = sum of exp(lse_p - lse) out_p
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/reduce.cuh"

namespace warploom {

// A row's parts in memory: part p has lses[p * lse_stride] and columns outs[p * out_stride ...). A
// part whose lse is -inf has no keys; its outs are not read.
struct RowParts {
    const float* lses;
    const float* outs;
    std::int64_t lse_stride;
    std::int64_t out_stride;
    int count;
    int columns;
};

// kColumns: the most that a row has.
template <int kColumnCount>
struct CombineParts {
    static constexpr int kWarps = 4;
    static constexpr int kThreads = kWarps * device::kWarpSize;
    static constexpr int kColumns = kColumnCount;
    static constexpr int kLaneColumns = kColumns / device::kWarpSize;

    struct SharedPlan {
        float outputs[kWarps][kColumns];
    };

    struct Result {
        float lse;
        float normalizer;  // what sum_of_column is to be multiplied with
    };

    // Part p is warp p % kWarps's and lane p % 32's, in rising order, so that parts without keys,
    // which add 0, change no bit: a row comes out the same however many of them follow.
    static WARPLOOM_DEVICE Result combine(const RowParts& parts, SharedPlan& shared) {
        constexpr float kInfinity = std::numeric_limits<float>::infinity();
        const int lane = device::lane_index();
        const int warp = device::warp_index();
        float maximum = -kInfinity;
        for (int part = lane; part < parts.count; part += device::kWarpSize) {
            maximum = fmaxf(maximum, parts.lses[part * parts.lse_stride]);
        }
        maximum = warp_reduce_max(maximum);
        // A row without keys: every part adds 0.
        const float shift = maximum == -kInfinity ? 0.0f : maximum;
        float sum = 0.0f;
        for (int part = lane; part < parts.count; part += device::kWarpSize) {
            sum += expf(parts.lses[part * parts.lse_stride] - shift);
        }
        sum = warp_reduce_sum(sum);

        float columns[kLaneColumns] = {};
        for (int part = warp; part < parts.count; part += kWarps) {
            const float lse = parts.lses[part * parts.lse_stride];
            if (lse == -kInfinity) {
                continue;
            }
            const float weight = expf(lse - shift);
            const float* out = parts.outs + part * parts.out_stride;
            WARPLOOM_UNROLL
            for (int index = 0; index < kLaneColumns; ++index) {
                const int column = index * device::kWarpSize + lane;
                if (column < parts.columns) {
                    columns[index] = fmaf(weight, out[column], columns[index]);
                }
            }
        }
        WARPLOOM_UNROLL
        for (int index = 0; index < kLaneColumns; ++index) {
            shared.outputs[warp][index * device::kWarpSize + lane] = columns[index];
        }
        device::sync_threads();

        return {sum == 0.0f ? -kInfinity : maximum + logf(sum), sum == 0.0f ? 0.0f : 1.0f / sum};
    }

    // After combine, by any thread.
    static WARPLOOM_DEVICE float sum_of_column(const SharedPlan& shared, int column) {
        float value = shared.outputs[0][column];
        WARPLOOM_UNROLL
        for (int other = 1; other < kWarps; ++other) {
            value += shared.outputs[other][column];
        }
        return value;
    }
};

}  // namespace warploom
