// The seam of family attention: checks -> Params -> launch.
//
// On the CPU the ordinary prefill goes to PyTorch's own fused attention, which is good at it; what
// it cannot do (decode at speed, causal with unequal lengths, value dims of their own, gradients of
// lse) is ours.
#include <limits>

#include "attention/attention.h"
#include "attention/attention_backward.h"
#include "common/torch.h"

namespace warploom::attention {
namespace {

// Fewer query rows than this make a call decode: bound by reading the keys, and ours.
constexpr std::int64_t kPrefillQueries = 16;

bool torch_serves(const Tensor& q, const Tensor& k, const Tensor& v, bool causal) {
    const bool square = q.size(1) == k.size(1);
    return q.size(0) > 0 && q.size(1) >= kPrefillQueries && k.size(1) > 0 && (square || !causal) &&
           q.size(3) == v.size(3);
}

Tensor heads_first(const Tensor& tensor) {
    return torch::stable::transpose(tensor, 1, 2);
}

std::tuple<Tensor, Tensor> torch_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                         bool causal, double softmax_scale) {
    using torch::stable::detail::from;
    using torch::stable::detail::to;
    std::array<StableIValue, 7> stack{from(heads_first(q)),
                                      from(heads_first(k)),
                                      from(heads_first(v)),
                                      from(0.0),
                                      from(causal),
                                      from(std::optional<Tensor>()),
                                      from(std::optional<double>(softmax_scale))};
    check_shim(torch_call_dispatcher("aten::_scaled_dot_product_flash_attention_for_cpu", "",
                                     stack.data(), TORCH_ABI_VERSION),
               "attention: PyTorch's attention");
    const Tensor out = heads_first(to<Tensor>(stack[0]));
    return {torch::stable::contiguous(out), torch::stable::contiguous(to<Tensor>(stack[1]))};
}

std::tuple<Tensor, Tensor, Tensor> torch_backward(const Tensor& grad_out, const Tensor& q,
                                                  const Tensor& k, const Tensor& v,
                                                  const Tensor& out, const Tensor& lse, bool causal,
                                                  double softmax_scale) {
    using torch::stable::detail::from;
    using torch::stable::detail::to;
    std::array<StableIValue, 10> stack{from(heads_first(grad_out)),
                                       from(heads_first(q)),
                                       from(heads_first(k)),
                                       from(heads_first(v)),
                                       from(heads_first(out)),
                                       from(lse),
                                       from(0.0),
                                       from(causal),
                                       from(std::optional<Tensor>()),
                                       from(std::optional<double>(softmax_scale))};
    check_shim(torch_call_dispatcher("aten::_scaled_dot_product_flash_attention_for_cpu_backward",
                                     "", stack.data(), TORCH_ABI_VERSION),
               "attention_backward: PyTorch's attention");
    return {torch::stable::contiguous(heads_first(to<Tensor>(stack[0]))),
            torch::stable::contiguous(heads_first(to<Tensor>(stack[1]))),
            torch::stable::contiguous(heads_first(to<Tensor>(stack[2])))};
}

HeadStrides strides_of(const Tensor& tensor) {
    return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Shapes [B, S, H, D] that fit together, one dtype; returns it.
template <Backend backend>
DType check_inputs(const Call<backend>& call, const Tensor& q, const Tensor& k, const Tensor& v) {
    call.check_dim(q, "q", 4);
    call.check_dim(k, "k", 4);
    call.check_dim(v, "v", 4);
    call.check_shape(k, "k", {q.size(0), k.size(1), k.size(2), q.size(3)});
    call.check_shape(v, "v", {q.size(0), k.size(1), k.size(2), v.size(3)});
    call.check(k.size(2) > 0 && q.size(2) % k.size(2) == 0, "k",
               "a head count that divides q's " + std::to_string(q.size(2)),
               std::to_string(k.size(2)));
    call.check(q.size(3) > 0 && v.size(3) > 0, "q", "head dims of at least 1", shape_of(q));
    constexpr std::int64_t kLongest = std::numeric_limits<int>::max();
    call.check(q.size(1) <= kLongest && k.size(1) <= kLongest, "q", "at most 2^31 - 1 tokens",
               shape_of(q));
    const DType dtype = call.dtype(q, "q");
    call.check_dtype(k, "k", dtype);
    call.check_dtype(v, "v", dtype);
    return dtype;
}

template <Backend backend>
std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                                     double softmax_scale) {
    Call<backend> call("attention", q);
    AttentionParams params{};
    params.dtype = check_inputs(call, q, k, v);
    const Tensor dense_q = call.dense_last(q);
    const Tensor dense_k = call.dense_last(k);
    const Tensor dense_v = call.dense_last(v);
    if (backend == Backend::kCpu && torch_serves(q, k, v, causal)) {
        return torch_forward(dense_q, dense_k, dense_v, causal, softmax_scale);
    }
    Tensor out = call.empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.scalar_type());
    Tensor lse = call.empty({q.size(0), q.size(2), q.size(1)}, call.statistics_type(params.dtype));
    params.q = call.input(dense_q, "q");
    params.k = call.input(dense_k, "k");
    params.v = call.input(dense_v, "v");
    params.out = call.output(out, "out");
    params.lse = call.output(lse, "lse");
    params.q_strides = strides_of(dense_q);
    params.k_strides = strides_of(dense_k);
    params.v_strides = strides_of(dense_v);
    params.out_strides = strides_of(out);
    params.batch = static_cast<int>(q.size(0));
    params.query_length = static_cast<int>(q.size(1));
    params.key_length = static_cast<int>(k.size(1));
    params.heads = static_cast<int>(q.size(2));
    params.kv_heads = static_cast<int>(k.size(2));
    params.head_dim = static_cast<int>(q.size(3));
    params.value_dim = static_cast<int>(v.size(3));
    params.causal = causal;
    params.softmax_scale = softmax_scale;
    WARPLOOM_RUN(backend, call, attention_forward, params)
    return {out, lse};
}

