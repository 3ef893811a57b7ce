// Launches the float16 kernels of attention backward.
#include "attention/attention_backward_16bit.cuh"

namespace warploom::attention {

void launch_backward_float16(const AttentionBackwardParams& params, Stream stream) {
    launch_backward_16bit<device::half>(params, stream);
}

}  // namespace warploom::attention
