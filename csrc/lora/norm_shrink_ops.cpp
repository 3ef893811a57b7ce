// The seam of the ops that emit the rank-r product of their rows: checks -> Params -> launch.
#include <optional>
#include <string>
#include <tuple>

#include "activation/checks.h"
#include "common/checks.h"
#include "lora/norm_shrink.h"

namespace warploom::lora {
namespace {

struct Sizes {
    int rows;
    int columns;
    int rank;
};

// `x` [rows, columns], lora_a [rank, columns].
template <Backend backend>
Sizes check_sizes(const Call<backend>& call, const Tensor& x, const char* argument,
                  const Tensor& lora_a) {
    call.check_dim(x, argument, 2);
    call.check(x.size(1) >= 1, argument, "at least 1 column", shape_of(x));
    call.check_dim(lora_a, "lora_a", 2);
    call.check_shape(lora_a, "lora_a", {lora_a.size(0), x.size(1)});
    call.check(lora_a.size(0) >= 1, "lora_a", "a rank of at least 1", shape_of(lora_a));
    return {narrow_size(call, x.size(0), argument), narrow_size(call, x.size(1), argument),
            narrow_size(call, lora_a.size(0), "lora_a")};
}

// What both ops share: the adapter, `shrunk` and the CPU kernel's workspace. They live as long as
// this does.
template <Backend backend>
struct Product {
    Tensor lora_a;
    Tensor shrunk;
    Tensor workspace;

    Product(const Call<backend>& call, const Tensor& x, const Tensor& adapter, const Sizes& sizes,
            DType dtype)
        : shrunk(call.empty({sizes.rows, sizes.rank}, x.scalar_type())),
          workspace(call.empty(
              {backend == Backend::kCpu ? shrink_workspace(sizes.rows, sizes.columns, sizes.rank)
                                        : 0},
              Call<backend>::statistics_type(dtype))) {
        const bool same = call.parameter_dtype(adapter, "lora_a", dtype) == dtype;
        lora_a =
            torch::stable::contiguous(same ? adapter : torch::stable::to(adapter, x.scalar_type()));
    }

    template <typename Params>
    void fill(Call<backend>& call, const Sizes& sizes, DType dtype, Params& params) {
        params.lora_a = call.input(lora_a, "lora_a");
        params.shrunk = call.output(shrunk, "shrunk");
        params.workspace = call.output(workspace, "workspace");
        params.rows = sizes.rows;
        params.columns = sizes.columns;
        params.rank = sizes.rank;
        params.dtype = dtype;
    }
};

template <Backend backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_shrink(const Tensor& x,
                                                           const std::optional<Tensor>& residual,
                                                           const Tensor& weight,
                                                           const Tensor& lora_a, double eps) {
    Call<backend> call("rms_norm_shrink", x);
    const Sizes sizes = check_sizes(call, x, "x", lora_a);
    const DType dtype = call.dtype(x, "x");
    RmsNormShrinkParams params{};
    params.weight_dtype = call.parameter_dtype(weight, "weight", dtype);
    params.eps = eps;
    call.check_shape(weight, "weight", {x.size(1)});
    const Tensor dense_weight = torch::stable::contiguous(weight);
    const Rows x_rows = call.rows(x);
    Product<backend> product(call, x, lora_a, sizes, dtype);
    Tensor out = call.empty_like(x);
    Tensor rstd = call.empty({x.size(0)}, call.statistics_type(dtype));
    Tensor sum = residual.has_value() ? call.empty_like(x) : call.empty({0}, x.scalar_type());
    std::optional<Rows> residual_rows;
    if (residual.has_value()) {
        call.check_shape(*residual, "residual", {x.size(0), x.size(1)});
        call.check_dtype(*residual, "residual", dtype);
        residual_rows = call.rows(*residual);
        params.residual = call.input(residual_rows->tensor, "residual");
        params.residual_row_stride = residual_rows->stride;
        params.sum = call.output(sum, "sum");
    }
    product.fill(call, sizes, dtype, params);
    params.x = call.input(x_rows.tensor, "x");
    params.x_row_stride = x_rows.stride;
    params.weight = call.input(dense_weight, "weight");
    params.out = call.output(out, "out");
    params.rstd = call.output(rstd, "rstd");
    WARPLOOM_RUN(backend, call, rms_norm_shrink, params)
    return {out, product.shrunk, rstd, sum};
}

template <Backend backend>
std::tuple<Tensor, Tensor> gated_activation_shrink(const Tensor& gate, const Tensor& up,
                                                   const Tensor& lora_a, std::string activation) {
    Call<backend> call("gated_activation_shrink", gate);
    const Sizes sizes = check_sizes(call, gate, "gate", lora_a);
    const DType dtype = activation::check_pair(call, gate, up);
    GatedShrinkParams params{};
    params.activation = activation::parse_activation(call, activation);
    const Rows gate_rows = call.rows(gate);
    const Rows up_rows = call.rows(up);
    Product<backend> product(call, gate, lora_a, sizes, dtype);
    Tensor out = call.empty_like(gate);
    product.fill(call, sizes, dtype, params);
    params.gate = call.input(gate_rows.tensor, "gate");
    params.up = call.input(up_rows.tensor, "up");
    params.gate_row_stride = gate_rows.stride;
    params.up_row_stride = up_rows.stride;
    params.out = call.output(out, "out");
    WARPLOOM_RUN(backend, call, gated_shrink, params)
    return {out, product.shrunk};
}

template <Backend backend, typename Library>
void register_norm_shrink(Library& library) {
    WARPLOOM_IMPL(library, backend, rms_norm_shrink);
    WARPLOOM_IMPL(library, backend, gated_activation_shrink);
}

WARPLOOM_REGISTER(register_norm_shrink)

}  // namespace
}  // namespace warploom::lora
