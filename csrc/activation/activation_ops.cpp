// The seam of family activation: checks -> Params -> launch.
#include "activation/checks.h"
#include "activation/gated_activation.h"

namespace warploom::activation {
namespace {

// A scalar tensor is a row of one element.
Tensor at_least_1d(const Tensor& tensor) {
    return tensor.dim() == 0 ? torch::stable::reshape(tensor, {1}) : tensor;
}

template <Backend backend>
Tensor gated_activation(const Tensor& gate, const Tensor& up, std::string activation) {
    Call<backend> call("gated_activation", gate);
    GatedActivationParams params{};
    params.dtype = check_pair(call, gate, up);
    params.activation = parse_activation(call, activation);
    const Rows gate_rows = call.rows(at_least_1d(gate));
    const Rows up_rows = call.rows(at_least_1d(up));
    Tensor out = call.empty_like(gate);
    params.gate = call.input(gate_rows.tensor, "gate");
    params.up = call.input(up_rows.tensor, "up");
    params.out = call.output(out, "out");
    params.rows = gate_rows.count;
    params.columns = gate_rows.columns;
    params.gate_row_stride = gate_rows.stride;
    params.up_row_stride = up_rows.stride;
    if (params.rows > 0) {
        WARPLOOM_RUN(backend, call, gated_activation, params)
    }
    return out;
}

template <Backend backend>
std::tuple<Tensor, Tensor> gated_activation_backward(const Tensor& grad_out, const Tensor& gate,
                                                     const Tensor& up, std::string activation) {
    Call<backend> call("gated_activation_backward", gate);
    GatedActivationBackwardParams params{};
    params.dtype = check_pair(call, gate, up);
    params.activation = parse_activation(call, activation);
    call.check_shape(grad_out, "grad_out", {gate.sizes().begin(), gate.sizes().end()});
    call.check_dtype(grad_out, "grad_out", params.dtype);
    const Rows grad_rows = call.rows(at_least_1d(grad_out));
    const Rows gate_rows = call.rows(at_least_1d(gate));
    const Rows up_rows = call.rows(at_least_1d(up));
    Tensor grad_gate = call.empty_like(gate);
    Tensor grad_up = call.empty_like(up);
    params.grad_out = call.input(grad_rows.tensor, "grad_out");
    params.gate = call.input(gate_rows.tensor, "gate");
    params.up = call.input(up_rows.tensor, "up");
    params.grad_gate = call.output(grad_gate, "grad_gate");
    params.grad_up = call.output(grad_up, "grad_up");
    params.rows = gate_rows.count;
    params.columns = gate_rows.columns;
    params.grad_out_row_stride = grad_rows.stride;
    params.gate_row_stride = gate_rows.stride;
    params.up_row_stride = up_rows.stride;
    if (params.rows > 0) {
        WARPLOOM_RUN(backend, call, gated_activation_backward, params)
    }
    return {grad_gate, grad_up};
}

template <Backend backend, typename Library>
void register_activation(Library& library) {
    WARPLOOM_IMPL(library, backend, gated_activation);
    WARPLOOM_IMPL(library, backend, gated_activation_backward);
}

WARPLOOM_REGISTER(register_activation)

}  // namespace
}  // namespace warploom::activation
