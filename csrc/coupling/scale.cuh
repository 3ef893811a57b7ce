// The maps u -> log s of affine couplings, and their slopes, in float32.
//
//   additive 0; exp u; tanh c tanh(u); atan 0.636 c atan(u); centered_sigmoid c (2 sigmoid(u) - 1);
//   sigmoid log(sigmoid(u + 2) + eps); softclip u / (1 + |u / log c|)
#pragma once

#include <cmath>

#include "coupling/affine_coupling.h"
#include "device/device.cuh"

namespace warploom::coupling {

struct LogScale {
    float value;  // log s
    float slope;  // of log s in u
};

// 1 / (1 + exp(-x))
WARPLOOM_DEVICE float sigmoid(float x) {
    return 1.0f / (1.0f + expf(-x));
}

template <CouplingScale kScale>
WARPLOOM_DEVICE LogScale log_scale(float u, float clamp, float eps) {
    if constexpr (kScale == CouplingScale::additive) {
        return {0.0f, 0.0f};
    } else if constexpr (kScale == CouplingScale::exp) {
        return {u, 1.0f};
    } else if constexpr (kScale == CouplingScale::tanh) {
        const float value = tanhf(u);
        return {clamp * value, clamp * (1.0f - value * value)};
    } else if constexpr (kScale == CouplingScale::atan) {
        const float factor = clamp * static_cast<float>(kAtanSlope);
        return {factor * atanf(u), factor / (1.0f + u * u)};
    } else if constexpr (kScale == CouplingScale::centered_sigmoid) {
        // 2 sigmoid(u) - 1 without its cancellation.
        const float value = tanhf(0.5f * u);
        return {clamp * value, 0.5f * clamp * (1.0f - value * value)};
    } else if constexpr (kScale == CouplingScale::sigmoid) {
        const float shifted = u + 2.0f;
        const float scale = sigmoid(shifted);
        const float rest = sigmoid(-shifted);
        if (eps == 0.0f) {
            // Finite where the sigmoid itself is 0.
            return {fminf(shifted, 0.0f) - log1pf(expf(-fabsf(shifted))), rest};
        }
        return {logf(scale + eps), scale * rest / (scale + eps)};
    } else {
        const float divisor = 1.0f + fabsf(u / logf(clamp));
        return {u / divisor, 1.0f / (divisor * divisor)};
    }
}

// Calls visit.template operator()<kScale>(): one branch of the whole grid, not of a thread.
template <typename Visit>
WARPLOOM_DEVICE void visit_scale(CouplingScale scale, Visit&& visit) {
    switch (scale) {
        case CouplingScale::additive:
            return visit.template operator()<CouplingScale::additive>();
        case CouplingScale::exp:
            return visit.template operator()<CouplingScale::exp>();
        case CouplingScale::tanh:
            return visit.template operator()<CouplingScale::tanh>();
        case CouplingScale::atan:
            return visit.template operator()<CouplingScale::atan>();
        case CouplingScale::centered_sigmoid:
            return visit.template operator()<CouplingScale::centered_sigmoid>();
        case CouplingScale::sigmoid:
            return visit.template operator()<CouplingScale::sigmoid>();
        default:
            return visit.template operator()<CouplingScale::softclip>();
    }
}

// Of kCount neighbours at once; additive couplings give no u.
template <int kCount>
WARPLOOM_DEVICE void log_scales(const CouplingOptions& options, const float (&u)[kCount],
                                LogScale (&scales)[kCount]) {
    const auto params_scale = static_cast<float>(options.params_scale);
    const auto clamp = static_cast<float>(options.clamp);
    const auto eps = static_cast<float>(options.eps);
    visit_scale(options.scale, [&]<CouplingScale kScale>() {
        WARPLOOM_UNROLL
        for (int index = 0; index < kCount; ++index) {
            scales[index] = log_scale<kScale>(params_scale * u[index], clamp, eps);
        }
    });
}

}  // namespace warploom::coupling
