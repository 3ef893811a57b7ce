// The seam of attention forward and backward: checks -> Params -> launch.
//
// On the CPU the ordinary prefill goes to PyTorch's own fused attention, which is good at it; what
// it cannot do (masks and biases of its own, causal with unequal lengths, packed sequences, value
// dims of their own, gradients of lse) is ours.
#include <cmath>

#include "attention/attention.h"
#include "attention/attention_backward.h"
#include "attention/checks.h"
#include "common/torch.h"

namespace warploom::attention {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Fewer query rows than this make a call decode: bound by reading the keys, and ours.
constexpr std::int64_t kPrefillQueries = 16;

// The optional arguments of both ops, in the order of their schemas.
struct Options {
    OptionalTensor bias;
    OptionalTensor alibi_slopes;
    OptionalTensor sinks;
    OptionalTensor key_padding_mask;
    OptionalTensor cu_seqlens_q;
    OptionalTensor cu_seqlens_k;
    OptionalTensor block_table;
    OptionalTensor dropout_seed;
    double softmax_scale;
    std::int64_t window_left;
    std::int64_t window_right;
    double softcap;
    double dropout_p;
    std::int64_t max_seqlen_q;
    std::int64_t max_seqlen_k;

    bool packed() const { return cu_seqlens_q.has_value(); }
    bool causal() const { return window_left < 0 && window_right == 0; }
};

bool torch_serves(const Tensor& q, const Tensor& k, const Tensor& v, const Options& options) {
    const bool plain = !options.packed() && !options.bias && !options.alibi_slopes &&
                       !options.sinks && !options.key_padding_mask && !options.dropout_seed &&
                       options.softcap == 0.0;
    const bool full = options.window_left < 0 && options.window_right < 0;
    return plain && (full || (options.causal() && q.size(1) == k.size(1))) && q.size(0) > 0 &&
           q.size(1) >= kPrefillQueries && k.size(1) > 0 && q.size(3) == v.size(3);
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
                                      from(OptionalTensor()),
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
                                       from(OptionalTensor()),
                                       from(std::optional<double>(softmax_scale))};
    check_shim(torch_call_dispatcher("aten::_scaled_dot_product_flash_attention_for_cpu_backward",
                                     "", stack.data(), TORCH_ABI_VERSION),
               "attention_backward: PyTorch's attention");
    return {torch::stable::contiguous(heads_first(to<Tensor>(stack[0]))),
            torch::stable::contiguous(heads_first(to<Tensor>(stack[1]))),
            torch::stable::contiguous(heads_first(to<Tensor>(stack[2])))};
}

// Checks where the sequences lie and how long they are. `kept` holds what must outlive the launch.
template <Backend backend>
Sequences check_sequences(Call<backend>& call, const Tensor& q, const Tensor& k,
                          const Options& options) {
    Sequences sequences{};
    if (!options.packed()) {
        sequences.batch = narrow_size(call, q.size(0), "q");
        sequences.query_length = narrow_size(call, q.size(1), "q");
        sequences.key_length = narrow_size(call, k.size(1), "k");
        return sequences;
    }
    call.check(options.cu_seqlens_k.has_value(), "cu_seqlens_k", "a tensor beside cu_seqlens_q",
               "none");
    const std::int64_t bounds = options.cu_seqlens_q->numel();
    call.check(bounds >= 1, "cu_seqlens_q", "at least 1 element", "0");
    sequences.cu_seqlens_q = int32_input(call, *options.cu_seqlens_q, "cu_seqlens_q", {bounds});
    sequences.cu_seqlens_k = int32_input(call, *options.cu_seqlens_k, "cu_seqlens_k", {bounds});
    sequences.batch = narrow_size(call, bounds - 1, "cu_seqlens_q");
    sequences.query_length = narrow_size(call, options.max_seqlen_q, "max_seqlen_q");
    sequences.key_length = narrow_size(call, options.max_seqlen_k, "max_seqlen_k");
    if (options.block_table.has_value()) {
        const BlockTable table =
            check_block_table(call, *options.block_table, bounds - 1, k.size(1));
        sequences.block_table = table.entries;
        sequences.block_table_stride = table.stride;
        sequences.page_size = table.page_size;
    }
    return sequences;
}

