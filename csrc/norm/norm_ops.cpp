// The seam of family norm: checks -> Params -> launch.
#include "common/torch.h"
#include "norm/l2_norm.h"
#include "norm/layer_norm.h"
#include "norm/rms_norm.h"

namespace warploom::norm {
namespace {

std::vector<std::int64_t> row_shape(const Tensor& x) {
    return {x.sizes().begin(), x.sizes().end() - 1};
}

template <Backend backend>
void check_input(const Call<backend>& call, const Tensor& x) {
    call.check(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, "x",
               "at least 1 dimension, the last one at least 1 long", shape_of(x));
}

// A parameter [columns] in the input's dtype or float32, dense.
template <Backend backend>
Tensor check_parameter(const Call<backend>& call, const Tensor& parameter, const char* argument,
                       const Tensor& x) {
    call.check_shape(parameter, argument, {x.size(x.dim() - 1)});
    return torch::stable::contiguous(parameter);
}

template <Backend backend>
RmsNormParams forward_params(const Call<backend>& call, const Tensor& x, const Tensor& weight,
                             double eps) {
    check_input(call, x);
    RmsNormParams params{};
    params.dtype = call.dtype(x, "x");
    params.weight_dtype = call.parameter_dtype(weight, "weight", params.dtype);
    params.eps = eps;
    return params;
}

template <Backend backend>
std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
    Call<backend> call("rms_norm", x);
    RmsNormParams params = forward_params(call, x, weight, eps);
    const Rows rows = call.rows(x);
    const Tensor dense_weight = check_parameter(call, weight, "weight", x);
    Tensor out = call.empty_like(x);
    Tensor rstd = call.empty(row_shape(x), call.statistics_type(params.dtype));
    params.x = call.input(rows.tensor, "x");
    params.weight = call.input(dense_weight, "weight");
    params.out = call.output(out, "out");
    params.rstd = call.output(rstd, "rstd");
    params.rows = rows.count;
    params.columns = rows.columns;
    params.x_row_stride = rows.stride;
    WARPLOOM_RUN(backend, call, rms_norm, params)
    return {out, rstd};
}

template <Backend backend>
std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                                const Tensor& weight, double eps) {
    Call<backend> call("add_rms_norm", x);
    RmsNormParams params = forward_params(call, x, weight, eps);
    call.check_shape(residual, "residual", {x.sizes().begin(), x.sizes().end()});
    call.check_dtype(residual, "residual", params.dtype);
    const Rows rows = call.rows(x);
    const Rows residual_rows = call.rows(residual);
    const Tensor dense_weight = check_parameter(call, weight, "weight", x);
    Tensor out = call.empty_like(x);
    Tensor sum = call.empty_like(x);
    Tensor rstd = call.empty(row_shape(x), call.statistics_type(params.dtype));
    params.x = call.input(rows.tensor, "x");
    params.residual = call.input(residual_rows.tensor, "residual");
    params.weight = call.input(dense_weight, "weight");
    params.out = call.output(out, "out");
    params.sum = call.output(sum, "sum");
    params.rstd = call.output(rstd, "rstd");
    params.rows = rows.count;
    params.columns = rows.columns;
    params.x_row_stride = rows.stride;
    params.residual_row_stride = residual_rows.stride;
    WARPLOOM_RUN(backend, call, rms_norm, params)
    return {out, sum, rstd};
}

