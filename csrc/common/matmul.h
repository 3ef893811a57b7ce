// PyTorch's matrix product into memory that is there. For *_ops.cpp only: it sees torch.
#pragma once

#include <array>

#include "torch.h"

// addmm by its own entry points: no Scalar passes through the stable dispatcher. That for CUDA is
// bound only where torch has it.
extern "C" {
AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                        AtenTensorHandle mat1, AtenTensorHandle mat2, double beta,
                                        double alpha);
AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                         AtenTensorHandle mat1, AtenTensorHandle mat2, double beta,
                                         double alpha) __attribute__((weak));
}

namespace warploom {

inline Tensor transposed(const Tensor& matrix) {
    return torch::stable::transpose(matrix, 0, 1);
}

// out = a b, by PyTorch. Its float16 products on a CPU may take 200 times as long as float32 ones.
// Unlike aten::matmul, this overload lets autocast alone.
inline void multiply(const Tensor& a, const Tensor& b, Tensor out) {
    using torch::stable::detail::from;
    using torch::stable::detail::to;
    if (out.is_cpu() && out.scalar_type() == ScalarType::Half) {
        const auto wide = [](const Tensor& half) {
            return torch::stable::to(half, ScalarType::Float);
        };
        const Tensor sums = torch::stable::new_empty(out, out.sizes(), ScalarType::Float);
        multiply(wide(a), wide(b), sums);
        torch::stable::copy_(out, sums);
        return;
    }
    std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
    check_shim(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION),
               "PyTorch's product");
    to<Tensor>(stack[0]);  // Takes back the reference that the call returns.
}

// out = beta added + alpha a b, by PyTorch. `added` is broadcast and may be out; where beta is 0 it
// is not read.
inline void add_product(const Tensor& added, double beta, const Tensor& a, const Tensor& b,
                        double alpha, Tensor out) {
    const auto addmm = out.is_cpu() ? aoti_torch_cpu_addmm_out : aoti_torch_cuda_addmm_out;
    check_shim(addmm(out.get(), added.get(), a.get(), b.get(), beta, alpha), "PyTorch's product");
}

}  // namespace warploom
