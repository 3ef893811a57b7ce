// The forward of affine couplings: the map of the transformed elements, the copy of the others and
// the sum of the log scales, in one read of x and of the parameters.
//
//   z = F x + q t, or F (x + q t)     F = exp(p L)     log_det = p sum L
#pragma once

#include "common/reduce.cuh"
#include "coupling/coupling_elements.cuh"

namespace warploom::coupling {

struct AffineCouplingTask {
    AffineCouplingParams params;
    CouplingGrid grid;
};

template <typename Traits>
struct AffineCouplingPlan {
    BlockReducePlan<Traits::kThreads> reduce;
};

// z of one vector; returns the sum of its log scales.
template <typename Traits>
WARPLOOM_DEVICE float transform_vector(const AffineCouplingParams& params, const float* means,
                                       std::int64_t sample, const Place& place) {
    using T = typename Traits::Element;
    constexpr int kVector = Traits::kVector;
    const CouplingOptions& options = params.options;
    const bool in_place = params.z.data == params.x.data;
    if (place.moved == 0 && in_place) {
        return 0.0f;
    }
    float values[kVector];
    load_floats(address_in<T>(params.x, sample, place.channel, place.pixel), values);
    float sum = 0.0f;
    if (place.moved != 0) {
        AffineMaps<kVector> maps;
        load_maps<T>(options, params.shift, params.raw_scale, means, sample, place, maps);
        WARPLOOM_UNROLL
        for (int index = 0; index < kVector; ++index) {
            if ((place.moved >> index & 1) != 0) {
                const float shift = maps.shifts[index];
                values[index] = options.add_first ? maps.factors[index] * (values[index] + shift)
                                                  : maps.factors[index] * values[index] + shift;
                sum += maps.log_scales[index];
            }
        }
    }
    store_packed(address_in<T>(params.z, sample, place.channel, place.pixel),
                 pack_floats<T>(values));
    return sum;
}

// Over the threads of one sample, in a block of kThreads; each gets it.
template <int kThreads>
WARPLOOM_DEVICE float sample_reduce_sum(float value, int sample_threads,
                                        BlockReducePlan<kThreads>& plan) {
    if (sample_threads == kThreads) {
        return block_reduce_sum(value, plan);
    }
    WARPLOOM_NO_UNROLL
    for (int lane_mask = sample_threads / 2; lane_mask > 0; lane_mask /= 2) {
        value += device::shuffle_xor(value, lane_mask);
    }
    return value;
}

WARPLOOM_DEVICE void store_log_det(const AffineCouplingParams& params, std::int64_t sample,
                                   float sum) {
    const float* log_det_in = static_cast<const float*>(params.log_det_in);
    static_cast<float*>(params.log_det)[sample] =
        log_det_in == nullptr ? sum : log_det_in[sample] + sum;
}

// grid [ceil(batch / samples of a block) * tiles], a sample's tiles side by side
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, Traits::kBlocksPerMultiprocessor)
affine_coupling_kernel(WARPLOOM_GRID_CONSTANT AffineCouplingTask task) {
    auto& plan = device::shared_memory<AffineCouplingPlan<Traits>>();
    const AffineCouplingParams& params = task.params;
    const CouplingOptions& options = params.options;
    const Share share = share_of_thread<Traits>(options, task.grid);
    const float* means = sample_means(options, params.partials, share.sample);
    float sum = 0.0f;
    WARPLOOM_NO_UNROLL
    for (int element = share.begin; element < share.end; element += share.step) {
        const Place place = place_of<Traits::kVector>(options, share.first + element);
        sum += transform_vector<Traits>(params, means, share.sample, place);
    }
    sum = static_cast<float>(options.log_sign) *
          sample_reduce_sum(sum, task.grid.sample_threads, plan.reduce);
    const bool is_first = static_cast<int>(threadIdx.x) % task.grid.sample_threads == 0;
    if (!is_first || share.sample >= options.batch) {
        return;
    }
    if (means != nullptr) {
        if (share.tile == 0) {
            store_log_det(params, share.sample, 0.0f);
        }
    } else if (task.grid.tiles == 1) {
        store_log_det(params, share.sample, sum);
    } else {
        static_cast<float*>(params.partials)[share.sample * task.grid.tiles + share.tile] = sum;
    }
}

// log_det of samples of several tiles, a warp each. grid [ceil(batch / warps of a block)]
template <int kThreads>
WARPLOOM_KERNEL(kThreads, 1)
sum_tiles_kernel(WARPLOOM_GRID_CONSTANT AffineCouplingTask task) {
    const std::int64_t sample =
        static_cast<std::int64_t>(blockIdx.x) * (kThreads / device::kWarpSize) +
        device::warp_index();
    const std::int64_t tiles = sample < task.params.options.batch ? task.grid.tiles : 0;
    const float* partials = static_cast<const float*>(task.params.partials) + sample * tiles;
    float sum = 0.0f;
    for (std::int64_t tile = device::lane_index(); tile < tiles; tile += device::kWarpSize) {
        sum += partials[tile];
    }
    sum = warp_reduce_sum(sum);
    if (device::lane_index() == 0 && tiles > 0) {
        store_log_det(task.params, sample, sum);
    }
}

}  // namespace warploom::coupling
