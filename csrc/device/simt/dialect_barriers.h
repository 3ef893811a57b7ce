// Host twins of ../ptx/barrier.cuh.
#pragma once

#include "primitives.h"

namespace warploom::device {

WARPLOOM_DEVICE void sync_threads(Where where = Where::current()) {
    simt::synchronize_block(where);
}

WARPLOOM_DEVICE void sync_warp(std::uint32_t mask = kFullMask, Where where = Where::current()) {
    simt::synchronize_warp(mask, where);
}

WARPLOOM_DEVICE void named_barrier_sync(int id, int threads, Where where = Where::current()) {
    simt::synchronize_named(id, threads, where);
}

WARPLOOM_DEVICE void named_barrier_arrive(int id, int threads, Where where = Where::current()) {
    simt::arrive_named(id, threads, where);
}

WARPLOOM_DEVICE void thread_fence(Where where = Where::current()) {
    simt::fence(where);
}

}  // namespace warploom::device
