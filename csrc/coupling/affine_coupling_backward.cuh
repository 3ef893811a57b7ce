// The backward of affine couplings: the gradients of x and of the parameters in one pass, from z or
// from x, and in another one those of the learned weights.
//
//   grad_L = p (g F x + grad_log_det)     grad_x = g F     grad_t = q g     grad_u = grad_L dL / du
//
// with F x = z - q t; where z = F (x + q t) that is z, and grad_t = q g F.
#pragma once

#include "common/reduce.cuh"
#include "coupling/coupling_elements.cuh"

namespace warploom::coupling {

struct AffineCouplingBackwardTask {
    AffineCouplingBackwardParams params;
    CouplingGrid grid;
};

// A vector on its way to its gradients; of passing elements grad_z alone.
template <typename Traits>
struct AffineGradients {
    Place place;
    Packed<typename Traits::Element, Traits::kVector> grad_z;  // 0 where it is absent
    Packed<typename Traits::Element, Traits::kVector> source;
    PackedParams<typename Traits::Element, Traits::kVector> params;
};

// The one that begins at `element` of the thread's share; none past its end.
template <typename Traits>
WARPLOOM_DEVICE void load_gradients(const AffineCouplingBackwardParams& params, const Share& share,
                                    int element, AffineGradients<Traits>& vector) {
    using T = typename Traits::Element;
    constexpr int kVector = Traits::kVector;
    if (element >= share.end) {
        return;
    }
    const CouplingOptions& options = params.options;
    const std::int64_t place_in_sample = share.first + element;
    vector.place = place_of<kVector>(options, place_in_sample);
    if (params.grad_z.data != nullptr) {
        vector.grad_z =
            load_packed<kVector>(sample_in<T>(params.grad_z, share.sample) + place_in_sample);
    }
    if (vector.place.moved != 0) {
        vector.source =
            load_packed<kVector>(sample_in<T>(params.source, share.sample) + place_in_sample);
        vector.params = load_params<T, kVector>(options, params.shift, params.raw_scale,
                                                share.sample, vector.place);
    }
}

// What log_det gives to the gradient of each L of a sample; 0 past the last one.
WARPLOOM_DEVICE float log_det_gradient(const AffineCouplingBackwardParams& params,
                                       std::int64_t sample) {
    const float* grad_log_det = static_cast<const float*>(params.grad_log_det);
    return grad_log_det == nullptr || sample >= params.options.batch
               ? 0.0f
               : static_cast<float>(params.options.log_sign) * grad_log_det[sample];
}

// The gradient of L of element `index` of a vector.
template <int kVector>
WARPLOOM_DEVICE float full_grad_log_scale(const AffineCouplingBackwardParams& params,
                                          const AffineMaps<kVector>& maps, const float* means,
                                          float of_log_det, const Place& place, int index,
                                          float grad, float source) {
    const CouplingOptions& options = params.options;
    const auto log_sign = static_cast<float>(options.log_sign);
    const float own = params.grad_z.data == nullptr
                          ? 0.0f
                          : grad_log_scale(options, params.from_output, maps, index, grad, source);
    if (means != nullptr) {
        // From x, the mean was taken of gradients with the factors of uncentred log scales.
        const float factor =
            params.from_output ? 1.0f : expf(-log_sign * mean_of(options, means, 0, place, index));
        return own - factor * mean_of(options, means, 1, place, index);
    }
    return own + of_log_det;
}

// The gradients at one vector.
template <typename Traits>
WARPLOOM_DEVICE void transform_gradients(const AffineCouplingBackwardParams& params,
                                         const float* means, float of_log_det, const Share& share,
                                         int element, const AffineGradients<Traits>& vector) {
    using T = typename Traits::Element;
    constexpr int kVector = Traits::kVector;
    const CouplingOptions& options = params.options;
    const std::int64_t sample = share.sample;
    const Place& place = vector.place;
    const bool has_params = place.moved != 0 || options.mask == CouplingMask::checkerboard ||
                            options.mask == CouplingMask::free;
    float grads[kVector];
    unpack(vector.grad_z, grads);
    float grad_shifts[kVector] = {};
    float grad_raw_scales[kVector] = {};
    if (place.moved != 0) {
        float sources[kVector];
        unpack(vector.source, sources);
        AffineMaps<kVector> maps;
        affine_maps(options, vector.params, are_paired(options, params.shift.channel_stride), means,
                    place, maps);
        const auto params_scale = static_cast<float>(options.params_scale);
        WARPLOOM_UNROLL
        for (int index = 0; index < kVector; ++index) {
            if ((place.moved >> index & 1) != 0) {
                const float grad_log = full_grad_log_scale(params, maps, means, of_log_det, place,
                                                           index, grads[index], sources[index]);
                // An absent gradient stays 0 beside an infinite factor.
                const float grad_x =
                    params.grad_z.data == nullptr ? 0.0f : grads[index] * maps.factors[index];
                grad_shifts[index] = static_cast<float>(options.shift_sign) * params_scale *
                                     (options.add_first ? grad_x : grads[index]);
                grad_raw_scales[index] = params_scale * grad_log * maps.slopes[index];
                grads[index] = grad_x;
            }
        }
    }
    store_packed(sample_in<T>(params.grad_x, sample) + share.first + element,
                 pack_floats<T>(grads));
    if (has_params) {
        store_params<T>(options, params.grad_shift, params.grad_raw_scale, sample, place,
                        grad_shifts, grad_raw_scales);
    }
}

// grid [ceil(batch / samples of a block) * tiles], a sample's tiles side by side
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, Traits::kBlocksPerMultiprocessor)
affine_coupling_backward_kernel(WARPLOOM_GRID_CONSTANT AffineCouplingBackwardTask task) {
    const AffineCouplingBackwardParams& params = task.params;
    const CouplingOptions& options = params.options;
    const Share share = share_of_thread<Traits>(options, task.grid);
    const float* means = sample_means(options, params.partials, share.sample);
    const float of_log_det = log_det_gradient(params, share.sample);
    AffineGradients<Traits> next{};
    load_gradients(params, share, share.begin, next);
    WARPLOOM_NO_UNROLL
    for (int element = share.begin; element < share.end; element += share.step) {
        const AffineGradients<Traits> vector = next;
        load_gradients(params, share, element + share.step, next);
        transform_gradients(params, means, of_log_det, share, element, vector);
    }
}

