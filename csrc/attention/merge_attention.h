// Attention to two disjoint sets of keys, joined by their log-sum-exps.
//
//   lse = log(exp(lse1) + exp(lse2)),   w1 = exp(lse1 - lse),   w2 = exp(lse2 - lse)
//   out = w1 out1 + w2 out2
//   grad_out1 = w1 grad_out,   grad_lse1 = w1 (grad_out . (out1 - out) + grad_lse); the same for 2
//
// out1 - out is w2 (out1 - out2): the backward does not read out, and its rounding does not come
// in.
//
// A part with lse -inf or +inf has no keys: its weight is 0 and its out is not looked at.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dispatch.h"
#include "common/launch.h"

namespace warploom::attention {

// All tensors are contiguous; lse and its gradients are float32 (float64 for float64 outs).
struct MergeParams {
    const void* out1;  // [batch, length, heads, dim]
    const void* lse1;  // [batch, heads, length]
    const void* out2;
    const void* lse2;
    void* out;
    void* lse;
    std::int64_t batch;
    std::int64_t length;
    std::int64_t heads;
    std::int64_t dim;
    DType dtype;
};

struct MergeBackwardParams {
    const void* grad_out;
    const void* grad_lse;  // or null
    const void* out1;
    const void* lse1;
    const void* out2;
    const void* lse2;
    void* grad_out1;
    void* grad_lse1;
    void* grad_out2;
    void* grad_lse2;
    std::int64_t batch;
    std::int64_t length;
    std::int64_t heads;
    std::int64_t dim;
    DType dtype;
};

WARPLOOM_DECLARE_CPU(merge_attention_cpu, MergeParams)
WARPLOOM_DECLARE_CPU(merge_attention_backward_cpu, MergeBackwardParams)
void merge_attention_cuda(const MergeParams& params, Stream stream);
void merge_attention_backward_cuda(const MergeBackwardParams& params, Stream stream);

}  // namespace warploom::attention