template <Backend backend>
Scoring check_scoring(Call<backend>& call, const Tensor& q, DType dtype, const Options& options,
                      const Sequences& sequences) {
    const std::int64_t batch = sequences.batch;
    const std::int64_t heads = q.size(-2);
    const ScalarType statistics = call.statistics_type(dtype);
    Scoring scoring{};
    scoring.softmax_scale = options.softmax_scale;
    scoring.softcap = options.softcap;
    call.check(options.softcap >= 0.0, "softcap", "a number >= 0", std::to_string(options.softcap));
    scoring.window_left = window_side(call, options.window_left, "window_left");
    scoring.window_right = window_side(call, options.window_right, "window_right");
    if (options.bias.has_value()) {
        call.check(!options.packed(), "bias", "none beside packed sequences", "a tensor");
        call.check_shape(*options.bias, "bias",
                         {batch, heads, sequences.query_length, sequences.key_length});
        call.check_dtype(*options.bias, "bias", dtype);
        scoring.bias = call.input(*options.bias, "bias");
        for (int dim = 0; dim < 4; ++dim) {
            scoring.bias_strides[dim] = options.bias->stride(dim);
        }
    }
    if (options.alibi_slopes.has_value()) {
        scoring.alibi_slopes = contiguous_input(call, *options.alibi_slopes, "alibi_slopes",
                                                {batch, heads}, statistics);
    }
    if (options.sinks.has_value()) {
        scoring.sinks = contiguous_input(call, *options.sinks, "sinks", {heads}, statistics);
    }
    if (options.key_padding_mask.has_value()) {
        call.check(!options.packed(), "key_padding_mask", "none beside packed sequences",
                   "a tensor");
        scoring.key_padding_mask = static_cast<const bool*>(
            contiguous_input(call, *options.key_padding_mask, "key_padding_mask",
                             {batch, sequences.key_length}, ScalarType::Bool));
    }
    call.check(options.dropout_p >= 0.0 && options.dropout_p < 1.0, "dropout_p", "[0, 1)",
               std::to_string(options.dropout_p));
    if (options.dropout_seed.has_value() && options.dropout_p > 0.0) {
        scoring.dropout_seed = static_cast<const std::int64_t*>(
            contiguous_input(call, *options.dropout_seed, "dropout_seed", {1}, ScalarType::Long));
        scoring.dropout_p = options.dropout_p;
    }
    return scoring;
}

// The strides of a dense tensor [B, S, H, D] or of a packed one [T, H, D].
HeadStrides strides_of(const Tensor& tensor) {
    const std::int64_t dims = tensor.dim();
    return {dims == 4 ? tensor.stride(0) : 0, tensor.stride(dims - 3), tensor.stride(dims - 2)};
}

// Dense: [B, S, H, D]; packed: [T, H, D], with pages k and v [num_blocks, page_size, H, D].
template <Backend backend>
DType check_inputs(const Call<backend>& call, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Options& options) {
    const std::int64_t dims = options.packed() ? 3 : 4;
    call.check_dim(q, "q", dims);
    call.check_dim(k, "k", options.block_table ? 4 : dims);
    if (!options.packed()) {
        call.check_shape(k, "k", {q.size(0), k.size(1), k.size(2), q.size(3)});
    }
    return check_heads(call, q, k, v, "k", "v");
}

