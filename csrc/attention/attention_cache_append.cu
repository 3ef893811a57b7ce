// Launcher of writing to a cache.
#include "attention/attention_cache_append.cuh"

#include <algorithm>
#include <limits>

namespace warploom::attention {
namespace {

template <typename Traits>
void launch_append(const CacheAppendParams& params, Stream stream) {
    const AppendWork work = append_work<Traits>(params);
    const std::int64_t blocks = ceil_divide(work.items, Traits::kThreads);
    device::launch(&attention_cache_append_kernel<Traits>,
                   {.grid = dim3(static_cast<unsigned>(
                        std::min<std::int64_t>(blocks, std::numeric_limits<std::int32_t>::max()))),
                    .threads = Traits::kThreads},
                   stream, work);
}

// Every row of the four tensors begins on 16 bytes, and so do both halves of what turns.
template <typename T>
bool may_use_vectors(const CacheAppendParams& params) {
    const auto aligned = [](int columns, const void* source, const HeadStrides& from,
                            const void* cache, const HeadStrides& to) {
        return are_vectors<T>(
            columns, {source, cache},
            {from.batch, from.sequence, from.head, to.batch, to.sequence, to.head});
    };
    return aligned(params.head_dim, params.k, params.k_strides, params.k_cache,
                   params.k_cache_strides) &&
           aligned(params.value_dim, params.v, params.v_strides, params.v_cache,
                   params.v_cache_strides) &&
           are_vectors<T>(params.rotary_dim / 2, {params.cos, params.sin}, {});
}

}  // namespace

void attention_cache_append_cuda(const CacheAppendParams& params, Stream stream) {
    if (params.batch == 0 || params.count == 0 || params.kv_heads == 0 || params.capacity == 0 ||
        params.head_dim + params.value_dim == 0) {
        return;
    }
    dispatch_dtype<TypeCase<DType::float32, float>, TypeCase<DType::float16, device::half>,
                   TypeCase<DType::bfloat16, device::bfloat16>>(params.dtype, [&]<typename T>() {
        if (may_use_vectors<T>(params)) {
            launch_append<AppendTraits<T, kVectorElements<T>>>(params, stream);
        } else {
            launch_append<AppendTraits<T, 1>>(params, stream);
        }
    });
}

}  // namespace warploom::attention
