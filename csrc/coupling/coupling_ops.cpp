// The seam of family coupling: checks -> Params -> launch.
#include <algorithm>
#include <cmath>

#include "common/torch.h"
#include "coupling/affine_coupling.h"
#include "coupling/checks.h"
#include "coupling/coupling_parts_cpu.h"

namespace warploom::coupling {
namespace {

constexpr const char* kMasks[] = {"range", "slots", "checkerboard", "checkerboard_packed", "free"};
constexpr const char* kScales[] = {"additive",         "exp",     "tanh",    "atan",
                                   "centered_sigmoid", "sigmoid", "softclip"};
constexpr const char* kCenters[] = {"none", "channel", "sample"};

template <typename Choice, Backend backend, std::size_t size>
Choice parse(const Call<backend>& call, const char* argument, const std::string& name,
             const char* const (&names)[size]) {
    for (std::size_t i = 0; i < size; ++i) {
        if (name == names[i]) {
            return static_cast<Choice>(i);
        }
    }
    call.fail(argument, "a known name", name);
}

template <typename To>
To advanced(const CouplingView& view, const void* base, std::int64_t elements, int bytes) {
    auto* data = static_cast<char*>(const_cast<void*>(base)) + elements * bytes;
    return {data, view.batch_stride, view.channel_stride, view.pixel_stride};
}

// The halves of a tensor of shift and raw scale with the strides `view`, in the order of `layout`.
template <typename To>
void split(To& shift, To& raw_scale, CouplingView view, const void* base, const std::string& layout,
           std::int64_t count, DType dtype) {
    const bool interleaved = layout == "interleaved";
    const std::int64_t other = (interleaved ? 1 : count) * view.channel_stride;
    if (interleaved) {
        view.channel_stride *= 2;
    }
    const std::int64_t shift_at = layout == "scale_shift" ? other : 0;
    shift = advanced<To>(view, base, shift_at, element_size(dtype));
    raw_scale = advanced<To>(view, base, other - shift_at, element_size(dtype));
}

// Where the slots can be read: each of the parameters' channels belongs to one channel of x.
template <Backend backend>
Tensor slot_channels(const Call<backend>& call, const CouplingOptions& options) {
    Tensor channels = call.empty({options.count}, ScalarType::Int);
    auto* found = static_cast<std::int32_t*>(channels.data_ptr());
    std::fill(found, found + options.count, -1);
    int taken = 0;
    for (int channel = 0; channel < options.channels; ++channel) {
        const std::int32_t slot = options.slots[channel];
        if (slot >= 0) {
            call.check(slot < options.count && found[slot] < 0, "mask",
                       std::to_string(options.count) + " transformed channels, as params has",
                       "other ones");
            found[slot] = channel;
            ++taken;
        }
    }
    call.check(taken == options.count, "mask",
               std::to_string(options.count) + " transformed channels, as params has",
               std::to_string(taken));
    return channels;
}

// What a call is given beside its tensors.
struct Arguments {
    std::string mask;
    std::int64_t first;
    std::int64_t count;
    std::string layout;
    std::string scale;
    double clamp;
    double eps;
    double params_scale;
    bool add_first;
    std::int64_t shift_sign;
    std::int64_t log_sign;
    std::string center;
};

template <Backend backend>
CouplingOptions parse_options(Call<backend>& call, const Tensor& x, const Layout& layout,
                              const std::optional<Tensor>& places,
                              const std::optional<Tensor>& scale_weight,
                              const Arguments& arguments) {
    CouplingOptions options{};
    options.dtype = call.dtype(x, "x");
    options.mask = parse<CouplingMask>(call, "mask", arguments.mask, kMasks);
    options.scale = parse<CouplingScale>(call, "scale", arguments.scale, kScales);
    options.center = parse<CouplingCenter>(call, "center", arguments.center, kCenters);
    options.batch = x.size(0);
    options.channels = narrow_size(call, x.size(1), "x");
    options.pixels = layout.pixels;
    options.width = x.dim() > 2 ? x.size(x.dim() - 1) : 1;
    options.channels_last = layout.channels_innermost;
    options.first = narrow_size(call, arguments.first, "first");
    options.count = narrow_size(call, arguments.count, "count");
    options.clamp = arguments.clamp;
    options.eps = arguments.eps;
    options.params_scale = arguments.params_scale;
    options.shift_sign = static_cast<int>(arguments.shift_sign);
    options.log_sign = static_cast<int>(arguments.log_sign);
    options.add_first = arguments.add_first;
    const bool over_channels =
        options.mask == CouplingMask::range || options.mask == CouplingMask::slots;
    call.check(over_channels || options.center == CouplingCenter::none, "center",
               "none for a mask that is not over channels", arguments.center);
    const std::int64_t most =
        options.channels - (options.mask == CouplingMask::range ? options.first : 0);
    call.check(over_channels ? options.count <= most : options.count == options.channels, "count",
               "as many channels as there are", std::to_string(options.count));
    const bool checkers = options.mask == CouplingMask::checkerboard ||
                          options.mask == CouplingMask::checkerboard_packed;
    call.check(!checkers || x.dim() == 4, "x", "4 dimensions for a checkerboard", shape_of(x));
    if (options.mask == CouplingMask::slots || options.mask == CouplingMask::free) {
        call.check(places.has_value(), "places", "a tensor", "none");
    }
    if (options.mask == CouplingMask::slots) {
        options.slots = int32_input(call, *places, "places", {options.channels});
        if constexpr (backend == Backend::kCpu) {
            options.slot_channels = static_cast<const std::int32_t*>(
                call.keep(slot_channels(call, options)).data_ptr());
        }
    }
    if (options.mask == CouplingMask::free) {
        std::vector<std::int64_t> shape = shape_vector(x);
        shape.erase(shape.begin());
        call.check_shape(*places, "places", shape);
        call.check(places->scalar_type() == ScalarType::Bool, "places", "dtype bool",
                   torch::headeronly::toString(places->scalar_type()));
        const Tensor mask = in_layout(call, torch::stable::unsqueeze(*places, 0), layout);
        const std::optional<CouplingView> view = strides_of(mask, options.channels_last);
        options.free_mask = static_cast<const std::uint8_t*>(call.input(mask, "places"));
        options.mask_channel_stride = view->channel_stride;
        options.mask_pixel_stride = view->pixel_stride;
    }
    if (scale_weight.has_value()) {
        options.scale_weight =
            contiguous_input(call, *scale_weight, "scale_weight", {options.count},
                             call.statistics_type(options.dtype));
    }
    return options;
}

// Shift and raw scale, for kernels with the same strides.
template <Backend backend>
void parse_params(Call<backend>& call, CouplingView& shift, CouplingView& raw, const Tensor& x,
                  const Layout& layout, const CouplingOptions& options, const Arguments& arguments,
                  const Tensor& params, const std::optional<Tensor>& raw_scale) {
    const bool joined = options.scale != CouplingScale::additive && !raw_scale.has_value();
    std::vector<std::int64_t> shape = shape_vector(x);
    shape[1] = (joined ? 2 : 1) * options.count;
    if (options.mask == CouplingMask::checkerboard_packed) {
        call.check(options.width % 2 == 0, "x", "an even width for packed parameters", shape_of(x));
        shape[3] /= 2;
    }
    call.check_shape(params, "params", shape);
    call.check_dtype(params, "params", options.dtype);
    Tensor first = params;
    std::optional<CouplingView> view = strides_of(first, layout.channels_innermost);
    std::optional<Tensor> second;
    if (raw_scale.has_value()) {
        call.check_shape(*raw_scale, "raw_scale", shape);
        call.check_dtype(*raw_scale, "raw_scale", options.dtype);
        second = *raw_scale;
        const std::optional<CouplingView> other = strides_of(*second, layout.channels_innermost);
        if (!view || !other || view->batch_stride != other->batch_stride ||
            view->channel_stride != other->channel_stride ||
            view->pixel_stride != other->pixel_stride) {
            view.reset();
            second = in_layout(call, *raw_scale, layout);
        }
    }
    if (!view) {
        first = in_layout(call, params, layout);
        view = strides_of(first, layout.channels_innermost);
    }
    const void* base = call.input(first, "params");
    if (joined) {
        split(shift, raw, *view, base, arguments.layout, options.count, options.dtype);
        return;
    }
    shift = advanced<CouplingView>(*view, base, 0, 0);
    if (second.has_value()) {
        raw = advanced<CouplingView>(*view, call.input(*second, "raw_scale"), 0, 0);
    }
}

struct PartCounts {
    std::int64_t log_det;
    std::int64_t weight;
};

template <Backend backend>
PartCounts part_counts(const CouplingOptions& options) {
    if constexpr (backend == Backend::kCpu) {
        const CouplingParts parts = coupling_parts_cpu(options);
        return {parts.count, parts.ranges};
    } else {
        return {affine_coupling_parts_cuda(options), affine_coupling_weight_parts_cuda(options)};
    }
}

template <Backend backend>
Tensor run_forward(Call<backend>& call, const std::optional<Tensor>& out, Tensor* z,
                   const Tensor& x, const Tensor& params, const std::optional<Tensor>& raw_scale,
                   const std::optional<Tensor>& places, const std::optional<Tensor>& scale_weight,
                   const std::optional<Tensor>& log_det_in, const Arguments& arguments) {
    call.check(x.dim() >= 2, "x", "at least 2 dimensions", shape_of(x));
    const Layout layout = layout_of(x);
    AffineCouplingParams launch{};
    launch.options = parse_options(call, x, layout, places, scale_weight, arguments);
    const CouplingOptions& options = launch.options;
    parse_params(call, launch.shift, launch.raw_scale, x, layout, options, arguments, params,
                 raw_scale);
    launch.x = sample_input(call, x, "x", layout);
    Tensor target = out.has_value() ? *out
                                    : empty_in_layout(call, shape_vector(x), x.scalar_type(),
                                                      layout.channels_last);
    call.check_shape(target, "out", shape_vector(x));
    call.check_dtype(target, "out", options.dtype);
    const std::optional<CouplingView> view = strides_of(target, options.channels_last);
    call.check(view && is_dense(*view, target, layout, layout.pixels), "out",
               "the memory layout of x", "another one");
    launch.z = advanced<CouplingOutput>(*view, call.output(target, "out"), 0, 0);
    const ScalarType statistics = call.statistics_type(options.dtype);
    Tensor log_det = call.empty({options.batch}, statistics);
    launch.log_det = call.output(log_det, "log_det");
    if (log_det_in.has_value()) {
        launch.log_det_in =
            contiguous_input(call, *log_det_in, "log_det_in", {options.batch}, statistics);
    }
    launch.parts = part_counts<backend>(options).log_det;
    launch.partials =
        call.output(call.keep(call.empty({options.batch, launch.parts}, statistics)), "partials");
    if (options.batch > 0) {
        WARPLOOM_RUN(backend, call, affine_coupling, launch)
    }
    if (z != nullptr) {
        *z = std::move(target);
    }
    return log_det;
}

template <Backend backend>
std::tuple<Tensor, Tensor> affine_coupling(
    const Tensor& x, const Tensor& params, const std::optional<Tensor>& raw_scale,
    const std::optional<Tensor>& places, const std::optional<Tensor>& scale_weight,
    const std::optional<Tensor>& log_det_in, std::string mask, std::int64_t first,
    std::int64_t count, std::string layout, std::string scale, double clamp, double eps,
    double params_scale, bool add_first, std::int64_t shift_sign, std::int64_t log_sign,
    std::string center) {
    Call<backend> call("affine_coupling", x);
    Tensor z;
    Tensor log_det =
        run_forward(call, std::nullopt, &z, x, params, raw_scale, places, scale_weight, log_det_in,
                    {mask, first, count, layout, scale, clamp, eps, params_scale, add_first,
                     shift_sign, log_sign, center});
    return {z, log_det};
}

template <Backend backend>
Tensor affine_coupling_out(const Tensor& out, const Tensor& x, const Tensor& params,
                           const std::optional<Tensor>& raw_scale,
                           const std::optional<Tensor>& places,
                           const std::optional<Tensor>& scale_weight,
                           const std::optional<Tensor>& log_det_in, std::string mask,
                           std::int64_t first, std::int64_t count, std::string layout,
                           std::string scale, double clamp, double eps, double params_scale,
                           bool add_first, std::int64_t shift_sign, std::int64_t log_sign,
                           std::string center) {
    Call<backend> call("affine_coupling_out", x);
    return run_forward(call, out, nullptr, x, params, raw_scale, places, scale_weight, log_det_in,
                       {mask, first, count, layout, scale, clamp, eps, params_scale, add_first,
                        shift_sign, log_sign, center});
}

template <Backend backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> affine_coupling_backward(
    const std::optional<Tensor>& grad_z, const std::optional<Tensor>& grad_log_det,
    const Tensor& source, const Tensor& params, const std::optional<Tensor>& raw_scale,
    const std::optional<Tensor>& places, const std::optional<Tensor>& scale_weight,
    std::string mask, std::int64_t first, std::int64_t count, std::string layout_name,
    std::string scale, double clamp, double eps, double params_scale, bool add_first,
    std::int64_t shift_sign, std::int64_t log_sign, std::string center, bool from_output) {
    Call<backend> call("affine_coupling_backward", source);
    call.check(source.dim() >= 2, "source", "at least 2 dimensions", shape_of(source));
    const Arguments arguments{mask, first,        count,     layout_name, scale,    clamp,
                              eps,  params_scale, add_first, shift_sign,  log_sign, center};
    const Layout layout = layout_of(source);
    AffineCouplingBackwardParams launch{};
    launch.options = parse_options(call, source, layout, places, scale_weight, arguments);
    const CouplingOptions& options = launch.options;
    parse_params(call, launch.shift, launch.raw_scale, source, layout, options, arguments, params,
                 raw_scale);
    launch.source = sample_input(call, source, "source", layout);
    if (grad_z.has_value()) {
        call.check_shape(*grad_z, "grad_z", shape_vector(source));
        call.check_dtype(*grad_z, "grad_z", options.dtype);
        launch.grad_z = sample_input(call, *grad_z, "grad_z", layout);
    }
    const ScalarType statistics = call.statistics_type(options.dtype);
    if (grad_log_det.has_value()) {
        launch.grad_log_det =
            contiguous_input(call, *grad_log_det, "grad_log_det", {options.batch}, statistics);
    }
    const ScalarType type = source.scalar_type();
    const auto output = [&](const Tensor& tensor, const char* argument) {
        const std::optional<CouplingView> view = strides_of(tensor, options.channels_last);
        return advanced<CouplingOutput>(*view, call.output(tensor, argument), 0, 0);
    };
    Tensor grad_x = empty_in_layout(call, shape_vector(source), type, layout.channels_last);
    Tensor grad_params = empty_in_layout(call, shape_vector(params), type, layout.channels_last);
    Tensor grad_raw = raw_scale.has_value() ? empty_in_layout(call, shape_vector(*raw_scale), type,
                                                              layout.channels_last)
                                            : call.empty({0}, type);
    launch.grad_x = output(grad_x, "grad_x");
    launch.grad_shift = output(grad_params, "grad_params");
    if (raw_scale.has_value()) {
        launch.grad_raw_scale = output(grad_raw, "grad_raw_scale");
    } else if (options.scale != CouplingScale::additive) {
        const std::optional<CouplingView> view = strides_of(grad_params, options.channels_last);
        split(launch.grad_shift, launch.grad_raw_scale, *view, launch.grad_shift.data, layout_name,
              options.count, options.dtype);
    }
    Tensor grad_weight = call.empty(scale_weight.has_value()
                                        ? std::vector<std::int64_t>{options.batch, options.count}
                                        : std::vector<std::int64_t>{0},
                                    statistics);
    if (scale_weight.has_value()) {
        launch.grad_weight = call.output(grad_weight, "grad_weight");
    }
    if (scale_weight.has_value() || options.center != CouplingCenter::none) {
        launch.parts = part_counts<backend>(options).weight;
        launch.partials = call.output(
            call.keep(call.empty({options.batch, launch.parts, options.count}, statistics)),
            "partials");
    }
    launch.from_output = from_output;
    if (options.batch > 0) {
        WARPLOOM_RUN(backend, call, affine_coupling_backward, launch)
    }
    return {grad_x, grad_params, grad_raw, grad_weight};
}

template <Backend backend, typename Library>
void register_coupling(Library& library) {
    WARPLOOM_IMPL(library, backend, affine_coupling);
    WARPLOOM_IMPL(library, backend, affine_coupling_out);
    WARPLOOM_IMPL(library, backend, affine_coupling_backward);
}

WARPLOOM_REGISTER(register_coupling)

}  // namespace
}  // namespace warploom::coupling
