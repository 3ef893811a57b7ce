// Launchers of the rows of unit length.
#include "l2_norm.cuh"

namespace warploom::norm {

void l2_norm_cuda(const L2NormParams& params, Stream stream) {
    check_columns("l2_norm", params.columns);
    if (params.rows == 0) {
        return;
    }
    dispatch_element(params.dtype, [&]<typename T>() {
        const bool vectors =
            are_vectors<T>(params.columns, {params.x, params.out}, {params.x_row_stride});
        using Widest = RowTraits<T, kVectorElements<T>, 1024, 1024, 16 / kVectorElements<T>>;
        dispatch_rows<T, 16, 128, Widest>(vectors, params.columns, [&]<typename Traits>() {
            device::launch(&l2_norm_kernel<Traits>,
                           {.grid = grid_of_rows<Traits>(params.rows),
                            .threads = Traits::kThreads,
                            .shared_bytes = sizeof(L2NormPlan<Traits>)},
                           stream, params);
        });
    });
}

void l2_norm_backward_cuda(const L2NormBackwardParams& params, Stream stream) {
    check_columns("l2_norm_backward", params.columns);
    if (params.rows == 0) {
        return;
    }
    dispatch_element(params.dtype, [&]<typename T>() {
        const bool vectors =
            are_vectors<T>(params.columns, {params.grad_out, params.x, params.grad_x},
                           {params.grad_out_row_stride, params.x_row_stride});
        using Widest = RowTraits<T, kVectorElements<T>, 1024, 1024, 8 / kVectorElements<T>>;
        dispatch_rows<T, 8, 128, Widest>(vectors, params.columns, [&]<typename Traits>() {
            device::launch(&l2_norm_backward_kernel<Traits>,
                           {.grid = grid_of_rows<Traits>(params.rows),
                            .threads = Traits::kThreads,
                            .shared_bytes = sizeof(L2NormPlan<Traits>)},
                           stream, params);
        });
    });
}

}  // namespace warploom::norm
