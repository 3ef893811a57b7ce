// The seam of the rational-quadratic splines: checks -> Params -> launch.
#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "common/torch.h"
#include "coupling/spline.h"

namespace warploom::coupling {
namespace {

// The scalar arguments of both ops, in the schema's order.
struct SplineArguments {
    std::int64_t first;
    std::int64_t num_bins;
    bool params_last;
    const std::string& tails;
    double left;
    double right;
    double bottom;
    double top;
    double min_bin_width;
    double min_bin_height;
    double min_derivative;
    double logit_scale;
    const std::string& convention;
    bool inverse;
};

template <Backend backend>
SplineOptions parse_options(const Call<backend>& call, const SplineArguments& given) {
    SplineOptions options{};
    if (given.tails == "none") {
        options.tails = Tails::none;
    } else if (given.tails == "linear") {
        options.tails = Tails::linear;
    } else {
        call.check(given.tails == "circular", "tails", "none, linear or circular", given.tails);
        options.tails = Tails::circular;
    }
    options.exponential = given.convention == "zuko";
    call.check(options.exponential || given.convention == "nflows", "convention", "nflows or zuko",
               given.convention);
    options.inverse = given.inverse;
    options.input_low = given.inverse ? given.bottom : given.left;
    options.input_high = given.inverse ? given.top : given.right;
    options.output_low = given.inverse ? given.left : given.bottom;
    options.output_high = given.inverse ? given.right : given.top;
    options.ratio = (given.top - given.bottom) / (given.right - given.left);
    options.min_width = given.min_bin_width;
    options.min_height = given.min_bin_height;
    options.min_derivative = given.min_derivative;
    options.logit_scale = given.logit_scale;
    if (options.exponential) {
        options.derivative_softness = -1 / std::log(given.min_derivative);
        options.size_softness = 2 * options.derivative_softness;
    } else {
        options.boundary_logit = std::log(std::expm1(1 - given.min_derivative));
    }
    return options;
}

// x [A, C, S]; params [A, k, M, S] or (params_last) [A, k, S, M].
template <Backend backend>
SplineLayout check_layout(const Call<backend>& call, const Tensor& x, const Tensor& params,
                          const SplineArguments& given, Tails tails) {
    call.check_dim(x, "x", 3);
    call.check_dim(params, "params", 4);
    call.check(given.num_bins >= 1 && given.num_bins <= kMostBins, "num_bins", "1 to 64",
               std::to_string(given.num_bins));
    const std::int64_t ends = tails == Tails::none ? 1 : tails == Tails::linear ? -1 : 0;
    const std::int64_t num_logits = 3 * given.num_bins + ends;
    const std::int64_t transformed = params.size(1);
    const std::int64_t inner = x.size(2);
    call.check(given.first >= 0 && given.first + transformed <= x.size(1), "first",
               "channels that x has", std::to_string(given.first));
    if (given.params_last) {
        call.check_shape(params, "params", {x.size(0), transformed, inner, num_logits});
    } else {
        call.check_shape(params, "params", {x.size(0), transformed, num_logits, inner});
    }
    SplineLayout layout{};
    layout.samples = x.size(0);
    layout.sample_stride = x.size(1) * inner;
    layout.first = given.first * inner;
    // Of one element a channel, both orders are one.
    const bool logits_are_neighbours = given.params_last || inner == 1;
    layout.runs_per_sample = logits_are_neighbours ? 1 : transformed;
    layout.runs = layout.samples * layout.runs_per_sample;
    layout.length = logits_are_neighbours ? transformed * inner : inner;
    layout.logit_stride = logits_are_neighbours ? 1 : inner;
    layout.element_stride = logits_are_neighbours ? num_logits : 1;
    layout.num_bins = static_cast<int>(given.num_bins);
    layout.num_logits = static_cast<int>(num_logits);
    return layout;
}

template <Backend backend>
std::tuple<Tensor, Tensor> rational_quadratic_spline(
    const Tensor& x, const Tensor& params, std::int64_t first, std::int64_t num_bins,
    bool params_last, std::string tails, double left, double right, double bottom, double top,
    double min_bin_width, double min_bin_height, double min_derivative, double logit_scale,
    std::string convention, bool inverse) {
    Call<backend> call("rational_quadratic_spline", x);
    const SplineArguments given{
        first, num_bins,      params_last,    tails,          left,        right,      bottom,
        top,   min_bin_width, min_bin_height, min_derivative, logit_scale, convention, inverse};
    SplineParams spline{};
    spline.dtype = call.dtype(x, "x");
    call.check_dtype(params, "params", spline.dtype);
    spline.options = parse_options(call, given);
    spline.layout = check_layout(call, x, params, given, spline.options.tails);
    const Tensor dense_x = torch::stable::contiguous(x);
    const Tensor dense_params = torch::stable::contiguous(params);
    Tensor y = call.empty_like(x);
    Tensor log_det =
        call.empty({x.size(0), params.size(1), x.size(2)}, call.statistics_type(spline.dtype));
    spline.x = call.input(dense_x, "x");
    spline.logits = call.input(dense_params, "params");
    spline.y = call.output(y, "y");
    spline.log_det = call.output(log_det, "log_det");
    if (x.numel() > 0) {
        WARPLOOM_RUN(backend, call, spline, spline)
    }
    return {y, log_det};
}

template <Backend backend>
std::tuple<Tensor, Tensor> rational_quadratic_spline_backward(
    const std::optional<Tensor>& grad_y, const std::optional<Tensor>& grad_log_det, const Tensor& x,
    const Tensor& params, std::int64_t first, std::int64_t num_bins, bool params_last,
    std::string tails, double left, double right, double bottom, double top, double min_bin_width,
    double min_bin_height, double min_derivative, double logit_scale, std::string convention,
    bool inverse) {
    Call<backend> call("rational_quadratic_spline_backward", x);
    const SplineArguments given{
        first, num_bins,      params_last,    tails,          left,        right,      bottom,
        top,   min_bin_width, min_bin_height, min_derivative, logit_scale, convention, inverse};
    SplineBackwardParams spline{};
    spline.dtype = call.dtype(x, "x");
    call.check_dtype(params, "params", spline.dtype);
    spline.options = parse_options(call, given);
    spline.layout = check_layout(call, x, params, given, spline.options.tails);
    const Tensor dense_x = torch::stable::contiguous(x);
    const Tensor dense_params = torch::stable::contiguous(params);
    if (grad_y.has_value()) {
        call.check_shape(*grad_y, "grad_y", {x.sizes().begin(), x.sizes().end()});
        call.check_dtype(*grad_y, "grad_y", spline.dtype);
        spline.grad_y = call.input(call.keep(torch::stable::contiguous(*grad_y)), "grad_y");
    }
    if (grad_log_det.has_value()) {
        call.check_shape(*grad_log_det, "grad_log_det", {x.size(0), params.size(1), x.size(2)});
        call.check(grad_log_det->scalar_type() == call.statistics_type(spline.dtype),
                   "grad_log_det", "the dtype of log_det",
                   torch::headeronly::toString(grad_log_det->scalar_type()));
        spline.grad_log_det =
            call.input(call.keep(torch::stable::contiguous(*grad_log_det)), "grad_log_det");
    }
    Tensor grad_x = call.empty_like(x);
    Tensor grad_params = call.empty_like(params);
    spline.x = call.input(dense_x, "x");
    spline.logits = call.input(dense_params, "params");
    spline.grad_x = call.output(grad_x, "grad_x");
    spline.grad_logits = call.output(grad_params, "grad_params");
    if (x.numel() > 0) {
        WARPLOOM_RUN(backend, call, spline_backward, spline)
    }
    return {grad_x, grad_params};
}

template <Backend backend, typename Library>
void register_spline(Library& library) {
    WARPLOOM_IMPL(library, backend, rational_quadratic_spline);
    WARPLOOM_IMPL(library, backend, rational_quadratic_spline_backward);
}

WARPLOOM_REGISTER(register_spline)

}  // namespace
}  // namespace warploom::coupling
