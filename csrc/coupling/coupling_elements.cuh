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

// The parameters of kVector neighbours as they lie in memory: shifts and raw scales, or where these
// alternate their pairs. The raw scales of an additive coupling are 0.
template <typename T, int kVector>
struct PackedParams {
    Packed<T, kVector> shifts;
    Packed<T, kVector> raw_scales;
};

template <typename T, int kVector>
WARPLOOM_DEVICE PackedParams<T, kVector> load_params(const CouplingOptions& options,
                                                     const CouplingView& shift,
                                                     const CouplingView& raw_scale,
                                                     std::int64_t sample, const Place& place) {
    const std::int64_t place_in_sample =
        place.slot * shift.channel_stride +
        slot_pixel_of<kVector>(options, place) * shift.pixel_stride;
    const T* shifts = sample_in<T>(shift, sample) + place_in_sample;
    PackedParams<T, kVector> params{load_packed<kVector>(shifts), zero_packed<T, kVector>()};
    if (kVector > 1 && are_paired(options, shift.channel_stride)) {
        params.raw_scales = load_packed<kVector>(shifts + kVector);
    } else if (raw_scale.data != nullptr) {
        params.raw_scales = load_packed<kVector>(sample_in<T>(raw_scale, sample) + place_in_sample);
    }
    return params;
}

template <typename T, int kVector>
WARPLOOM_DEVICE void unpack_params(bool paired, const PackedParams<T, kVector>& params,
                                   float (&t)[kVector], float (&u)[kVector]) {
    unpack(params.shifts, t);
    unpack(params.raw_scales, u);
    if constexpr (kVector > 1) {
        if (paired) {
            float pairs[2 * kVector];
            WARPLOOM_UNROLL
            for (int index = 0; index < kVector; ++index) {
                pairs[index] = t[index];
                pairs[kVector + index] = u[index];
            }
            WARPLOOM_UNROLL
            for (int index = 0; index < kVector; ++index) {
                t[index] = pairs[2 * index];
                u[index] = pairs[2 * index + 1];
            }
        }
    }
}

// Shifts and raw scales to where `load_params` finds them.
template <typename T, int kVector>
WARPLOOM_DEVICE void store_params(const CouplingOptions& options, const CouplingOutput& shift,
                                  const CouplingOutput& raw_scale, std::int64_t sample,
                                  const Place& place, const float (&t)[kVector],
                                  const float (&u)[kVector]) {
    const std::int64_t place_in_sample =
        place.slot * shift.channel_stride +
        slot_pixel_of<kVector>(options, place) * shift.pixel_stride;
    T* shifts = sample_in<T>(shift, sample) + place_in_sample;
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
        store_packed(sample_in<T>(raw_scale, sample) + place_in_sample, pack_floats<T>(u));
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
WARPLOOM_DEVICE void affine_maps(const CouplingOptions& options,
                                 const PackedParams<T, kVector>& params, bool paired,
                                 const float* means, const Place& place,
                                 AffineMaps<kVector>& maps) {
    const auto params_scale = static_cast<float>(options.params_scale);
    const auto clamp = static_cast<float>(options.clamp);
    const auto eps = static_cast<float>(options.eps);
    const float* weights = static_cast<const float*>(options.scale_weight);
    float raw[kVector];
    unpack_params(paired, params, maps.shifts, raw);
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

template <typename T>
WARPLOOM_DEVICE void load_map(const CouplingOptions& options, const CouplingView& shift,
                              const CouplingView& raw_scale, const float* means,
                              std::int64_t sample, const Place& place, AffineMaps<1>& map) {
    affine_maps(options, load_params<T, 1>(options, shift, raw_scale, sample, place), false, means,
                place, map);
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
