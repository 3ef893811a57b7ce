// What the backward units share on the host. One unit per dtype: they compile side by side.
#pragma once

#include "attention/attention_backward.h"

namespace warploom::attention {

// Queue the kernels of grad_k, grad_v and grad_q, and with them grad_bias and grad_distance, for
// tensors of one dtype. `params.delta` is complete.
void launch_backward_float32(const AttentionBackwardParams& params, Stream stream);
void launch_backward_float16(const AttentionBackwardParams& params, Stream stream);
void launch_backward_bfloat16(const AttentionBackwardParams& params, Stream stream);

}  // namespace warploom::attention
