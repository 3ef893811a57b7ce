// Launches decoding: the parts, and where there are several their merge.
#include "attention/attention_decode.h"

#include <algorithm>
#include <climits>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "attention/attention_decode.cuh"
#include "common/copy_bytes.h"

namespace warploom::attention {
namespace {

constexpr int kMaxHeadDim = 256;

// Shared memory and registers leave an sm_80 room for two blocks on a multiprocessor.
constexpr int kMultiprocessorBlocks = 2;
// A part of fewer keys takes longer to start and to merge than to read.
constexpr int kLeastPartKeys = 256;
constexpr int kMostSplits = 128;

void check(const AttentionDecodeParams& params) {
    const int head_dim = std::max(params.head_dim, params.value_dim);
    if (std::min(params.head_dim, params.value_dim) < 1 || head_dim > kMaxHeadDim) {
        throw std::invalid_argument(
            "attention_decode: head dimensions: expected 1 to 256, got q, k " +
            std::to_string(params.head_dim) + " and v " + std::to_string(params.value_dim));
    }
    if (params.capacity >= kMaxLength) {
        throw std::invalid_argument("attention_decode: k_cache: expected fewer than " +
                                    std::to_string(kMaxLength) + " keys a sequence, got " +
                                    std::to_string(params.capacity));
    }
}

unsigned checked_grid(std::int64_t blocks) {
    if (blocks > INT_MAX) {
        throw std::invalid_argument(
            "attention_decode: q: expected at most 2147483647 blocks, got " +
            std::to_string(blocks));
    }
    return static_cast<unsigned>(blocks);
}

// 16, 4, or the size of an element: what divides the address of every row and its length.
int unit_bytes(const void* tensor, const HeadStrides& strides, int columns, int element_bytes) {
    const std::int64_t elements = strides.batch | strides.sequence | strides.head | columns;
    const std::uint64_t bits = reinterpret_cast<std::uintptr_t>(tensor) |
                               static_cast<std::uint64_t>(elements) * element_bytes;
    return coarse_copy_unit(bits, element_bytes);
}

int rows_of_group(const AttentionDecodeParams& params) {
    return params.query_length * (params.heads / params.kv_heads);
}

template <typename Traits>
void launch_parts(const AttentionDecodeParams& params, Stream stream) {
    const int bytes = element_size(params.dtype);
    const DecodeKernelParams arguments = {
        .decode = params,
        .scores = score_constants(params.scoring),
        .row_tiles = static_cast<int>(ceil_divide(rows_of_group(params), Traits::kRows)),
        .q_bytes = unit_bytes(params.q, params.q_strides, params.head_dim, bytes),
        .k_bytes = unit_bytes(params.k_cache, params.k_strides, params.head_dim, bytes),
        .v_bytes = unit_bytes(params.v_cache, params.v_strides, params.value_dim, bytes),
        .out_bytes = unit_bytes(params.out, params.out_strides, params.value_dim, bytes),
    };
    const std::int64_t blocks = static_cast<std::int64_t>(params.batch) * params.num_splits *
                                params.kv_heads * arguments.row_tiles;
    device::launch(attention_decode_kernel<Traits>,
                   {.grid = dim3(checked_grid(blocks)),
                    .threads = Traits::kThreads,
                    .shared_bytes = sizeof(typename Traits::SharedPlan)},
                   stream, arguments);
}

template <typename T>
void launch_decode(const AttentionDecodeParams& params, Stream stream) {
    const int columns = std::max(params.head_dim, params.value_dim);
    if (columns <= 64) {
        launch_parts<DecodeTraits<T, 64>>(params, stream);
    } else if (columns <= 128) {
        launch_parts<DecodeTraits<T, 128>>(params, stream);
    } else {
        launch_parts<DecodeTraits<T, 256>>(params, stream);
    }
    if (params.num_splits > 1) {
        const std::int64_t rows =
            static_cast<std::int64_t>(params.batch) * params.heads * params.query_length;
        device::launch(attention_decode_combine_kernel<T>,
                       {.grid = dim3(checked_grid(rows)),
                        .threads = Combine::kThreads,
                        .shared_bytes = sizeof(Combine::SharedPlan)},
                       stream, params);
    }
}

}  // namespace

// The blocks of a wave of the device take one part each at a time. Chosen is the smallest number of
// splits that keeps it nearly as busy as the best one does: fewer parts, less to merge.
int attention_decode_splits(const AttentionDecodeParams& params) {
    const int rows = element_size(params.dtype) == 2 ? DecodeTraits<device::half, 64>::kRows
                                                     : DecodeTraits<float, 64>::kRows;
    const std::int64_t blocks = static_cast<std::int64_t>(params.batch) * params.kv_heads *
                                ceil_divide(rows_of_group(params), rows);
    const int most = std::clamp(params.capacity / kLeastPartKeys, 1, kMostSplits);
    const std::int64_t wave =
        static_cast<std::int64_t>(device::multiprocessor_count()) * kMultiprocessorBlocks;
    const auto busy = [&](int splits) {
        const std::int64_t waves = ceil_divide(blocks * splits, wave);
        return waves == 0 ? 1.0 : static_cast<double>(blocks * splits) / (waves * wave);
    };
    double best = 0.0;
    for (int splits = 1; splits <= most; ++splits) {
        best = std::max(best, busy(splits));
    }
    constexpr double kNearly = 0.85;
    int splits = 1;
    while (busy(splits) < kNearly * best) {
        ++splits;
    }
    return splits;
}

void attention_decode_cuda(const AttentionDecodeParams& params, Stream stream) {
    check(params);
    if (params.batch == 0 || params.heads == 0 || params.query_length == 0) {
        return;
    }
    dispatch_dtype<TypeCase<DType::float32, float>, TypeCase<DType::float16, device::half>,
                   TypeCase<DType::bfloat16, device::bfloat16>>(
        params.dtype, [&]<typename T>() { launch_decode<T>(params, stream); });
}

}  // namespace warploom::attention