// The C++ of the CPU; the CUDA kernel of the backward joins it in `attention_backward.cu`.
template <Backend backend>
std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_out, const Tensor& q,
                                                      const Tensor& k, const Tensor& v,
                                                      const Tensor& out, const Tensor& lse,
                                                      const std::optional<Tensor>& grad_lse,
                                                      bool causal, double softmax_scale) {
    Call<backend> call("attention_backward", q);
    const DType dtype = check_inputs(call, q, k, v);
    const std::vector<std::int64_t> out_shape{q.size(0), q.size(1), q.size(2), v.size(3)};
    const std::vector<std::int64_t> lse_shape{q.size(0), q.size(2), q.size(1)};
    call.check_shape(grad_out, "grad_out", out_shape);
    call.check_dtype(grad_out, "grad_out", dtype);
    call.check_shape(out, "out", out_shape);
    call.check_dtype(out, "out", dtype);
    call.check_shape(lse, "lse", lse_shape);
    const ScalarType statistics = call.statistics_type(dtype);
    call.check(lse.scalar_type() == statistics, "lse", "the dtype that attention returned",
               torch::headeronly::toString(lse.scalar_type()));
    const Tensor dense_q = call.dense_last(q);
    const Tensor dense_k = call.dense_last(k);
    const Tensor dense_v = call.dense_last(v);
    const Tensor dense_grad = call.dense_last(grad_out);
    const Tensor dense_out = call.dense_last(out);
    if (!grad_lse.has_value() && torch_serves(q, k, v, causal)) {
        return torch_backward(dense_grad, dense_q, dense_k, dense_v, dense_out, lse, causal,
                              softmax_scale);
    }
    const Tensor dense_lse = torch::stable::contiguous(lse);
    Tensor grad_q = call.empty_like(q);
    Tensor grad_k = call.empty_like(k);
    Tensor grad_v = call.empty_like(v);
    AttentionBackwardParams params{};
    Tensor dense_grad_lse = lse;
    if (grad_lse.has_value()) {
        call.check_shape(*grad_lse, "grad_lse", lse_shape);
        call.check(grad_lse->scalar_type() == statistics, "grad_lse", "lse's dtype",
                   torch::headeronly::toString(grad_lse->scalar_type()));
        dense_grad_lse = torch::stable::contiguous(*grad_lse);
        params.grad_lse = call.input(dense_grad_lse, "grad_lse");
    }
    params.grad_out = call.input(dense_grad, "grad_out");
    params.q = call.input(dense_q, "q");
    params.k = call.input(dense_k, "k");
    params.v = call.input(dense_v, "v");
    params.out = call.input(dense_out, "out");
    params.lse = call.input(dense_lse, "lse");
    params.grad_q = call.output(grad_q, "grad_q");
    params.grad_k = call.output(grad_k, "grad_k");
    params.grad_v = call.output(grad_v, "grad_v");
    params.grad_out_strides = strides_of(dense_grad);
    params.q_strides = strides_of(dense_q);
    params.k_strides = strides_of(dense_k);
    params.v_strides = strides_of(dense_v);
    params.out_strides = strides_of(dense_out);
    params.grad_q_strides = strides_of(grad_q);
    params.grad_k_strides = strides_of(grad_k);
    params.grad_v_strides = strides_of(grad_v);
    params.batch = q.size(0);
    params.query_length = q.size(1);
    params.key_length = k.size(1);
    params.heads = q.size(2);
    params.kv_heads = k.size(2);
    params.head_dim = q.size(3);
    params.value_dim = v.size(3);
    params.causal = causal;
    params.softmax_scale = softmax_scale;
    params.dtype = dtype;
    attention_backward_cpu(params);
    return {grad_q, grad_k, grad_v};
}

template <Backend backend, typename Library>
void register_attention(Library& library) {
    WARPLOOM_IMPL(library, backend, attention);
    if constexpr (backend == Backend::kCpu) {
        WARPLOOM_IMPL(library, backend, attention_backward);
    }
}

WARPLOOM_REGISTER(register_attention)

}  // namespace
}  // namespace warploom::attention
