// Launches the float32 kernels of attention backward.
#include <algorithm>

#include "attention/attention_backward_float32.cuh"
#include "attention/attention_backward_launch.cuh"

namespace warploom::attention {
namespace {

template <int kColumns, bool kFeatures>
void launch_columns(const BackwardKernelParams& params, Stream stream) {
    launch_gradient<BackwardFloat32Traits<Gradient::key_and_value, kColumns, kFeatures>>(params,
                                                                                         stream);
    launch_gradient<BackwardFloat32Traits<Gradient::query, kColumns, kFeatures>>(params, stream);
}

template <bool kFeatures>
void launch(const BackwardKernelParams& params, Stream stream) {
    const int columns = std::max(params.attention.head_dim, params.attention.value_dim);
    if (columns <= 64) {
        launch_columns<64, kFeatures>(params, stream);
    } else if (columns <= 128) {
        launch_columns<128, kFeatures>(params, stream);
    } else {
        launch_columns<256, kFeatures>(params, stream);
    }
}

}  // namespace

void launch_backward_float32(const AttentionBackwardParams& params, Stream stream) {
    if (params.scoring.plain()) {
        launch<false>(backward_params(params), stream);
    } else {
        launch<true>(backward_params(params), stream);
    }
}

}  // namespace warploom::attention
