// Vector clocks: which accesses of other threads a thread may rely on.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "types.h"

namespace warploom::device::simt {

// A moment of one thread, in 32 bits.
struct Epoch {
    static constexpr int kThreadBits = 10;

    std::uint32_t bits = 0;

    static Epoch of(int thread, std::uint32_t clock) {
        return {clock << kThreadBits | static_cast<std::uint32_t>(thread)};
    }
    int thread() const { return static_cast<int>(bits & ((1u << kThreadBits) - 1)); }
    std::uint32_t clock() const { return bits >> kThreadBits; }
};

// What the threads that released into an object knew: a barrier in its current phase.
using SyncClock = std::vector<std::uint32_t>;  // by thread; empty means nothing

// The clocks of the threads of one block. What a thread knows of another is the greatest of three
// numbers: what all knew at the last sync_threads, what warp barriers brought (a row per thread,
// over its own warp), and what other barriers brought (a row per thread, over the block, in use
// only from such a barrier to the next sync_threads).
class Clocks {
  public:
    explicit Clocks(int threads);
    void start_block();

    Epoch now(int thread) const { return Epoch::of(thread, own_[thread]); }

    // Whether what happened at `epoch` precedes all that `thread` does from now on.
    bool ordered(Epoch epoch, int thread) const {
        const int other = epoch.thread();
        if (other == thread || epoch.clock() <= block_[other]) {
            return true;
        }
        if (other / kWarpSize == thread / kWarpSize &&
            epoch.clock() <= warp_[thread][other % kWarpSize]) {
            return true;
        }
        return has_wide_[thread] && epoch.clock() <= wide_[thread][other];
    }

    void join_block();
    void join_warp(int warp, std::uint32_t mask);
    void release(int thread, SyncClock& clock);
    void acquire(int thread, const SyncClock& clock);

  private:
    void widen(int thread);

    int threads_;
    std::vector<std::uint32_t> own_;
    std::vector<std::uint32_t> block_;
    std::vector<std::array<std::uint32_t, kWarpSize>> warp_;
    std::vector<std::vector<std::uint32_t>> wide_;
    std::vector<char> has_wide_;
};

}  // namespace warploom::device::simt
