// Scaled dot-product attention: what the seam hands to the kernels and to the C++ code for CPUs.
//
//   d      = j - (i + key_length - query_length)     how far key j lies behind query i
//   score  = softcap tanh(softmax_scale q k^T / softcap) + bias - slope |d|
//   seen   : -window_left <= d <= window_right (-1: no limit), and the key is no padding
//   lse    = log(exp(sink) + sum over seen keys of exp(score))
//   out    = sum over seen keys of keep exp(score - lse) / (1 - dropout_p) v
//
// Query head h reads key/value head h / (heads / kv_heads). A query that sees no key has out 0 and
// lse -inf (lse = sink with sinks). Causal attention is window_right 0.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dispatch.h"
#include "common/launch.h"

namespace warploom::attention {

// Strides in elements. The last dimension is contiguous.
struct HeadStrides {
    std::int64_t batch;
    std::int64_t sequence;
    std::int64_t head;
};

// Where the sequences lie. Dense: entry b is tensor[b], all of one length. Packed (cu_seqlens_q and
// cu_seqlens_k are there): sequence b has the query rows [cu_seqlens_q[b], cu_seqlens_q[b + 1]) of
// a tensor without a batch dimension (batch strides are 0), and so many keys as cu_seqlens_k says.
// Packed with pages (block_table is there): its key j is row j % page_size of block
// block_table[b, j / page_size]; the batch strides of k and v are those of blocks.
// These arrays are read by kernels only.
struct Sequences {
    const std::int32_t* cu_seqlens_q;  // [batch + 1], or null: dense
    const std::int32_t* cu_seqlens_k;  // [batch + 1], or null: dense
    const std::int32_t* block_table;  // [batch, max_blocks], rows block_table_stride apart; or null
    std::int64_t block_table_stride;
    int page_size;
    int batch;
    int query_length;  // dense: of each entry; packed: no sequence is longer
    int key_length;    // the same for keys
};

// What makes scores of the products, and which of them are seen.
struct Scoring {
    double softmax_scale;
    double softcap;    // 0: none
    int window_left;   // -1: no limit
    int window_right;  // -1: no limit
    const void* bias;  // [batch, heads, query_length, key_length], the tensors' dtype; or null
    std::int64_t bias_strides[4];      // any, 0 included
    const void* alibi_slopes;          // [batch, heads] contiguous, as lse; or null
    const void* sinks;                 // [heads] contiguous, as lse; or null
    const bool* key_padding_mask;      // [batch, key_length] contiguous, true: hidden; or null
    const std::int64_t* dropout_seed;  // [1]; or null: no dropout
    double dropout_p;                  // in [0, 1)

    // True where the scores are softmax_scale q k^T and the window is all that hides keys.
    bool plain() const {
        return softcap == 0.0 && bias == nullptr && alibi_slopes == nullptr &&
               key_padding_mask == nullptr && dropout_seed == nullptr;
    }
};

// Element (batch b, head h, query i, key j) of a probability is dropped if number j % 4 of
// philox(seed, j / 4, i, b heads + h, 0) is below dropout_threshold(dropout_p) (common/philox.h).

// The tensors have one dtype, lse excepted. Their addresses are multiples of their element size and
// no more; strides may be anything, 0 and negative included. lse of (b, h, i) lies at
// b lse_batch_stride + h lse_head_stride + i, plus cu_seqlens_q[b] where packed.
struct AttentionParams {
    const void* q;  // [batch, query_length, heads, head_dim]
    const void* k;  // [batch, key_length, kv_heads, head_dim]
    const void* v;  // [batch, key_length, kv_heads, value_dim]
    void* out;      // [batch, query_length, heads, value_dim]
    void* lse;      // [batch, heads, query_length]; float32 (float64 tensors: float64)
    HeadStrides q_strides;
    HeadStrides k_strides;
    HeadStrides v_strides;
    HeadStrides out_strides;
    std::int64_t lse_batch_stride;
    std::int64_t lse_head_stride;
    Sequences sequences;
    Scoring scoring;
    int heads;
    int kv_heads;
    int head_dim;   // 1 to 256 in the kernels
    int value_dim;  // 1 to 256 in the kernels
    DType dtype;
};

// Any head_dim and value_dim, float64 too.
WARPLOOM_DECLARE_CPU_BF16(attention_forward_cpu, AttentionParams)

// Queues the forward kernel. float32, float16 and bfloat16, head_dim and value_dim from 1 to 256,
// heads a multiple of kv_heads; else it throws. Any other size may be 0. Packed: out and lse of
// rows that belong to no sequence are left as they are (the seam has filled them).
void attention_forward_cuda(const AttentionParams& params, Stream stream);

}  // namespace warploom::attention
