// The affine maps of kVector neighbouring elements, from their parameters in memory.
#pragma once

#include "common/vec.cuh"
#include "coupling/coupling_places.cuh"
#include "coupling/scale.cuh"

namespace warploom::coupling {

// Whether shift and raw scale of neighbours alternate in memory; the shift's view is their base.
WARPLOOM_DEVICE bool are_paired(const CouplingOptions& options, std::int64_t channel_stride) {
    return options.channels_last && channel_stride == 2;
}

// Shifts and raw scales, 0 for the raw scales of an additive coupling.
template <typename T, int kVector>
WARPLOOM_DEVICE void load_params(const CouplingOptions& options, const CouplingView& shift,
                                 const CouplingView& raw_scale, std::int64_t sample,
                                 const Place& place, float (&t)[kVector], float (&u)[kVector]) {
    const std::int64_t pixel = slot_pixel_of<kVector>(options, place);
    const T* shifts = address_in<T>(shift, sample, place.slot, pixel);
    if constexpr (kVector > 1) {
        if (are_paired(options, shift.channel_stride)) {
            float pairs[2 * kVector];
            load_floats(shifts, pairs);
            WARPLOOM_UNROLL
            for (int index = 0; index < kVector; ++index) {
                t[index] = pairs[2 * index];
                u[index] = pairs[2 * index + 1];
            }
            return;
        }
    }
    load_floats(shifts, t);
    if (raw_scale.data != nullptr) {
        load_floats(address_in<T>(raw_scale, sample, place.slot, pixel), u);
    } else {
        WARPLOOM_UNROLL
        for (int index = 0; index < kVector; ++index) {
            u[index] = 0.0f;
        }
    }
}

// The same way back.
template <typename T, int kVector>
WARPLOOM_DEVICE void store_params(const CouplingOptions& options, const CouplingOutput& shift,
                                  const CouplingOutput& raw_scale, std::int64_t sample,
                                  const Place& place, const float (&t)[kVector],
                                  const float (&u)[kVector]) {
    const std::int64_t pixel = slot_pixel_of<kVector>(options, place);
    T* shifts = address_in<T>(shift, sample, place.slot, pixel);
    if constexpr (kVector > 1) {
        if (are_paired(options, shift.channel_stride)) {
            WARPLOOM_UNROLL
            for (int half = 0; half < 2; ++half) {
                float pairs[kVector];
                WARPLOOM_UNROLL
                for (int index = 0; index < kVector / 2; ++index) {
                    pairs[2 * index] = t[half * (kVector / 2) + index];
                    pairs[2 * index + 1] = u[half * (kVector / 2) + index];
                }
                store_packed(shifts + half * kVector, pack_floats<T>(pairs));
            }
            return;
        }
    }
    store_packed(shifts, pack_floats<T>(t));
    if (raw_scale.data != nullptr) {
        store_packed(address_in<T>(raw_scale, sample, place.slot, pixel), pack_floats<T>(u));
    }
}

// What a centred (volume-preserving) coupling keeps for one sample: a mean for each pixel, of the
// log scales and then of their gradients; behind these the two means of the sample.
WARPLOOM_HOST_DEVICE std::int64_t center_floats(const CouplingOptions& options) {
    return 2 * options.pixels + 2;
}

// Where the means of a sample's elements begin; null where none are taken.
WARPLOOM_DEVICE const float* sample_means(const CouplingOptions& options, const void* workspace,
                                          std::int64_t sample) {
    if (options.center == CouplingCenter::none) {
        return nullptr;
    }
    return static_cast<const float*>(workspace) + sample * center_floats(options) +
           (options.center == CouplingCenter::sample ? 2 * options.pixels : 0);
}

// The mean for element `index` of a vector; `which`: 0 of log scales, 1 of gradients.
WARPLOOM_DEVICE float mean_of(const CouplingOptions& options, const float* means, int which,
                              const Place& place, int index) {
    if (means == nullptr) {
        return 0.0f;
    }
    if (options.center == CouplingCenter::sample) {
        return means[which];
    }
    return means[which * options.pixels + place.pixel + (options.channels_last ? 0 : index)];
}

// out = factor x + shift, or factor (x + shift) where add_first.
template <int kVector>
struct AffineMaps {
    float shifts[kVector];      // q t
    float factors[kVector];     // exp(p L)
    float log_scales[kVector];  // L
    float unweighted[kVector];  // L without the learned weight and the mean
    float slopes[kVector];      // dL / du
};

// `means` of the sample, null for maps that are not centred.
template <typename T, int kVector>
WARPLOOM_DEVICE void load_maps(const CouplingOptions& options, const CouplingView& shift,
                               const CouplingView& raw_scale, const float* means,
                               std::int64_t sample, const Place& place, AffineMaps<kVector>& maps) {
    const auto params_scale = static_cast<float>(options.params_scale);
    const auto clamp = static_cast<float>(options.clamp);
    const auto eps = static_cast<float>(options.eps);
    const float* weights = static_cast<const float*>(options.scale_weight);
    float raw[kVector];
    load_params<T>(options, shift, raw_scale, sample, place, maps.shifts, raw);
    visit_scale(options.scale, [&]<CouplingScale kScale>() {
        WARPLOOM_UNROLL
        for (int index = 0; index < kVector; ++index) {
            const LogScale scale = log_scale<kScale>(params_scale * raw[index], clamp, eps);
            maps.unweighted[index] = scale.value;
            maps.slopes[index] = scale.slope;
        }
    });
    WARPLOOM_UNROLL
    for (int index = 0; index < kVector; ++index) {
        const int slot = place.slot + (options.channels_last ? index : 0);
        const float weight = weights == nullptr ? 1.0f : weights[slot];
        maps.shifts[index] *= static_cast<float>(options.shift_sign) * params_scale;
        maps.slopes[index] *= weight;
        maps.log_scales[index] =
            maps.unweighted[index] * weight - mean_of(options, means, 0, place, index);
        maps.factors[index] = expf(static_cast<float>(options.log_sign) * maps.log_scales[index]);
    }
}

// The gradient of L of element `index`, but for log_det's: p g F x or p g F (x + q t).
template <int kVector>
WARPLOOM_DEVICE float grad_log_scale(const CouplingOptions& options, bool from_output,
                                     const AffineMaps<kVector>& maps, int index, float grad,
                                     float source) {
    const float shift = maps.shifts[index];
    const float scaled = from_output
                             ? (options.add_first ? source : source - shift)
                             : maps.factors[index] * (options.add_first ? source + shift : source);
    return static_cast<float>(options.log_sign) * grad * scaled;
}

}  // namespace warploom::coupling
