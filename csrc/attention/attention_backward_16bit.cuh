// Chooses the kernels of attention backward for float16 or bfloat16.
#pragma once

#include <algorithm>

#include "attention/attention_backward_launch.cuh"
#include "attention/attention_backward_mma.cuh"

namespace warploom::attention {

template <typename T, int kHeadColumns, int kValueColumns, bool kFeatures>
void launch_columns(const BackwardKernelParams& params, Stream stream) {
    const auto launch = [&]<Gradient kGradient>() {
        launch_gradient<BackwardTraits<T, kGradient, kHeadColumns, kValueColumns, kFeatures>>(
            params, stream);
    };
    if constexpr (kKeysWithValues<kHeadColumns, kValueColumns, kFeatures>) {
        launch.template operator()<Gradient::key_and_value>();
    } else {
        launch.template operator()<Gradient::key>();
        launch.template operator()<Gradient::value>();
    }
    launch.template operator()<Gradient::query>();
}

template <typename T, bool kFeatures>
void launch_features(const AttentionBackwardParams& attention, Stream stream) {
    const BackwardKernelParams params = backward_params(attention);
    const int columns = std::max(attention.head_dim, attention.value_dim);
    if (columns <= 64) {
        launch_columns<T, 64, 64, kFeatures>(params, stream);
    } else if (columns <= 128) {
        launch_columns<T, 128, 128, kFeatures>(params, stream);
    } else if (attention.head_dim <= 192 && attention.value_dim <= 128) {
        launch_columns<T, 192, 128, kFeatures>(params, stream);
    } else {
        launch_columns<T, 256, 256, kFeatures>(params, stream);
    }
}

template <typename T>
void launch_backward_16bit(const AttentionBackwardParams& params, Stream stream) {
    if (params.scoring.plain()) {
        launch_features<T, false>(params, stream);
    } else {
        launch_features<T, true>(params, stream);
    }
}

}  // namespace warploom::attention
