// The means of centred (volume-preserving) couplings: of the log scales and of their gradients,
// over the transformed channels of each pixel, and over the pixels of each sample.
#pragma once

#include "common/reduce.cuh"
#include "coupling/coupling_center.h"
#include "coupling/coupling_elements.cuh"

namespace warploom::coupling {

inline constexpr int kCenterThreads = 256;

// grid [ceil(batch * pixels / kCenterThreads)], a thread for each pixel
template <typename T>
WARPLOOM_KERNEL(kCenterThreads, 1)
center_pixels_kernel(WARPLOOM_GRID_CONSTANT CouplingCenterParams params) {
    const CouplingOptions& options = params.options;
    const Division row = divide(
        static_cast<std::int64_t>(blockIdx.x) * kCenterThreads + threadIdx.x, options.pixels);
    const std::int64_t sample = row.quotient;
    const std::int64_t pixel = row.remainder;
    if (sample >= options.batch) {
        return;
    }
    float logs = 0.0f;
    float grads = 0.0f;
    WARPLOOM_NO_UNROLL
    for (int channel = 0; channel < options.channels; ++channel) {
        const Place place = place_at<1>(options, channel, pixel);
        if (place.moved == 0) {
            continue;
        }
        AffineMaps<1> maps;
        load_map<T>(options, params.shift, params.raw_scale, nullptr, sample, place, maps);
        logs += maps.log_scales[0];
        if (params.grad_z.data != nullptr) {
            const float grad =
                device::to_float(*address_in<T>(params.grad_z, sample, channel, pixel));
            const float source =
                device::to_float(*address_in<T>(params.source, sample, channel, pixel));
            grads += grad_log_scale(options, params.from_output, maps, 0, grad, source);
        }
    }
    float* means = static_cast<float*>(params.means) + sample * center_floats(options) + pixel;
    means[0] = logs / static_cast<float>(options.count);
    means[options.pixels] = grads / static_cast<float>(options.count);
}

struct CenterPlan {
    BlockReducePlan<kCenterThreads, 2> reduce;
};

// grid [batch]
template <int kThreads>
WARPLOOM_KERNEL(kThreads, 1)
center_samples_kernel(WARPLOOM_GRID_CONSTANT CouplingCenterParams params) {
    auto& plan = device::shared_memory<CenterPlan>();
    const std::int64_t pixels = params.options.pixels;
    float* means = static_cast<float*>(params.means) + blockIdx.x * center_floats(params.options);
    float sums[2] = {};
    for (std::int64_t pixel = threadIdx.x; pixel < pixels; pixel += kThreads) {
        sums[0] += means[pixel];
        sums[1] += means[pixels + pixel];
    }
    block_reduce_sum<kThreads>(sums, plan.reduce);
    if (threadIdx.x < 2) {
        means[2 * pixels + threadIdx.x] =
            (threadIdx.x == 0 ? sums[0] : sums[1]) / static_cast<float>(pixels);
    }
}

}  // namespace warploom::coupling