inline constexpr int kWeightThreads = 256;

struct WeightPlan {
    float sums[kWeightThreads / device::kWarpSize][device::kWarpSize];  // (warp, lane)
};

// grad_weight = sum over pixels of grad_L L(u), L without the weight. A warp takes 32 neighbours of
// a line at once: pixels of one channel, which its lanes then add up; or, with channels last, 32
// channels of every 8th pixel, which the warps add up.
// grid [batch * ceil(channels / channels of a block)]
template <typename T>
WARPLOOM_KERNEL(kWeightThreads, 2)
weight_gradient_kernel(WARPLOOM_GRID_CONSTANT AffineCouplingBackwardParams params) {
    constexpr int kWarps = kWeightThreads / device::kWarpSize;
    auto& plan = device::shared_memory<WeightPlan>();
    const CouplingOptions& options = params.options;
    const int lane = device::lane_index();
    const int warp = device::warp_index();
    const bool along_channels = options.channels_last;
    const int block_channels = along_channels ? device::kWarpSize : kWarps;
    const Division block =
        divide(blockIdx.x, (options.channels + block_channels - 1) / block_channels);
    const std::int64_t sample = block.quotient;
    const int channel =
        static_cast<int>(block.remainder) * block_channels + (along_channels ? lane : warp);
    const float* means = sample_means(options, params.partials, sample);
    const float of_log_det = log_det_gradient(params, sample);
    int slot = -1;
    float sum = 0.0f;
    if (channel < options.channels) {
        const std::int64_t step = along_channels ? kWarps : device::kWarpSize;
        WARPLOOM_NO_UNROLL
        for (std::int64_t pixel = along_channels ? warp : lane; pixel < options.pixels;
             pixel += step) {
            const Place place = place_at<1>(options, channel, pixel);
            if (place.moved != 0) {
                const float grad =
                    params.grad_z.data == nullptr
                        ? 0.0f
                        : device::to_float(*address_in<T>(params.grad_z, sample, channel, pixel));
                const float source =
                    device::to_float(*address_in<T>(params.source, sample, channel, pixel));
                AffineMaps<1> map;
                load_map<T>(options, params.shift, params.raw_scale, means, sample, place, map);
                sum += map.unweighted[0] *
                       full_grad_log_scale(params, map, means, of_log_det, place, 0, grad, source);
            }
        }
        slot = slot_of(options, channel);
    }
    plan.sums[warp][lane] = sum;
    device::sync_threads();
    float total = 0.0f;
    if (along_channels) {
        WARPLOOM_UNROLL
        for (int other = 0; other < kWarps; ++other) {
            total += plan.sums[other][lane];
        }
    } else {
        total = warp_reduce_sum(sum);
    }
    if ((along_channels ? warp : lane) == 0 && slot >= 0 && slot < options.count) {
        static_cast<float*>(params.grad_weight)[sample * options.count + slot] = total;
    }
}

}  // namespace warploom::coupling
