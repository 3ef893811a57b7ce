// The gradient of absorbed latent attention: what the seam hands to the code that computes it.
//
//   P       = exp(score - lse)                                          as mla_decode.h
//   delta   = sum of grad_out * out over d_latent
//   dS      = softmax_scale P (grad_out . row[0 .. d_latent) - delta + grad_lse)
//   grad_q  = sum over tokens of dS row
//   grad_kv = sum over heads and queries of dS q, plus of P grad_out in its first d_latent features
//
// Fixed orders of sums, no atomics. Rows of kv from kv_seqlens[b] on have a gradient of 0.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dispatch.h"
#include "common/launch.h"

namespace warploom::mla {

// Strides in elements; the last dimension of every tensor is contiguous.
struct MlaAbsorbedBackwardParams {
    const void* grad_out;  // [batch, query_length, heads, d_latent]
    const void* q;         // [batch, query_length, heads, d_latent + d_rope]
    const void* kv;        // [batch, kv_length, d_latent + d_rope]
    const void* out;       // [batch, query_length, heads, d_latent] contiguous
    const void* lse;  // [batch, heads, query_length] contiguous; float32 (float64 ...: float64)
    const void* grad_lse;  // as lse, or null
    void* grad_q;          // as q, contiguous
    void* grad_kv;         // as kv, contiguous
    // Workspaces of the kernels, null on the CPU.
    void* delta;             // as lse
    float* partial_grad_kv;  // [batch, query_parts, kv_length, d_latent + d_rope]; null: one part
    const std::int32_t* kv_seqlens;  // [batch], read by kernels only
    std::int64_t grad_out_batch_stride;
    std::int64_t grad_out_sequence_stride;
    std::int64_t grad_out_head_stride;
    std::int64_t q_batch_stride;
    std::int64_t q_sequence_stride;
    std::int64_t q_head_stride;
    std::int64_t kv_batch_stride;
    std::int64_t kv_row_stride;
    double softmax_scale;
    int batch;
    int query_length;
    int kv_length;
    int heads;
    int d_latent;
    int d_rope;
    int query_parts;  // See mla_absorbed_backward_parts.
    bool causal;
    DType dtype;
};

WARPLOOM_DECLARE_CPU_BF16(mla_absorbed_backward_cpu, MlaAbsorbedBackwardParams)

// The kernel of grad_kv cuts the queries of all heads into so many parts, each summed by itself. By
// the sizes alone: so the order of sums is the same on every device.
int mla_absorbed_backward_parts(const MlaAbsorbedBackwardParams& params);

// float32, float16, bfloat16; d_latent a multiple of 16 up to 512, d_rope of 16 up to 256.
void mla_absorbed_backward_cuda(const MlaAbsorbedBackwardParams& params, Stream stream);

}  // namespace warploom::mla
