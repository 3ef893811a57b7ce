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

// A vector on its way to the maps, or a copy.
template <typename Traits>
struct AffineVector {
    Place place;
    Packed<typename Traits::Element, Traits::kVector> x;
    PackedParams<typename Traits::Element, Traits::kVector> params;
};

template <typename Traits>
WARPLOOM_DEVICE AffineVector<Traits> load_vector_at(const AffineCouplingParams& params,
                                                    const Share& share, int element) {
    using T = typename Traits::Element;
    constexpr int kVector = Traits::kVector;
    const CouplingOptions& options = params.options;
    AffineVector<Traits> vector{};
    vector.place = place_of<kVector>(options, share.first + element);
    if (vector.place.moved != 0 || params.z.data != params.x.data) {
        vector.x =
            load_packed<kVector>(sample_in<T>(params.x, share.sample) + share.first + element);
    }
    if (vector.place.moved != 0) {
        vector.params = load_params<T, kVector>(options, params.shift, params.raw_scale,
                                                share.sample, vector.place);
    }
    return vector;
}

// z of one vector; returns the sum of its log scales.
template <typename Traits>
WARPLOOM_DEVICE float transform_vector(const AffineCouplingParams& params, const float* means,
                                       const Share& share, int element,
                                       const AffineVector<Traits>& vector) {
    using T = typename Traits::Element;
    constexpr int kVector = Traits::kVector;
    const CouplingOptions& options = params.options;
    const Place& place = vector.place;
    if (place.moved == 0 && params.z.data == params.x.data) {
        return 0.0f;
    }
    float values[kVector];
    unpack(vector.x, values);
    float sum = 0.0f;
    if (place.moved != 0) {
        AffineMaps<kVector> maps;
        affine_maps(options, vector.params, are_paired(options, params.shift.channel_stride), means,
                    place, maps);
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
    store_packed(sample_in<T>(params.z, share.sample) + share.first + element,
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
        const AffineVector<Traits> vector = load_vector_at<Traits>(params, share, element);
        sum += transform_vector(params, means, share, element, vector);
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
