// Which products are PyTorch's. For *_ops.cpp only: it sees torch.
#pragma once

#include "lora/checks.h"

namespace warploom::lora {

// From so many ranks on, the BLAS's copies of its operands are worth it: on two threads with
// AVX-512, 512 x 4096 float32 by 64, 128 and 256 ranks, it made 106, 154 and 188 GFLOP/s where
// lora_linear_cpu.cpp made 99, 114 and 130. That widens 16-bit elements and draws dropout on the
// way, which here would take a second wide matrix.
constexpr std::int64_t kBlasRank = 64;

// x W^T and g W of a weight: on the CPU all, on a GPU as lora_products_are_pytorchs_cuda says.
template <Backend backend>
bool is_library_weight(const CheckedWeight& weight) {
    if constexpr (backend == Backend::kCuda) {
        return weight.weight.format == WeightFormat::dense && lora_products_are_pytorchs_cuda();
    }
    return backend == Backend::kCpu;
}

// Products of x's type with an adapter of `rank` ranks.
template <Backend backend>
bool is_library_adapter(const Call<backend>& call, const Input& x, const Tensor& adapter,
                        std::int64_t rank, const Dropout& dropout) {
    if (dropout.seed != nullptr) {
        return false;
    }
    if constexpr (backend == Backend::kCuda) {
        return lora_products_are_pytorchs_cuda();
    }
    return backend == Backend::kCpu && rank >= kBlasRank &&
           x.type() == call.statistics_type(x.dtype) && adapter.scalar_type() == x.type();
}

// An adapter where PyTorch multiplies by it.
inline Tensor library_adapter(const Tensor& adapter, const Input& x) {
    return torch::stable::to(adapter, x.type());
}

}  // namespace warploom::lora
