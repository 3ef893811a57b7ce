// Kernel parameters and launches of attention backward.
#pragma once

#include <climits>
#include <stdexcept>
#include <string>

#include "attention/attention_backward.cuh"
#include "attention/attention_backward_launch.h"
#include "attention/copy_bytes.h"

namespace warploom::attention {

inline BackwardKernelParams backward_params(const AttentionBackwardParams& params) {
    const Sequences& sequences = params.sequences;
    // Packed rows lie side by side, whatever the sequences' lengths.
    const bool packed = sequences.cu_seqlens_q != nullptr;
    const int queries = packed ? INT_MAX : sequences.query_length;
    const int keys = packed ? INT_MAX : sequences.key_length;
    const auto of_queries = [&](const void* tensor, const HeadStrides& strides, int columns) {
        return copy_bytes(tensor, strides, sequences.batch, queries, params.heads, columns,
                          element_size(params.dtype));
    };
    const auto of_keys = [&](const void* tensor, const HeadStrides& strides, int columns) {
        return copy_bytes(tensor, strides, sequences.batch, keys, params.kv_heads, columns,
                          element_size(params.dtype));
    };
    return {
        .attention = params,
        .constants = score_constants(params.scoring),
        .softmax_scale = static_cast<float>(params.scoring.softmax_scale),
        .tiles = 0,
        .copy_bytes =
            {
                .q = of_queries(params.q, params.q_strides, params.head_dim),
                .k = of_keys(params.k, params.k_strides, params.head_dim),
                .v = of_keys(params.v, params.v_strides, params.value_dim),
                .grad_out = of_queries(params.grad_out, params.grad_out_strides, params.value_dim),
                .grad_q = of_queries(params.grad_q, params.grad_q_strides, params.head_dim),
                .grad_k = of_keys(params.grad_k, params.grad_k_strides, params.head_dim),
                .grad_v = of_keys(params.grad_v, params.grad_v_strides, params.value_dim),
            },
    };
}

// One block for each of the tiles of `rows` of `length` rows, of each head and batch entry.
inline void launch_tiles(void (*kernel)(BackwardKernelParams), BackwardKernelParams params,
                         int length, int rows, int heads, int threads, std::size_t shared_bytes,
                         Stream stream) {
    params.tiles = static_cast<int>(ceil_divide(length, rows));
    const std::int64_t blocks =
        static_cast<std::int64_t>(params.attention.sequences.batch) * heads * params.tiles;
    if (blocks > INT_MAX) {
        throw std::invalid_argument("attention_backward: expected at most 2147483647 tiles, got " +
                                    std::to_string(blocks));
    }
    if (blocks > 0) {
        const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(blocks)),
                                           .threads = threads,
                                           .shared_bytes = shared_bytes};
        device::launch(kernel, shape, stream, params);
    }
}

// One block for each owned tile.
template <typename Traits>
void launch_gradient(const BackwardKernelParams& params, Stream stream) {
    static_assert(sizeof(typename Traits::SharedPlan) <= 99 * 1024,
                  "launch_gradient: the plan exceeds 99 KiB");
    const AttentionBackwardParams& attention = params.attention;
    const Sequences& sequences = attention.sequences;
    launch_tiles(attention_backward_kernel<Traits>, params,
                 Traits::kOwnsQueries ? sequences.query_length : sequences.key_length,
                 Traits::kOwnedRows, Traits::kOwnsQueries ? attention.heads : attention.kv_heads,
                 Traits::kThreads, sizeof(typename Traits::SharedPlan), stream);
}

}  // namespace warploom::attention
