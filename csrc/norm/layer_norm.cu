// Launchers of LayerNorm: which threads a row gets, and whether its vectors may move 16 bytes at
// once.
#include "layer_norm.cuh"

namespace warploom::norm {

namespace {

template <typename Traits>
void launch_forward(const LayerNormParams& params, Stream stream) {
    device::launch(&layer_norm_kernel<Traits>,
                   {.grid = grid_of_rows<Traits>(params.rows),
                    .threads = Traits::kThreads,
                    .shared_bytes = sizeof(LayerNormPlan<Traits>)},
                   stream, params);
}

template <typename Traits>
void launch_backward(const LayerNormBackwardParams& params, Stream stream) {
    device::launch(&layer_norm_backward_kernel<Traits>,
                   {.grid = dim3(static_cast<unsigned>(params.partials)),
                    .threads = Traits::kThreads,
                    .shared_bytes = sizeof(LayerNormBackwardPlan<Traits>)},
                   stream, params);
}

}  // namespace

void layer_norm_cuda(const LayerNormParams& params, Stream stream) {
    check_columns("layer_norm", params.columns);
    if (params.rows == 0 || params.columns == 0) {
        return;
    }
    dispatch_element(params.dtype, [&]<typename T>() {
        const bool vectors =
            are_vectors<T>(params.columns, {params.x, params.weight, params.bias, params.out},
                           {params.x_row_stride});
        using Widest = RowTraits<T, kVectorElements<T>, 1024, 1024, 16 / kVectorElements<T>>;
        dispatch_rows<T, 16, 128, Widest>(vectors, params.columns, [&]<typename Traits>() {
            launch_forward<Traits>(params, stream);
        });
    });
}

void layer_norm_backward_cuda(const LayerNormBackwardParams& params, Stream stream) {
    check_columns("layer_norm_backward", params.columns);
    if (params.columns == 0) {
        return;
    }
    // Without rows the sums are still written: zeros.
    dispatch_element(params.dtype, [&]<typename T>() {
        const bool vectors = are_vectors<T>(
            params.columns,
            {params.grad_out, params.x, params.weight, params.grad_x, params.workspace},
            {params.grad_out_row_stride, params.x_row_stride});
        // Two sums a column: twice the registers, half the threads.
        using Widest = RowTraits<T, kVectorElements<T>, 512, 512, 16 / kVectorElements<T>>;
        dispatch_rows<T, 8, 512, Widest>(vectors, params.columns, [&]<typename Traits>() {
            launch_backward<Traits>(params, stream);
        });
    });
    launch_partial_sum({.workspace = static_cast<const float*>(params.workspace),
                        .outputs = {params.grad_weight, params.grad_bias},
                        .partials = params.partials,
                        .columns = params.columns},
                       2, params.weight_dtype, stream);
}

}  // namespace warploom::norm
