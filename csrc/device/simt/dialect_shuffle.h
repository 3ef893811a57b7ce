// Host twins of ../ptx/shuffle.cuh.
#pragma once

#include "primitives.h"

namespace warploom::device {

namespace detail {

template <typename T>
WARPLOOM_DEVICE T shuffle_as(T value, simt::ShuffleMode mode, int argument, std::uint32_t mask,
                             Where where) {
    static_assert(std::is_trivially_copyable_v<T>, "shuffle: the value must be trivially copyable");
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffle: the value must have 32 or 64 bits");
    using Carrier = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
    return bit_cast<T>(static_cast<Carrier>(
        simt::shuffle_bits(bit_cast<Carrier>(value), mode, argument, mask, where)));
}

}  // namespace detail

template <typename T>
WARPLOOM_DEVICE T shuffle(T value, int source_lane, std::uint32_t mask = kFullMask,
                          Where where = Where::current()) {
    return detail::shuffle_as(value, simt::ShuffleMode::index, source_lane, mask, where);
}

template <typename T>
WARPLOOM_DEVICE T shuffle_xor(T value, int lane_mask, std::uint32_t mask = kFullMask,
                              Where where = Where::current()) {
    return detail::shuffle_as(value, simt::ShuffleMode::exclusive_or, lane_mask, mask, where);
}

// A lane below `delta` keeps its own value.
template <typename T>
WARPLOOM_DEVICE T shuffle_up(T value, int delta, std::uint32_t mask = kFullMask,
                             Where where = Where::current()) {
    return detail::shuffle_as(value, simt::ShuffleMode::up, delta, mask, where);
}

// A lane whose source would lie past lane 31 keeps its own value.
template <typename T>
WARPLOOM_DEVICE T shuffle_down(T value, int delta, std::uint32_t mask = kFullMask,
                               Where where = Where::current()) {
    return detail::shuffle_as(value, simt::ShuffleMode::down, delta, mask, where);
}

WARPLOOM_DEVICE std::uint32_t ballot(bool predicate, std::uint32_t mask = kFullMask,
                                     Where where = Where::current()) {
    return simt::vote(predicate, mask, where);
}

WARPLOOM_DEVICE bool any(bool predicate, std::uint32_t mask = kFullMask,
                         Where where = Where::current()) {
    return simt::vote(predicate, mask, where) != 0;
}

WARPLOOM_DEVICE bool all(bool predicate, std::uint32_t mask = kFullMask,
                         Where where = Where::current()) {
    return simt::vote(predicate, mask, where) == mask;
}

}  // namespace warploom::device
