// Seeded bugs of global and shared memory accesses and of launches. Grid shape: [1] unless said.
#pragma once

#include "cases.h"

namespace warploom::seeded {

struct alignas(16) Quad {
    float values[4];
};

// Adds to each value its successor; the last one has none.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
global_read_out_of_bounds(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    const int next = thread_index() + 1;
    float successor = 0.0f;
    if (kSeeded || next < arguments.elements) {
        successor = arguments.in[next];  // BUG
    }
    arguments.out[threadIdx.x] = arguments.in[threadIdx.x] + successor;
}

// Copies `elements` values; the tail is forgotten.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
global_write_out_of_bounds(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    const bool inside = thread_index() < arguments.elements;
    const float value = inside ? arguments.in[threadIdx.x] : 0.0f;
    if (kSeeded || inside) {
        arguments.out[threadIdx.x] = value;  // BUG
    }
}

// Shifts the block by one through shared memory; the last thread writes past the plan.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
shared_out_of_bounds(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    float* tile = plan.tile;
    const int next = thread_index() + 1;
    tile[kSeeded ? next : next % kThreads] = arguments.in[threadIdx.x];  // BUG
    sync_threads();
    arguments.out[threadIdx.x] = tile[next % kThreads];
}

// The launch gives half of the shared memory that the plan describes.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
shared_launch_too_small(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();  // BUG
    plan.tile[threadIdx.x] = arguments.in[threadIdx.x];
    sync_threads();
    arguments.out[threadIdx.x] = plan.tile[kThreads - 1 - thread_index()];
}

// A 16-byte load from an address that is a multiple of 4 only.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
vector_load_misaligned(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    if (thread_index() < 16) {
        const int first = 4 * thread_index();
        const auto quad = load_vector<Quad>(arguments.in + first + (kSeeded ? 1 : 0));  // BUG
        for (int index = 0; index < 4; ++index) {
            arguments.out[first + index] = quad.values[index];
        }
    }
}

template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
vector_store_misaligned(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    if (thread_index() < 16) {
        const int first = 4 * thread_index();
        const auto quad = load_vector<Quad>(arguments.in + first);
        store_vector(arguments.out + first + (kSeeded ? 1 : 0), quad);  // BUG
    }
}

template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
shared_vector_load_misaligned(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    plan.tile[threadIdx.x] = arguments.in[threadIdx.x];
    sync_threads();
    if (thread_index() < 16) {
        const int first = 4 * thread_index();
        const auto quad = load_vector<Quad>(plan.tile + first + (kSeeded ? 1 : 0));  // BUG
        for (int index = 0; index < 4; ++index) {
            arguments.out[first + index] = quad.values[index];
        }
    }
}

// One thread leaves its slot unwritten.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
shared_read_uninitialised(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    if (!kSeeded || threadIdx.x != 0) {
        plan.tile[threadIdx.x] = arguments.in[threadIdx.x];
    }
    sync_threads();
    const float mirrored = plan.tile[kThreads - 1 - thread_index()];  // BUG
    arguments.out[threadIdx.x] = mirrored;
}

// The block's total is built by plain additions.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
shared_accumulate_not_atomic(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    if (threadIdx.x == 0) {
        plan.tile[0] = 0.0f;
    }
    sync_threads();
    if constexpr (kSeeded) {
        plan.tile[0] += arguments.in[threadIdx.x];  // BUG
    } else {
        atomic_add(&plan.tile[0], arguments.in[threadIdx.x]);
    }
    sync_threads();
    arguments.out[threadIdx.x] = plan.tile[0];
}

// The same in global memory.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
global_accumulate_not_atomic(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    if constexpr (kSeeded) {
        arguments.out[0] += arguments.in[threadIdx.x];  // BUG
    } else {
        atomic_add(&arguments.out[0], arguments.in[threadIdx.x]);
    }
}

// One thread of the block reads what another wrote to global memory, without a barrier.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
global_exchange_race(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    arguments.out[threadIdx.x] = arguments.in[threadIdx.x];
    if constexpr (!kSeeded) {
        sync_threads();
    }
    const float mirrored = arguments.out[kThreads - 1 - thread_index()];  // BUG
    sync_threads();
    arguments.out[threadIdx.x] = mirrored;
}

// A pointer to ordinary host memory reaches the kernel.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
host_pointer(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    const float* source = kSeeded ? arguments.host : arguments.in;
    const float value = source[threadIdx.x];  // BUG
    arguments.out[threadIdx.x] = value;
}

// Grid shape: [2]. Both blocks write the same values' places with different values.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads / 2, 1)
blocks_write_one_place(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    constexpr int kBlock = kThreads / 2;
    const int place = (kSeeded ? 0 : static_cast<int>(blockIdx.x) * kBlock) + thread_index();
    const int source = static_cast<int>(blockIdx.x) * kBlock + thread_index();
    arguments.out[place] = arguments.in[source];  // BUG
}

// Grid shape: [2]. The second block reads what the first one wrote.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads / 2, 1)
block_reads_other_block(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    constexpr int kBlock = kThreads / 2;
    const int place = static_cast<int>(blockIdx.x) * kBlock + thread_index();
    float before = 0.0f;
    if (kSeeded && blockIdx.x == 1) {
        before = arguments.out[thread_index()];  // BUG
    }
    arguments.out[place] = arguments.in[place] + before;
}

// Prefix sums, each thread by itself; the mask is off by one.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
mask_off_by_one(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    float sum = 0.0f;
    for (int index = 0; index < kThreads; ++index) {
        const bool visible = kSeeded ? index < thread_index() : index <= thread_index();  // BUG
        sum += visible ? arguments.in[index] : 0.0f;
    }
    arguments.out[threadIdx.x] = sum;
}

// Reverses the block; the launches, not the text, differ.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
launched_wrongly(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    plan.tile[threadIdx.x] = arguments.in[threadIdx.x];
    sync_threads();
    arguments.out[threadIdx.x] = plan.tile[kThreads - 1 - thread_index()];
}

inline constexpr LaunchShape kTwoSmallBlocks = {
    .grid = dim3(2), .threads = kThreads / 2, .shared_bytes = sizeof(TilePlan)};
inline constexpr LaunchShape kHalfPlan = {
    .grid = dim3(1), .threads = kThreads, .shared_bytes = sizeof(TilePlan) / 2};
inline constexpr LaunchShape kHugePlan = {
    .grid = dim3(1), .threads = kThreads, .shared_bytes = 228 * 1024};
inline constexpr LaunchShape kNoBlock = {
    .grid = dim3(0), .threads = kThreads, .shared_bytes = sizeof(TilePlan)};
inline constexpr LaunchShape kTooManyThreads = {
    .grid = dim3(1), .threads = 1025, .shared_bytes = sizeof(TilePlan)};
inline constexpr LaunchShape kNoThread = {
    .grid = dim3(1), .threads = 0, .shared_bytes = sizeof(TilePlan)};

inline const Case kMemoryCases[] = {
    WARPLOOM_SEEDED_CASE(global_read_out_of_bounds, kOneBlock),
    WARPLOOM_SEEDED_CASE(global_write_out_of_bounds, kOneBlock),
    WARPLOOM_SEEDED_CASE(shared_out_of_bounds, kOneBlock),
    {"shared_launch_too_small", shared_launch_too_small<true>, shared_launch_too_small<false>,
     kHalfPlan, kOneBlock},
    WARPLOOM_SEEDED_CASE(vector_load_misaligned, kOneBlock),
    WARPLOOM_SEEDED_CASE(vector_store_misaligned, kOneBlock),
    WARPLOOM_SEEDED_CASE(shared_vector_load_misaligned, kOneBlock),
    WARPLOOM_SEEDED_CASE(shared_read_uninitialised, kOneBlock),
    WARPLOOM_SEEDED_CASE(shared_accumulate_not_atomic, kOneBlock),
    WARPLOOM_SEEDED_CASE(global_accumulate_not_atomic, kOneBlock),
    WARPLOOM_SEEDED_CASE(global_exchange_race, kOneBlock),
    WARPLOOM_SEEDED_CASE(host_pointer, kOneBlock),
    WARPLOOM_SEEDED_CASE(blocks_write_one_place, kTwoSmallBlocks),
    WARPLOOM_SEEDED_CASE(block_reads_other_block, kTwoSmallBlocks),
    WARPLOOM_SEEDED_CASE(mask_off_by_one, kOneBlock),
    {"launch_plan_too_large", launched_wrongly<true>, launched_wrongly<false>, kHugePlan,
     kOneBlock},
    {"launch_empty_grid", launched_wrongly<true>, launched_wrongly<false>, kNoBlock, kOneBlock},
    {"launch_too_many_threads", launched_wrongly<true>, launched_wrongly<false>, kTooManyThreads,
     kOneBlock},
    {"launch_no_threads", launched_wrongly<true>, launched_wrongly<false>, kNoThread, kOneBlock},
};

}  // namespace warploom::seeded
