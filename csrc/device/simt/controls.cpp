#include "controls.h"

#include <mutex>
#include <stdexcept>

#include "primitives.h"

namespace warploom::device::simt {

namespace {

std::mutex guard;
Controls current;

}  // namespace

void set_controls(const Controls& controls) {
    const std::lock_guard lock(guard);
    current = controls;
}

Controls controls() {
    const std::lock_guard lock(guard);
    return current;
}

std::size_t shared_memory_limit() {
    return controls().shared_memory_limit;
}

LaneOrder lane_order_from(const std::string& name) {
    if (name == "forward") {
        return LaneOrder::forward;
    }
    if (name == "backward") {
        return LaneOrder::backward;
    }
    if (name == "random") {
        return LaneOrder::random;
    }
    throw std::invalid_argument(
        "set_lane_order: expected 'forward', 'backward' or 'random', got '" + name + "'");
}

AsyncPolicy async_policy_from(const std::string& name) {
    if (name == "late") {
        return AsyncPolicy::late;
    }
    if (name == "early") {
        return AsyncPolicy::early;
    }
    if (name == "random") {
        return AsyncPolicy::random;
    }
    throw std::invalid_argument("set_async_policy: expected 'late', 'early' or 'random', got '" +
                                name + "'");
}

}  // namespace warploom::device::simt
