// The seam of family mla: checks -> Params -> launch.
#include "common/checks.h"
#include "common/torch.h"
#include "mla/mla_absorbed_backward.h"
#include "mla/mla_decode.h"

namespace warploom::mla {
namespace {

using OptionalTensor = std::optional<Tensor>;

// A cache [B, S, row], or pages [num_blocks, page_size, row] with a block_table; `dtype` is that of
// a dense one.
template <Backend backend>
CacheLayout check_cache(Call<backend>& call, std::int64_t batch, const Tensor& kv_cache,
                        const Tensor& cache_seqlens, const OptionalTensor& block_table, DType dtype,
                        int d_latent, int d_rope) {
    call.check_dim(kv_cache, "kv_cache", 3);
    CacheLayout layout{};
    std::int64_t row = d_latent + d_rope;
    switch (kv_cache.scalar_type()) {
        case ScalarType::Float8_e4m3fn:
            layout.format = CacheFormat::float8_e4m3;
            break;
        case ScalarType::Char:
            layout.format = CacheFormat::int8;
            break;
        default:
            layout.format = CacheFormat::dense;
            call.check_dtype(kv_cache, "kv_cache", dtype);
    }
    if (layout.format != CacheFormat::dense) {
        row = compressed_row_bytes(d_latent, d_rope);
    }
    call.check_shape(kv_cache, "kv_cache", {kv_cache.size(0), kv_cache.size(1), row});
    call.check(row == 1 || kv_cache.stride(2) == 1, "kv_cache", "a contiguous last dimension",
               std::to_string(kv_cache.stride(2)));
    layout.cache_seqlens = int32_input(call, cache_seqlens, "cache_seqlens", {batch});
    layout.batch_stride = kv_cache.stride(0);
    layout.row_stride = kv_cache.stride(1);
    if (block_table.has_value()) {
        const BlockTable table = check_block_table(call, *block_table, batch, kv_cache.size(1));
        layout.block_table = table.entries;
        layout.block_table_stride = table.stride;
        layout.page_size = table.page_size;
        layout.capacity = narrow_size(call, table.places * table.page_size, "block_table");
    } else {
        call.check(kv_cache.size(0) == batch, "kv_cache", "a batch of " + std::to_string(batch),
                   shape_of(kv_cache));
        layout.capacity = narrow_size(call, kv_cache.size(1), "kv_cache");
        layout.page_size = layout.capacity;
    }
    return layout;
}

// d_latent, and what is left of `width` for the rotated key.
template <Backend backend>
std::pair<int, int> check_widths(const Call<backend>& call, std::int64_t d_latent,
                                 std::int64_t width) {
    call.check(d_latent >= 1 && d_latent <= width, "d_latent", "1 to " + std::to_string(width),
               std::to_string(d_latent));
    return {narrow_size(call, d_latent, "d_latent"), narrow_size(call, width - d_latent, "q")};
}

template <Backend backend>
std::tuple<Tensor, Tensor> mla_decode(const Tensor& q, const Tensor& kv_cache,
                                      const Tensor& cache_seqlens,
                                      const OptionalTensor& block_table, std::int64_t d_latent,
                                      double softmax_scale, bool causal, std::int64_t num_splits,
                                      std::int64_t split_size) {
    Call<backend> call("mla_decode", q);
    call.check_dim(q, "q", 4);
    MlaDecodeParams params{};
    params.dtype = call.dtype(q, "q");
    std::tie(params.d_latent, params.d_rope) = check_widths(call, d_latent, q.size(3));
    const std::int64_t batch = q.size(0);
    params.cache = check_cache(call, batch, kv_cache, cache_seqlens, block_table, params.dtype,
                               params.d_latent, params.d_rope);
    const Tensor dense_q = call.dense_last(q);
    Tensor out = call.empty({batch, q.size(1), q.size(2), d_latent}, q.scalar_type());
    Tensor lse = call.empty({batch, q.size(2), q.size(1)}, call.statistics_type(params.dtype));
    params.q = call.input(dense_q, "q");
    params.kv_cache = call.input(kv_cache, "kv_cache");
    params.out = call.output(out, "out");
    params.lse = call.output(lse, "lse");
    params.q_batch_stride = dense_q.stride(0);
    params.q_sequence_stride = dense_q.stride(1);
    params.q_head_stride = dense_q.stride(2);
    params.softmax_scale = softmax_scale;
    params.batch = narrow_size(call, batch, "q");
    params.query_length = narrow_size(call, q.size(1), "q");
    params.heads = narrow_size(call, q.size(2), "q");
    params.num_splits = narrow_size(call, num_splits, "num_splits");
    params.split_size = narrow_size(call, split_size, "split_size");
    params.causal = causal;
    if constexpr (backend != Backend::kCpu) {
        const MlaDecodeWorkspace sizes = mla_decode_workspace(params);
        const std::int64_t rows = q.size(1) * q.size(2);
        const Tensor& partial_out =
            call.keep(call.empty({sizes.parts, rows, d_latent}, ScalarType::Float));
        params.partial_out = static_cast<float*>(call.output(partial_out, "partial_out"));
        const Tensor& partial_lse = call.keep(call.empty({sizes.parts, rows}, ScalarType::Float));
        params.partial_lse = static_cast<float*>(call.output(partial_lse, "partial_lse"));
        const Tensor& schedule = call.keep(call.empty({sizes.schedule_size}, ScalarType::Int));
        params.schedule = static_cast<std::int32_t*>(call.output(schedule, "schedule"));
    }
    WARPLOOM_RUN(backend, call, mla_decode, params)
    return {out, lse};
}

template <Backend backend>
std::tuple<Tensor, Tensor> mla_absorbed_backward(const Tensor& grad_out, const Tensor& q,
                                                 const Tensor& kv, const Tensor& out,
                                                 const Tensor& lse, const OptionalTensor& grad_lse,
                                                 const Tensor& kv_seqlens, std::int64_t d_latent,
                                                 double softmax_scale, bool causal) {
    Call<backend> call("mla_absorbed_backward", q);
    call.check_dim(q, "q", 4);
    call.check_dim(kv, "kv", 3);
    MlaAbsorbedBackwardParams params{};
    params.dtype = call.dtype(q, "q");
    std::tie(params.d_latent, params.d_rope) = check_widths(call, d_latent, q.size(3));
    const std::int64_t batch = q.size(0);
    const std::vector<std::int64_t> out_shape{batch, q.size(1), q.size(2), d_latent};
    const std::vector<std::int64_t> lse_shape{batch, q.size(2), q.size(1)};
    call.check_shape(kv, "kv", {batch, kv.size(1), q.size(3)});
    call.check_shape(grad_out, "grad_out", out_shape);
    call.check_shape(out, "out", out_shape);
    for (const auto& [tensor, name] :
         {std::pair{&kv, "kv"}, std::pair{&grad_out, "grad_out"}, std::pair{&out, "out"}}) {
        call.check_dtype(*tensor, name, params.dtype);
    }
    const ScalarType statistics = call.statistics_type(params.dtype);
    const Tensor dense_grad = call.dense_last(grad_out);
    const Tensor dense_q = call.dense_last(q);
    const Tensor dense_kv = call.dense_last(kv);
    const Tensor dense_out = torch::stable::contiguous(out);
    Tensor grad_q = call.empty_like(q);
    Tensor grad_kv = call.empty_like(kv);
    params.grad_out = call.input(dense_grad, "grad_out");
    params.q = call.input(dense_q, "q");
    params.kv = call.input(dense_kv, "kv");
    params.out = call.input(dense_out, "out");
    params.lse = contiguous_input(call, lse, "lse", lse_shape, statistics);
    if (grad_lse.has_value()) {
        params.grad_lse = contiguous_input(call, *grad_lse, "grad_lse", lse_shape, statistics);
    }
    params.grad_q = call.output(grad_q, "grad_q");
    params.grad_kv = call.output(grad_kv, "grad_kv");
    params.kv_seqlens = int32_input(call, kv_seqlens, "kv_seqlens", {batch});
    params.grad_out_batch_stride = dense_grad.stride(0);
    params.grad_out_sequence_stride = dense_grad.stride(1);
    params.grad_out_head_stride = dense_grad.stride(2);
    params.q_batch_stride = dense_q.stride(0);
    params.q_sequence_stride = dense_q.stride(1);
    params.q_head_stride = dense_q.stride(2);
    params.kv_batch_stride = dense_kv.stride(0);
    params.kv_row_stride = dense_kv.stride(1);
    params.softmax_scale = softmax_scale;
    params.batch = narrow_size(call, batch, "q");
    params.query_length = narrow_size(call, q.size(1), "q");
    params.kv_length = narrow_size(call, kv.size(1), "kv");
    params.heads = narrow_size(call, q.size(2), "q");
    params.causal = causal;
    if constexpr (backend != Backend::kCpu) {
        const Tensor& delta = call.keep(call.empty(lse_shape, ScalarType::Float));
        params.delta = call.output(delta, "delta");
        params.query_parts = mla_absorbed_backward_parts(params);
        if (params.query_parts > 1) {
            const Tensor& partial = call.keep(
                call.empty({batch, params.query_parts, kv.size(1), kv.size(2)}, ScalarType::Float));
            params.partial_grad_kv = static_cast<float*>(call.output(partial, "partial_grad_kv"));
        }
    }
    WARPLOOM_RUN(backend, call, mla_absorbed_backward, params)
    return {grad_q, grad_kv};
}

template <Backend backend>
void mla_cache_append(const Tensor& compressed_kv, const Tensor& norm_weight,
                      const Tensor& kv_cache, const Tensor& cache_seqlens,
                      const OptionalTensor& block_table, const OptionalTensor& cu_seqlens,
                      const OptionalTensor& cos, const OptionalTensor& sin, double eps,
                      bool interleaved) {
    Call<backend> call("mla_cache_append", compressed_kv);
    const bool packed = cu_seqlens.has_value();
    call.check_dim(compressed_kv, "compressed_kv", packed ? 2 : 3);
    call.check_dim(norm_weight, "norm_weight", 1);
    MlaCacheAppendParams params{};
    params.dtype = call.dtype(compressed_kv, "compressed_kv");
    params.weight_dtype = call.parameter_dtype(norm_weight, "norm_weight", params.dtype);
    std::tie(params.d_latent, params.d_rope) =
        check_widths(call, norm_weight.size(0), compressed_kv.size(-1));
    const std::int64_t batch = cache_seqlens.numel();
    params.cache = check_cache(call, batch, kv_cache, cache_seqlens, block_table, params.dtype,
                               params.d_latent, params.d_rope);
    const Tensor dense_kv = call.dense_last(compressed_kv);
    const Tensor dense_weight = torch::stable::contiguous(norm_weight);
    if (packed) {
        params.cu_seqlens = int32_input(call, *cu_seqlens, "cu_seqlens", {batch + 1});
    } else {
        call.check(compressed_kv.size(0) == batch, "compressed_kv",
                   "a batch of " + std::to_string(batch), shape_of(compressed_kv));
        params.batch_stride = dense_kv.stride(0);
    }
    if (cos.has_value()) {
        const ScalarType table_type = call.statistics_type(params.dtype);
        const std::vector<std::int64_t> shape{cos->size(0), params.d_rope / 2};
        call.check(params.d_rope % 2 == 0, "cos", "an even d_rope", std::to_string(params.d_rope));
        call.check(sin.has_value() && cos->size(0) > 0, "sin", "a table of 1 row or more", "none");
        params.cos = contiguous_input(call, *cos, "cos", shape, table_type);
        params.sin = contiguous_input(call, *sin, "sin", shape, table_type);
        params.table_rows = narrow_size(call, cos->size(0), "cos");
    }
    params.compressed_kv = call.input(dense_kv, "compressed_kv");
    params.norm_weight = call.input(dense_weight, "norm_weight");
    params.kv_cache = call.output(kv_cache, "kv_cache");
    params.row_stride = dense_kv.stride(packed ? 0 : 1);
    params.eps = eps;
    params.batch = narrow_size(call, batch, "cache_seqlens");
    params.count = narrow_size(call, compressed_kv.size(packed ? 0 : 1), "compressed_kv");
    params.interleaved = interleaved;
    WARPLOOM_RUN(backend, call, mla_cache_append, params)
}

template <Backend backend, typename Library>
void register_mla(Library& library) {
    WARPLOOM_IMPL(library, backend, mla_decode);
    WARPLOOM_IMPL(library, backend, mla_absorbed_backward);
    WARPLOOM_IMPL(library, backend, mla_cache_append);
}

WARPLOOM_REGISTER(register_mla)

}  // namespace
}  // namespace warploom::mla
