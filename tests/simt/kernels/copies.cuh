// Seeded bugs of asynchronous copies. Grid shape: [1].
#pragma once

#include "cases.h"

namespace warploom::seeded {

// Reverses the block through an asynchronous copy.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
missing_copy_wait(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    copy_async<4>(&plan.tile[threadIdx.x], arguments.in + threadIdx.x);
    copy_async_commit();
    if constexpr (!kSeeded) {
        copy_async_wait<0>();
    }
    sync_threads();
    const float mirrored = plan.tile[kThreads - 1 - thread_index()];  // BUG
    copy_async_wait<0>();
    arguments.out[threadIdx.x] = mirrored;
}

// Waits until one group is pending, but reads the newest one.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
copy_wait_off_by_one(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    copy_async<4>(&plan.tile[threadIdx.x], arguments.in + threadIdx.x);
    copy_async_commit();
    copy_async_wait<kSeeded ? 1 : 0>();
    sync_threads();
    const float mirrored = plan.tile[kThreads - 1 - thread_index()];  // BUG
    copy_async_wait<0>();
    arguments.out[threadIdx.x] = mirrored;
}

// Two stages; without a commit between them the older stage is not a group of its own.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
missing_copy_commit(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    struct Plan {
        float stages[2][kThreads];
    };
    Plan& plan = shared_memory<Plan>();
    copy_async<4>(&plan.stages[0][threadIdx.x], arguments.in + threadIdx.x);
    if constexpr (!kSeeded) {
        copy_async_commit();
    }
    copy_async<4>(&plan.stages[1][threadIdx.x], arguments.in + threadIdx.x);
    copy_async_commit();
    copy_async_wait<1>();
    sync_threads();
    const float mirrored = plan.stages[0][kThreads - 1 - thread_index()];  // BUG
    copy_async_wait<0>();
    sync_threads();
    arguments.out[threadIdx.x] = mirrored + 0.0f * plan.stages[1][threadIdx.x];
}

// A thread's wait covers its own copies alone.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
copy_wait_without_barrier(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    copy_async<4>(&plan.tile[threadIdx.x], arguments.in + threadIdx.x);
    copy_async_commit();
    copy_async_wait<0>();
    if constexpr (!kSeeded) {
        sync_threads();
    }
    const float mirrored = plan.tile[kThreads - 1 - thread_index()];  // BUG
    arguments.out[threadIdx.x] = mirrored;
}

// A barrier before the wait does not help the threads that read what others copied.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
barrier_before_copy_wait(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    copy_async<4>(&plan.tile[threadIdx.x], arguments.in + threadIdx.x);
    copy_async_commit();
    if constexpr (kSeeded) {
        sync_threads();
        copy_async_wait<0>();
    } else {
        copy_async_wait<0>();
        sync_threads();
    }
    const float mirrored = plan.tile[kThreads - 1 - thread_index()];  // BUG
    arguments.out[threadIdx.x] = mirrored;
}

// The kernel ends while its copy is under way.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
copy_unfinished_at_exit(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    copy_async<4>(&plan.tile[threadIdx.x], arguments.in + threadIdx.x);  // BUG
    copy_async_commit();
    if constexpr (!kSeeded) {
        copy_async_wait<0>();
    }
    arguments.out[threadIdx.x] = arguments.in[threadIdx.x];
}

// The next copy into a tile starts while other threads still read it.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
copy_over_unread_tile(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    plan.tile[threadIdx.x] = arguments.in[threadIdx.x];
    sync_threads();
    const float mirrored = plan.tile[kThreads - 1 - thread_index()];
    if constexpr (!kSeeded) {
        sync_threads();
    }
    copy_async<4>(&plan.tile[threadIdx.x], arguments.in + kThreads - 1 - threadIdx.x);  // BUG
    copy_async_commit();
    copy_async_wait<0>();
    arguments.out[threadIdx.x] = mirrored + 0.0f * plan.tile[threadIdx.x];
}

// A thread stores where its own copy is still to land.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
store_under_copy(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    copy_async<4>(&plan.tile[threadIdx.x], arguments.in + threadIdx.x);
    copy_async_commit();
    if constexpr (!kSeeded) {
        copy_async_wait<0>();
    }
    plan.tile[threadIdx.x] = -arguments.in[threadIdx.x];  // BUG
    copy_async_wait<0>();
    arguments.out[threadIdx.x] = plan.tile[threadIdx.x];
}

// A 16-byte copy from an address that is a multiple of 4 only.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
copy_misaligned(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    if (thread_index() < 16) {
        const int first = 4 * thread_index();
        copy_async<16>(&plan.tile[first], arguments.in + first + (kSeeded ? 1 : 0));  // BUG
    }
    copy_async_commit();
    copy_async_wait<0>();
    sync_threads();
    arguments.out[threadIdx.x] = plan.tile[thread_index() % 64];
}

// The tail is copied without looking at its length.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
copy_out_of_bounds(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    const bool valid = kSeeded || thread_index() < arguments.elements;
    copy_async<4>(&plan.tile[threadIdx.x], arguments.in + threadIdx.x, valid);  // BUG
    copy_async_commit();
    copy_async_wait<0>();
    if (thread_index() < arguments.elements) {
        arguments.out[threadIdx.x] = plan.tile[threadIdx.x];
    }
}

inline constexpr LaunchShape kTwoStages = {
    .grid = dim3(1), .threads = kThreads, .shared_bytes = 2 * sizeof(TilePlan)};

inline const Case kCopyCases[] = {
    WARPLOOM_SEEDED_CASE(missing_copy_wait, kOneBlock),
    WARPLOOM_SEEDED_CASE(copy_wait_off_by_one, kOneBlock),
    WARPLOOM_SEEDED_CASE(missing_copy_commit, kTwoStages),
    WARPLOOM_SEEDED_CASE(copy_wait_without_barrier, kOneBlock),
    WARPLOOM_SEEDED_CASE(barrier_before_copy_wait, kOneBlock),
    WARPLOOM_SEEDED_CASE(copy_unfinished_at_exit, kOneBlock),
    WARPLOOM_SEEDED_CASE(copy_over_unread_tile, kOneBlock),
    WARPLOOM_SEEDED_CASE(store_under_copy, kOneBlock),
    WARPLOOM_SEEDED_CASE(copy_misaligned, kOneBlock),
    WARPLOOM_SEEDED_CASE(copy_out_of_bounds, kOneBlock),
};

}  // namespace warploom::seeded
