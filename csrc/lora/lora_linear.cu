// Launches the products with an update.
#include "lora/lora_linear.cuh"

#include <algorithm>
#include <iterator>

#include "lora/launch.cuh"

namespace warploom::lora {
namespace {

template <typename T>
QuantizedWeight quantized_weight(const Weight& weight, int rows, int columns) {
    constexpr int kElements = Chunk<T>::kSize;
    const int bits = weight.format == WeightFormat::nf4 ? 4 : 8;
    const int chunk_bytes = kElements * bits / 8;
    const std::uint64_t places = reinterpret_cast<std::uintptr_t>(weight.values) |
                                 static_cast<std::uint64_t>(columns) * bits / 8;
    return {
        .values = static_cast<const unsigned char*>(weight.values),
        .scale = weight.scale,
        .rows = rows,
        .columns = columns,
        .scale_block = weight.scale_block,
        .scale_stride = weight.scale == nullptr ? 0 : columns / weight.scale_block,
        .format = weight.format,
        .whole_chunks = copy_unit(places) >= chunk_bytes && weight.scale_block % kElements == 0};
}

template <typename Traits>
void launch_update(UpdateParams params, Stream stream) {
    using T = typename Traits::Element;
    params.out_copy_bytes = row_copy_unit<T>(params.out, params.columns, params.columns);
    if (params.unscaled != nullptr) {
        const int unscaled = row_copy_unit<T>(params.unscaled, params.columns, params.columns);
        params.out_copy_bytes = std::min(params.out_copy_bytes, unscaled);
    }
    std::copy(std::begin(kNf4), std::end(kNf4), params.nf4.values);
    params.row_tiles = static_cast<int>(ceil_divide(params.rows, Traits::kRows));
    params.column_tiles = static_cast<int>(ceil_divide(params.columns, Traits::kColumns));
    launch_tiles<Traits>("lora_linear", updated_product_kernel<Traits>,
                         std::int64_t{params.row_tiles} * params.column_tiles, stream, params);
}

}  // namespace

// Chips that give a block this much shared memory (Hopper, Blackwell for data centres) have tensor
// cores that mma.sync, which the kernels here use, leaves half idle: on an H200 cuBLAS took a
// quarter of their time.
bool lora_products_are_pytorchs_cuda() {
    return device::shared_memory_limit() > std::size_t{200} << 10;
}

void lora_linear_cuda(const LoraLinearParams& params, Stream stream) {
    dispatch(params.dtype, [&]<typename T>() {
        const int in = params.in_features;
        UpdateParams update{};
        update.left = place_of<T>(params.x, params.x_row_stride, in);
        update.right = place_of<T>(params.weight.values, in, in);
        update.low_left = place_of<T>(params.shrunk, params.shrunk_row_stride, params.rank);
        update.low_right = place_of<T>(params.lora_b, params.rank, params.rank);
        update.weight = quantized_weight<T>(params.weight, params.out_features, in);
        update.out = params.out;
        update.unscaled = params.unscaled;
        update.column_scale = static_cast<const float*>(params.column_scale);
        update.bias = params.bias;
        update.low_scale = static_cast<float>(params.scaling);
        update.rows = params.rows;
        update.columns = params.out_features;
        update.terms = in;
        update.rank = params.rank;
        launch_update<UpdateTraits<T, false>>(update, stream);
    });
}

void lora_grad_x_cuda(const LoraGradXParams& params, Stream stream) {
    dispatch(params.dtype, [&]<typename T>() {
        const int in = params.in_features;
        UpdateParams update{};
        update.left = place_of<T>(params.grad, params.grad_row_stride, params.out_features);
        update.right = place_of<T>(params.weight.values, in, in);
        update.low_left =
            place_of<T>(params.grad_shrunk, params.grad_shrunk_row_stride, params.rank);
        update.low_right = place_of<T>(params.lora_a, in, in);
        update.weight = quantized_weight<T>(params.weight, params.out_features, in);
        update.out = params.grad_x;
        // Without an update there is nothing to draw for.
        update.mask = mask_of(params.rank > 0 ? params.dropout : Dropout{});
        update.low_scale = static_cast<float>(kept_scale(params.dropout));
        update.rows = params.rows;
        update.columns = in;
        update.terms = params.out_features;
        update.rank = params.rank;
        launch_update<UpdateTraits<T, true>>(update, stream);
    });
}

}  // namespace warploom::lora
