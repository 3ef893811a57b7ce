// A linear map per group of rows: what the seam hands to the code that computes it.
//
//   out[i] = weight[g] x[i]                          group_offsets[g] <= i < group_offsets[g + 1]
//   grad_x[i] = weight[g]^T grad_out[i],   grad_weight[g] = sum over the group of grad_out[i]
//   x[i]^T
//
// Rows behind the last offset have an out and a grad_x of 0; a group without rows has a grad_weight
// of 0. Sums are float32 (float64 for float64), in fixed orders, without atomics.
#pragma once

#include <cstdint>
#include <limits>

#include "common/cpu.h"
#include "common/dispatch.h"
#include "common/launch.h"

namespace warploom::grouped_linear {

// Rows have a contiguous last dimension; weights are contiguous. Addresses are multiples of the
// element size and no more.
struct GroupedLinearParams {
    const void* x;                      // [rows, in_features], rows x_row_stride apart
    const void* weight;                 // [groups, out_features, in_features] contiguous
    const std::int32_t* group_offsets;  // [groups + 1], rising from 0
    void* out;                          // [rows, out_features] contiguous
    std::int64_t x_row_stride;
    int rows;
    int groups;
    int out_features;
    int in_features;
    bool batch_invariant;  // The kernels' sums of a row are those of any other batch anyway.
    DType dtype;
};

// The CPU kernel serves groups of at most this many rows and leaves the others' rows of out alone.
// Of float32, PyTorch's product is as fast from there on, but its sums depend on the number of
// rows; of bfloat16 it is never faster.
constexpr int most_cpu_rows(DType dtype, bool batch_invariant) {
    constexpr int kAny = std::numeric_limits<int>::max();
    switch (dtype) {
        case DType::bfloat16:
            return kAny;
        case DType::float32:
            return batch_invariant ? kAny : 4;
        default:
            return 0;
    }
}

WARPLOOM_DECLARE_CPU(grouped_linear_cpu, GroupedLinearParams)
void grouped_linear_cuda(const GroupedLinearParams& params, Stream stream);

struct GroupedLinearBackwardParams {
    const void* grad_out;               // [rows, out_features], rows grad_out_row_stride apart
    const void* x;                      // [rows, in_features], rows x_row_stride apart
    const void* weight;                 // [groups, out_features, in_features] contiguous
    const std::int32_t* group_offsets;  // [groups + 1]
    void* grad_x;                       // [rows, in_features] contiguous; null: not asked for
    void* grad_weight;                  // as weight; null: not asked for
    std::int64_t grad_out_row_stride;
    std::int64_t x_row_stride;
    int rows;
    int groups;
    int out_features;
    int in_features;
    DType dtype;
};

void grouped_linear_backward_cuda(const GroupedLinearBackwardParams& params, Stream stream);

}  // namespace warploom::grouped_linear
