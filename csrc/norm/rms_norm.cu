// Launchers of RMSNorm: which threads a row gets, and whether its vectors may move 16 bytes at
// once.
#include "rms_norm.cuh"

namespace warploom::norm {

namespace {

template <typename Traits>
void launch_forward(const RmsNormParams& params, Stream stream) {
    device::launch(&rms_norm_kernel<Traits>,
                   {.grid = grid_of_rows<Traits>(params.rows),
                    .threads = Traits::kThreads,
                    .shared_bytes = sizeof(RmsNormPlan<Traits>)},
                   stream, params);
}

template <typename Traits>
void launch_backward(const RmsNormBackwardParams& params, Stream stream) {
    device::launch(&rms_norm_backward_kernel<Traits>,
                   {.grid = dim3(static_cast<unsigned>(params.partials)),
                    .threads = Traits::kThreads,
                    .shared_bytes = sizeof(RmsNormBackwardPlan<Traits>)},
                   stream, params);
}

}  // namespace

void rms_norm_cuda(const RmsNormParams& params, Stream stream) {
    check_columns("rms_norm", params.columns);
    if (params.rows == 0 || params.columns == 0) {
        return;
    }
    dispatch_element(params.dtype, [&]<typename T>() {
        const bool vectors = are_vectors<T>(
            params.columns, {params.x, params.residual, params.weight, params.out, params.sum},
            {params.x_row_stride, params.residual != nullptr ? params.residual_row_stride : 0});
        using Widest = RowTraits<T, kVectorElements<T>, 1024, 1024, 16 / kVectorElements<T>>;
        dispatch_rows<T, 16, 128, Widest>(vectors, params.columns, [&]<typename Traits>() {
            launch_forward<Traits>(params, stream);
        });
    });
}

void rms_norm_backward_cuda(const RmsNormBackwardParams& params, Stream stream) {
    check_columns("rms_norm_backward", params.columns);
    if (params.columns == 0) {
        return;
    }
    // Without rows the sums are still written: zeros.
    dispatch_element(params.dtype, [&]<typename T>() {
        const bool vectors =
            are_vectors<T>(params.columns,
                           {params.grad_out, params.x, params.weight, params.grad_sum,
                            params.grad_x, params.workspace},
                           {params.grad_out_row_stride, params.x_row_stride,
                            params.grad_sum != nullptr ? params.grad_sum_row_stride : 0});
        using Widest = RowTraits<T, kVectorElements<T>, 1024, 1024, 8 / kVectorElements<T>>;
        dispatch_rows<T, 8, 512, Widest>(vectors, params.columns, [&]<typename Traits>() {
            launch_backward<Traits>(params, stream);
        });
    });
    launch_partial_sum({.workspace = static_cast<const float*>(params.workspace),
                        .outputs = {params.grad_weight, nullptr},
                        .partials = params.partials,
                        .columns = params.columns},
                       1, params.weight_dtype, stream);
}

}  // namespace warploom::norm
