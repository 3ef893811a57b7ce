// Attention of a few new queries on a cache: what the seam hands to the code that computes it.
// Scores, windows and sinks as attention.h; query i of sequence b sits at
// cache_seqlens[b] - query_length + i.
#pragma once

#include <cstdint>

#include "attention/attention.h"
#include "common/cpu.h"
#include "common/dispatch.h"
#include "common/launch.h"

namespace warploom::attention {

// The keys of a sequence are cut into parts that blocks work on by themselves, and a second kernel
// merges by their lse: part s has the keys [s split_size, (s + 1) split_size) where split_size is
// given, else the s-th of num_splits equal runs of tiles. Parts without keys have lse -inf.
struct AttentionDecodeParams {
    const void* q;        // [batch, query_length, heads, head_dim]
    const void* k_cache;  // [batch, capacity, kv_heads, head_dim] or [num_blocks, page_size, ...]
    const void* v_cache;  // [batch, capacity, kv_heads, value_dim] or [num_blocks, page_size, ...]
    void* out;            // [batch, query_length, heads, value_dim]
    void* lse;            // [batch, heads, query_length] contiguous; float32 (float64 ...: float64)
    float* partial_out;   // [num_splits, batch, query_length, heads, value_dim]; null for 1 split
    float* partial_lse;   // [num_splits, batch, heads, query_length]; null for 1 split
    const std::int32_t* cache_seqlens;  // [batch], read by kernels only
    const std::int32_t* block_table;  // [batch, max_blocks], rows block_table_stride apart; or null
    std::int64_t block_table_stride;
    HeadStrides q_strides;
    HeadStrides k_strides;  // batch: of sequences, or of blocks where there is a block_table
    HeadStrides v_strides;
    HeadStrides out_strides;
    Scoring scoring;  // softmax_scale, softcap, window, alibi_slopes and sinks; the rest is null
    int page_size;    // capacity where there is no block_table
    int batch;
    int query_length;
    int capacity;  // most keys that a sequence can have
    int heads;
    int kv_heads;
    int head_dim;
    int value_dim;
    int num_splits;  // at least 1
    int split_size;  // 0: the keys are cut into num_splits equal parts
    DType dtype;
};

WARPLOOM_DECLARE_CPU_BF16(attention_decode_cpu, AttentionDecodeParams)

// How many splits fill the device, from sizes and the device's multiprocessors alone.
int attention_decode_splits(const AttentionDecodeParams& params);

// Queues the kernels: the splits, and where there are several their merge.
void attention_decode_cuda(const AttentionDecodeParams& params, Stream stream);

// Writing new keys, rotated where tables are given, and values behind each sequence's rows:
// row cache_seqlens[b] + i. What lies beyond the capacity, or in a negative block, is not written.
struct CacheAppendParams {
    const void* k;  // [batch, count, kv_heads, head_dim]
    const void* v;  // [batch, count, kv_heads, value_dim]
    void* k_cache;  // as AttentionDecodeParams
    void* v_cache;
    const std::int32_t* cache_seqlens;
    const std::int32_t* block_table;
    std::int64_t block_table_stride;
    const void* cos;  // [table_rows, rotary_dim / 2] contiguous, float32 (float64 ...); or null
    const void* sin;
    HeadStrides k_strides;
    HeadStrides v_strides;
    HeadStrides k_cache_strides;
    HeadStrides v_cache_strides;
    int page_size;
    int batch;
    int count;
    int capacity;
    int kv_heads;
    int head_dim;
    int value_dim;
    int rotary_dim;  // a position beyond table_rows takes the last row
    int table_rows;
    bool interleaved;
    DType dtype;
};

WARPLOOM_DECLARE_CPU(attention_cache_append_cpu, CacheAppendParams)
void attention_cache_append_cuda(const CacheAppendParams& params, Stream stream);

}  // namespace warploom::attention
