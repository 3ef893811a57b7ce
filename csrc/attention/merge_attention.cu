// Launchers of merging, forward and backward.
#include "attention/merge_attention.cuh"

#include <initializer_list>

namespace warploom::attention {
namespace {

template <typename Traits, typename Params>
void launch_merge(void (*kernel)(MergeWork<Params>), const Params& params, Stream stream) {
    MergeWork<Params> work{
        .params = params, .rows = params.batch * params.length * params.heads, .row_lanes = 1};
    while (work.row_lanes < device::kWarpSize && work.row_lanes * Traits::kVector < params.dim) {
        work.row_lanes *= 2;
    }
    if (work.rows == 0) {
        return;
    }
    // Fewer than 2^31 for all that fits a device's memory: each block has 4 rows of 33 or more
    // elements, or more rows.
    const std::int64_t blocks = ceil_divide(work.rows * work.row_lanes, Traits::kThreads);
    device::launch(kernel,
                   {.grid = dim3(static_cast<unsigned>(blocks)), .threads = Traits::kThreads},
                   stream, work);
}

// Calls launch.template operator()<Traits>() with vectors where `outs` allow them.
template <typename Launch>
void dispatch(DType dtype, std::int64_t dim, std::initializer_list<const void*> outs,
              const Launch& launch) {
    dispatch_dtype<TypeCase<DType::float32, float>, TypeCase<DType::float16, device::half>,
                   TypeCase<DType::bfloat16, device::bfloat16>>(dtype, [&]<typename T>() {
        if (are_vectors<T>(dim, outs, {})) {
            launch.template operator()<MergeTraits<T, kVectorElements<T>>>();
        } else {
            launch.template operator()<MergeTraits<T, 1>>();
        }
    });
}

}  // namespace

void merge_attention_cuda(const MergeParams& params, Stream stream) {
    dispatch(params.dtype, params.dim, {params.out1, params.out2, params.out},
             [&]<typename Traits>() {
                 launch_merge<Traits>(&merge_attention_kernel<Traits>, params, stream);
             });
}

void merge_attention_backward_cuda(const MergeBackwardParams& params, Stream stream) {
    dispatch(params.dtype, params.dim,
             {params.grad_out, params.out1, params.out2, params.grad_out1, params.grad_out2},
             [&]<typename Traits>() {
                 launch_merge<Traits>(&merge_attention_backward_kernel<Traits>, params, stream);
             });
}

}  // namespace warploom::attention
