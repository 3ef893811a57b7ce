// Launcher of the cross-entropy of rows.
#include <limits>

#include "cross_entropy_rows.cuh"

namespace warploom::vocab {

void cross_entropy_rows_cuda(const CrossEntropyRowsParams& params, Stream stream) {
    if (params.rows == 0) {
        return;
    }
    const auto launch = [&]<typename Traits>() {
        constexpr std::int64_t kMostBlocks = std::numeric_limits<std::int32_t>::max();
        const std::int64_t blocks = std::min(params.rows, kMostBlocks);
        device::launch(&cross_entropy_rows_kernel<Traits>,
                       {.grid = dim3(static_cast<unsigned>(blocks)),
                        .threads = Traits::kThreads,
                        .shared_bytes = sizeof(CrossEntropyPlan<Traits>)},
                       stream, params);
    };
    dispatch_dtype<TypeCase<DType::float32, float>, TypeCase<DType::float16, device::half>,
                   TypeCase<DType::bfloat16, device::bfloat16>>(params.dtype, [&]<typename T>() {
        if (are_vectors<T>(params.columns, {params.logits}, {})) {
            launch.template operator()<CrossEntropyTraits<T, kVectorElements<T>>>();
        } else {
            launch.template operator()<CrossEntropyTraits<T, 1>>();
        }
    });
}

}  // namespace warploom::vocab
