// The seam of the cascade of max pools: checks -> Params -> launch.
#include <algorithm>
#include <vector>

#include "common/checks.h"
#include "common/parallel.h"
#include "common/torch.h"
#include "spp/sppf.h"
#include "spp/sppf_workspace_cpu.h"

namespace warploom::spp {
namespace {

// Of a tensor with `slices` times x's channels.
template <Backend backend>
SppfShape check_shape(const Call<backend>& call, const Tensor& tensor, const char* argument,
                      std::int64_t slices, std::int64_t kernel_size, bool channels_last) {
    call.check_dim(tensor, argument, 4);
    call.check(kernel_size >= 3 && kernel_size % 2 == 1, "kernel_size", "an odd number >= 3",
               std::to_string(kernel_size));
    SppfShape shape{};
    shape.batch = tensor.size(0);
    const std::int64_t channels = tensor.size(channels_last ? 3 : 1);
    shape.channels = narrow_size(call, channels / slices, argument);
    shape.height = narrow_size(call, tensor.size(channels_last ? 1 : 2), argument);
    shape.width = narrow_size(call, tensor.size(channels_last ? 2 : 3), argument);
    shape.radius = narrow_size(call, kernel_size / 2, "kernel_size");
    shape.channels_last = channels_last;
    shape.dtype = call.dtype(tensor, argument);
    call.check(channels % slices == 0 && channels * shape.height * shape.width > 0, argument,
               "channels and pixels", shape_of(tensor));
    return shape;
}

std::vector<std::int64_t> sizes_of(const SppfShape& shape, std::int64_t slices) {
    const std::int64_t channels = slices * shape.channels;
    if (shape.channels_last) {
        return {shape.batch, shape.height, shape.width, channels};
    }
    return {shape.batch, channels, shape.height, shape.width};
}

// Of the CPU, where each part of the work has planes, and backward their gradients.
template <Backend backend>
SppfWorkspace make_workspace(Call<backend>& call, const SppfShape& shape, bool backward) {
    SppfWorkspace workspace{};
    if constexpr (backend == Backend::kCpu) {
        const int most_lanes = backward ? kSppfBackwardLanes : kSppfForwardLanes;
        workspace.lanes = shape.channels_last ? most_lanes : 1;
        const std::int64_t groups = shape.batch * ceil_divide(shape.channels, workspace.lanes);
        workspace.parts = static_cast<int>(std::min<std::int64_t>(groups, thread_count()));
        if (shape.channels_last) {
            workspace.values_per_part = sppf_channels_size(shape, backward);
        } else {
            const std::int64_t padded = sppf_padded_size(shape, 1);
            narrow_size(call, padded, "x");
            const std::int64_t plane = static_cast<std::int64_t>(shape.height) * shape.width;
            workspace.values_per_part = padded + (backward ? 2 * plane : 0);
            workspace.indices_per_part = backward ? padded : 0;
        }
        const auto allocate = [&](std::int64_t per_part, ScalarType type) {
            return call.output(call.keep(call.empty({workspace.parts * per_part}, type)),
                               "workspace");
        };
        workspace.values =
            allocate(workspace.values_per_part, Call<backend>::statistics_type(shape.dtype));
        workspace.indices =
            static_cast<std::int32_t*>(allocate(workspace.indices_per_part, ScalarType::Int));
    }
    return workspace;
}

template <Backend backend>
Tensor sppf(const Tensor& x, std::int64_t kernel_size, bool channels_last) {
    Call<backend> call("sppf", x);
    SppfParams params{};
    params.shape = check_shape(call, x, "x", 1, kernel_size, channels_last);
    const Tensor& dense = call.keep(torch::stable::contiguous(x));
    Tensor out = call.empty(sizes_of(params.shape, kSppfSlices), x.scalar_type());
    params.x = call.input(dense, "x");
    params.out = call.output(out, "out");
    params.workspace = make_workspace(call, params.shape, false);
    if (params.shape.batch > 0) {
        WARPLOOM_RUN(backend, call, sppf, params)
    }
    return out;
}

template <Backend backend>
Tensor sppf_backward(const Tensor& grad_out, const Tensor& out, std::int64_t kernel_size,
                     bool channels_last) {
    Call<backend> call("sppf_backward", grad_out);
    SppfBackwardParams params{};
    params.shape = check_shape(call, out, "out", kSppfSlices, kernel_size, channels_last);
    call.check_shape(grad_out, "grad_out", sizes_of(params.shape, kSppfSlices));
    call.check_dtype(grad_out, "grad_out", params.shape.dtype);
    const Tensor& dense_grad = call.keep(torch::stable::contiguous(grad_out));
    params.grad_out = call.input(dense_grad, "grad_out");
    const Tensor& dense_out = call.keep(torch::stable::contiguous(out));
    params.out = call.input(dense_out, "out");
    Tensor grad_x = call.empty(sizes_of(params.shape, 1), out.scalar_type());
    params.grad_x = call.output(grad_x, "grad_x");
    params.workspace = make_workspace(call, params.shape, true);
    if (params.shape.batch > 0) {
        WARPLOOM_RUN(backend, call, sppf_backward, params)
    }
    return grad_x;
}

template <Backend backend, typename Library>
void register_sppf(Library& library) {
    WARPLOOM_IMPL(library, backend, sppf);
    WARPLOOM_IMPL(library, backend, sppf_backward);
}

WARPLOOM_REGISTER(register_sppf)

}  // namespace
}  // namespace warploom::spp
