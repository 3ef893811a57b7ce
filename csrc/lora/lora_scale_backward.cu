// Launches the gradient of column_scale's product.
#include "lora/lora_scale_backward.cuh"

#include "lora/launch.cuh"
#include "norm/row_group.cuh"

namespace warploom::lora {
namespace {

template <typename Traits>
void launch_scale_backward(const LoraScaleBackwardParams& params, int partials, Stream stream) {
    const dim3 grid(static_cast<unsigned>(ceil_divide(params.columns, Traits::kColumns)),
                    static_cast<unsigned>(partials));
    device::launch(scale_backward_kernel<Traits>, {grid, Traits::kThreads}, stream, params);
}

}  // namespace

void lora_scale_backward_cuda(const LoraScaleBackwardParams& params, Stream stream) {
    if (params.columns == 0) {
        return;
    }
    const int partials = lora_scale_partials(params.rows);
    dispatch(params.dtype, [&]<typename T>() {
        if (are_vectors<T>(params.columns, {params.grad_out, params.unscaled, params.grad},
                           {params.grad_row_stride})) {
            launch_scale_backward<ScaleBackwardTraits<T, kVectorElements<T>>>(params, partials,
                                                                              stream);
        } else {
            launch_scale_backward<ScaleBackwardTraits<T, 1>>(params, partials, stream);
        }
    });
    if (params.grad_column_scale != nullptr) {
        const norm::PartialSumParams sums = {
            .workspace = static_cast<const float*>(params.workspace),
            .outputs = {params.grad_column_scale},
            .partials = partials,
            .columns = params.columns};
        norm::launch_partial_sum(sums, 1, DType::float32, stream);
    }
}

}  // namespace warploom::lora
