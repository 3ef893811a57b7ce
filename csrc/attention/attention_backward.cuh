// Attention backward after FlashAttention-2 (Dao 2023), with one owner for each gradient
// (attention_backward_block.cuh): the kernel of delta, and the kernel of the gradients, whose
// products are those of attention_backward_mma.cuh or attention_backward_float32.cuh.
#pragma once

#include "attention/attention_backward_scores.cuh"
#include "common/reduce.cuh"

namespace warploom::attention {

inline constexpr int kDeltaWarps = 4;

// delta = sum of grad_out * out over value_dim, less grad_lse. One warp, one row.
// grid shape: [batch * heads * ceil(query_length / kDeltaWarps)], the rows fastest
template <typename T>
WARPLOOM_KERNEL(kDeltaWarps* device::kWarpSize, 1)
attention_backward_delta_kernel(WARPLOOM_GRID_CONSTANT BackwardKernelParams params) {
    const AttentionBackwardParams& attention = params.attention;
    const int block = static_cast<int>(blockIdx.x);
    const int batch_head = block / params.tiles;
    const int query = (block - batch_head * params.tiles) * kDeltaWarps + device::warp_index();
    const int batch = batch_head / attention.heads;
    const int head = batch_head - batch * attention.heads;
    const Sequence sequence = sequence_of(attention.sequences, batch);
    if (query >= sequence.queries) {
        return;
    }
    const int row = sequence.first_query + query;
    const T* grad = static_cast<const T*>(attention.grad_out) +
                    row_offset(attention.grad_out_strides, batch, row, head);
    const T* out =
        static_cast<const T*>(attention.out) + row_offset(attention.out_strides, batch, row, head);
    float delta = 0.0f;
    for (int column = device::lane_index(); column < attention.value_dim;
         column += device::kWarpSize) {
        delta = fmaf(device::to_float(grad[column]), device::to_float(out[column]), delta);
    }
    delta = warp_reduce_sum(delta);
    if (device::lane_index() == 0) {
        const std::int64_t place = statistics_offset(attention, batch, head, row);
        if (attention.grad_lse != nullptr) {
            delta -= static_cast<const float*>(attention.grad_lse)[place];
        }
        static_cast<float*>(attention.delta)[place] = delta;
    }
}

// grid shape: [batch * heads * ceil(owned length / kOwnedRows)], the tile fastest; heads: those of
// the gradient
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 1)
attention_backward_kernel(WARPLOOM_GRID_CONSTANT BackwardKernelParams params) {
    auto& shared = device::shared_memory<typename Traits::SharedPlan>();
    const BackwardTask task = backward_task<Traits>(params);
    if (task.owned <= 0) {
        return;
    }
    const int passing_tiles = task.heads * task.passing_tiles;
    fill_owned<Traits>(shared, task, params);
    if (passing_tiles > 0) {
        fill_passing<Traits>(shared, task, params, 0);
    }
    device::copy_async_commit();

    typename Traits::FirstSums first_sums = {};
    typename Traits::ValueSums value_sums = {};
    DistanceSums<Traits> distances = {};
    for (int index = 0; index < passing_tiles; ++index) {
        // After the barrier all see this tile, and none reads the one before it any more.
        device::copy_async_wait<0>();
        device::sync_threads();
        if (index + 1 < passing_tiles) {
            fill_passing<Traits>(shared, task, params, index + 1);
        }
        device::copy_async_commit();

        WARPLOOM_NO_UNROLL
        for (int part = 0; part < Traits::kPassingRows; part += Traits::kScoreRows) {
            const ScoreTile tile = score_tile<Traits>(task, index, part);
            if (tile.seen == Sight::none && !writes_bias<Traits>(params.attention)) {
                continue;
            }
            typename Traits::Scores scores;
            ScoreFeatures<Traits> features;
            multiply_rows<Traits>(scores, shared.owned_first, tile.owned, shared.passing_first,
                                  tile.kept);
            make_probabilities<Traits>(scores, features, shared, task, params, tile);
            if constexpr (Traits::kSumsValue && Traits::kFeatures) {
                add_product<Traits>(value_sums,
                                    drop<Traits>(scores, features, params.constants.keep_factor),
                                    shared.passing_second, tile.kept);
            } else if constexpr (Traits::kSumsValue) {
                add_product<Traits>(value_sums, scores, shared.passing_second, tile.kept);
            }
            if constexpr (Traits::kSumsFirst) {
                typename Traits::Scores grads;
                multiply_rows<Traits>(grads, shared.owned_second, tile.owned, shared.passing_second,
                                      tile.kept);
                differentiate<Traits>(scores, grads, features, distances, shared, task, params,
                                      tile);
                add_product<Traits>(first_sums, scores, shared.passing_first, tile.kept);
            }
        }
    }
    // Now that no copy is under way, the sums may take the owned rows' place.
    device::copy_async_wait<0>();
    device::sync_threads();
    if constexpr (Traits::kSumsFirst) {
        write_sums<Traits>(first_sums, params.softmax_scale, shared.owned_first,
                           first_gradient<Traits>(task, params));
    }
    if constexpr (Traits::kSumsValue) {
        write_sums<Traits>(value_sums, 1.0f, shared.owned_second,
                           value_gradient<Traits>(task, params));
    }
    if constexpr (Traits::kFeatures && Traits::kOwnsQueries) {
        if (params.attention.grad_distance != nullptr) {
            write_distances<Traits>(distances, task, params.attention);
        }
    }
}

}  // namespace warploom::attention