template <Backend backend>
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_out, const Tensor& x,
                                             const Tensor& weight, const Tensor& rstd,
                                             const std::optional<Tensor>& grad_sum) {
    Call<backend> call("rms_norm_backward", x);
    check_input(call, x);
    const std::vector<std::int64_t> shape{x.sizes().begin(), x.sizes().end()};
    RmsNormBackwardParams params{};
    params.dtype = call.dtype(x, "x");
    params.weight_dtype = call.parameter_dtype(weight, "weight", params.dtype);
    call.check_shape(grad_out, "grad_out", shape);
    call.check_dtype(grad_out, "grad_out", params.dtype);
    call.check_shape(rstd, "rstd", row_shape(x));
    call.check(rstd.scalar_type() == call.statistics_type(params.dtype), "rstd",
               "the dtype that rms_norm returned", torch::headeronly::toString(rstd.scalar_type()));
    const Rows rows = call.rows(x);
    const Rows grad_rows = call.rows(grad_out);
    const Tensor dense_weight = check_parameter(call, weight, "weight", x);
    const Tensor dense_rstd = torch::stable::contiguous(rstd);
    params.partials = rms_norm_backward_partials(rows.count);
    Tensor grad_x = call.empty_like(x);
    Tensor grad_weight = call.empty_like(weight);
    Tensor workspace =
        call.empty({params.partials, rows.columns}, call.statistics_type(params.dtype));
    std::optional<Rows> grad_sum_rows;
    if (grad_sum.has_value()) {
        call.check_shape(*grad_sum, "grad_sum", shape);
        call.check_dtype(*grad_sum, "grad_sum", params.dtype);
        grad_sum_rows = call.rows(*grad_sum);
        params.grad_sum = call.input(grad_sum_rows->tensor, "grad_sum");
        params.grad_sum_row_stride = grad_sum_rows->stride;
    }
    params.grad_out = call.input(grad_rows.tensor, "grad_out");
    params.x = call.input(rows.tensor, "x");
    params.weight = call.input(dense_weight, "weight");
    params.rstd = call.input(dense_rstd, "rstd");
    params.grad_x = call.output(grad_x, "grad_x");
    params.grad_weight = call.output(grad_weight, "grad_weight");
    params.workspace = call.output(workspace, "workspace");
    params.rows = rows.count;
    params.columns = rows.columns;
    params.grad_out_row_stride = grad_rows.stride;
    params.x_row_stride = rows.stride;
    WARPLOOM_RUN(backend, call, rms_norm_backward, params)
    return {grad_x, grad_weight};
}

template <Backend backend>
std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight,
                                              const Tensor& bias, double eps) {
    Call<backend> call("layer_norm", x);
    check_input(call, x);
    LayerNormParams params{};
    params.dtype = call.dtype(x, "x");
    params.weight_dtype = call.parameter_dtype(weight, "weight", params.dtype);
    call.check_dtype(bias, "bias", params.weight_dtype);
    params.eps = eps;
    const Rows rows = call.rows(x);
    const Tensor dense_weight = check_parameter(call, weight, "weight", x);
    const Tensor dense_bias = check_parameter(call, bias, "bias", x);
    Tensor out = call.empty_like(x);
    Tensor mean = call.empty(row_shape(x), call.statistics_type(params.dtype));
    Tensor rstd = call.empty(row_shape(x), call.statistics_type(params.dtype));
    params.x = call.input(rows.tensor, "x");
    params.weight = call.input(dense_weight, "weight");
    params.bias = call.input(dense_bias, "bias");
    params.out = call.output(out, "out");
    params.mean = call.output(mean, "mean");
    params.rstd = call.output(rstd, "rstd");
    params.rows = rows.count;
    params.columns = rows.columns;
    params.x_row_stride = rows.stride;
    WARPLOOM_RUN(backend, call, layer_norm, params)
    return {out, mean, rstd};
}

