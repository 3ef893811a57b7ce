// Launches absorbed backward: delta, the gradients of queries and keys, and the merge of the
// latter's parts.
#include <algorithm>
#include <climits>
#include <stdexcept>
#include <string>

#include "attention/copy_bytes.h"
#include "mla/mla_absorbed_backward.cuh"
#include "mla/mla_absorbed_backward_float32.cuh"
#include "mla/mla_absorbed_backward_mma.cuh"

namespace warploom::mla {
namespace {

void check(const MlaAbsorbedBackwardParams& params) {
    const auto is_served = [](int columns, int smallest, int largest) {
        return columns >= smallest && columns <= largest && columns % 16 == 0;
    };
    if (!is_served(params.d_latent, 16, BackwardSizes::kMaxLatent) ||
        !is_served(params.d_rope, 0, BackwardSizes::kMaxRope)) {
        throw std::invalid_argument(
            "mla_absorbed_backward: q: expected multiples of 16, d_latent up to 512 and d_rope up "
            "to 256, got " +
            std::to_string(params.d_latent) + " and " + std::to_string(params.d_rope));
    }
    const std::int64_t rows = static_cast<std::int64_t>(params.query_length) * params.heads;
    if (rows > INT_MAX / 2) {
        throw std::invalid_argument(
            "mla_absorbed_backward: q: expected at most 1073741823 queries of all heads, got " +
            std::to_string(rows));
    }
}

BackwardKernelParams kernel_params(const MlaAbsorbedBackwardParams& params) {
    const auto copy_bytes = [&](const void* tensor, const attention::HeadStrides& strides,
                                int length, int heads, int columns) {
        return attention::copy_bytes(tensor, strides, params.batch, length, heads, columns,
                                     element_size(params.dtype));
    };
    const int columns = params.d_latent + params.d_rope;
    return {
        .mla = params,
        .softmax_scale = static_cast<float>(params.softmax_scale),
        .rows = params.query_length * params.heads,
        .tiles = 0,
        .copy_bytes =
            {
                .q = copy_bytes(
                    params.q,
                    {params.q_batch_stride, params.q_sequence_stride, params.q_head_stride},
                    params.query_length, params.heads, columns),
                .kv = copy_bytes(params.kv, {params.kv_batch_stride, params.kv_row_stride, 0},
                                 params.kv_length, 1, columns),
                .grad_out =
                    copy_bytes(params.grad_out,
                               {params.grad_out_batch_stride, params.grad_out_sequence_stride,
                                params.grad_out_head_stride},
                               params.query_length, params.heads, params.d_latent),
            },
    };
}

// One block for each of the `tiles` of each of `matrices`.
void launch_tiles(void (*kernel)(BackwardKernelParams), BackwardKernelParams params,
                  std::int64_t matrices, std::int64_t tiles, int threads, std::size_t shared_bytes,
                  Stream stream) {
    if (matrices * tiles > INT_MAX) {
        throw std::invalid_argument(
            "mla_absorbed_backward: q: expected at most 2147483647 tiles, got " +
            std::to_string(matrices * tiles));
    }
    if (matrices * tiles > 0) {
        params.tiles = static_cast<int>(tiles);
        const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(matrices * tiles)),
                                           .threads = threads,
                                           .shared_bytes = shared_bytes};
        device::launch(kernel, shape, stream, params);
    }
}

template <typename Traits>
void launch_gradient(const BackwardKernelParams& params, Stream stream) {
    static_assert(sizeof(typename Traits::SharedPlan) <= 99 * 1024,
                  "launch_gradient: the plan exceeds 99 KiB");
    const MlaAbsorbedBackwardParams& mla = params.mla;
    const std::int64_t parts = Traits::kOwnsQueries ? 1 : mla.query_parts;
    const int rows = Traits::kOwnsQueries ? params.rows : mla.kv_length;
    launch_tiles(mla_absorbed_backward_kernel<Traits>, params, mla.batch * parts,
                 ceil_divide(rows, Traits::kOwnedRows), Traits::kThreads,
                 sizeof(typename Traits::SharedPlan), stream);
}

template <typename T, template <bool> typename Traits>
void launch(const BackwardKernelParams& params, Stream stream) {
    const MlaAbsorbedBackwardParams& mla = params.mla;
    launch_tiles(mla_absorbed_backward_delta_kernel<T>, params, mla.batch,
                 ceil_divide(params.rows, kDeltaWarps), kDeltaWarps * device::kWarpSize, 0, stream);
    launch_gradient<Traits<true>>(params, stream);
    launch_gradient<Traits<false>>(params, stream);
    if (mla.query_parts > 1) {
        const std::int64_t elements =
            static_cast<std::int64_t>(mla.kv_length) * (mla.d_latent + mla.d_rope);
        launch_tiles(mla_absorbed_backward_merge_kernel<T>, params, mla.batch,
                     ceil_divide(elements, kMergeElements), kMergeThreads, 0, stream);
    }
}

template <bool kOwnsQueries>
using HalfTraits = BackwardTraits<device::half, kOwnsQueries>;
template <bool kOwnsQueries>
using Bfloat16Traits = BackwardTraits<device::bfloat16, kOwnsQueries>;

}  // namespace

int mla_absorbed_backward_parts(const MlaAbsorbedBackwardParams& params) {
    // About two blocks for each multiprocessor of a large device, but no part so short that writing
    // and reading its sums would be much of its work.
    constexpr std::int64_t kEnoughBlocks = 256;
    constexpr std::int64_t kKeysOfBlock = 32;
    constexpr std::int64_t kFewestRows = 256;
    const std::int64_t rows = static_cast<std::int64_t>(params.query_length) * params.heads;
    const std::int64_t blocks = params.batch * ceil_divide(params.kv_length, kKeysOfBlock);
    if (blocks == 0 || rows < kFewestRows) {
        return 1;
    }
    return static_cast<int>(std::min(ceil_divide(kEnoughBlocks, blocks), rows / kFewestRows));
}

void mla_absorbed_backward_cuda(const MlaAbsorbedBackwardParams& params, Stream stream) {
    check(params);
    const BackwardKernelParams kernel = kernel_params(params);
    switch (params.dtype) {
        case DType::float32:
            return launch<float, BackwardFloat32Traits>(kernel, stream);
        case DType::float16:
            return launch<device::half, HalfTraits>(kernel, stream);
        case DType::bfloat16:
            return launch<device::bfloat16, Bfloat16Traits>(kernel, stream);
        default:
            throw std::runtime_error(std::string("no kernel for dtype ") + name_of(params.dtype));
    }
}

}  // namespace warploom::mla
