// The seam of decoding from a cache, of writing to it, and of merging: checks -> Params -> launch.
#include "attention/attention_decode.h"
#include "attention/checks.h"
#include "attention/merge_attention.h"
#include "common/torch.h"

namespace warploom::attention {
namespace {

using OptionalTensor = std::optional<Tensor>;

HeadStrides strides_of(const Tensor& tensor) {
    return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Where the rows of a cache lie.
struct CacheLayout {
    const std::int32_t* cache_seqlens;
    BlockTable table;  // entries is null where there are no pages
    int capacity;
};

// k_cache [B, S, Hkv, D], or pages [num_blocks, page_size, Hkv, D] with a block_table.
template <Backend backend>
CacheLayout check_cache(Call<backend>& call, std::int64_t batch, const Tensor& k_cache,
                        const Tensor& cache_seqlens, const OptionalTensor& block_table) {
    CacheLayout layout{};
    layout.cache_seqlens = int32_input(call, cache_seqlens, "cache_seqlens", {batch});
    if (block_table.has_value()) {
        layout.table = check_block_table(call, *block_table, batch, k_cache.size(1));
        layout.capacity =
            narrow_size(call, layout.table.places * layout.table.page_size, "block_table");
    } else {
        call.check(k_cache.size(0) == batch, "k_cache", "q's batch " + std::to_string(batch),
                   shape_of(k_cache));
        layout.capacity = narrow_size(call, k_cache.size(1), "k_cache");
        layout.table.page_size = layout.capacity;
    }
    return layout;
}

template <Backend backend>
std::tuple<Tensor, Tensor> attention_decode(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& cache_seqlens,
    const OptionalTensor& block_table, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, double softmax_scale, std::int64_t window_left,
    std::int64_t window_right, double softcap, std::int64_t num_splits, std::int64_t split_size) {
    Call<backend> call("attention_decode", q);
    call.check_dim(q, "q", 4);
    call.check_dim(k_cache, "k_cache", 4);
    AttentionDecodeParams params{};
    params.dtype = check_heads(call, q, k_cache, v_cache, "k_cache", "v_cache");
    const std::int64_t batch = q.size(0);
    const std::int64_t heads = q.size(2);
    const CacheLayout layout = check_cache(call, batch, k_cache, cache_seqlens, block_table);
    const Tensor dense_q = call.dense_last(q);
    const Tensor dense_k = call.dense_last(k_cache);
    const Tensor dense_v = call.dense_last(v_cache);
    const ScalarType statistics = call.statistics_type(params.dtype);
    Tensor out = call.empty({batch, q.size(1), heads, v_cache.size(3)}, q.scalar_type());
    Tensor lse = call.empty({batch, heads, q.size(1)}, statistics);
    params.q = call.input(dense_q, "q");
    params.k_cache = call.input(dense_k, "k_cache");
    params.v_cache = call.input(dense_v, "v_cache");
    params.out = call.output(out, "out");
    params.lse = call.output(lse, "lse");
    params.cache_seqlens = layout.cache_seqlens;
    params.block_table = layout.table.entries;
    params.block_table_stride = layout.table.stride;
    params.q_strides = strides_of(dense_q);
    params.k_strides = strides_of(dense_k);
    params.v_strides = strides_of(dense_v);
    params.out_strides = strides_of(out);
    params.scoring.softmax_scale = softmax_scale;
    params.scoring.softcap = softcap;
    params.scoring.window_left = window_side(call, window_left, "window_left");
    params.scoring.window_right = window_side(call, window_right, "window_right");
    if (alibi_slopes.has_value()) {
        params.scoring.alibi_slopes =
            contiguous_input(call, *alibi_slopes, "alibi_slopes", {batch, heads}, statistics);
    }
    if (sinks.has_value()) {
        params.scoring.sinks = contiguous_input(call, *sinks, "sinks", {heads}, statistics);
    }
    params.page_size = layout.table.page_size;
    params.batch = narrow_size(call, batch, "q");
    params.query_length = narrow_size(call, q.size(1), "q");
    params.capacity = layout.capacity;
    params.heads = static_cast<int>(heads);
    params.kv_heads = static_cast<int>(k_cache.size(2));
    params.head_dim = static_cast<int>(q.size(3));
    params.value_dim = static_cast<int>(v_cache.size(3));
    params.split_size = narrow_size(call, split_size, "split_size");
    call.check(num_splits >= 0, "num_splits", "a number >= 0", std::to_string(num_splits));
    params.num_splits = narrow_size(call, num_splits, "num_splits");
    if (split_size > 0) {
        params.num_splits = std::max(1, static_cast<int>(ceil_divide(layout.capacity, split_size)));
    }
    OptionalTensor partial_out;
    OptionalTensor partial_lse;
    if constexpr (backend != Backend::kCpu) {
        if (params.num_splits == 0) {
            params.num_splits = attention_decode_splits(params);
        }
        if (params.num_splits > 1) {
            partial_out = call.empty({params.num_splits, batch, q.size(1), heads, v_cache.size(3)},
                                     ScalarType::Float);
            partial_lse =
                call.empty({params.num_splits, batch, heads, q.size(1)}, ScalarType::Float);
            params.partial_out = static_cast<float*>(call.output(*partial_out, "partial_out"));
            params.partial_lse = static_cast<float*>(call.output(*partial_lse, "partial_lse"));
        }
    }
    WARPLOOM_RUN(backend, call, attention_decode, params)
    return {out, lse};
}

template <Backend backend>
void attention_cache_append(const Tensor& k, const Tensor& v, const Tensor& k_cache,
                            const Tensor& v_cache, const Tensor& cache_seqlens,
                            const OptionalTensor& block_table, const OptionalTensor& cos,
                            const OptionalTensor& sin, bool interleaved) {
    Call<backend> call("attention_cache_append", k);
    call.check_dim(k, "k", 4);
    call.check_dim(v, "v", 4);
    call.check_dim(k_cache, "k_cache", 4);
    call.check_dim(v_cache, "v_cache", 4);
    CacheAppendParams params{};
    params.dtype = call.dtype(k, "k");
    for (const auto& [tensor, name] :
         {std::pair{&v, "v"}, std::pair{&k_cache, "k_cache"}, std::pair{&v_cache, "v_cache"}}) {
        call.check_dtype(*tensor, name, params.dtype);
    }
    const std::int64_t batch = k.size(0);
    call.check_shape(v, "v", {batch, k.size(1), k.size(2), v.size(3)});
    call.check_shape(k_cache, "k_cache", {k_cache.size(0), k_cache.size(1), k.size(2), k.size(3)});
    call.check_shape(v_cache, "v_cache", {k_cache.size(0), k_cache.size(1), k.size(2), v.size(3)});
    for (const auto& [tensor, name] :
         {std::pair{&k_cache, "k_cache"}, std::pair{&v_cache, "v_cache"}}) {
        call.check(tensor->size(3) == 1 || tensor->stride(3) == 1, name,
                   "a contiguous last dimension", std::to_string(tensor->stride(3)));
    }
    const CacheLayout layout = check_cache(call, batch, k_cache, cache_seqlens, block_table);
    if (cos.has_value()) {
        const ScalarType table_type = call.statistics_type(params.dtype);
        const std::vector<std::int64_t> shape{cos->size(0), cos->size(1)};
        call.check(2 * cos->size(1) <= k.size(3), "cos",
                   "at most " + std::to_string(k.size(3) / 2) + " columns", shape_of(*cos));
        call.check(sin.has_value() && cos->size(0) > 0, "sin", "a table of 1 row or more", "none");
        params.cos = contiguous_input(call, *cos, "cos", shape, table_type);
        params.sin = contiguous_input(call, *sin, "sin", shape, table_type);
        params.rotary_dim = static_cast<int>(2 * cos->size(1));
        params.table_rows = narrow_size(call, cos->size(0), "cos");
    }
    const Tensor dense_k = call.dense_last(k);
    const Tensor dense_v = call.dense_last(v);
    params.k = call.input(dense_k, "k");
    params.v = call.input(dense_v, "v");
    params.k_cache = call.output(k_cache, "k_cache");
    params.v_cache = call.output(v_cache, "v_cache");
    params.cache_seqlens = layout.cache_seqlens;
    params.block_table = layout.table.entries;
    params.block_table_stride = layout.table.stride;
    params.k_strides = strides_of(dense_k);
    params.v_strides = strides_of(dense_v);
    params.k_cache_strides = strides_of(k_cache);
    params.v_cache_strides = strides_of(v_cache);
    params.page_size = layout.table.page_size;
    params.batch = narrow_size(call, batch, "k");
    params.count = narrow_size(call, k.size(1), "k");
    params.capacity = layout.capacity;
    params.kv_heads = narrow_size(call, k.size(2), "k");
    params.head_dim = narrow_size(call, k.size(3), "k");
    params.value_dim = narrow_size(call, v.size(3), "v");
    params.interleaved = interleaved;
    WARPLOOM_RUN(backend, call, attention_cache_append, params)
}

// Shapes and types of one part, and of what goes with it.
template <Backend backend>
void check_part(Call<backend>& call, const Tensor& like, const Tensor& out, const char* out_name,
                const Tensor& lse, const char* lse_name) {
    const DType dtype = call.dtype(like, "out1");
    call.check_shape(out, out_name, {like.sizes().begin(), like.sizes().end()});
    call.check_dtype(out, out_name, dtype);
    call.check_shape(lse, lse_name, {like.size(0), like.size(2), like.size(1)});
    call.check(lse.scalar_type() == call.statistics_type(dtype), lse_name,
               torch::headeronly::toString(call.statistics_type(dtype)),
               torch::headeronly::toString(lse.scalar_type()));
}

template <Backend backend>
const void* dense_input(Call<backend>& call, const Tensor& tensor, const char* argument) {
    return call.input(call.keep(torch::stable::contiguous(tensor)), argument);
}

template <Backend backend>
std::tuple<Tensor, Tensor> merge_attention(const Tensor& out1, const Tensor& lse1,
                                           const Tensor& out2, const Tensor& lse2) {
    Call<backend> call("merge_attention", out1);
    call.check_dim(out1, "out1", 4);
    check_part(call, out1, out1, "out1", lse1, "lse1");
    check_part(call, out1, out2, "out2", lse2, "lse2");
    Tensor out = call.empty_like(out1);
    Tensor lse = call.empty_like(lse1);
    MergeParams params{};
    params.out1 = dense_input(call, out1, "out1");
    params.lse1 = dense_input(call, lse1, "lse1");
    params.out2 = dense_input(call, out2, "out2");
    params.lse2 = dense_input(call, lse2, "lse2");
    params.out = call.output(out, "out");
    params.lse = call.output(lse, "lse");
    params.batch = out1.size(0);
    params.length = out1.size(1);
    params.heads = out1.size(2);
    params.dim = out1.size(3);
    params.dtype = call.dtype(out1, "out1");
    WARPLOOM_RUN(backend, call, merge_attention, params)
    return {out, lse};
}

template <Backend backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> merge_attention_backward(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& out1, const Tensor& lse1,
    const Tensor& out2, const Tensor& lse2) {
    Call<backend> call("merge_attention_backward", out1);
    call.check_dim(out1, "out1", 4);
    check_part(call, out1, out1, "out1", lse1, "lse1");
    check_part(call, out1, out2, "out2", lse2, "lse2");
    check_part(call, out1, grad_out, "grad_out", grad_lse.has_value() ? *grad_lse : lse1,
               "grad_lse");
    Tensor grad_out1 = call.empty_like(out1);
    Tensor grad_lse1 = call.empty_like(lse1);
    Tensor grad_out2 = call.empty_like(out1);
    Tensor grad_lse2 = call.empty_like(lse1);
    MergeBackwardParams params{};
    params.grad_out = dense_input(call, grad_out, "grad_out");
    params.grad_lse = grad_lse.has_value() ? dense_input(call, *grad_lse, "grad_lse") : nullptr;
    params.out1 = dense_input(call, out1, "out1");
    params.lse1 = dense_input(call, lse1, "lse1");
    params.out2 = dense_input(call, out2, "out2");
    params.lse2 = dense_input(call, lse2, "lse2");
    params.grad_out1 = call.output(grad_out1, "grad_out1");
    params.grad_lse1 = call.output(grad_lse1, "grad_lse1");
    params.grad_out2 = call.output(grad_out2, "grad_out2");
    params.grad_lse2 = call.output(grad_lse2, "grad_lse2");
    params.batch = out1.size(0);
    params.length = out1.size(1);
    params.heads = out1.size(2);
    params.dim = out1.size(3);
    params.dtype = call.dtype(out1, "out1");
    WARPLOOM_RUN(backend, call, merge_attention_backward, params)
    return {grad_out1, grad_lse1, grad_out2, grad_lse2};
}

template <Backend backend, typename Library>
void register_decode(Library& library) {
    WARPLOOM_IMPL(library, backend, attention_decode);
    WARPLOOM_IMPL(library, backend, attention_cache_append);
    WARPLOOM_IMPL(library, backend, merge_attention);
    WARPLOOM_IMPL(library, backend, merge_attention_backward);
}

WARPLOOM_REGISTER(register_decode)

}  // namespace
}  // namespace warploom::attention
