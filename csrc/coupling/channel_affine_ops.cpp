// The seam of a scale and a shift per channel: checks -> Params -> launch.
#include <tuple>

#include "common/torch.h"
#include "coupling/channel_affine.h"
#include "coupling/checks.h"

namespace warploom::coupling {
namespace {

// A tensor as [outer, channels, inner], dense but for the stride of outer; copied where it is not.
struct ChannelView {
    const void* data;
    std::int64_t stride;
};

template <Backend backend>
ChannelView channel_view(Call<backend>& call, const Tensor& tensor, const char* argument,
                         const Layout& layout) {
    if (layout.channels_innermost) {
        const Rows rows = call.rows(channels_to_end(tensor));
        return {call.input(call.keep(rows.tensor), argument), rows.stride};
    }
    const CouplingView view = sample_input(call, tensor, argument, layout);
    return {view.data, view.batch_stride};
}

template <Backend backend>
ChannelShape channel_shape(const Call<backend>& call, const Tensor& x, const Layout& layout) {
    call.check(x.dim() >= 2, "x", "at least 2 dimensions", shape_of(x));
    if (layout.channels_innermost) {
        return {x.size(0) * layout.pixels, x.size(1), 1};
    }
    return {x.size(0), x.size(1), layout.pixels};
}

template <Backend backend>
ChannelMap parse_map(Call<backend>& call, const Tensor& x, const Tensor& scale, const Tensor& shift,
                     const std::string& order, bool inverse, DType dtype) {
    const bool multiply_first = order == "mul_add";
    call.check(multiply_first || order == "add_mul", "order", "mul_add or add_mul", order);
    ChannelMap map{};
    map.add_first = multiply_first == inverse;
    map.inverse = inverse;
    map.dtype = call.parameter_dtype(scale, "scale", dtype);
    const ScalarType type = scale.scalar_type();
    map.scale = contiguous_input(call, scale, "scale", {x.size(1)}, type);
    map.shift = contiguous_input(call, shift, "shift", {x.size(1)}, type);
    return map;
}

template <Backend backend>
Tensor channel_affine(const Tensor& x, const Tensor& scale, const Tensor& shift, std::string order,
                      bool inverse) {
    Call<backend> call("channel_affine", x);
    const Layout layout = layout_of(x);
    ChannelAffineParams params{};
    params.dtype = call.dtype(x, "x");
    params.shape = channel_shape(call, x, layout);
    params.map = parse_map(call, x, scale, shift, order, inverse, params.dtype);
    const ChannelView view = channel_view(call, x, "x", layout);
    Tensor z = empty_in_layout(call, shape_vector(x), x.scalar_type(), layout.channels_last);
    params.x = view.data;
    params.x_stride = view.stride;
    params.z = call.output(z, "z");
    if (x.numel() > 0) {
        WARPLOOM_RUN(backend, call, channel_affine, params)
    }
    return z;
}

template <Backend backend>
ChannelParts parts_of(const ChannelShape& shape) {
    if constexpr (backend == Backend::kCpu) {
        return channel_parts_cpu(shape);
    } else {
        return channel_parts_cuda(shape);
    }
}

template <Backend backend>
std::tuple<Tensor, Tensor, Tensor> channel_affine_backward(const Tensor& grad_z, const Tensor& x,
                                                           const Tensor& scale, const Tensor& shift,
                                                           std::string order, bool inverse) {
    Call<backend> call("channel_affine_backward", x);
    const Layout layout = layout_of(x);
    ChannelAffineBackwardParams params{};
    params.dtype = call.dtype(x, "x");
    params.shape = channel_shape(call, x, layout);
    params.map = parse_map(call, x, scale, shift, order, inverse, params.dtype);
    call.check_shape(grad_z, "grad_z", shape_vector(x));
    call.check_dtype(grad_z, "grad_z", params.dtype);
    const ChannelView view = channel_view(call, x, "x", layout);
    const ChannelView grad_view = channel_view(call, grad_z, "grad_z", layout);
    Tensor grad_x = empty_in_layout(call, shape_vector(x), x.scalar_type(), layout.channels_last);
    Tensor grad_scale = call.empty_like(scale);
    Tensor grad_shift = call.empty_like(shift);
    params.parts = parts_of<backend>(params.shape);
    Tensor partials = call.empty({2, params.parts.count, params.shape.channels},
                                 call.statistics_type(params.dtype));
    params.x = view.data;
    params.x_stride = view.stride;
    params.grad_z = grad_view.data;
    params.grad_z_stride = grad_view.stride;
    params.grad_x = call.output(grad_x, "grad_x");
    params.grad_scale = call.output(grad_scale, "grad_scale");
    params.grad_shift = call.output(grad_shift, "grad_shift");
    params.partials = call.output(partials, "partials");
    WARPLOOM_RUN(backend, call, channel_affine_backward, params)
    return {grad_x, grad_scale, grad_shift};
}

template <Backend backend, typename Library>
void register_channel_affine(Library& library) {
    WARPLOOM_IMPL(library, backend, channel_affine);
    WARPLOOM_IMPL(library, backend, channel_affine_backward);
}

WARPLOOM_REGISTER(register_channel_affine)

}  // namespace
}  // namespace warploom::coupling
