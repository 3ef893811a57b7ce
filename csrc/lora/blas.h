// Products with an adapter of many ranks on the CPU, by PyTorch's BLAS. For *_ops.cpp only: it sees
// torch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "lora/checks.h"

namespace warploom::lora {

// From so many ranks on, the BLAS's copies of its operands are worth it: on two threads with
// AVX-512, 512 x 4096 float32 by 64, 128 and 256 ranks, it made 106, 154 and 188 GFLOP/s where
// lora_linear_cpu.cpp made 99, 114 and 130. That widens 16-bit elements and draws dropout on the
// way, which here would take a second wide matrix.
constexpr std::int64_t kBlasRank = 64;

template <Backend backend>
bool has_blas_product(const Call<backend>& call, const Input& x, const Tensor& adapter,
                      std::int64_t rank, const Dropout& dropout) {
    return backend == Backend::kCpu && rank >= kBlasRank && dropout.seed == nullptr &&
           x.type() == call.statistics_type(x.dtype) && adapter.scalar_type() == x.type();
}

// out = old out + alpha a b, old 1 or 0
inline void multiply_add(const Tensor& a, const Tensor& b, Tensor out, double old, double alpha) {
    check_shim(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), old, alpha),
               "PyTorch's product");
}

}  // namespace warploom::lora
