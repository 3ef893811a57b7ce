// Attention to two disjoint sets of keys, joined; and its gradients. Bound by memory: every element
// is read once and written once. Arithmetic in float32.
#pragma once

#include <cmath>
#include <limits>

#include "attention/merge_attention.h"
#include "common/index.cuh"
#include "common/vec.cuh"

namespace warploom::attention {

template <typename Element_, int kVector_>
struct MergeTraits {
    using Element = Element_;
    static constexpr int kVector = kVector_;
    static constexpr int kThreads = 128;
};

// What a kernel is given: the op's Params and how a block is cut. row_lanes neighbouring lanes, a
// power of 2 up to 32, share a row: enough to take it in one step, where 32 are.
template <typename Params>
struct MergeWork {
    Params params;
    std::int64_t rows;  // batch * length * heads, in the order of the outs
    int row_lanes;
};

// One row of an out, and where its lse lies: [batch, length, heads] against [batch, heads, length].
struct MergeRow {
    bool exists;
    std::int64_t out;  // of its first element
    std::int64_t lse;
    int lane;  // among those of the row
};

template <typename Traits, typename Params>
WARPLOOM_DEVICE MergeRow merge_row(const MergeWork<Params>& work) {
    const int block_rows = Traits::kThreads / work.row_lanes;
    const std::int64_t row =
        static_cast<std::int64_t>(blockIdx.x) * block_rows + threadIdx.x / work.row_lanes;
    const Division by_head = divide(row, work.params.heads);
    const Division by_length = divide(by_head.quotient, work.params.length);
    return {row < work.rows, row * work.params.dim,
            (by_length.quotient * work.params.heads + by_head.remainder) * work.params.length +
                by_length.remainder,
            static_cast<int>(threadIdx.x) % work.row_lanes};
}

struct MergeWeights {
    float first;
    float second;
    float lse;
};

WARPLOOM_DEVICE MergeWeights merge_weights(const void* lse1, const void* lse2, std::int64_t place) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    float first = static_cast<const float*>(lse1)[place];
    float second = static_cast<const float*>(lse2)[place];
    first = first == kInfinity ? -kInfinity : first;
    second = second == kInfinity ? -kInfinity : second;
    if (first == -kInfinity && second == -kInfinity) {
        return {0.0f, 0.0f, -kInfinity};
    }
    // The larger one's term is 1. A NaN comes through.
    const float maximum = first > second ? first : second;
    const float first_term = expf(first - maximum);
    const float second_term = expf(second - maximum);
    const float sum = first_term + second_term;
    return {first_term / sum, second_term / sum, maximum + logf(sum)};
}

// kVector elements of a part as floats, 0 where the part weighs nothing.
template <typename Traits>
WARPLOOM_DEVICE void load_part(const void* part, std::int64_t place, float weight,
                               float (&values)[Traits::kVector]) {
    using T = typename Traits::Element;
    if (weight != 0.0f) {
        load_floats(static_cast<const T*>(part) + place, values);
    } else {
        WARPLOOM_UNROLL
        for (int index = 0; index < Traits::kVector; ++index) {
            values[index] = 0.0f;
        }
    }
}

template <typename Traits>
WARPLOOM_DEVICE void store_part(void* part, std::int64_t place,
                                const float (&values)[Traits::kVector]) {
    using T = typename Traits::Element;
    store_packed(static_cast<T*>(part) + place, pack_floats<T>(values));
}

// grid [ceil(rows row_lanes / kThreads)]
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 8)
merge_attention_kernel(WARPLOOM_GRID_CONSTANT MergeWork<MergeParams> work) {
    constexpr int kVector = Traits::kVector;
    const MergeParams& params = work.params;
    const MergeRow row = merge_row<Traits>(work);
    if (!row.exists) {
        return;
    }
    const MergeWeights weights = merge_weights(params.lse1, params.lse2, row.lse);
    if (row.lane == 0) {
        static_cast<float*>(params.lse)[row.lse] = weights.lse;
    }
    for (std::int64_t column = row.lane * kVector; column < params.dim;
         column += work.row_lanes * kVector) {
        float first[kVector];
        float second[kVector];
        load_part<Traits>(params.out1, row.out + column, weights.first, first);
        load_part<Traits>(params.out2, row.out + column, weights.second, second);
        WARPLOOM_UNROLL
        for (int index = 0; index < kVector; ++index) {
            first[index] = weights.first * first[index] + weights.second * second[index];
        }
        store_part<Traits>(params.out, row.out + column, first);
    }
}

// grid [ceil(rows row_lanes / kThreads)]
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 8)
merge_attention_backward_kernel(WARPLOOM_GRID_CONSTANT MergeWork<MergeBackwardParams> work) {
    constexpr int kVector = Traits::kVector;
    const MergeBackwardParams& params = work.params;
    const MergeRow row = merge_row<Traits>(work);
    MergeWeights weights = {};
    float difference = 0.0f;  // grad_out . (out1 - out2)
    if (row.exists) {
        weights = merge_weights(params.lse1, params.lse2, row.lse);
        for (std::int64_t column = row.lane * kVector; column < params.dim;
             column += work.row_lanes * kVector) {
            const std::int64_t place = row.out + column;
            float grad[kVector];
            float first[kVector];
            float second[kVector];
            load_part<Traits>(params.grad_out, place, 1.0f, grad);
            load_part<Traits>(params.out1, place, weights.first, first);
            load_part<Traits>(params.out2, place, weights.second, second);
            WARPLOOM_UNROLL
            for (int index = 0; index < kVector; ++index) {
                difference += grad[index] * (first[index] - second[index]);
                first[index] = weights.first * grad[index];
                second[index] = weights.second * grad[index];
            }
            store_part<Traits>(params.grad_out1, place, first);
            store_part<Traits>(params.grad_out2, place, second);
        }
    }
    for (int lane_mask = 1; lane_mask < work.row_lanes; lane_mask *= 2) {
        difference += device::shuffle_xor(difference, lane_mask);
    }
    if (row.exists && row.lane == 0) {
        const float grad_lse =
            params.grad_lse == nullptr ? 0.0f : static_cast<const float*>(params.grad_lse)[row.lse];
        static_cast<float*>(params.grad_lse1)[row.lse] =
            weights.first * (weights.second * difference + grad_lse);
        static_cast<float*>(params.grad_lse2)[row.lse] =
            weights.second * (grad_lse - weights.first * difference);
    }
}

}  // namespace warploom::attention