template <Backend backend>
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_out, const Tensor& x,
                                                       const Tensor& weight, const Tensor& mean,
                                                       const Tensor& rstd) {
    Call<backend> call("layer_norm_backward", x);
    check_input(call, x);
    LayerNormBackwardParams params{};
    params.dtype = call.dtype(x, "x");
    params.weight_dtype = call.parameter_dtype(weight, "weight", params.dtype);
    call.check_shape(grad_out, "grad_out", {x.sizes().begin(), x.sizes().end()});
    call.check_dtype(grad_out, "grad_out", params.dtype);
    call.check_shape(mean, "mean", row_shape(x));
    call.check_shape(rstd, "rstd", row_shape(x));
    const ScalarType statistics = call.statistics_type(params.dtype);
    call.check(mean.scalar_type() == statistics, "mean", "the dtype that layer_norm returned",
               torch::headeronly::toString(mean.scalar_type()));
    call.check(rstd.scalar_type() == statistics, "rstd", "the dtype that layer_norm returned",
               torch::headeronly::toString(rstd.scalar_type()));
    const Rows rows = call.rows(x);
    const Rows grad_rows = call.rows(grad_out);
    const Tensor dense_weight = check_parameter(call, weight, "weight", x);
    const Tensor dense_mean = torch::stable::contiguous(mean);
    const Tensor dense_rstd = torch::stable::contiguous(rstd);
    params.partials = rms_norm_backward_partials(rows.count);
    Tensor grad_x = call.empty_like(x);
    Tensor grad_weight = call.empty_like(weight);
    Tensor grad_bias = call.empty_like(weight);
    Tensor workspace = call.empty({2, params.partials, rows.columns}, statistics);
    params.grad_out = call.input(grad_rows.tensor, "grad_out");
    params.x = call.input(rows.tensor, "x");
    params.weight = call.input(dense_weight, "weight");
    params.mean = call.input(dense_mean, "mean");
    params.rstd = call.input(dense_rstd, "rstd");
    params.grad_x = call.output(grad_x, "grad_x");
    params.grad_weight = call.output(grad_weight, "grad_weight");
    params.grad_bias = call.output(grad_bias, "grad_bias");
    params.workspace = call.output(workspace, "workspace");
    params.rows = rows.count;
    params.columns = rows.columns;
    params.grad_out_row_stride = grad_rows.stride;
    params.x_row_stride = rows.stride;
    WARPLOOM_RUN(backend, call, layer_norm_backward, params)
    return {grad_x, grad_weight, grad_bias};
}

template <Backend backend>
std::tuple<Tensor, Tensor> l2_norm(const Tensor& x, double eps) {
    Call<backend> call("l2_norm", x);
    check_input(call, x);
    L2NormParams params{};
    params.dtype = call.dtype(x, "x");
    params.eps = eps;
    const Rows rows = call.rows(x);
    Tensor out = call.empty_like(x);
    Tensor rnorm = call.empty(row_shape(x), call.statistics_type(params.dtype));
    params.x = call.input(rows.tensor, "x");
    params.out = call.output(out, "out");
    params.rnorm = call.output(rnorm, "rnorm");
    params.rows = rows.count;
    params.columns = rows.columns;
    params.x_row_stride = rows.stride;
    WARPLOOM_RUN(backend, call, l2_norm, params)
    return {out, rnorm};
}

template <Backend backend>
Tensor l2_norm_backward(const Tensor& grad_out, const Tensor& x, const Tensor& rnorm) {
    Call<backend> call("l2_norm_backward", x);
    check_input(call, x);
    L2NormBackwardParams params{};
    params.dtype = call.dtype(x, "x");
    call.check_shape(grad_out, "grad_out", {x.sizes().begin(), x.sizes().end()});
    call.check_dtype(grad_out, "grad_out", params.dtype);
    call.check_shape(rnorm, "rnorm", row_shape(x));
    call.check(rnorm.scalar_type() == call.statistics_type(params.dtype), "rnorm",
               "the dtype that l2_norm returned", torch::headeronly::toString(rnorm.scalar_type()));
    const Rows rows = call.rows(x);
    const Rows grad_rows = call.rows(grad_out);
    const Tensor dense_rnorm = torch::stable::contiguous(rnorm);
    Tensor grad_x = call.empty_like(x);
    params.grad_out = call.input(grad_rows.tensor, "grad_out");
    params.x = call.input(rows.tensor, "x");
    params.rnorm = call.input(dense_rnorm, "rnorm");
    params.grad_x = call.output(grad_x, "grad_x");
    params.rows = rows.count;
    params.columns = rows.columns;
    params.grad_out_row_stride = grad_rows.stride;
    params.x_row_stride = rows.stride;
    WARPLOOM_RUN(backend, call, l2_norm_backward, params)
    return grad_x;
}

template <Backend backend, typename Library>
void register_norm(Library& library) {
    WARPLOOM_IMPL(library, backend, rms_norm);
    WARPLOOM_IMPL(library, backend, add_rms_norm);
    WARPLOOM_IMPL(library, backend, rms_norm_backward);
    WARPLOOM_IMPL(library, backend, layer_norm);
    WARPLOOM_IMPL(library, backend, layer_norm_backward);
    WARPLOOM_IMPL(library, backend, l2_norm);
    WARPLOOM_IMPL(library, backend, l2_norm_backward);
}

WARPLOOM_REGISTER(register_norm)

}  // namespace
}  // namespace warploom::norm
