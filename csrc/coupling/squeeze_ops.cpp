// The seam of squeezing: checks -> Params -> launch.
#include "coupling/squeeze.h"

#include "common/torch.h"
#include "coupling/checks.h"

namespace warploom::coupling {
namespace {

template <Backend backend>
SqueezeShape parse_shape(const Call<backend>& call, const Tensor& x, std::int64_t factor,
                         const std::string& order, bool inverse) {
    call.check_dim(x, "x", 4);
    call.check(factor >= 1, "factor", "at least 1", std::to_string(factor));
    call.check(order == "channel_major" || order == "position_major", "order",
               "channel_major or position_major", order);
    const std::int64_t positions = factor * factor;
    if (inverse) {
        call.check(x.size(1) % positions == 0, "x", "a multiple of factor^2 channels", shape_of(x));
    } else {
        call.check(x.size(2) % factor == 0 && x.size(3) % factor == 0, "x",
                   "height and width that factor divides", shape_of(x));
    }
    return {.batch = x.size(0),
            .channels = inverse ? x.size(1) / positions : x.size(1),
            .height = inverse ? x.size(2) : x.size(2) / factor,
            .width = inverse ? x.size(3) : x.size(3) / factor,
            .factor = factor,
            .by_position = order == "position_major"};
}

template <Backend backend>
Tensor squeeze(const Tensor& x, std::int64_t factor, std::string order, bool inverse) {
    Call<backend> call("squeeze", x);
    const SqueezeShape shape = parse_shape(call, x, factor, order, inverse);
    const Layout layout = layout_of(x);
    const CouplingView view = sample_input(call, x, "x", layout);
    const std::int64_t scale = inverse ? factor : 1;
    const std::int64_t squeezed = inverse ? 1 : factor * factor;
    Tensor z = empty_in_layout(
        call, {shape.batch, shape.channels * squeezed, shape.height * scale, shape.width * scale},
        x.scalar_type(), layout.channels_last);
    if (x.numel() == 0) {
        return z;
    }
    SqueezeParams params = squeeze_matrices(shape, layout.channels_last);
    params.dtype = call.dtype(x, "x");
    params.from = view.data;
    params.to = call.output(z, "z");
    params.to_lines = inverse == layout.channels_last;
    const std::int64_t sample = x.numel() / shape.batch;
    params.packed.strides[0] = params.to_lines ? view.batch_stride : sample;
    params.lines.strides[0] = params.to_lines ? sample : view.batch_stride;
    WARPLOOM_RUN(backend, call, squeeze, params)
    return z;
}

template <Backend backend, typename Library>
void register_squeeze(Library& library) {
    WARPLOOM_IMPL(library, backend, squeeze);
}

WARPLOOM_REGISTER(register_squeeze)

}  // namespace
}  // namespace warploom::coupling
