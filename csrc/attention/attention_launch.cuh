// Launches of the forward kernels, for the units that hold them.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "attention/attention_block.cuh"
#include "attention/copy_bytes.h"

namespace warploom::attention {

// Whether a positive factor turns products into scores. 0 does not: times the -inf of a hidden key
// it would be NaN.
inline bool scales_alone(const AttentionParams& params) {
    return params.scoring.plain() && score_constants(params.scoring).scale > 0.0f;
}

inline ForwardKernelParams kernel_params(const AttentionParams& params, int queries) {
    const Sequences& sequences = params.sequences;
    // Packed rows lie side by side and pages one behind the other, whatever the sequences' lengths.
    const bool packed = sequences.cu_seqlens_q != nullptr;
    const int query_rows = packed ? INT_MAX : sequences.query_length;
    const int key_rows = packed ? INT_MAX : sequences.key_length;
    const int key_batch = sequences.block_table != nullptr ? INT_MAX : sequences.batch;
    const auto of_queries = [&](const void* tensor, const HeadStrides& strides, int columns) {
        return copy_bytes(tensor, strides, sequences.batch, query_rows, params.heads, columns,
                          element_size(params.dtype));
    };
    const auto of_keys = [&](const void* tensor, const HeadStrides& strides, int columns) {
        return copy_bytes(tensor, strides, key_batch, key_rows, params.kv_heads, columns,
                          element_size(params.dtype));
    };
    const ScoreConstants constants = score_constants(params.scoring);
    return {
        .attention = params,
        .constants = constants,
        .score_scale = scales_alone(params) ? constants.scale : 1.0f,
        .query_tiles = static_cast<int>(ceil_divide(sequences.query_length, queries)),
        .copy_bytes =
            {
                .q = of_queries(params.q, params.q_strides, params.head_dim),
                .k = of_keys(params.k, params.k_strides, params.head_dim),
                .v = of_keys(params.v, params.v_strides, params.value_dim),
                .out = of_queries(params.out, params.out_strides, params.value_dim),
            },
    };
}

template <typename Traits>
void launch_forward(void (*kernel)(ForwardKernelParams), const AttentionParams& params,
                    Stream stream) {
    const ForwardKernelParams arguments = kernel_params(params, Traits::kQueries);
    const std::int64_t blocks = static_cast<std::int64_t>(params.sequences.batch) * params.heads *
                                static_cast<std::int64_t>(arguments.query_tiles);
    if (blocks > INT_MAX) {
        throw std::invalid_argument("attention: q: expected at most 2147483647 query tiles, got " +
                                    std::to_string(blocks));
    }
    const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(blocks)),
                                       .threads = Traits::kThreads,
                                       .shared_bytes = sizeof(typename Traits::SharedPlan)};
    device::launch(kernel, shape, stream, arguments);
}

// Calls launch.template operator()<kHeadDim, kValueDim, kScored>() for the smallest columns that
// hold the head dims.
template <typename Launch>
void choose_traits(const AttentionParams& params, Launch&& launch) {
    const auto choose = [&]<bool kScored>() {
        if (std::max(params.head_dim, params.value_dim) <= 64) {
            launch.template operator()<64, 64, kScored>();
        } else if (std::max(params.head_dim, params.value_dim) <= 128) {
            launch.template operator()<128, 128, kScored>();
        } else if (params.head_dim <= 192 && params.value_dim <= 128) {
            launch.template operator()<192, 128, kScored>();
        } else {
            launch.template operator()<256, 256, kScored>();
        }
    };
    if (scales_alone(params)) {
        choose.template operator()<false>();
    } else {
        choose.template operator()<true>();
    }
}

// attention_forward_cuda for float32, whose kernels are a unit of their own.
void attention_forward_float32(const AttentionParams& params, Stream stream);

}  // namespace warploom::attention
