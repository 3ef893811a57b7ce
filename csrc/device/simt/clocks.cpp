#include "clocks.h"

#include <algorithm>
#include <bit>

namespace warploom::device::simt {

namespace {

void raise_to(SyncClock& clock, const SyncClock& other) {
    for (std::size_t index = 0; index < other.size(); ++index) {
        clock[index] = std::max(clock[index], other[index]);
    }
}

}  // namespace

Clocks::Clocks(int threads)
    : threads_(threads),
      own_(threads),
      block_(threads),
      warp_(threads),
      wide_(threads),
      has_wide_(threads) {
    start_block();
}

void Clocks::start_block() {
    std::fill(own_.begin(), own_.end(), 1u);
    std::fill(block_.begin(), block_.end(), 0u);
    std::fill(warp_.begin(), warp_.end(), std::array<std::uint32_t, kWarpSize>{});
    std::fill(has_wide_.begin(), has_wide_.end(), char{0});
}

void Clocks::join_block() {
    // Nobody knows more of a thread than the thread itself.
    block_ = own_;
    for (std::uint32_t& clock : own_) {
        ++clock;
    }
    std::fill(has_wide_.begin(), has_wide_.end(), char{0});
}

void Clocks::join_warp(int warp, std::uint32_t mask) {
    const int first = warp * kWarpSize;
    std::array<std::uint32_t, kWarpSize> joined{};
    int widest = -1;
    for (std::uint32_t left = mask; left != 0; left &= left - 1) {
        const int lane = std::countr_zero(left);
        for (int index = 0; index < kWarpSize; ++index) {
            joined[index] = std::max(joined[index], warp_[first + lane][index]);
        }
        if (has_wide_[first + lane]) {
            if (widest < 0) {
                widest = first + lane;
            } else {
                raise_to(wide_[widest], wide_[first + lane]);
            }
        }
    }
    for (std::uint32_t left = mask; left != 0; left &= left - 1) {
        const int lane = std::countr_zero(left);
        joined[lane] = own_[first + lane];
    }
    for (std::uint32_t left = mask; left != 0; left &= left - 1) {
        const int thread = first + std::countr_zero(left);
        warp_[thread] = joined;
        ++own_[thread];
        if (widest >= 0 && thread != widest) {
            wide_[thread] = wide_[widest];
            has_wide_[thread] = 1;
        }
    }
}

void Clocks::widen(int thread) {
    if (!has_wide_[thread]) {
        wide_[thread].assign(static_cast<std::size_t>(threads_), 0u);
        has_wide_[thread] = 1;
    }
}

void Clocks::release(int thread, SyncClock& clock) {
    clock.resize(static_cast<std::size_t>(threads_));
    if (has_wide_[thread]) {
        raise_to(clock, wide_[thread]);
    }
    const int first = thread / kWarpSize * kWarpSize;
    const int lanes = std::min(kWarpSize, threads_ - first);
    for (int lane = 0; lane < lanes; ++lane) {
        clock[first + lane] = std::max(clock[first + lane], warp_[thread][lane]);
    }
    clock[thread] = own_[thread]++;
}

void Clocks::acquire(int thread, const SyncClock& clock) {
    widen(thread);
    raise_to(wide_[thread], clock);
}

}  // namespace warploom::device::simt
