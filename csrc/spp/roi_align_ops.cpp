// The seam of RoIAlign: checks -> Params -> launch.
#include <algorithm>
#include <vector>

#include "common/checks.h"
#include "common/parallel.h"
#include "common/torch.h"
#include "spp/roi_align.h"

namespace warploom::spp {
namespace {

// Where regions can be read: each is of a sample that exists.
template <typename W, Backend backend>
void check_samples(const Call<backend>& call, const RoiAlignShape& shape) {
    const W* rois = static_cast<const W*>(shape.rois);
    for (std::int64_t index = 0; index < shape.count; ++index) {
        const W sample = rois[5 * index];
        call.check(sample >= 0 && sample < static_cast<W>(shape.batch), "rois",
                   "samples from 0 to " + std::to_string(shape.batch - 1), std::to_string(sample));
    }
}

// x has shape [batch, channels, height, width].
template <Backend backend>
RoiAlignShape check_shape(Call<backend>& call, const Tensor& x, const Tensor& rois,
                          std::int64_t pooled_height, std::int64_t pooled_width,
                          double spatial_scale, std::int64_t sampling_ratio, bool aligned) {
    call.check_dim(x, "x", 4);
    call.check_dim(rois, "rois", 2);
    RoiAlignShape shape{};
    shape.dtype = call.dtype(x, "x");
    shape.count = rois.size(0);
    shape.batch = x.size(0);
    shape.channels = narrow_size(call, x.size(1), "x");
    shape.height = narrow_size(call, x.size(2), "x");
    shape.width = narrow_size(call, x.size(3), "x");
    shape.pooled_height = narrow_size(call, pooled_height, "pooled_height");
    shape.pooled_width = narrow_size(call, pooled_width, "pooled_width");
    call.check(shape.channels > 0 && shape.height > 0 && shape.width > 0, "x",
               "channels and pixels", shape_of(x));
    call.check(pooled_height > 0 && pooled_width > 0, "output_size", "numbers >= 1",
               std::to_string(std::min(pooled_height, pooled_width)));
    shape.rois = contiguous_input(call, rois, "rois", {shape.count, 5},
                                  Call<backend>::statistics_type(shape.dtype));
    shape.spatial_scale = spatial_scale;
    shape.sampling_ratio =
        narrow_size(call, std::max<std::int64_t>(sampling_ratio, 0), "sampling_ratio");
    shape.aligned = aligned;
    if constexpr (backend == Backend::kCpu) {
        if (shape.dtype == DType::float64) {
            check_samples<double>(call, shape);
        } else {
            check_samples<float>(call, shape);
        }
    }
    return shape;
}

// Of the CPU, for `planes` planes dealt out to parts that have `buffer` numbers each. A bin's
// samples lie between two pixels each; where they are at most a pixel apart, bins of an axis share
// no more than the two pixels at a bound.
template <Backend backend>
RoiAlignWorkspace make_workspace(Call<backend>& call, const RoiAlignShape& shape,
                                 std::int64_t planes, std::int64_t buffer) {
    RoiAlignWorkspace workspace{};
    if constexpr (backend == Backend::kCpu) {
        const auto capacity = [&](std::int64_t bins, std::int64_t size) {
            return shape.sampling_ratio > 0 ? 2 * bins * shape.sampling_ratio : size + 2 * bins;
        };
        workspace.row_capacity = capacity(shape.pooled_height, shape.height);
        workspace.column_capacity = capacity(shape.pooled_width, shape.width);
        const std::int64_t places = workspace.row_capacity + workspace.column_capacity;
        workspace.pixels_per_roi =
            3 + std::int64_t{shape.pooled_height} + shape.pooled_width + 2 + places;
        workspace.weights_per_roi = 1 + places;
        workspace.buffer = buffer;
        workspace.parts = static_cast<int>(std::min<std::int64_t>(planes, thread_count()));
        const auto allocate = [&](std::int64_t elements, ScalarType type) {
            return call.output(call.keep(call.empty({elements}, type)), "workspace");
        };
        const ScalarType wide = Call<backend>::statistics_type(shape.dtype);
        workspace.pixels = static_cast<std::int32_t*>(
            allocate(shape.count * workspace.pixels_per_roi, ScalarType::Int));
        workspace.weights = allocate(shape.count * workspace.weights_per_roi, wide);
        workspace.buffers = allocate(workspace.parts * buffer, wide);
    }
    return workspace;
}

template <Backend backend>
Tensor roi_align(const Tensor& x, const Tensor& rois, std::int64_t pooled_height,
                 std::int64_t pooled_width, double spatial_scale, std::int64_t sampling_ratio,
                 bool aligned) {
    Call<backend> call("roi_align", x);
    RoiAlignParams params{};
    RoiAlignShape& shape = params.shape;
    shape = check_shape(call, x, rois, pooled_height, pooled_width, spatial_scale, sampling_ratio,
                        aligned);
    const Tensor dense = torch::stable::contiguous(x);
    Tensor out =
        call.empty({shape.count, shape.channels, pooled_height, pooled_width}, x.scalar_type());
    params.x = call.input(dense, "x");
    params.out = call.output(out, "out");
    params.workspace = make_workspace(call, shape, shape.count * shape.channels, shape.width);
    if (shape.count > 0) {
        WARPLOOM_RUN(backend, call, roi_align, params)
    }
    return out;
}

// Of x only its shape is used.
template <Backend backend>
Tensor roi_align_backward(const Tensor& grad_out, const Tensor& x, const Tensor& rois,
                          std::int64_t pooled_height, std::int64_t pooled_width,
                          double spatial_scale, std::int64_t sampling_ratio, bool aligned) {
    Call<backend> call("roi_align_backward", grad_out);
    RoiAlignBackwardParams params{};
    RoiAlignShape& shape = params.shape;
    shape = check_shape(call, x, rois, pooled_height, pooled_width, spatial_scale, sampling_ratio,
                        aligned);
    call.check_shape(grad_out, "grad_out",
                     {shape.count, shape.channels, pooled_height, pooled_width});
    call.check_dtype(grad_out, "grad_out", shape.dtype);
    const Tensor dense = torch::stable::contiguous(grad_out);
    Tensor grad_x = call.empty_like(x);
    params.grad_out = call.input(dense, "grad_out");
    params.grad_x = call.output(grad_x, "grad_x");
    const std::int64_t plane = static_cast<std::int64_t>(shape.height) * shape.width;
    params.workspace =
        make_workspace(call, shape, shape.batch * shape.channels, shape.width + plane);
    if (shape.batch > 0) {
        WARPLOOM_RUN(backend, call, roi_align_backward, params)
    }
    return grad_x;
}

template <Backend backend, typename Library>
void register_roi_align(Library& library) {
    WARPLOOM_IMPL(library, backend, roi_align);
    WARPLOOM_IMPL(library, backend, roi_align_backward);
}

WARPLOOM_REGISTER(register_roi_align)

}  // namespace
}  // namespace warploom::spp
