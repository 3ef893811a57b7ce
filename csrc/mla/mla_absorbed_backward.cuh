// Gradient of absorbed latent attention, each with one owner for its sums
// (mla_absorbed_backward_block.cuh): the kernel of delta, and the kernel of the gradients, whose
// products are those of mla_absorbed_backward_mma.cuh or mla_absorbed_backward_float32.cuh.
#pragma once

#include "common/reduce.cuh"
#include "mla/mla_absorbed_backward_scores.cuh"

namespace warploom::mla {

inline constexpr int kDeltaWarps = 4;

// delta = sum of grad_out * out over d_latent. One warp, one row.
// grid shape: [batch * ceil(rows / kDeltaWarps)], the rows fastest
template <typename T>
WARPLOOM_KERNEL(kDeltaWarps* device::kWarpSize, 1)
mla_absorbed_backward_delta_kernel(WARPLOOM_GRID_CONSTANT BackwardKernelParams params) {
    const MlaAbsorbedBackwardParams& mla = params.mla;
    const int block = static_cast<int>(blockIdx.x);
    const int batch = block / params.tiles;
    const int row = (block - batch * params.tiles) * kDeltaWarps + device::warp_index();
    if (row >= params.rows) {
        return;
    }
    const T* grad = rows_of_grad_out<T>(params, batch).row(row);
    const T* out = static_cast<const T*>(mla.out) +
                   (static_cast<std::int64_t>(batch) * params.rows + row) * mla.d_latent;
    float delta = 0.0f;
    for (int column = device::lane_index(); column < mla.d_latent; column += device::kWarpSize) {
        delta = fmaf(device::to_float(grad[column]), device::to_float(out[column]), delta);
    }
    delta = warp_reduce_sum(delta);
    if (device::lane_index() == 0) {
        static_cast<float*>(mla.delta)[statistics_offset(mla, batch, row)] = delta;
    }
}

// grid shape: [batch * parts * ceil(owned length / kOwnedRows)], the tile fastest; parts: 1, or
// those of the queries where keys are owned
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 1)
mla_absorbed_backward_kernel(WARPLOOM_GRID_CONSTANT BackwardKernelParams params) {
    auto& shared = device::shared_memory<typename Traits::SharedPlan>();
    const BackwardTask task = backward_task<Traits>(params);
    typename Traits::Owned owned;
    load_owned<Traits>(owned, shared, task, params);
    if constexpr (Traits::kOwnsQueries) {
        fill_statistics(shared.statistics[0], task, params, task.first_owned);
    }
    if (task.first_tile < task.end_tile) {
        fill_passing<Traits>(shared, task, params, task.first_tile);
    }
    device::copy_async_commit();

    typename Traits::Sums sums = {};
    for (int tile = task.first_tile; tile < task.end_tile; ++tile) {
        // After the barrier all see this tile, and none reads the one before it any more.
        device::copy_async_wait<0>();
        device::sync_threads();
        if (Traits::kStages > 1 && tile + 1 < task.end_tile) {
            fill_passing<Traits>(shared, task, params, tile + 1);
        }
        device::copy_async_commit();

        const auto& passing = shared.passing[tile % Traits::kStages];
        multiply_rows<Traits>(shared, owned, passing, params);
        device::sync_threads();
        differentiate<Traits>(shared, task, params, tile);
        device::sync_threads();
        add_products<Traits>(sums, shared, passing, params);

        if (Traits::kStages == 1 && tile + 1 < task.end_tile) {
            device::sync_threads();
            fill_passing<Traits>(shared, task, params, tile + 1);
            device::copy_async_commit();
        }
    }
    device::copy_async_wait<0>();
    if (!Traits::kOwnsQueries && params.mla.query_parts > 1) {
        write_sums(sums, part_rows(task, params));
    } else {
        write_sums(sums, gradient_rows<Traits>(task, params));
    }
}

inline constexpr int kMergeThreads = 256;
inline constexpr int kMergeElements = kMergeThreads * Chunk<float>::kSize;

// grad_kv = sum of its parts, in their order. One thread, one chunk.
// grid shape: [batch * ceil(kv_length * columns / kMergeElements)]
template <typename T>
WARPLOOM_KERNEL(kMergeThreads, 1)
mla_absorbed_backward_merge_kernel(WARPLOOM_GRID_CONSTANT BackwardKernelParams params) {
    const MlaAbsorbedBackwardParams& mla = params.mla;
    const int block = static_cast<int>(blockIdx.x);
    const int batch = block / params.tiles;
    const std::int64_t size =
        static_cast<std::int64_t>(mla.kv_length) * (mla.d_latent + mla.d_rope);
    const std::int64_t first =
        static_cast<std::int64_t>(block - batch * params.tiles) * kMergeElements +
        static_cast<int>(threadIdx.x) * Chunk<float>::kSize;
    if (first >= size) {
        return;
    }
    const float* part = mla.partial_grad_kv + batch * mla.query_parts * size + first;
    auto sums = device::load_vector<Chunk<float>>(part);
    for (int index = 1; index < mla.query_parts; ++index) {
        part += size;
        add(sums, device::load_vector<Chunk<float>>(part));
    }
    T* destination = static_cast<T*>(mla.grad_kv) + batch * size + first;
    store_pair(destination, sums.elements[0], sums.elements[1]);
    store_pair(destination + 2, sums.elements[2], sums.elements[3]);
}

}  // namespace warploom::mla
