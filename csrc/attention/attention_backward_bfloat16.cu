// Launches the bfloat16 kernels of attention backward.
#include "attention/attention_backward_16bit.cuh"

namespace warploom::attention {

void launch_backward_bfloat16(const AttentionBackwardParams& params, Stream stream) {
    launch_backward_16bit<device::bfloat16>(params, stream);
}

}  // namespace warploom::attention
