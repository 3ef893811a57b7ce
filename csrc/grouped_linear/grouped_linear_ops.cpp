// The seam of family grouped_linear: checks -> Params -> launch.
//
// On the CPU, where the offsets can be read, PyTorch multiplies group by group, but for the forward
// of groups of a few rows, which is ours.
#include <algorithm>

#include "common/checks.h"
#include "common/matmul.h"
#include "grouped_linear/grouped_linear.h"

namespace warploom::grouped_linear {
namespace {

struct Sizes {
    DType dtype;
    int rows;
    int groups;
    int out_features;
    int in_features;
};

template <Backend backend>
Sizes check_sizes(const Call<backend>& call, const Tensor& x, const Tensor& weight) {
    call.check_dim(x, "x", 2);
    call.check_dim(weight, "weight", 3);
    call.check_shape(weight, "weight", {weight.size(0), weight.size(1), x.size(1)});
    const DType dtype = call.dtype(x, "x");
    call.check_dtype(weight, "weight", dtype);
    return {dtype, narrow_size(call, x.size(0), "x"), narrow_size(call, weight.size(0), "weight"),
            narrow_size(call, weight.size(1), "weight"), narrow_size(call, x.size(1), "x")};
}

// Calls visit(group, first row, rows) for every group. The offsets lie on the CPU.
template <Backend backend, typename Visit>
void for_each_group(const Call<backend>& call, const std::int32_t* offsets, const Sizes& sizes,
                    const Visit& visit) {
    const std::int64_t last = offsets[sizes.groups];
    call.check(offsets[0] == 0 && last <= sizes.rows &&
                   std::is_sorted(offsets, offsets + sizes.groups + 1),
               "group_offsets", "offsets that rise from 0 to at most " + std::to_string(sizes.rows),
               std::to_string(offsets[0]) + " to " + std::to_string(last));
    for (int group = 0; group < sizes.groups; ++group) {
        visit(group, offsets[group], offsets[group + 1] - offsets[group]);
    }
}

// Rows [first, first + count) of a tensor.
Tensor rows_of(Tensor tensor, std::int64_t first, std::int64_t count) {
    return torch::stable::narrow(tensor, 0, first, count);
}

void clear_rows_behind(const Tensor& out, std::int64_t last) {
    Tensor behind = rows_of(out, last, out.size(0) - last);
    torch::stable::zero_(behind);
}

template <Backend backend>
Tensor grouped_linear(const Tensor& x, const Tensor& weight, const Tensor& group_offsets,
                      bool batch_invariant) {
    Call<backend> call("grouped_linear", x);
    const Sizes sizes = check_sizes(call, x, weight);
    const Tensor dense_x = call.dense_last(x);
    const Tensor dense_weight = torch::stable::contiguous(weight);
    Tensor out = call.empty({x.size(0), weight.size(1)}, x.scalar_type());
    GroupedLinearParams params{};
    params.x = call.input(dense_x, "x");
    params.weight = call.input(dense_weight, "weight");
    params.group_offsets = int32_input(call, group_offsets, "group_offsets", {weight.size(0) + 1});
    params.out = call.output(out, "out");
    params.x_row_stride = dense_x.stride(0);
    params.rows = sizes.rows;
    params.groups = sizes.groups;
    params.out_features = sizes.out_features;
    params.in_features = sizes.in_features;
    params.batch_invariant = batch_invariant;
    params.dtype = sizes.dtype;
    if constexpr (backend == Backend::kCpu) {
        for_each_group(call, params.group_offsets, sizes, [&](int group, int first, int count) {
            if (count > most_cpu_rows(sizes.dtype, batch_invariant)) {
                // One row at a time has the same sums in any batch.
                const int step = batch_invariant ? 1 : count;
                const Tensor matrix = transposed(torch::stable::select(dense_weight, 0, group));
                for (int row = first; row < first + count; row += step) {
                    multiply(rows_of(dense_x, row, step), matrix, rows_of(out, row, step));
                }
            }
        });
        grouped_linear_cpu(params);
        clear_rows_behind(out, params.group_offsets[sizes.groups]);
    } else {
        grouped_linear_cuda(params, static_cast<Stream>(call.stream()));
    }
    return out;
}

template <Backend backend>
std::tuple<Tensor, Tensor> grouped_linear_backward(const Tensor& grad_out, const Tensor& x,
                                                   const Tensor& weight,
                                                   const Tensor& group_offsets, bool needs_x,
                                                   bool needs_weight) {
    Call<backend> call("grouped_linear_backward", x);
    const Sizes sizes = check_sizes(call, x, weight);
    call.check_shape(grad_out, "grad_out", {x.size(0), weight.size(1)});
    call.check_dtype(grad_out, "grad_out", sizes.dtype);
    const Tensor dense_grad = call.dense_last(grad_out);
    const Tensor dense_x = call.dense_last(x);
    const Tensor dense_weight = torch::stable::contiguous(weight);
    const auto like = [&](const Tensor& tensor, bool needed) {
        return needed ? call.empty_like(tensor) : call.empty({0}, tensor.scalar_type());
    };
    Tensor grad_x = like(x, needs_x);
    Tensor grad_weight = like(weight, needs_weight);
    GroupedLinearBackwardParams params{};
    params.grad_out = call.input(dense_grad, "grad_out");
    params.x = call.input(dense_x, "x");
    params.weight = call.input(dense_weight, "weight");
    params.group_offsets = int32_input(call, group_offsets, "group_offsets", {weight.size(0) + 1});
    params.grad_x = needs_x ? call.output(grad_x, "grad_x") : nullptr;
    params.grad_weight = needs_weight ? call.output(grad_weight, "grad_weight") : nullptr;
    params.grad_out_row_stride = dense_grad.stride(0);
    params.x_row_stride = dense_x.stride(0);
    params.rows = sizes.rows;
    params.groups = sizes.groups;
    params.out_features = sizes.out_features;
    params.in_features = sizes.in_features;
    params.dtype = sizes.dtype;
    if constexpr (backend == Backend::kCpu) {
        for_each_group(call, params.group_offsets, sizes, [&](int group, int first, int count) {
            const Tensor grad = rows_of(dense_grad, first, count);
            if (needs_x && count > 0) {
                multiply(grad, torch::stable::select(dense_weight, 0, group),
                         rows_of(grad_x, first, count));
            }
            if (needs_weight) {
                multiply(transposed(grad), rows_of(dense_x, first, count),
                         torch::stable::select(grad_weight, 0, group));
            }
        });
        if (needs_x) {
            clear_rows_behind(grad_x, params.group_offsets[sizes.groups]);
        }
    } else {
        grouped_linear_backward_cuda(params, static_cast<Stream>(call.stream()));
    }
    return {grad_x, grad_weight};
}

template <Backend backend, typename Library>
void register_grouped_linear(Library& library) {
    WARPLOOM_IMPL(library, backend, grouped_linear);
    WARPLOOM_IMPL(library, backend, grouped_linear_backward);
}

WARPLOOM_REGISTER(register_grouped_linear)

}  // namespace
}  // namespace warploom::grouped_linear
