// Seeded bugs of barriers. Grid shape: [1]; the line that a report must name ends in a BUG comment.
#pragma once

#include "cases.h"

namespace warploom::seeded {

// Reverses the block.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
missing_sync_after_write(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    plan.tile[threadIdx.x] = arguments.in[threadIdx.x];
    if constexpr (!kSeeded) {
        sync_threads();
    }
    const float mirrored = plan.tile[kThreads - 1 - thread_index()];  // BUG
    arguments.out[threadIdx.x] = mirrored;
}

// Reverses the block twice, through one tile.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
missing_sync_before_overwrite(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    plan.tile[threadIdx.x] = arguments.in[threadIdx.x];
    sync_threads();
    const float mirrored = plan.tile[kThreads - 1 - thread_index()];
    if constexpr (!kSeeded) {
        sync_threads();
    }
    plan.tile[threadIdx.x] = mirrored;  // BUG
    sync_threads();
    arguments.out[threadIdx.x] = plan.tile[kThreads - 1 - thread_index()];
}

// Swaps neighbouring lanes.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
missing_sync_warp(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    plan.tile[threadIdx.x] = arguments.in[threadIdx.x];
    if constexpr (!kSeeded) {
        sync_warp();
    }
    const float neighbour = plan.tile[threadIdx.x ^ 1];  // BUG
    arguments.out[threadIdx.x] = neighbour;
}

// Exchanges the halves of each warp; a barrier of the lower lanes does not cover the upper ones.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
sync_warp_too_narrow(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    plan.tile[threadIdx.x] = arguments.in[threadIdx.x];
    if constexpr (kSeeded) {
        sync_warp(lane_index() < 16 ? 0x0000ffffu : 0xffff0000u);
    } else {
        sync_warp();
    }
    const float other_half = plan.tile[threadIdx.x ^ 16];  // BUG
    arguments.out[threadIdx.x] = other_half;
}

// A warp's shuffle orders no memory of other lanes.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
shuffle_as_barrier(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    plan.tile[threadIdx.x] = arguments.in[threadIdx.x];
    const int neighbour = shuffle_xor(thread_index(), 1);
    if constexpr (!kSeeded) {
        sync_warp();
    }
    const float value = plan.tile[neighbour];  // BUG
    arguments.out[threadIdx.x] = value;
}

// Reverses the block; the lower lanes wait at another barrier than the upper ones.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
divergent_barrier(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    plan.tile[threadIdx.x] = arguments.in[threadIdx.x];
    if (kSeeded && lane_index() < 16) {
        sync_threads();  // BUG
    } else {
        sync_threads();
    }
    arguments.out[threadIdx.x] = plan.tile[kThreads - 1 - thread_index()];
}

// Half of the block skips a barrier that the other half waits at.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
conditional_barrier(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    plan.tile[threadIdx.x] = arguments.in[threadIdx.x];
    if (!kSeeded || thread_index() < kThreads / 2) {
        sync_threads();  // BUG
    }
    named_barrier_sync(1, kThreads);
    arguments.out[threadIdx.x] = plan.tile[kThreads - 1 - thread_index()];
}

// Threads past the tail leave before the barrier.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
early_return_before_barrier(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    const bool inside = thread_index() < arguments.elements;
    if (kSeeded && !inside) {
        return;
    }
    plan.tile[threadIdx.x] = inside ? arguments.in[threadIdx.x] : 0.0f;
    sync_threads();  // BUG
    if (inside) {
        arguments.out[threadIdx.x] = plan.tile[arguments.elements - 1 - thread_index()];
    }
}

// 128 threads pass a barrier that waits for 160.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
named_barrier_wrong_count(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    plan.tile[threadIdx.x] = arguments.in[threadIdx.x];
    named_barrier_sync(1, kSeeded ? kThreads + kWarpSize : kThreads);  // BUG
    arguments.out[threadIdx.x] = plan.tile[kThreads - 1 - thread_index()];
}

// A count that is no multiple of the warp size.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
named_barrier_odd_count(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    plan.tile[threadIdx.x] = arguments.in[threadIdx.x];
    named_barrier_sync(1, kSeeded ? kThreads - 1 : kThreads);  // BUG
    arguments.out[threadIdx.x] = plan.tile[kThreads - 1 - thread_index()];
}

// The halves of the block do not agree how many threads the barrier is for.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
named_barrier_unequal_counts(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    const bool is_upper = thread_index() >= kThreads / 2;
    named_barrier_sync(1, kSeeded && is_upper ? kThreads / 2 : kThreads);  // BUG
    arguments.out[threadIdx.x] = arguments.in[kThreads - 1 - thread_index()];
}

// There are 16 barriers, 0 to 15.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
named_barrier_bad_id(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    plan.tile[threadIdx.x] = arguments.in[threadIdx.x];
    named_barrier_sync(kSeeded ? 16 : 15, kThreads);  // BUG
    arguments.out[threadIdx.x] = plan.tile[kThreads - 1 - thread_index()];
}

// Two halves of the block wait for each other at two barriers in opposite order.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
crossed_barriers(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    plan.tile[threadIdx.x] = arguments.in[threadIdx.x];
    const int first = kSeeded && thread_index() >= kThreads / 2 ? 2 : 1;
    named_barrier_sync(first, kThreads);  // BUG
    const float mirrored = plan.tile[kThreads - 1 - thread_index()];
    named_barrier_sync(3 - first, kThreads);
    arguments.out[threadIdx.x] = mirrored;
}

// The upper half produces for the lower half, which waits at a barrier where nobody arrives.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
arrive_at_wrong_barrier(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    if (thread_index() >= kThreads / 2) {
        plan.tile[threadIdx.x] = arguments.in[threadIdx.x];
        named_barrier_arrive(kSeeded ? 2 : 1, kThreads);
        arguments.out[threadIdx.x] = 0.0f;
    } else {
        named_barrier_sync(1, kThreads);  // BUG
        arguments.out[threadIdx.x] = plan.tile[kThreads - 1 - thread_index()];
    }
}

// The upper half reuses the tile without hearing that the lower half has read it.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
stage_released_early(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    constexpr int kHalf = kThreads / 2;
    constexpr int kEmpty = 1;
    constexpr int kFull = 2;  // and 3, of the second round
    const int slot = thread_index() % kHalf;
    float sum = 0.0f;
    for (int round = 0; round < 2; ++round) {
        if (thread_index() >= kHalf) {
            if (round > 0 && !kSeeded) {
                named_barrier_sync(kEmpty, kThreads);
            }
            plan.tile[slot] = arguments.in[round * kHalf + slot];  // BUG
            named_barrier_arrive(kFull + round, kThreads);
        } else {
            named_barrier_sync(kFull + round, kThreads);
            sum += plan.tile[kHalf - 1 - slot];
            if (round == 0 && !kSeeded) {
                named_barrier_arrive(kEmpty, kThreads);
            }
        }
    }
    arguments.out[threadIdx.x] = sum;
}

inline const Case kSynchronisationCases[] = {
    WARPLOOM_SEEDED_CASE(missing_sync_after_write, kOneBlock),
    WARPLOOM_SEEDED_CASE(missing_sync_before_overwrite, kOneBlock),
    WARPLOOM_SEEDED_CASE(missing_sync_warp, kOneBlock),
    WARPLOOM_SEEDED_CASE(sync_warp_too_narrow, kOneBlock),
    WARPLOOM_SEEDED_CASE(shuffle_as_barrier, kOneBlock),
    WARPLOOM_SEEDED_CASE(divergent_barrier, kOneBlock),
    WARPLOOM_SEEDED_CASE(conditional_barrier, kOneBlock),
    WARPLOOM_SEEDED_CASE(early_return_before_barrier, kOneBlock),
    WARPLOOM_SEEDED_CASE(named_barrier_wrong_count, kOneBlock),
    WARPLOOM_SEEDED_CASE(named_barrier_odd_count, kOneBlock),
    WARPLOOM_SEEDED_CASE(named_barrier_unequal_counts, kOneBlock),
    WARPLOOM_SEEDED_CASE(named_barrier_bad_id, kOneBlock),
    WARPLOOM_SEEDED_CASE(crossed_barriers, kOneBlock),
    WARPLOOM_SEEDED_CASE(arrive_at_wrong_barrier, kOneBlock),
    WARPLOOM_SEEDED_CASE(stage_released_early, kOneBlock),
};

}  // namespace warploom::seeded
