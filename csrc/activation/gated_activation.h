// Gated activations: what their kernels are given.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dispatch.h"
#include "common/launch.h"

namespace warploom::activation {

enum class Activation : int { silu, gelu, gelu_tanh };

struct GatedActivationParams {
    const void* gate;  // [rows, columns], rows gate_row_stride elements apart, columns dense
    const void* up;    // [rows, columns], rows up_row_stride apart, columns dense
    void* out;         // [rows, columns], contiguous
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t gate_row_stride;
    std::int64_t up_row_stride;
    Activation activation;
    DType dtype;
};

struct GatedActivationBackwardParams {
    const void* grad_out;  // [rows, columns], rows grad_out_row_stride apart, columns dense
    const void* gate;      // as in GatedActivationParams
    const void* up;
    void* grad_gate;  // [rows, columns], contiguous
    void* grad_up;    // [rows, columns], contiguous
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t grad_out_row_stride;
    std::int64_t gate_row_stride;
    std::int64_t up_row_stride;
    Activation activation;
    DType dtype;
};

WARPLOOM_DECLARE_CPU(gated_activation_cpu, GatedActivationParams)
WARPLOOM_DECLARE_CPU(gated_activation_backward_cpu, GatedActivationBackwardParams)
void gated_activation_cuda(const GatedActivationParams& params, Stream stream);
void gated_activation_backward_cuda(const GatedActivationBackwardParams& params, Stream stream);

}  // namespace warploom::activation
