// Launches the attention kernels.
#include "attention/attention.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "attention/attention.cuh"
#include "attention/attention_float32.cuh"

namespace warploom::attention {
namespace {

constexpr int kMaxHeadDim = 256;

void check(const AttentionParams& params) {
    const int head_dim = std::max(params.head_dim, params.value_dim);
    if (std::min(params.head_dim, params.value_dim) < 1 || head_dim > kMaxHeadDim) {
        throw std::invalid_argument("attention: head dimensions: expected 1 to 256, got q, k " +
                                    std::to_string(params.head_dim) + " and v " +
                                    std::to_string(params.value_dim));
    }
    if (params.kv_heads < 1 || params.heads % params.kv_heads != 0) {
        throw std::invalid_argument("attention: q: expected a multiple of " +
                                    std::to_string(params.kv_heads) + " heads, got " +
                                    std::to_string(params.heads));
    }
}

// The largest of 16, 8, 4, ... bytes that divides the address of every row and the row's length.
// The stride of a dimension of size 1 does not matter.
int copy_bytes(const void* tensor, const HeadStrides& strides, int batch, int length, int heads,
               int columns, int element_bytes) {
    const auto bytes = [&](std::int64_t elements) {
        return static_cast<std::uint64_t>(elements) * static_cast<std::uint64_t>(element_bytes);
    };
    std::uint64_t bits = reinterpret_cast<std::uintptr_t>(tensor) | bytes(columns) | 16;
    bits |= batch > 1 ? bytes(strides.batch) : 0;
    bits |= length > 1 ? bytes(strides.sequence) : 0;
    bits |= heads > 1 ? bytes(strides.head) : 0;
    return static_cast<int>(bits & (~bits + 1));
}

ForwardKernelParams kernel_params(const AttentionParams& params, int queries) {
    constexpr double kLog2E = 1.44269504088896341;
    const int bytes = element_size(params.dtype);
    return {
        .attention = params,
        // Positive for a softmax_scale of 0 too: 0 times the -inf of a hidden key would be NaN.
        .score_scale = std::max(static_cast<float>(std::abs(params.softmax_scale) * kLog2E),
                                std::numeric_limits<float>::min()),
        .negate_scores = params.softmax_scale < 0.0,
        .query_tiles = static_cast<int>(ceil_divide(params.query_length, queries)),
        .copy_bytes =
            {
                .q = copy_bytes(params.q, params.q_strides, params.batch, params.query_length,
                                params.heads, params.head_dim, bytes),
                .k = copy_bytes(params.k, params.k_strides, params.batch, params.key_length,
                                params.kv_heads, params.head_dim, bytes),
                .v = copy_bytes(params.v, params.v_strides, params.batch, params.key_length,
                                params.kv_heads, params.value_dim, bytes),
                .out = copy_bytes(params.out, params.out_strides, params.batch, params.query_length,
                                  params.heads, params.value_dim, bytes),
            },
    };
}

template <typename Traits>
void launch_forward(void (*kernel)(ForwardKernelParams), const AttentionParams& params,
                    Stream stream) {
    const ForwardKernelParams arguments = kernel_params(params, Traits::kQueries);
    const std::int64_t blocks = static_cast<std::int64_t>(params.batch) * params.heads *
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

template <typename T, int kHeadDim>
void launch_forward(const AttentionParams& params, Stream stream) {
    if constexpr (std::is_same_v<T, float>) {
        using Traits = Float32Traits<kHeadDim>;
        launch_forward<Traits>(attention_forward_float32_kernel<Traits>, params, stream);
    } else {
        using Traits = ForwardTraits<T, kHeadDim>;
        launch_forward<Traits>(attention_forward_kernel<Traits>, params, stream);
    }
}

template <typename T>
void launch_forward(const AttentionParams& params, Stream stream) {
    const int head_dim = std::max(params.head_dim, params.value_dim);
    if (head_dim <= 64) {
        launch_forward<T, 64>(params, stream);
    } else if (head_dim <= 128) {
        launch_forward<T, 128>(params, stream);
    } else {
        launch_forward<T, 256>(params, stream);
    }
}

}  // namespace

void attention_forward_cuda(const AttentionParams& params, Stream stream) {
    check(params);
    if (params.batch == 0 || params.heads == 0 || params.query_length == 0) {
        return;
    }
    dispatch_dtype<TypeCase<DType::float32, float>, TypeCase<DType::float16, device::half>,
                   TypeCase<DType::bfloat16, device::bfloat16>>(
        params.dtype, [&]<typename T>() { launch_forward<T>(params, stream); });
}

}  // namespace warploom::attention