template <Backend backend>
std::tuple<Tensor, Tensor> attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& bias,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& key_padding_mask, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, const OptionalTensor& block_table,
    const OptionalTensor& dropout_seed, double softmax_scale, std::int64_t window_left,
    std::int64_t window_right, double softcap, double dropout_p, std::int64_t max_seqlen_q,
    std::int64_t max_seqlen_k) {
    Call<backend> call("attention", q);
    const Options options{bias,         alibi_slopes, sinks,        key_padding_mask, cu_seqlens_q,
                          cu_seqlens_k, block_table,  dropout_seed, softmax_scale,    window_left,
                          window_right, softcap,      dropout_p,    max_seqlen_q,     max_seqlen_k};
    AttentionParams params{};
    params.dtype = check_inputs(call, q, k, v, options);
    const Tensor dense_q = call.dense_last(q);
    const Tensor dense_k = call.dense_last(k);
    const Tensor dense_v = call.dense_last(v);
    if (backend == Backend::kCpu && torch_serves(q, k, v, options)) {
        return torch_forward(dense_q, dense_k, dense_v, options.causal(), softmax_scale);
    }
    params.sequences = check_sequences(call, q, k, options);
    params.scoring = check_scoring(call, q, params.dtype, options, params.sequences);
    const std::int64_t heads = q.size(-2);
    const std::int64_t rows = q.size(-3);
    std::vector<std::int64_t> out_shape{rows, heads, v.size(-1)};
    std::vector<std::int64_t> lse_shape{heads, rows};
    if (!options.packed()) {
        out_shape.insert(out_shape.begin(), q.size(0));
        lse_shape.insert(lse_shape.begin(), q.size(0));
    }
    Tensor out = call.empty(out_shape, q.scalar_type());
    Tensor lse = call.empty(lse_shape, call.statistics_type(params.dtype));
    if (options.packed()) {
        // Rows that belong to no sequence.
        torch::stable::fill_(out, 0.0);
        torch::stable::fill_(lse, -INFINITY);
    }
    params.q = call.input(dense_q, "q");
    params.k = call.input(dense_k, "k");
    params.v = call.input(dense_v, "v");
    params.out = call.output(out, "out");
    params.lse = call.output(lse, "lse");
    params.q_strides = strides_of(dense_q);
    params.k_strides = strides_of(dense_k);
    params.v_strides = strides_of(dense_v);
    params.out_strides = strides_of(out);
    params.lse_batch_stride = options.packed() ? 0 : heads * rows;
    params.lse_head_stride = rows;
    params.heads = static_cast<int>(heads);
    params.kv_heads = static_cast<int>(k.size(-2));
    params.head_dim = static_cast<int>(q.size(-1));
    params.value_dim = static_cast<int>(v.size(-1));
    WARPLOOM_RUN(backend, call, attention_forward, params)
    return {out, lse};
}

