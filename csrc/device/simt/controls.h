// What a test may choose: the order of lanes, the moment of asynchronous copies, the seed, the
// shared memory of the device.
#pragma once

#include <cstdint>
#include <string>

#include "types.h"

namespace warploom::device::simt {

// The order in which threads run between two meetings.
enum class LaneOrder { forward, backward, random };

// When an asynchronous operation takes effect: at its issue, at the wait that completes it, or
// somewhere between.
enum class AsyncPolicy { late, early, random };

struct Controls {
    LaneOrder lane_order = LaneOrder::forward;
    AsyncPolicy async_policy = AsyncPolicy::late;
    std::uint64_t seed = 0;
    std::size_t shared_memory_limit = kMaxSharedBytes;
};

// In force from the next launch on.
void set_controls(const Controls& controls);
Controls controls();

// Both throw std::invalid_argument that names the accepted words.
LaneOrder lane_order_from(const std::string& name);
AsyncPolicy async_policy_from(const std::string& name);

// A small generator (xorshift64*), equal on every machine for one seed.
class Random {
  public:
    explicit Random(std::uint64_t seed = 0) : state_(seed * 2 + 0x9e3779b97f4a7c15u) {}

    std::uint32_t below(std::uint32_t bound) {
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        const std::uint64_t high = (state_ * 0x2545f4914f6cdd1du) >> 32;
        return static_cast<std::uint32_t>(high * bound >> 32);
    }

  private:
    std::uint64_t state_;
};

}  // namespace warploom::device::simt
