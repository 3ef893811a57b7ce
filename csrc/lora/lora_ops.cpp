// The seam of family lora's linear maps: checks -> Params -> launch.
//
// On the CPU x W^T and g W are PyTorch's products, a quantised weight block by block, and those
// with an adapter of many ranks; on some GPUs all are, but of quantised weights and dropped inputs
// (library_products.h); grad_weight and grad_bias are PyTorch's everywhere.
#include <algorithm>

#include "lora/checks.h"
#include "lora/library_products.h"

namespace warploom::lora {
namespace {

// Quantised weights on the CPU: visit(block, first, count) for all of a weight's rows, or of its
// columns, `block` those of them, dequantised into memory that a cache holds and all blocks share.
template <Backend backend, typename Visit>
void for_each_block(const Call<backend>& call, const CheckedWeight& weight, const Input& x,
                    bool of_columns, const Visit& visit) {
    constexpr std::int64_t kBlockBytes = std::int64_t{4} << 20;
    // As in multiply.
    const bool widened = x.dtype == DType::float16;
    const ScalarType type = widened ? ScalarType::Float : x.type();
    DequantizeParams params{};
    params.weight = weight.weight;
    params.in_features = x.columns;
    params.dtype = x.dtype;
    params.out_dtype = widened ? DType::float32 : x.dtype;
    const std::int64_t size = of_columns ? x.columns : weight.out_features;
    const std::int64_t other = of_columns ? weight.out_features : x.columns;
    const std::int64_t fitting = kBlockBytes / (other * element_size(params.out_dtype) + 1);
    const std::int64_t step = std::min(size, std::max<std::int64_t>(fitting / 16 * 16, 16));
    Tensor buffer = call.empty({step * other}, type);
    params.out = buffer.data_ptr();
    for (std::int64_t first = 0; first < size; first += step) {
        const std::int64_t count = std::min(step, size - first);
        params.rows = static_cast<int>(of_columns ? other : count);
        params.columns = static_cast<int>(of_columns ? count : other);
        params.first_row = static_cast<int>(of_columns ? 0 : first);
        params.first_column = static_cast<int>(of_columns ? first : 0);
        dequantize_cpu(params);
        Tensor used = torch::stable::narrow(buffer, 0, 0, count * other);
        visit(torch::stable::view(used, {params.rows, params.columns}), first, count);
    }
}

// out = a W^T, or a W
template <Backend backend>
void multiply_by_weight(const Call<backend>& call, const Tensor& a, const CheckedWeight& weight,
                        const Input& x, bool transpose, Tensor out) {
    const auto factor = [&](const Tensor& block) { return transpose ? transposed(block) : block; };
    if (weight.weight.format == WeightFormat::dense) {
        multiply(a, factor(weight.tensor), out);
        return;
    }
    const bool widened = x.dtype == DType::float16;
    const Tensor wide = widened ? torch::stable::to(a, ScalarType::Float) : a;
    Tensor sums = widened ? call.empty({out.size(0), out.size(1)}, ScalarType::Float) : out;
    for_each_block(call, weight, x, !transpose,
                   [&](const Tensor& block, std::int64_t first, std::int64_t count) {
                       multiply(wide, factor(block), torch::stable::narrow(sums, 1, first, count));
                   });
    if (widened) {
        torch::stable::copy_(out, sums);
    }
}

// shrunk = drop(x) A^T
template <Backend backend>
Tensor shrink(Call<backend>& call, const Input& x, const Tensor& lora_a, const Dropout& dropout) {
    LoraShrinkParams params{};
    params.rank = check_rank(call, lora_a);
    Tensor shrunk = call.empty({x.rows, params.rank}, x.type());
    if (is_library_adapter(call, x, lora_a, params.rank, dropout)) {
        call.check_shape(lora_a, "lora_a", {params.rank, x.columns});
        multiply(x.tensor, transposed(library_adapter(lora_a, x)), shrunk);
        return shrunk;
    }
    params.x = call.input(x.tensor, "x");
    params.lora_a = adapter_input(call, lora_a, "lora_a", x, {params.rank, x.columns}, false);
    params.shrunk = call.output(shrunk, "shrunk");
    params.dropout = dropout;
    params.x_row_stride = x.stride();
    params.rows = x.rows;
    params.in_features = x.columns;
    params.dtype = x.dtype;
    if (params.rows > 0 && params.rank > 0) {
        WARPLOOM_RUN(backend, call, lora_shrink, params)
    }
    return shrunk;
}

// scaling wide^T narrow, transposed or not, in the type of `parameter`, whose gradient it is.
template <Backend backend>
Tensor adapter_grad(Call<backend>& call, const Input& x, const Tensor& wide, const Tensor& narrow,
                    const Tensor& parameter, const Dropout& dropout, double scaling,
                    bool transposed) {
    LoraAdapterGradParams params{};
    params.rows = x.rows;
    params.columns = narrow_size(call, wide.size(1), "wide");
    params.rank = narrow_size(call, narrow.size(1), "narrow");
    Tensor out = call.empty_like(parameter);
    // A float32 gradient of 16-bit factors keeps its float32 sums.
    if (x.rows > 0 && out.scalar_type() == x.type() &&
        is_library_adapter(call, x, parameter, params.rank, dropout)) {
        const Tensor& left = transposed ? narrow : wide;
        add_product(out, 0.0, warploom::transposed(left), transposed ? wide : narrow, scaling, out);
        return out;
    }
    const ScalarType type = call.statistics_type(x.dtype);
    Tensor sums =
        out.scalar_type() == type ? out : call.empty({parameter.size(0), parameter.size(1)}, type);
    params.wide = call.input(wide, "wide");
    params.narrow = call.input(narrow, "narrow");
    params.out = call.output(sums, "gradient");
    params.dropout = dropout;
    params.wide_row_stride = wide.stride(0);
    params.narrow_row_stride = narrow.stride(0);
    params.scaling = scaling;
    params.transposed = transposed;
    params.dtype = x.dtype;
    if (params.rows == 0) {
        torch::stable::zero_(sums);
    } else if (out.numel() > 0) {
        WARPLOOM_RUN(backend, call, lora_adapter_grad, params)
    }
    if (out.scalar_type() != type) {
        torch::stable::copy_(out, sums);
    }
    return out;
}

template <Backend backend>
Tensor lora_shrink(const Tensor& x, const Tensor& lora_a, const OptionalTensor& seed,
                   double dropout_p) {
    Call<backend> call("lora_shrink", x);
    return shrink(call, check_input(call, x), lora_a, check_dropout(call, seed, dropout_p));
}

template <Backend backend>
std::tuple<Tensor, Tensor> lora_shrink_backward(const Tensor& grad_shrunk, const Tensor& x,
                                                const Tensor& lora_a, const OptionalTensor& seed,
                                                double dropout_p, bool needs_x, bool needs_a) {
    Call<backend> call("lora_shrink_backward", x);
    const Input input = check_input(call, x);
    const Dropout dropout = check_dropout(call, seed, dropout_p);
    const int rank = check_rank(call, lora_a);
    const Tensor narrow = check_narrow(call, grad_shrunk, "grad_shrunk", input, rank);
    Tensor grad_x = needs_x ? call.empty_like(x) : call.empty({0}, x.scalar_type());
    if (needs_x && is_library_adapter(call, input, lora_a, rank, dropout)) {
        call.check_shape(lora_a, "lora_a", {rank, input.columns});
        multiply(narrow, library_adapter(lora_a, input), grad_x);
    } else if (needs_x) {
        LoraGradXParams params{};
        params.grad_shrunk = call.input(narrow, "grad_shrunk");
        params.lora_a = adapter_input(call, lora_a, "lora_a", input, {rank, input.columns}, false);
        params.grad_x = call.output(grad_x, "grad_x");
        params.dropout = dropout;
        params.grad_shrunk_row_stride = narrow.stride(0);
        params.rows = input.rows;
        params.in_features = input.columns;
        params.rank = rank;
        params.dtype = input.dtype;
        if (grad_x.numel() > 0) {
            WARPLOOM_RUN(backend, call, lora_grad_x, params)
        }
    }
    Tensor grad_a =
        needs_a ? adapter_grad(call, input, input.tensor, narrow, lora_a, dropout, 1.0, true)
                : call.empty({0}, lora_a.scalar_type());
    return {grad_x, grad_a};
}

// A vector [columns] of the type that statistics have.
template <Backend backend>
const void* column_scale_input(Call<backend>& call, const OptionalTensor& column_scale,
                               const Input& x, std::int64_t columns) {
    return column_scale.has_value() ? contiguous_input(call, *column_scale, "column_scale",
                                                       {columns}, call.statistics_type(x.dtype))
                                    : nullptr;
}

// out = column_scale unscaled, as the backward scales a gradient.
template <Backend backend>
void scale_columns(Call<backend>& call, const Input& x, const Tensor& unscaled,
                   const void* column_scale, Tensor out) {
    LoraScaleBackwardParams params{};
    params.grad_out = call.input(unscaled, "unscaled");
    params.unscaled = params.grad_out;
    params.column_scale = column_scale;
    params.grad = call.output(out, "out");
    params.grad_row_stride = unscaled.stride(0);
    params.rows = x.rows;
    params.columns = narrow_size(call, unscaled.size(1), "unscaled");
    params.dtype = x.dtype;
    WARPLOOM_RUN(backend, call, lora_scale_backward, params)
}

template <Backend backend>
std::tuple<Tensor, Tensor, Tensor> lora_linear(
    const Tensor& x, const Tensor& weight, const OptionalTensor& weight_scale,
    const OptionalTensor& bias, const OptionalTensor& lora_a, const OptionalTensor& lora_b,
    const OptionalTensor& column_scale, const OptionalTensor& shrunk, const OptionalTensor& seed,
    std::string weight_format, double scaling, double dropout_p) {
    Call<backend> call("lora_linear", x);
    const Input input = check_input(call, x);
    const CheckedWeight checked = check_weight(call, weight, weight_scale, weight_format, input);
    const std::int64_t columns = checked.out_features;
    Tensor made = lora_a.has_value()
                      ? shrink(call, input, *lora_a, check_dropout(call, seed, dropout_p))
                      : call.empty({0}, input.type());
    // DoRA beside a bias takes the kernel's epilogue.
    const bool on_gpu = backend == Backend::kCuda && is_library_weight<backend>(checked) &&
                        !(column_scale.has_value() && bias.has_value());
    LoraLinearParams params{};
    OptionalTensor added;  // what PyTorch multiplies by lora_b
    if (lora_b.has_value() && (lora_a.has_value() || shrunk.has_value())) {
        call.check_dim(*lora_b, "lora_b", 2);
        params.rank = narrow_size(call, lora_b->size(1), "lora_b");
        const Tensor narrow =
            check_narrow(call, lora_a.has_value() ? made : *shrunk, "shrunk", input, params.rank);
        if ((backend == Backend::kCpu || on_gpu) &&
            is_library_adapter(call, input, *lora_b, params.rank, {})) {
            call.check_shape(*lora_b, "lora_b", {columns, params.rank});
            added = narrow;
            params.rank = 0;
        } else {
            params.shrunk = call.input(narrow, "shrunk");
            params.shrunk_row_stride = narrow.stride(0);
            params.lora_b =
                adapter_input(call, *lora_b, "lora_b", input, {columns, params.rank}, true);
        }
    }
    if (bias.has_value()) {
        call.check_dtype(*bias, "bias", input.dtype);
        params.bias = contiguous_input(call, *bias, "bias", {columns}, input.type());
    }
    params.column_scale = column_scale_input(call, column_scale, input, columns);
    Tensor out = call.empty({input.rows, columns}, input.type());
    Tensor unscaled =
        column_scale.has_value() ? call.empty_like(out) : call.empty({0}, input.type());
    params.x = call.input(input.tensor, "x");
    params.weight = checked.weight;
    params.out = call.output(out, "out");
    params.unscaled = column_scale.has_value() ? call.output(unscaled, "unscaled") : nullptr;
    params.x_row_stride = input.stride();
    params.scaling = scaling;
    params.rows = input.rows;
    params.in_features = input.columns;
    params.out_features = checked.out_features;
    params.dtype = input.dtype;
    if (out.numel() == 0) {
        return {out, made, unscaled};
    }
    Tensor sums = on_gpu && column_scale.has_value() ? unscaled : out;
    if constexpr (backend == Backend::kCpu) {
        multiply_by_weight(call, input.tensor, checked, input, true, sums);
    } else if (on_gpu && bias.has_value()) {
        add_product(*bias, 1.0, input.tensor, transposed(checked.tensor), 1.0, sums);
    } else if (on_gpu) {
        multiply(input.tensor, transposed(checked.tensor), sums);
    }
    if (added.has_value()) {
        add_product(sums, 1.0, *added, transposed(library_adapter(*lora_b, input)), scaling, sums);
    }
    if (!on_gpu) {
        WARPLOOM_RUN(backend, call, lora_linear, params)
    } else if (column_scale.has_value()) {
        scale_columns(call, input, unscaled, params.column_scale, out);
    }
    return {out, made, unscaled};
}

// g = column_scale grad_out, and column_scale's gradient.
template <Backend backend>
std::tuple<Tensor, Tensor> scale_backward(Call<backend>& call, const Input& x, const Tensor& grad,
                                          const Tensor& unscaled, const Tensor& column_scale,
                                          bool needs_column_scale) {
    LoraScaleBackwardParams params{};
    const std::int64_t columns = grad.size(1);
    const ScalarType type = call.statistics_type(x.dtype);
    Tensor scaled = call.empty({x.rows, columns}, x.type());
    Tensor grad_column_scale = call.empty({needs_column_scale ? columns : 0}, type);
    Tensor workspace = call.empty({lora_scale_partials(x.rows), columns}, type);
    params.grad_out = call.input(grad, "grad_out");
    params.unscaled = call.input(unscaled, "unscaled");
    params.column_scale = column_scale_input(call, column_scale, x, columns);
    params.grad = call.output(scaled, "grad");
    params.workspace = call.output(workspace, "workspace");
    params.grad_row_stride = grad.stride(0);
    params.rows = x.rows;
    params.columns = static_cast<int>(columns);
    params.dtype = x.dtype;
    if (needs_column_scale) {
        params.grad_column_scale = call.output(grad_column_scale, "grad_column_scale");
    }
    if (scaled.numel() > 0) {
        WARPLOOM_RUN(backend, call, lora_scale_backward, params)
    } else {
        torch::stable::zero_(grad_column_scale);
    }
    return {scaled, grad_column_scale};
}

template <Backend backend>
Tensor grad_of_shrunk(Call<backend>& call, const Input& x, const Tensor& grad, const Tensor& lora_b,
                      double scaling) {
    LoraGradShrunkParams params{};
    params.rank = narrow_size(call, lora_b.size(1), "lora_b");
    Tensor grad_shrunk = call.empty({x.rows, params.rank}, x.type());
    if (is_library_adapter(call, x, lora_b, params.rank, {})) {
        call.check_shape(lora_b, "lora_b", {grad.size(1), params.rank});
        add_product(grad_shrunk, 0.0, grad, library_adapter(lora_b, x), scaling, grad_shrunk);
        return grad_shrunk;
    }
    params.grad = call.input(grad, "grad");
    params.lora_b = adapter_input(call, lora_b, "lora_b", x, {grad.size(1), params.rank}, true);
    params.grad_shrunk = call.output(grad_shrunk, "grad_shrunk");
    params.grad_row_stride = grad.stride(0);
    params.scaling = scaling;
    params.rows = x.rows;
    params.out_features = static_cast<int>(grad.size(1));
    params.dtype = x.dtype;
    if (grad_shrunk.numel() > 0) {
        WARPLOOM_RUN(backend, call, lora_grad_shrunk, params)
    }
    return grad_shrunk;
}

// grad_x = g W, and the update: added A by PyTorch, or what params have of it by the kernel.
template <Backend backend>
void fill_grad_x(Call<backend>& call, const Input& x, const CheckedWeight& checked,
                 const Tensor& grad, const OptionalTensor& added, const OptionalTensor& lora_a,
                 LoraGradXParams params, Tensor grad_x) {
    const bool on_gpu = backend == Backend::kCuda && is_library_weight<backend>(checked);
    if (on_gpu && params.rank > 0) {
        // The kernel draws what is kept of the update alone.
        params.grad = nullptr;
        params.out_features = 0;
        WARPLOOM_RUN(backend, call, lora_grad_x, params)
        add_product(grad_x, 1.0, grad, checked.tensor, 1.0, grad_x);
        return;
    }
    if constexpr (backend == Backend::kCpu) {
        multiply_by_weight(call, grad, checked, x, false, grad_x);
    } else if (on_gpu) {
        multiply(grad, checked.tensor, grad_x);
    }
    if (added.has_value()) {
        add_product(grad_x, 1.0, *added, library_adapter(*lora_a, x), 1.0, grad_x);
    }
    if (!on_gpu) {
        WARPLOOM_RUN(backend, call, lora_grad_x, params)
    }
}

template <Backend backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_backward(
    const Tensor& grad_out, const Tensor& x, const Tensor& weight,
    const OptionalTensor& weight_scale, const OptionalTensor& lora_a, const OptionalTensor& lora_b,
    const OptionalTensor& column_scale, const OptionalTensor& shrunk, const OptionalTensor& seed,
    const OptionalTensor& unscaled, std::string weight_format, double scaling, double dropout_p,
    bool needs_x, bool needs_weight, bool needs_bias, bool needs_a, bool needs_b,
    bool needs_column_scale, bool needs_shrunk) {
    Call<backend> call("lora_linear_backward", x);
    const Input input = check_input(call, x);
    const CheckedWeight checked = check_weight(call, weight, weight_scale, weight_format, input);
    const std::int64_t columns = checked.out_features;
    call.check(!needs_weight || checked.weight.format == WeightFormat::dense, "needs_weight",
               "a dense weight", weight_format);
    const Dropout dropout = check_dropout(call, seed, dropout_p);
    const auto nothing = [&](const OptionalTensor& like) {
        return call.empty({0}, like.has_value() ? like->scalar_type() : input.type());
    };
    Tensor grad = check_rows(call, grad_out, "grad_out", input, columns);
    Tensor grad_bias = nothing({});
    if (needs_bias) {
        grad_bias = call.empty({columns}, input.type());
        torch::stable::sum_out(grad_bias, grad, std::vector<std::int64_t>{0});
    }
    Tensor grad_column_scale = call.empty({0}, call.statistics_type(input.dtype));
    if (column_scale.has_value()) {
        call.check(unscaled.has_value(), "unscaled", "a tensor beside column_scale", "None");
        const Tensor dense =
            torch::stable::contiguous(check_rows(call, *unscaled, "unscaled", input, columns));
        std::tie(grad, grad_column_scale) =
            scale_backward(call, input, grad, dense, *column_scale, needs_column_scale);
    }

    Tensor grad_shrunk = nothing({});
    Tensor grad_a = nothing(lora_a);
    Tensor grad_b = nothing(lora_b);
    LoraGradXParams params{};
    OptionalTensor added;  // what PyTorch multiplies by lora_a
    if (lora_b.has_value() && shrunk.has_value()) {
        call.check_dim(*lora_b, "lora_b", 2);
        const std::int64_t rank = lora_b->size(1);
        if (needs_b) {
            const Tensor narrow = check_narrow(call, *shrunk, "shrunk", input, rank);
            grad_b = adapter_grad(call, input, grad, narrow, *lora_b, {}, scaling, false);
        }
        const bool reaches_a = lora_a.has_value() && (needs_a || needs_x);
        if (needs_shrunk || reaches_a) {
            grad_shrunk = grad_of_shrunk(call, input, grad, *lora_b, scaling);
        }
        if (reaches_a) {
            const Tensor narrow = check_narrow(call, grad_shrunk, "grad_shrunk", input, rank);
            if (needs_a) {
                grad_a =
                    adapter_grad(call, input, input.tensor, narrow, *lora_a, dropout, 1.0, true);
            }
            if (is_library_weight<backend>(checked) &&
                is_library_adapter(call, input, *lora_a, rank, dropout)) {
                call.check_shape(*lora_a, "lora_a", {rank, input.columns});
                added = narrow;
            } else {
                params.lora_a =
                    adapter_input(call, *lora_a, "lora_a", input, {rank, input.columns}, false);
                params.grad_shrunk = call.input(narrow, "grad_shrunk");
                params.grad_shrunk_row_stride = narrow.stride(0);
                params.rank = narrow_size(call, rank, "lora_b");
            }
        }
    }
    Tensor grad_x = nothing({});
    if (needs_x) {
        grad_x = call.empty_like(x);
        params.grad = call.input(grad, "grad");
        params.weight = checked.weight;
        params.grad_x = call.output(grad_x, "grad_x");
        params.dropout = dropout;
        params.grad_row_stride = grad.stride(0);
        params.rows = input.rows;
        params.in_features = input.columns;
        params.out_features = checked.out_features;
        params.dtype = input.dtype;
        if (grad_x.numel() > 0) {
            fill_grad_x(call, input, checked, grad, added, lora_a, params, grad_x);
        }
    }
    Tensor grad_weight = nothing({});
    if (needs_weight) {
        grad_weight = call.empty({columns, input.columns}, input.type());
        multiply(transposed(grad), input.tensor, grad_weight);
    }
    return {grad_x,
            grad_weight,
            grad_bias,
            grad_a,
            grad_b,
            grad_column_scale,
            needs_shrunk ? grad_shrunk : nothing({})};
}

template <Backend backend, typename Library>
void register_lora(Library& library) {
    WARPLOOM_IMPL(library, backend, lora_shrink);
    WARPLOOM_IMPL(library, backend, lora_shrink_backward);
    WARPLOOM_IMPL(library, backend, lora_linear);
    WARPLOOM_IMPL(library, backend, lora_linear_backward);
}

WARPLOOM_REGISTER(register_lora)

}  // namespace
}  // namespace warploom::lora