template <Backend backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const OptionalTensor& grad_lse, const OptionalTensor& bias,
    const OptionalTensor& alibi_slopes, const OptionalTensor& key_padding_mask,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& dropout_seed, double softmax_scale, std::int64_t window_left,
    std::int64_t window_right, double softcap, double dropout_p, std::int64_t max_seqlen_q,
    std::int64_t max_seqlen_k, bool needs_bias, bool needs_distance) {
    Call<backend> call("attention_backward", q);
    const OptionalTensor none;
    const Options options{bias,         alibi_slopes, none,         key_padding_mask, cu_seqlens_q,
                          cu_seqlens_k, none,         dropout_seed, softmax_scale,    window_left,
                          window_right, softcap,      dropout_p,    max_seqlen_q,     max_seqlen_k};
    AttentionBackwardParams params{};
    params.dtype = check_inputs(call, q, k, v, options);
    const std::int64_t heads = q.size(-2);
    const std::int64_t rows = q.size(-3);
    std::vector<std::int64_t> out_shape{rows, heads, v.size(-1)};
    std::vector<std::int64_t> lse_shape{heads, rows};
    if (!options.packed()) {
        out_shape.insert(out_shape.begin(), q.size(0));
        lse_shape.insert(lse_shape.begin(), q.size(0));
    }
    const ScalarType statistics = call.statistics_type(params.dtype);
    call.check_shape(grad_out, "grad_out", out_shape);
    call.check_dtype(grad_out, "grad_out", params.dtype);
    call.check_shape(out, "out", out_shape);
    call.check_dtype(out, "out", params.dtype);
    const Tensor dense_q = call.dense_last(q);
    const Tensor dense_k = call.dense_last(k);
    const Tensor dense_v = call.dense_last(v);
    const Tensor dense_grad = call.dense_last(grad_out);
    const Tensor dense_out = call.dense_last(out);
    Tensor grad_bias =
        call.empty(needs_bias ? std::vector<std::int64_t>{q.size(0), heads, rows, k.size(1)}
                              : std::vector<std::int64_t>{0},
                   q.scalar_type());
    Tensor grad_distance =
        call.empty(needs_distance ? lse_shape : std::vector<std::int64_t>{0}, statistics);
    if (backend == Backend::kCpu && !grad_lse.has_value() && torch_serves(q, k, v, options)) {
        const auto [grad_q, grad_k, grad_v] = torch_backward(
            dense_grad, dense_q, dense_k, dense_v, dense_out, lse, options.causal(), softmax_scale);
        return {grad_q, grad_k, grad_v, grad_bias, grad_distance};
    }
    params.sequences = check_sequences(call, q, k, options);
    params.scoring = check_scoring(call, q, params.dtype, options, params.sequences);
    Tensor grad_q = call.empty_like(q);
    Tensor grad_k = call.empty_like(k);
    Tensor grad_v = call.empty_like(v);
    if (options.packed()) {
        for (Tensor* tensor : {&grad_q, &grad_k, &grad_v}) {
            torch::stable::fill_(*tensor, 0.0);
        }
        if (needs_distance) {
            torch::stable::fill_(grad_distance, 0.0);
        }
    }
    params.lse = contiguous_input(call, lse, "lse", lse_shape, statistics);
    if (grad_lse.has_value()) {
        params.grad_lse = contiguous_input(call, *grad_lse, "grad_lse", lse_shape, statistics);
    }
    OptionalTensor delta;
    if constexpr (backend != Backend::kCpu) {
        delta = call.empty(lse_shape, statistics);
        params.delta = call.output(*delta, "delta");
    }
    params.grad_out = call.input(dense_grad, "grad_out");
    params.q = call.input(dense_q, "q");
    params.k = call.input(dense_k, "k");
    params.v = call.input(dense_v, "v");
    params.out = call.input(dense_out, "out");
    params.grad_q = call.output(grad_q, "grad_q");
    params.grad_k = call.output(grad_k, "grad_k");
    params.grad_v = call.output(grad_v, "grad_v");
    params.grad_bias = needs_bias ? call.output(grad_bias, "grad_bias") : nullptr;
    params.grad_distance = needs_distance ? call.output(grad_distance, "grad_distance") : nullptr;
    params.grad_out_strides = strides_of(dense_grad);
    params.q_strides = strides_of(dense_q);
    params.k_strides = strides_of(dense_k);
    params.v_strides = strides_of(dense_v);
    params.out_strides = strides_of(dense_out);
    params.grad_q_strides = strides_of(grad_q);
    params.grad_k_strides = strides_of(grad_k);
    params.grad_v_strides = strides_of(grad_v);
    params.lse_batch_stride = options.packed() ? 0 : heads * rows;
    params.lse_head_stride = rows;
    params.heads = static_cast<int>(heads);
    params.kv_heads = static_cast<int>(k.size(-2));
    params.head_dim = static_cast<int>(q.size(-1));
    params.value_dim = static_cast<int>(v.size(-1));
    WARPLOOM_RUN(backend, call, attention_backward, params)
    return {grad_q, grad_k, grad_v, grad_bias, grad_distance};
}

template <Backend backend, typename Library>
void register_attention(Library& library) {
    WARPLOOM_IMPL(library, backend, attention);
    WARPLOOM_IMPL(library, backend, attention_backward);
}

WARPLOOM_REGISTER(register_attention)

}  // namespace
}  // namespace warploom::attention
