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

// Gradients of z at a vector; an absent gradient is 0.
template <typename T, int kVector>
WARPLOOM_DEVICE void load_gradients(const CouplingView& grad_z, std::int64_t sample,
                                    const Place& place, float (&grads)[kVector]) {
    if (grad_z.data != nullptr) {
        load_floats(address_in<T>(grad_z, sample, place.channel, place.pixel), grads);
        return;
    }
    WARPLOOM_UNROLL
    for (int index = 0; index < kVector; ++index) {
        grads[index] = 0.0f;
    }
}

// The gradient of L of element `index` of a vector of `sample`.
template <int kVector>
WARPLOOM_DEVICE float full_grad_log_scale(const AffineCouplingBackwardParams& params,
                                          const AffineMaps<kVector>& maps, const float* means,
                                          std::int64_t sample, const Place& place, int index,
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
    const float* grad_log_det = static_cast<const float*>(params.grad_log_det);
    return grad_log_det == nullptr ? own : own + log_sign * grad_log_det[sample];
}

// The gradients at one vector.
template <typename Traits>
WARPLOOM_DEVICE void transform_gradients(const AffineCouplingBackwardParams& params,
                                         const float* means, std::int64_t sample,
                                         const Place& place) {
    using T = typename Traits::Element;
    constexpr int kVector = Traits::kVector;
    const CouplingOptions& options = params.options;
    const bool has_params = place.moved != 0 || options.mask == CouplingMask::checkerboard ||
                            options.mask == CouplingMask::free;
    float grads[kVector];
    load_gradients<T>(params.grad_z, sample, place, grads);
    float grad_shifts[kVector] = {};
    float grad_raw_scales[kVector] = {};
    if (place.moved != 0) {
        float sources[kVector];
        load_floats(address_in<T>(params.source, sample, place.channel, place.pixel), sources);
        AffineMaps<kVector> maps;
        load_maps<T>(options, params.shift, params.raw_scale, means, sample, place, maps);
        const auto params_scale = static_cast<float>(options.params_scale);
        WARPLOOM_UNROLL
        for (int index = 0; index < kVector; ++index) {
            if ((place.moved >> index & 1) != 0) {
                const float grad_log = full_grad_log_scale(params, maps, means, sample, place,
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
    store_packed(address_in<T>(params.grad_x, sample, place.channel, place.pixel),
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
    WARPLOOM_NO_UNROLL
    for (int element = share.begin; element < share.end; element += share.step) {
        const Place place = place_of<Traits::kVector>(options, share.first + element);
        transform_gradients<Traits>(params, means, share.sample, place);
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
    int slot = -1;
    float sum = 0.0f;
    if (channel < options.channels) {
        const std::int64_t step = along_channels ? kWarps : device::kWarpSize;
        WARPLOOM_NO_UNROLL
        for (std::int64_t pixel = along_channels ? warp : lane; pixel < options.pixels;
             pixel += step) {
            const Place place = place_at<1>(options, channel, pixel);
            if (place.moved != 0) {
                float grad[1];
                float source[1];
                load_gradients<T>(params.grad_z, sample, place, grad);
                load_floats(address_in<T>(params.source, sample, channel, pixel), source);
                AffineMaps<1> maps;
                load_maps<T>(options, params.shift, params.raw_scale, means, sample, place, maps);
                sum += maps.unweighted[0] * full_grad_log_scale(params, maps, means, sample, place,
                                                                0, grad[0], source[0]);
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
