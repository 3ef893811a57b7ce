// Launches the float32 attention kernels.
#include "attention/attention_float32.cuh"

#include "attention/attention_launch.cuh"

namespace warploom::attention {

void attention_forward_float32(const AttentionParams& params, Stream stream) {
    choose_traits(params, [&]<int kHeadDim, int kValueDim, bool kScored>() {
        using Traits = Float32Traits<kHeadDim, kValueDim, kScored>;
        launch_forward<Traits>(attention_forward_float32_kernel<Traits>, params, stream);
    });
}

}  // namespace warploom::attention
