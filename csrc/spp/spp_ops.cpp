// The seam of spatial pyramid pooling: checks -> Params -> launch.
#include "common/checks.h"
#include "common/torch.h"
#include "spp/spatial_pyramid_pool.h"

namespace warploom::spp {
namespace {

template <Backend backend>
BinMode parse_bin_mode(const Call<backend>& call, const std::string& name) {
    if (name == "adaptive") {
        return BinMode::adaptive;
    }
    if (name == "caffe") {
        return BinMode::caffe;
    }
    if (name == "sppnet") {
        return BinMode::sppnet;
    }
    call.check(name == "roi", "bin_mode", "adaptive, caffe, sppnet or roi", name);
    return BinMode::roi;
}

// Where regions can be read: each lies in an image that there is, and has its pixels.
template <Backend backend>
void check_regions(const Call<backend>& call, const PyramidParams& params, std::int64_t pixels) {
    const std::int32_t* offsets = params.offsets;
    for (std::int64_t image = 0; offsets != nullptr && image <= params.images; ++image) {
        const std::int64_t before = image == 0 ? 0 : offsets[image - 1];
        call.check(offsets[image] >= before && offsets[image] <= pixels, "offsets",
                   "numbers that rise from 0 to " + std::to_string(pixels),
                   std::to_string(offsets[image]));
    }
    if (offsets != nullptr) {
        call.check(offsets[0] == 0 && offsets[params.images] == pixels, "offsets",
                   "numbers that rise from 0 to " + std::to_string(pixels),
                   std::to_string(offsets[0]) + " to " + std::to_string(offsets[params.images]));
    }
    for (std::int64_t index = 0; index < params.count; ++index) {
        const std::int32_t* region = params.regions + 7 * index;
        call.check(region[0] >= 0 && region[0] < params.images, "rois",
                   "images below " + std::to_string(params.images), std::to_string(region[0]));
        const std::int64_t height = region[5];
        const std::int64_t width = region[6];
        const bool fits = offsets == nullptr
                              ? height <= params.height && width <= params.width
                              : height * width <= offsets[region[0] + 1] - offsets[region[0]];
        call.check(fits && height >= 0 && width >= 0, "sizes", "sizes within the image",
                   std::to_string(height) + " x " + std::to_string(width));
    }
}

// All but the strides of x, or of its gradient.
template <Backend backend>
void set_pyramid(Call<backend>& call, PyramidParams& params, const Tensor& x,
                 const std::optional<Tensor>& regions, const std::optional<Tensor>& offsets,
                 const std::vector<std::int64_t>& levels, const std::string& mode,
                 const std::string& bin_mode, bool channel_major) {
    call.check_dim(x, "x", offsets.has_value() ? 2 : 4);
    call.check(mode == "max" || mode == "avg", "mode", "max or avg", mode);
    params.dtype = call.dtype(x, "x");
    params.bin_mode = parse_bin_mode(call, bin_mode);
    params.is_average = mode == "avg";
    params.channels = x.size(1);
    params.images = x.size(0);
    params.count = params.images;
    std::int64_t pixels = x.size(0);
    if (offsets.has_value()) {
        call.check(regions.has_value() && offsets->dim() == 1 && offsets->size(0) > 0, "offsets",
                   "one dimension, beside regions", shape_of(*offsets));
        params.images = offsets->size(0) - 1;
        params.offsets = int32_input(call, *offsets, "offsets", {params.images + 1});
    } else {
        params.height = narrow_size(call, x.size(2), "x");
        params.width = narrow_size(call, x.size(3), "x");
        pixels = x.size(2) * x.size(3);
    }
    narrow_size(call, pixels, "x");
    constexpr std::int64_t kMostOfInt16 = 1 << 15;
    params.is_narrow_index = pixels <= kMostOfInt16;
    if (regions.has_value()) {
        params.has_regions = true;
        params.count = regions->size(0);
        params.regions = int32_input(call, *regions, "regions", {params.count, 7});
        if constexpr (backend == Backend::kCpu) {
            check_regions(call, params, pixels);
        }
    }
    std::int64_t rows = 0;
    std::int64_t columns = 0;
    std::int64_t bins = 0;
    call.check(levels.size() % 2 == 0 && levels.size() <= 2 * kMostBins, "levels",
               "pairs of a height and a width", std::to_string(levels.size()) + " numbers");
    for (std::size_t place = 0; place < levels.size(); place += 2) {
        call.check(levels[place] > 0 && levels[place + 1] > 0, "levels", "numbers above 0",
                   std::to_string(std::min(levels[place], levels[place + 1])));
        PyramidLevel& level = params.levels[params.level_count++];
        rows += levels[place];
        columns += levels[place + 1];
        call.check(rows <= kMostBins && columns <= kMostBins, "levels",
                   "at most " + std::to_string(kMostBins) + " bins along an axis",
                   std::to_string(std::max(rows, columns)));
        level.rows = static_cast<int>(levels[place]);
        level.columns = static_cast<int>(levels[place + 1]);
        level.channel_stride = level.rows * level.columns;
        level.offset = channel_major ? bins : bins * params.channels;
        bins += level.channel_stride;
    }
    for (int index = 0; channel_major && index < params.level_count; ++index) {
        params.levels[index].channel_stride = bins;
    }
    params.out_stride = params.channels * bins;
}

void set_strides(PyramidParams& params, const Tensor& x) {
    params.channel_stride = x.stride(1);
    if (params.offsets != nullptr) {
        params.pixel_stride = x.stride(0);
    } else {
        params.image_stride = x.stride(0);
        params.row_stride = x.stride(2);
        params.pixel_stride = x.stride(3);
    }
}

ScalarType index_type(const PyramidParams& params) {
    return params.is_narrow_index ? ScalarType::Short : ScalarType::Int;
}

template <Backend backend>
std::tuple<Tensor, Tensor> spatial_pyramid_pool(const Tensor& x, std::optional<Tensor> regions,
                                                std::optional<Tensor> offsets,
                                                std::vector<std::int64_t> levels, std::string mode,
                                                std::string bin_mode, bool channel_major,
                                                bool needs_index) {
    Call<backend> call("spatial_pyramid_pool", x);
    SpatialPyramidPoolParams params{};
    set_pyramid(call, params, x, regions, offsets, levels, mode, bin_mode, channel_major);
    set_strides(params, x);
    const std::vector<std::int64_t> shape{params.count, params.out_stride};
    Tensor out = call.empty(shape, x.scalar_type());
    Tensor argmax =
        call.empty(needs_index ? shape : std::vector<std::int64_t>{0}, index_type(params));
    params.x = call.input(x, "x");
    params.out = call.output(out, "out");
    params.argmax = needs_index ? call.output(argmax, "argmax") : nullptr;
    if (params.count * params.out_stride > 0) {
        WARPLOOM_RUN(backend, call, spatial_pyramid_pool, params)
    }
    return {out, argmax};
}

// [B, C, H, W] as [B, H, W, C], and back.
Tensor channels_to_end(const Tensor& x) {
    return torch::stable::transpose(torch::stable::transpose(x, 1, 2), 2, 3);
}
Tensor channels_from_end(const Tensor& pixels) {
    return torch::stable::transpose(torch::stable::transpose(pixels, 2, 3), 1, 2);
}

// Contiguous, or as x where that is channels-last alone.
template <Backend backend>
Tensor gradient_like(const Call<backend>& call, const Tensor& x) {
    if (x.dim() == 2 || x.is_contiguous() || !channels_to_end(x).is_contiguous()) {
        return call.empty_like(x);
    }
    return channels_from_end(call.empty_like(channels_to_end(x)));
}

template <Backend backend>
Tensor spatial_pyramid_pool_backward(const Tensor& grad_out, const Tensor& x,
                                     std::optional<Tensor> argmax, std::optional<Tensor> regions,
                                     std::optional<Tensor> offsets,
                                     std::vector<std::int64_t> levels, std::string mode,
                                     std::string bin_mode, bool channel_major) {
    Call<backend> call("spatial_pyramid_pool_backward", x);
    SpatialPyramidPoolBackwardParams params{};
    set_pyramid(call, params, x, regions, offsets, levels, mode, bin_mode, channel_major);
    Tensor grad_x = gradient_like(call, x);
    set_strides(params, grad_x);
    const std::vector<std::int64_t> shape{params.count, params.out_stride};
    params.grad_out = contiguous_input(call, grad_out, "grad_out", shape, x.scalar_type());
    if (!params.is_average) {
        call.check(argmax.has_value(), "argmax", "a tensor beside mode max", "None");
        params.argmax = contiguous_input(call, *argmax, "argmax", shape, index_type(params));
    }
    params.grad_x = call.output(grad_x, "grad_x");
    if (grad_x.numel() > 0) {
        WARPLOOM_RUN(backend, call, spatial_pyramid_pool_backward, params)
    }
    return grad_x;
}

template <Backend backend, typename Library>
void register_spp(Library& library) {
    WARPLOOM_IMPL(library, backend, spatial_pyramid_pool);
    WARPLOOM_IMPL(library, backend, spatial_pyramid_pool_backward);
}

WARPLOOM_REGISTER(register_spp)

}  // namespace
}  // namespace warploom::spp
