// Checks that the seams of gated activations share. For *_ops.cpp only: it sees torch.
#pragma once

#include <string>

#include "activation/gated_activation.h"
#include "common/torch.h"

namespace warploom::activation {

template <Backend backend>
Activation parse_activation(const Call<backend>& call, const std::string& name) {
    if (name == "silu") {
        return Activation::silu;
    }
    if (name == "gelu") {
        return Activation::gelu;
    }
    call.check(name == "gelu_tanh", "activation", "silu, gelu or gelu_tanh", name);
    return Activation::gelu_tanh;
}

// Both inputs of the forward have one shape and dtype, at least one dimension.
template <Backend backend>
DType check_pair(const Call<backend>& call, const Tensor& gate, const Tensor& up) {
    const DType dtype = call.dtype(gate, "gate");
    call.check_shape(up, "up", {gate.sizes().begin(), gate.sizes().end()});
    call.check_dtype(up, "up", dtype);
    return dtype;
}

}  // namespace warploom::activation
