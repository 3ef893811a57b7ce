// Launches attention backward: delta, then the kernels of its dtype.
#include "attention/attention_backward.h"

#include <algorithm>

#include "attention/attention_backward_launch.cuh"

namespace warploom::attention {
namespace {

constexpr int kMaxHeadDim = 256;

void check(const AttentionBackwardParams& params) {
    if (std::min(params.head_dim, params.value_dim) < 1 ||
        std::max(params.head_dim, params.value_dim) > kMaxHeadDim) {
        throw std::invalid_argument(
            "attention_backward: head dimensions: expected 1 to 256, got q, k " +
            std::to_string(params.head_dim) + " and v " + std::to_string(params.value_dim));
    }
    if (params.kv_heads < 1 || params.heads % params.kv_heads != 0) {
        throw std::invalid_argument("attention_backward: q: expected a multiple of " +
                                    std::to_string(params.kv_heads) + " heads, got " +
                                    std::to_string(params.heads));
    }
}

template <typename T>
void launch_delta(const AttentionBackwardParams& params, Stream stream) {
    launch_tiles(attention_backward_delta_kernel<T>, backward_params(params),
                 params.sequences.query_length, kDeltaWarps, params.heads,
                 kDeltaWarps * device::kWarpSize, 0, stream);
}

}  // namespace

void attention_backward_cuda(const AttentionBackwardParams& params, Stream stream) {
    check(params);
    switch (params.dtype) {
        case DType::float32:
            launch_delta<float>(params, stream);
            return launch_backward_float32(params, stream);
        case DType::float16:
            launch_delta<device::half>(params, stream);
            return launch_backward_float16(params, stream);
        case DType::bfloat16:
            launch_delta<device::bfloat16>(params, stream);
            return launch_backward_bfloat16(params, stream);
        default:
            throw std::runtime_error(std::string("no kernel for dtype ") + name_of(params.dtype));
    }
}

}  // namespace warploom::attention
