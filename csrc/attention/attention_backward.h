// The gradient of scaled dot-product attention: what the seam hands to the code that computes it.
//
//   P      = exp(score - lse)                                          as attention.h
//   keep   = 1 / (1 - dropout_p) where the element stays, else 0       1 without dropout
//   delta  = sum of grad_out * out over value_dim, less grad_lse
//   dB     = P * (keep grad_out v^T - delta)                           gradient of the biased score
//   dS     = softmax_scale (1 - tanh^2) dB                             tanh^2: of the soft-cap,
//   else 0 grad_q = dS k,   grad_k = dS^T q,   grad_v = (keep P)^T grad_out grad_bias = dB,
//   grad_distance = sum over keys of -|d| dB          d as attention.h
#pragma once

#include <cstdint>

#include "attention/attention.h"
#include "common/cpu.h"
#include "common/dispatch.h"
#include "common/launch.h"

namespace warploom::attention {

// Strides in elements; the last dimension of every tensor is contiguous. lse, grad_lse, delta and
// grad_distance are laid out alike, as AttentionParams says of lse.
struct AttentionBackwardParams {
    const void* grad_out;  // [batch, query_length, heads, value_dim]
    const void* q;         // [batch, query_length, heads, head_dim]
    const void* k;         // [batch, key_length, kv_heads, head_dim]
    const void* v;         // [batch, key_length, kv_heads, value_dim]
    const void* out;       // [batch, query_length, heads, value_dim]
    const void* lse;       // [batch, heads, query_length] float32 (float64 for float64 q)
    const void* grad_lse;  // as lse, or null
    void* grad_q;          // as q
    void* grad_k;          // as k
    void* grad_v;          // as v
    void* grad_bias;  // [batch, heads, query_length, key_length] contiguous, or null: not asked for
    void* grad_distance;  // as lse, or null: not asked for
    void* delta;          // as lse, a workspace; null on the CPU
    HeadStrides grad_out_strides;
    HeadStrides q_strides;
    HeadStrides k_strides;
    HeadStrides v_strides;
    HeadStrides out_strides;
    HeadStrides grad_q_strides;
    HeadStrides grad_k_strides;
    HeadStrides grad_v_strides;
    std::int64_t lse_batch_stride;
    std::int64_t lse_head_stride;
    Sequences sequences;  // dense or packed, without pages
    Scoring scoring;      // sinks null: they are in lse
    int heads;
    int kv_heads;
    int head_dim;
    int value_dim;
    DType dtype;  // of every tensor but lse, grad_lse, delta and grad_distance
};

WARPLOOM_DECLARE_CPU_BF16(attention_backward_cpu, AttentionBackwardParams)

// Queues the backward kernels: fixed orders of sums, no atomics. Limits as attention_forward_cuda.
// Packed: gradients of rows that belong to no sequence are left as they are (the seam has filled
// them with zeros).
void attention_backward_cuda(const AttentionBackwardParams& params, Stream stream);

}  // namespace warploom::attention
