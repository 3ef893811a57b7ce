// Barriers of a block, of a part of a block and of a warp, and the memory fence.
#pragma once

#include "index.cuh"

namespace warploom::device {

// PTX ISA, Parallel Synchronization and Communication Instructions: barrier.sync.aligned 0
WARPLOOM_DEVICE void sync_threads() {
    __syncthreads();
}

// PTX ISA, Parallel Synchronization and Communication Instructions: bar.warp.sync
WARPLOOM_DEVICE void sync_warp(std::uint32_t mask = kFullMask) {
    __syncwarp(mask);
}

// PTX ISA, Parallel Synchronization and Communication Instructions: barrier.sync.aligned
// `id` 1 to 15 (0 is sync_threads), `threads` a multiple of 32: the syncing and the arriving
// threads together.
WARPLOOM_DEVICE void named_barrier_sync(int id, int threads) {
    asm volatile("barrier.sync.aligned %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

// PTX ISA, Parallel Synchronization and Communication Instructions: barrier.arrive.aligned
WARPLOOM_DEVICE void named_barrier_arrive(int id, int threads) {
    asm volatile("barrier.arrive.aligned %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

// PTX ISA, Parallel Synchronization and Communication Instructions: fence.acq_rel.gpu
WARPLOOM_DEVICE void thread_fence() {
    __threadfence();
}

}  // namespace warploom::device
