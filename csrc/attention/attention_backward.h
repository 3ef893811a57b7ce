// The gradient of scaled dot-product attention: what the seam hands to the code that computes it.
//
//   P      = exp(softmax_scale * q k^T - lse)                          as attention.h
//   dP     = grad_out v^T,   delta = sum of grad_out * out over value_dim
//   dS     = softmax_scale * P * (dP - delta + grad_lse)
//   grad_q = dS k,   grad_k = dS^T q,   grad_v = P^T grad_out
#pragma once

#include <cstdint>

#include "attention/attention.h"
#include "common/cpu.h"
#include "common/dispatch.h"
#include "common/launch.h"

namespace warploom::attention {

// Strides in elements; the last dimension of every tensor is contiguous.
struct AttentionBackwardParams {
    const void* grad_out;  // [batch, query_length, heads, value_dim]
    const void* q;         // [batch, query_length, heads, head_dim]
    const void* k;         // [batch, key_length, kv_heads, head_dim]
    const void* v;         // [batch, key_length, kv_heads, value_dim]
    const void* out;       // [batch, query_length, heads, value_dim]
    const void* lse;  // [batch, heads, query_length] contiguous, float32 (float64 for float64 q)
    const void* grad_lse;  // as lse, or null
    void* grad_q;          // as q
    void* grad_k;          // as k
    void* grad_v;          // as v
    HeadStrides grad_out_strides;
    HeadStrides q_strides;
    HeadStrides k_strides;
    HeadStrides v_strides;
    HeadStrides out_strides;
    HeadStrides grad_q_strides;
    HeadStrides grad_k_strides;
    HeadStrides grad_v_strides;
    std::int64_t batch;
    std::int64_t query_length;
    std::int64_t key_length;
    std::int64_t heads;
    std::int64_t kv_heads;
    std::int64_t head_dim;
    std::int64_t value_dim;
    bool causal;
    double softmax_scale;
    DType dtype;  // of every tensor but lse and grad_lse
};

WARPLOOM_DECLARE_CPU(attention_backward_cpu, AttentionBackwardParams)

}  // namespace warploom::attention
