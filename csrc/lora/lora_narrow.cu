// Launches the products with the adapter's rank as one of their sizes.
#include "lora/lora_narrow.cuh"

#include "lora/launch.cuh"

namespace warploom::lora {
namespace {

template <typename T, NarrowProduct kProduct>
void launch_narrow(const char* op, NarrowParams params, Stream stream) {
    using Traits = NarrowTraits<T, kProduct>;
    params.column_tiles = static_cast<int>(ceil_divide(params.columns, Traits::kColumns));
    launch_tiles<Traits>(op, narrow_product_kernel<Traits>,
                         ceil_divide(params.rows, Traits::kRows) * params.column_tiles, stream,
                         params);
}

}  // namespace

void lora_shrink_cuda(const LoraShrinkParams& params, Stream stream) {
    dispatch(params.dtype, [&]<typename T>() {
        NarrowParams narrow{};
        narrow.left = place_of<T>(params.x, params.x_row_stride, params.in_features);
        narrow.right = place_of<T>(params.lora_a, params.in_features, params.in_features);
        narrow.out = params.shrunk;
        narrow.out_row_stride = params.rank;
        narrow.out_column_stride = 1;
        narrow.mask = mask_of(params.dropout);
        narrow.scale = static_cast<float>(kept_scale(params.dropout));
        narrow.rows = params.rows;
        narrow.columns = params.rank;
        narrow.terms = params.in_features;
        launch_narrow<T, NarrowProduct::shrink>("lora_shrink", narrow, stream);
    });
}

void lora_grad_shrunk_cuda(const LoraGradShrunkParams& params, Stream stream) {
    dispatch(params.dtype, [&]<typename T>() {
        NarrowParams narrow{};
        narrow.left = place_of<T>(params.grad, params.grad_row_stride, params.out_features);
        narrow.right = place_of<T>(params.lora_b, params.rank, params.rank);
        narrow.out = params.grad_shrunk;
        narrow.out_row_stride = params.rank;
        narrow.out_column_stride = 1;
        narrow.scale = static_cast<float>(params.scaling);
        narrow.rows = params.rows;
        narrow.columns = params.rank;
        narrow.terms = params.out_features;
        launch_narrow<T, NarrowProduct::grad_shrunk>("lora_linear_backward", narrow, stream);
    });
}

void lora_adapter_grad_cuda(const LoraAdapterGradParams& params, Stream stream) {
    dispatch(params.dtype, [&]<typename T>() {
        NarrowParams narrow{};
        narrow.left = place_of<T>(params.wide, params.wide_row_stride, params.columns);
        narrow.right = place_of<T>(params.narrow, params.narrow_row_stride, params.rank);
        narrow.out = params.out;
        narrow.out_row_stride = params.transposed ? 1 : params.rank;
        narrow.out_column_stride = params.transposed ? params.columns : 1;
        narrow.mask = mask_of(params.dropout);
        narrow.scale = static_cast<float>(params.scaling * kept_scale(params.dropout));
        narrow.rows = params.columns;
        narrow.columns = params.rank;
        narrow.terms = params.rows;
        launch_narrow<T, NarrowProduct::adapter_grad>("lora_linear_backward", narrow, stream);
    });
}

}  // namespace warploom::lora
