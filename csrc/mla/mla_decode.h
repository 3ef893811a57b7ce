// Absorbed latent attention on a cache, and writing to that cache: what the seam hands to the code
// that computes it.
//
//   score(i, h, j) = softmax_scale q(i, h) . row(j)           all d_latent + d_rope features
//   seen   : j < cache_seqlens[b], and causal: j <= i + cache_seqlens[b] - query_length
//   lse    = log(sum over seen tokens of exp(score))          -inf where none is seen, and out is 0
//   out    = sum over seen tokens of exp(score - lse) row(j)[0 .. d_latent)
//
// A row of the cache is one token: the latent [d_latent], then the shared rotated key [d_rope].
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dispatch.h"
#include "common/launch.h"

namespace warploom::mla {

// What a row of a cache is made of. dense: d_latent + d_rope numbers of the tensors' dtype. Else
// bytes: d_latent numbers of 1 byte (e4m3, or two's complement), ceil(d_latent / kScaleGroup)
// float32 scales of kScaleGroup numbers each, and d_rope bfloat16 numbers. A number is its code
// times its scale.
enum class CacheFormat : int { dense, float8_e4m3, int8 };
constexpr int kScaleGroup = 128;

constexpr int scale_count(int d_latent) {
    return (d_latent + kScaleGroup - 1) / kScaleGroup;
}
constexpr int compressed_row_bytes(int d_latent, int d_rope) {
    return d_latent + 4 * scale_count(d_latent) + 2 * d_rope;
}

// Where the rows of a cache lie: row j of sequence b is row j of batch entry b or, with a
// block_table, row j % page_size of block block_table[b, j / page_size]. Strides in elements of the
// cache (bytes where it is compressed); a row is contiguous.
struct CacheLayout {
    const std::int32_t* cache_seqlens;  // [batch], read by kernels only
    const std::int32_t* block_table;  // [batch, max_blocks], rows block_table_stride apart; or null
    std::int64_t block_table_stride;
    std::int64_t batch_stride;  // of sequences, or of blocks where there is a block_table
    std::int64_t row_stride;
    int page_size;  // capacity where there is no block_table
    int capacity;   // most tokens that a sequence can have
    CacheFormat format;
};

struct MlaDecodeParams {
    const void* q;         // [batch, query_length, heads, d_latent + d_rope]
    const void* kv_cache;  // [batch, capacity, row], or [num_blocks, page_size, row]
    void* out;             // [batch, query_length, heads, d_latent] contiguous
    void* lse;  // [batch, heads, query_length] contiguous; float32 (float64 ...: float64)
    // Workspaces of the kernels, null on the CPU. A part is a run of tokens of one sequence that a
    // block works on by itself; part p of all has row p of both. See mla_decode_parts.
    float* partial_out;      // [parts, query_length * heads, d_latent]
    float* partial_lse;      // [parts, query_length * heads]
    std::int32_t* schedule;  // [schedule_size]: written by the scheduler kernel, read by the others
    CacheLayout cache;
    std::int64_t q_batch_stride;  // in elements; the last dimension is contiguous
    std::int64_t q_sequence_stride;
    std::int64_t q_head_stride;
    double softmax_scale;
    int batch;
    int query_length;
    int heads;
    int d_latent;
    int d_rope;
    int num_splits;  // > 0: every sequence is cut into so many equal parts
    int split_size;  // > 0: into parts of so many tokens; both 0: by the device's scheduler
    bool causal;
    DType dtype;  // of q, out and a dense cache
};

WARPLOOM_DECLARE_CPU_BF16(mla_decode_cpu, MlaDecodeParams)

// Sizes of the workspaces, from sizes and the device's multiprocessors alone: nothing of them is
// read from the device, so that a call can be captured in a CUDA graph.
struct MlaDecodeWorkspace {
    std::int64_t parts;
    std::int64_t schedule_size;
};
MlaDecodeWorkspace mla_decode_workspace(const MlaDecodeParams& params);

// Queues the scheduler, the parts and their merge. float32, float16, bfloat16; d_latent a multiple
// of 16 up to 512, d_rope of 16 up to 256.
void mla_decode_cuda(const MlaDecodeParams& params, Stream stream);

// Writes tokens behind each sequence's rows: the latent normalised,
//   latent / sqrt(mean(latent^2) + eps) * norm_weight
// and the shared key rotated at its position cache_seqlens[b] + i. What lies beyond the capacity,
// or in a negative block, is not written. A compressed row's scales are the largest magnitude of
// their group / 448 (e4m3) or 127 (int8), 1 for a group of zeros; codes are rounded to nearest
// even.
struct MlaCacheAppendParams {
    const void* compressed_kv;       // [batch, count, d_latent + d_rope], or packed [tokens, ...]
    const void* norm_weight;         // [d_latent] contiguous
    void* kv_cache;                  // as MlaDecodeParams
    const std::int32_t* cu_seqlens;  // [batch + 1]: packed; or null
    const void* cos;  // [table_rows, d_rope / 2] contiguous, float32 (float64 ...); or null
    const void* sin;
    CacheLayout cache;
    std::int64_t batch_stride;  // of compressed_kv; 0 where packed
    std::int64_t row_stride;
    double eps;
    int batch;
    int count;  // tokens of a sequence; packed: of all sequences
    int d_latent;
    int d_rope;
    int table_rows;  // a position beyond them takes the last row
    bool interleaved;
    DType dtype;         // of compressed_kv and a dense cache
    DType weight_dtype;  // dtype or float32
};

WARPLOOM_DECLARE_CPU(mla_cache_append_cpu, MlaCacheAppendParams)
void mla_cache_append_cuda(const MlaCacheAppendParams& params, Stream stream);

}  // namespace warploom::mla
