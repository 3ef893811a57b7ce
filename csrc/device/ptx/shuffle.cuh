// Exchange of registers and votes among the lanes named by a mask. Every named lane reaches the
// same call.
#pragma once

#include "index.cuh"

namespace warploom::device {

namespace detail {

// The integer that carries a 32- or 64-bit value through the shuffle instructions.
template <typename T>
struct ShuffleCarrier {
    static_assert(std::is_trivially_copyable_v<T>, "shuffle: the value must be trivially copyable");
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffle: the value must have 32 or 64 bits");
    using type = std::conditional_t<sizeof(T) == 4, unsigned int, unsigned long long>;
};

template <typename T>
using shuffle_carrier = typename ShuffleCarrier<T>::type;

}  // namespace detail

// PTX ISA, Data Movement and Conversion Instructions: shfl.sync.idx
template <typename T>
WARPLOOM_DEVICE T shuffle(T value, int source_lane, std::uint32_t mask = kFullMask) {
    using Carrier = detail::shuffle_carrier<T>;
    return bit_cast<T>(__shfl_sync(mask, bit_cast<Carrier>(value), source_lane));
}

// PTX ISA, Data Movement and Conversion Instructions: shfl.sync.bfly
template <typename T>
WARPLOOM_DEVICE T shuffle_xor(T value, int lane_mask, std::uint32_t mask = kFullMask) {
    using Carrier = detail::shuffle_carrier<T>;
    return bit_cast<T>(__shfl_xor_sync(mask, bit_cast<Carrier>(value), lane_mask));
}

// PTX ISA, Data Movement and Conversion Instructions: shfl.sync.up
// A lane below `delta` keeps its own value.
template <typename T>
WARPLOOM_DEVICE T shuffle_up(T value, int delta, std::uint32_t mask = kFullMask) {
    using Carrier = detail::shuffle_carrier<T>;
    return bit_cast<T>(__shfl_up_sync(mask, bit_cast<Carrier>(value), delta));
}

// PTX ISA, Data Movement and Conversion Instructions: shfl.sync.down
// A lane whose source would lie past lane 31 keeps its own value.
template <typename T>
WARPLOOM_DEVICE T shuffle_down(T value, int delta, std::uint32_t mask = kFullMask) {
    using Carrier = detail::shuffle_carrier<T>;
    return bit_cast<T>(__shfl_down_sync(mask, bit_cast<Carrier>(value), delta));
}

// PTX ISA, Parallel Synchronization and Communication Instructions: vote.sync.ballot
WARPLOOM_DEVICE std::uint32_t ballot(bool predicate, std::uint32_t mask = kFullMask) {
    return __ballot_sync(mask, predicate);
}

// PTX ISA, Parallel Synchronization and Communication Instructions: vote.sync.any
WARPLOOM_DEVICE bool any(bool predicate, std::uint32_t mask = kFullMask) {
    return __any_sync(mask, predicate) != 0;
}

// PTX ISA, Parallel Synchronization and Communication Instructions: vote.sync.all
WARPLOOM_DEVICE bool all(bool predicate, std::uint32_t mask = kFullMask) {
    return __all_sync(mask, predicate) != 0;
}

}  // namespace warploom::device
