// Scaled dot-product attention: what the seam hands to the kernels and to the C++ code for CPUs.
//
//   scores = softmax_scale * q k^T                      [batch, heads, query_length, key_length]
//   lse    = log(sum over keys of exp(scores))          [batch, heads, query_length]
//   out    = exp(scores - lse) v                        [batch, query_length, heads, value_dim]
//
// Query head h reads key/value head h / (heads / kv_heads). `causal` is aligned bottom-right: query
// i sees the keys j <= i + key_length - query_length. A query that sees no key has out 0, lse -inf.
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

// The tensors have one dtype, lse excepted. Their addresses are multiples of their element size and
// no more; strides may be anything, 0 and negative included.
struct AttentionParams {
    const void* q;  // [batch, query_length, heads, head_dim]
    const void* k;  // [batch, key_length, kv_heads, head_dim]
    const void* v;  // [batch, key_length, kv_heads, value_dim]
    void* out;      // [batch, query_length, heads, value_dim]
    void* lse;      // [batch, heads, query_length] contiguous; float32 (float64 tensors: float64)
    HeadStrides q_strides;
    HeadStrides k_strides;
    HeadStrides v_strides;
    HeadStrides out_strides;
    int batch;
    int query_length;
    int key_length;
    int heads;
    int kv_heads;
    int head_dim;   // 1 to 256 in the kernels
    int value_dim;  // 1 to 256 in the kernels
    bool causal;
    double softmax_scale;
    DType dtype;
};

// Any head_dim and value_dim, float64 too.
WARPLOOM_DECLARE_CPU(attention_forward_cpu, AttentionParams)

// Queues the forward kernel. float32, float16 and bfloat16, head_dim and value_dim from 1 to 256,
// heads a multiple of kv_heads; else it throws. Any other size may be 0.
void attention_forward_cuda(const AttentionParams& params, Stream stream);

}  // namespace warploom::attention
