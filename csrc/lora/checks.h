// Checks of the seam of family lora's linear maps, and what becomes of an argument before a kernel
// reads it. For *_ops.cpp only: it sees torch.
#pragma once

#include "common/checks.h"
#include "common/matmul.h"
#include "lora/lora_linear.h"

namespace warploom::lora {

using OptionalTensor = std::optional<Tensor>;

// The input of a call, as the kernels see it.
struct Input {
    Tensor tensor;
    DType dtype;
    int rows;
    int columns;

    std::int64_t stride() const { return tensor.stride(0); }
    ScalarType type() const { return tensor.scalar_type(); }
};

template <Backend backend>
Input check_input(const Call<backend>& call, const Tensor& x) {
    call.check_dim(x, "x", 2);
    return {call.dense_last(x), call.dtype(x, "x"), narrow_size(call, x.size(0), "x"),
            narrow_size(call, x.size(1), "x")};
}

// A matrix [rows, columns] of x's type with a dense last dimension.
template <Backend backend>
Tensor check_rows(Call<backend>& call, const Tensor& tensor, const char* argument, const Input& x,
                  std::int64_t columns) {
    call.check_shape(tensor, argument, {x.rows, columns});
    call.check_dtype(tensor, argument, x.dtype);
    return call.keep(call.dense_last(tensor));
}

// Half of an adapter: contiguous and of x's type, or on the CPU the factor [rank, columns] that it
// is, or whose transpose it is, wide and with zeros at the end of its rows.
template <Backend backend>
const void* adapter_input(Call<backend>& call, const Tensor& tensor, const char* argument,
                          const Input& x, const std::vector<std::int64_t>& shape,
                          bool is_transpose) {
    call.check_shape(tensor, argument, shape);
    call.parameter_dtype(tensor, argument, x.dtype);
    if constexpr (backend == Backend::kCpu) {
        const Tensor factor = is_transpose ? transposed(tensor) : tensor;
        const std::int64_t columns = factor.size(1);
        const std::int64_t stride = cpu_factor_stride(columns);
        Tensor padded = call.empty({factor.size(0), stride}, call.statistics_type(x.dtype));
        Tensor behind = torch::stable::narrow(padded, 1, columns, stride - columns);
        torch::stable::zero_(behind);
        Tensor inside = torch::stable::narrow(padded, 1, 0, columns);
        torch::stable::copy_(inside, factor);
        return call.input(call.keep(padded), argument);
    }
    const Tensor same = torch::stable::to(tensor, x.type());
    return call.input(call.keep(torch::stable::contiguous(same)), argument);
}

// shrunk or its gradient where it is read: wide on the CPU.
template <Backend backend>
Tensor check_narrow(Call<backend>& call, const Tensor& tensor, const char* argument, const Input& x,
                    std::int64_t rank) {
    const Tensor narrow = check_rows(call, tensor, argument, x, rank);
    if constexpr (backend == Backend::kCpu) {
        return call.keep(torch::stable::to(narrow, call.statistics_type(x.dtype)));
    }
    return narrow;
}

template <Backend backend>
int check_rank(const Call<backend>& call, const Tensor& lora_a) {
    call.check_dim(lora_a, "lora_a", 2);
    return narrow_size(call, lora_a.size(0), "lora_a");
}

template <Backend backend>
Dropout check_dropout(Call<backend>& call, const OptionalTensor& seed, double dropout_p) {
    call.check(dropout_p >= 0.0 && dropout_p < 1.0, "dropout_p", "a probability in [0, 1)",
               std::to_string(dropout_p));
    if (!seed.has_value()) {
        return {nullptr, 0.0};
    }
    call.check(seed->numel() == 1, "seed", "one element", shape_of(*seed));
    const Tensor flat = torch::stable::reshape(*seed, {1});
    return {static_cast<const std::int64_t*>(
                contiguous_input(call, flat, "seed", {1}, ScalarType::Long)),
            dropout_p};
}

// The weight [N, K] of the call, and how it is stored.
struct CheckedWeight {
    Tensor tensor;
    Weight weight;
    int out_features;
};

template <Backend backend>
WeightFormat parse_format(const Call<backend>& call, const std::string& name) {
    if (name == "dense") {
        return WeightFormat::dense;
    }
    if (name == "nf4") {
        return WeightFormat::nf4;
    }
    if (name == "int8") {
        return WeightFormat::int8;
    }
    call.check(name == "fp8_e4m3", "weight_format", "dense, nf4, int8 or fp8_e4m3", name);
    return WeightFormat::fp8_e4m3;
}

template <Backend backend>
CheckedWeight check_weight(Call<backend>& call, const Tensor& weight, const OptionalTensor& scale,
                           const std::string& format, const Input& x) {
    call.check_dim(weight, "weight", 2);
    CheckedWeight checked{
        torch::stable::contiguous(weight), {}, narrow_size(call, weight.size(0), "weight")};
    Weight& params = checked.weight;
    params.format = parse_format(call, format);
    const bool nf4 = params.format == WeightFormat::nf4;
    call.check(!nf4 || x.columns % 2 == 0, "x", "an even number of columns beside nf4",
               shape_of(x.tensor));
    call.check_shape(weight, "weight", {weight.size(0), nf4 ? x.columns / 2 : x.columns});
    if (params.format == WeightFormat::dense) {
        call.check_dtype(weight, "weight", x.dtype);
    } else {
        call.check(weight.scalar_type() == ScalarType::Byte, "weight", "dtype Byte",
                   torch::headeronly::toString(weight.scalar_type()));
        call.check(scale.has_value(), "weight_scale", "a tensor beside a quantised weight", "None");
        call.check_dim(*scale, "weight_scale", 2);
        const std::int64_t blocks = scale->size(1);
        call.check(blocks > 0 && x.columns % (2 * blocks) == 0, "weight_scale",
                   "blocks of an even number of columns", shape_of(*scale));
        params.scale = static_cast<const float*>(contiguous_input(
            call, *scale, "weight_scale", {weight.size(0), blocks}, ScalarType::Float));
        params.scale_block = static_cast<int>(x.columns / blocks);
    }
    params.values = call.input(checked.tensor, "weight");
    return checked;
}

}  // namespace warploom::lora
