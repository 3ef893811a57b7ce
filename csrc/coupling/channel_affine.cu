// Launches a scale and a shift per channel, and its gradients.
#include "coupling/channel_affine.cuh"

#include "norm/row_group.cuh"

namespace warploom::coupling {
namespace {

using norm::dispatch_element;

// Whether vectors along a line lie within it, and are aligned in all of `pointers`.
template <typename T>
bool have_vectors(const ChannelShape& shape, const ChannelMap& map,
                  std::initializer_list<const void*> pointers,
                  std::initializer_list<std::int64_t> strides) {
    const bool along_channels = shape.inner == 1;
    return are_vectors<T>(along_channels ? shape.channels : shape.inner, pointers, strides) &&
           (!along_channels || are_vectors<T>(0, {map.scale, map.shift}, {}));
}

template <typename Traits>
void launch_forward(const ChannelAffineParams& params, Stream stream) {
    const ChannelShape& shape = params.shape;
    constexpr int kBlock = Traits::kThreads * Traits::kItems * Traits::kVector;
    const std::int64_t blocks = ceil_divide(shape.outer * shape.channels * shape.inner, kBlock);
    device::launch(&channel_affine_kernel<Traits>,
                   {.grid = dim3(static_cast<unsigned>(blocks)), .threads = Traits::kThreads},
                   stream, params);
}

template <typename Traits>
void launch_backward(const ChannelAffineBackwardParams& params, Stream stream) {
    const auto parts = static_cast<unsigned>(params.parts.count);
    const auto channels = static_cast<unsigned>(params.shape.channels);
    if (params.shape.inner == 1) {
        const std::int64_t columns = params.shape.channels / Traits::kVector;
        device::launch(
            &channel_rows_backward_kernel<Traits>,
            {.grid = dim3(static_cast<unsigned>(ceil_divide(columns, Traits::kThreads)), parts),
             .threads = Traits::kThreads,
             .shared_bytes = sizeof(ChannelRowsPlan<Traits>)},
            stream, params);
    } else {
        device::launch(&channel_lines_backward_kernel<Traits>,
                       {.grid = dim3(parts * channels),
                        .threads = Traits::kThreads,
                        .shared_bytes = sizeof(ChannelLinesPlan<Traits>)},
                       stream, params);
    }
}

}  // namespace

void channel_affine_cuda(const ChannelAffineParams& params, Stream stream) {
    dispatch_element(params.dtype, [&]<typename T>() {
        if (have_vectors<T>(params.shape, params.map, {params.x, params.z}, {params.x_stride})) {
            launch_forward<ChannelTraits<T, kVectorElements<T>>>(params, stream);
        } else {
            launch_forward<ChannelTraits<T, 1>>(params, stream);
        }
    });
}

void channel_affine_backward_cuda(const ChannelAffineBackwardParams& params, Stream stream) {
    if (params.shape.channels == 0) {
        return;
    }
    if (params.parts.count > 0) {
        dispatch_element(params.dtype, [&]<typename T>() {
            if (have_vectors<T>(params.shape, params.map, {params.grad_z, params.x, params.grad_x},
                                {params.grad_z_stride, params.x_stride})) {
                launch_backward<ChannelTraits<T, kVectorElements<T>>>(params, stream);
            } else {
                launch_backward<ChannelTraits<T, 1>>(params, stream);
            }
        });
    }
    // Without elements the sums are still written: zeros.
    norm::launch_partial_sum({.workspace = static_cast<const float*>(params.partials),
                              .outputs = {params.grad_scale, params.grad_shift},
                              .partials = params.parts.count,
                              .columns = params.shape.channels},
                             2, params.map.dtype, stream);
}

}  // namespace warploom::coupling
