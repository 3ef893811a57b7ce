// Sums and maxima over a warp or a block, in an order that depends on nothing but the number of
// threads.
#pragma once

#include "../device/device.cuh"

namespace warploom {

// Every lane of a full warp gets the sum; lanes meet in a butterfly, so all get the same bits.
WARPLOOM_DEVICE float warp_reduce_sum(float value) {
    WARPLOOM_UNROLL
    for (int lane_mask = device::kWarpSize / 2; lane_mask > 0; lane_mask /= 2) {
        value += device::shuffle_xor(value, lane_mask);
    }
    return value;
}

// Every lane of a full warp gets the maximum.
WARPLOOM_DEVICE float warp_reduce_max(float value) {
    WARPLOOM_UNROLL
    for (int lane_mask = device::kWarpSize / 2; lane_mask > 0; lane_mask /= 2) {
        value = fmaxf(value, device::shuffle_xor(value, lane_mask));
    }
    return value;
}

// Shared memory of block_reduce_sum: a member of the kernel's plan.
template <int kThreads, int kValues = 1>
struct BlockReducePlan {
    static_assert(kThreads % device::kWarpSize == 0 && kThreads <= 1024,
                  "BlockReducePlan: full warps, at most 1024 threads");
    float partial[kValues][kThreads / device::kWarpSize];  // (value, warp)
};

// Every thread of a block of kThreads gets the kValues sums over the block. When it returns, `plan`
// is free for the next use; before it, no other thread may still be reading `plan`.
template <int kThreads, int kValues>
WARPLOOM_DEVICE void block_reduce_sum(float (&values)[kValues],
                                      BlockReducePlan<kThreads, kValues>& plan) {
    constexpr int kWarps = kThreads / device::kWarpSize;
    WARPLOOM_UNROLL
    for (int index = 0; index < kValues; ++index) {
        values[index] = warp_reduce_sum(values[index]);
    }
    if constexpr (kWarps > 1) {
        if (device::lane_index() == 0) {
            WARPLOOM_UNROLL
            for (int index = 0; index < kValues; ++index) {
                plan.partial[index][device::warp_index()] = values[index];
            }
        }
        device::sync_threads();
        WARPLOOM_UNROLL
        for (int index = 0; index < kValues; ++index) {
            values[index] = plan.partial[index][0];
            WARPLOOM_UNROLL
            for (int warp = 1; warp < kWarps; ++warp) {
                values[index] += plan.partial[index][warp];
            }
        }
        device::sync_threads();
    }
}

// The same for one value: returns the sum.
template <int kThreads>
WARPLOOM_DEVICE float block_reduce_sum(float value, BlockReducePlan<kThreads>& plan) {
    float values[1] = {value};
    block_reduce_sum<kThreads, 1>(values, plan);
    return values[0];
}

}  // namespace warploom
