// Launchers of the gated activations.
#include "gated_activation.cuh"

#include <algorithm>
#include <initializer_list>
#include <limits>

namespace warploom::activation {

namespace {

// Blocks for `rows` x `columns` elements, `vectors_per_block` vectors of kVector each.
template <int kVector>
dim3 grid_of(std::int64_t rows, std::int64_t columns, std::int64_t vectors_per_block) {
    return dim3(static_cast<unsigned>(
        std::min<std::int64_t>(ceil_divide(rows * columns / kVector, vectors_per_block),
                               std::numeric_limits<std::int32_t>::max())));
}

// Calls visit.template operator()<GatedTraits<T, kVector>>() with vectors of 16 bytes where all
// rows begin and end on such a boundary, else of one element.
template <typename Visit>
void dispatch_traits(DType dtype, std::int64_t columns, std::initializer_list<const void*> pointers,
                     std::initializer_list<std::int64_t> row_strides, Visit&& visit) {
    dispatch_dtype<TypeCase<DType::float32, float>, TypeCase<DType::float16, device::half>,
                   TypeCase<DType::bfloat16, device::bfloat16>>(dtype, [&]<typename T>() {
        if (are_vectors<T>(columns, pointers, row_strides)) {
            visit.template operator()<GatedTraits<T, kVectorElements<T>>>();
        } else {
            visit.template operator()<GatedTraits<T, 1>>();
        }
    });
}

}  // namespace

void gated_activation_cuda(const GatedActivationParams& params, Stream stream) {
    if (params.rows == 0 || params.columns == 0) {
        return;
    }
    dispatch_traits(params.dtype, params.columns, {params.gate, params.up, params.out},
                    {params.gate_row_stride, params.up_row_stride}, [&]<typename Traits>() {
                        device::launch(&gated_activation_kernel<Traits>,
                                       {.grid = grid_of<Traits::kVector>(
                                            params.rows, params.columns, Traits::kVectorsPerBlock),
                                        .threads = Traits::kThreads},
                                       stream, params);
                    });
}

void gated_activation_backward_cuda(const GatedActivationBackwardParams& params, Stream stream) {
    if (params.rows == 0 || params.columns == 0) {
        return;
    }
    dispatch_traits(params.dtype, params.columns,
                    {params.grad_out, params.gate, params.up, params.grad_gate, params.grad_up},
                    {params.grad_out_row_stride, params.gate_row_stride, params.up_row_stride},
                    [&]<typename Traits>() {
                        device::launch(&gated_activation_backward_kernel<Traits>,
                                       {.grid = grid_of<Traits::kVector>(
                                            params.rows, params.columns, Traits::kThreads),
                                        .threads = Traits::kThreads},
                                       stream, params);
                    });
}

}  // namespace warploom::activation
