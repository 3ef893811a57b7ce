// Launcher of rotary position embedding.
#include "rotary.cuh"

#include <algorithm>
#include <limits>

namespace warploom::rope {

namespace {

template <typename Traits>
void launch_rotary(const RotaryParams& params, Stream stream) {
    const RotaryWork work = rotary_work<Traits>(params);
    const std::int64_t blocks = ceil_divide(work.items, Traits::kThreads);
    device::launch(&rotary_kernel<Traits>,
                   {.grid = dim3(static_cast<unsigned>(
                        std::min<std::int64_t>(blocks, std::numeric_limits<std::int32_t>::max()))),
                    .threads = Traits::kThreads},
                   stream, work);
}

// Both halves of the turned channels, the copied channels and the tables begin on 16 bytes.
template <typename T>
bool may_use_vectors(const RotaryParams& params) {
    return are_vectors<T>(params.rotary_dim / 2, {params.x, params.out},
                          {params.head_dim, params.x_batch_stride, params.x_sequence_stride,
                           params.x_head_stride}) &&
           are_vectors<float>(params.rotary_dim / 2, {params.cos, params.sin},
                              {params.cos_row_stride, params.sin_row_stride});
}

}  // namespace

void apply_rotary_cuda(const RotaryParams& params, Stream stream) {
    if (params.batch == 0 || params.sequence == 0 || params.heads == 0 || params.head_dim == 0) {
        return;
    }
    dispatch_dtype<TypeCase<DType::float32, float>, TypeCase<DType::float16, device::half>,
                   TypeCase<DType::bfloat16, device::bfloat16>>(params.dtype, [&]<typename T>() {
        if (may_use_vectors<T>(params)) {
            launch_rotary<RotaryTraits<T, kVectorElements<T>>>(params, stream);
        } else {
            launch_rotary<RotaryTraits<T, 1>>(params, stream);
        }
    });
}

}  // namespace warploom::rope
