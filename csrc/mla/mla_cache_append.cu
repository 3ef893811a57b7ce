// Launcher of writing to a cache of latents.
#include "mla/mla_cache_append.cuh"

#include <algorithm>
#include <cstdint>
#include <limits>

namespace warploom::mla {
namespace {

// Whether kLaneFeatures elements of every row begin at a multiple of their size.
bool are_aligned(const void* tensor, std::int64_t strides, int element_bytes) {
    const std::uint64_t bits = reinterpret_cast<std::uintptr_t>(tensor) |
                               static_cast<std::uint64_t>(strides) * element_bytes;
    return bits % static_cast<std::uint64_t>(kLaneFeatures * element_bytes) == 0;
}

AppendWork append_work(const MlaCacheAppendParams& params) {
    const bool dense = params.cache.format == CacheFormat::dense;
    const int bytes = element_size(params.dtype);
    return {.params = params,
            .tokens = params.cu_seqlens != nullptr
                          ? params.count
                          : static_cast<std::int64_t>(params.batch) * params.count,
            .source_vectors =
                are_aligned(params.compressed_kv, params.batch_stride | params.row_stride, bytes),
            .weight_vectors = are_aligned(params.norm_weight, 0, element_size(params.weight_dtype)),
            .cache_vectors =
                are_aligned(params.kv_cache, params.cache.batch_stride | params.cache.row_stride,
                            dense ? bytes : 1)};
}

}  // namespace

void mla_cache_append_cuda(const MlaCacheAppendParams& params, Stream stream) {
    const AppendWork work = append_work(params);
    if (work.tokens == 0 || params.batch == 0 || params.cache.capacity == 0) {
        return;
    }
    const std::int64_t blocks = std::min<std::int64_t>(ceil_divide(work.tokens, kAppendTokens),
                                                       std::numeric_limits<std::int32_t>::max());
    dispatch_dtype<TypeCase<DType::float32, float>, TypeCase<DType::float16, device::half>,
                   TypeCase<DType::bfloat16, device::bfloat16>>(params.dtype, [&]<typename T>() {
        device::launch(mla_cache_append_kernel<T>,
                       {.grid = dim3(static_cast<unsigned>(blocks)), .threads = kAppendThreads},
                       stream, work);
    });
}

}  // namespace warploom::mla
