// What pooling holds of windows, and how two of them become one. Included by <op>_cpu.cpp only (see
// common/cpu.h on namespaces).
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "spp/turn_cpu.h"

namespace warploom::spp {
namespace WARPLOOM_CPU_ISA {

enum class Reduction { sum, max, indexed_max };

// What is held of a window, of each plane, so far: its maximum and the pixel, or its sum.
template <typename W, int kLanes>
struct Held {
    static constexpr int kVectors = kLanes / kSide<W>;
    Vector<W> values[kVectors];
    Indices<W> places[kVectors];
};

template <Reduction kReduction, typename W>
constexpr W kNothing = kReduction == Reduction::sum ? W{0} : -std::numeric_limits<W>::infinity();

// Whether there is a NaN in a vector.
template <typename Values>
inline bool is_nan(const Values& values) {
    bool found = false;
    for (std::size_t lane = 0; lane < sizeof(values) / sizeof(values[0]); ++lane) {
        found |= values[lane] != values[lane];
    }
    return found;
}

// Pixels come in order: of equal ones the first stays, of NaN the last. A maximum of numbers alone
// is one instruction.
template <Reduction kReduction, bool kMayBeNan = true, typename Values, typename Places>
inline void take(Values value, Places place, Values& held, Places& held_place) {
    const auto take_where = [&](auto is_taken) {
        held = is_taken ? value : held;
        if constexpr (kReduction == Reduction::indexed_max) {
            held_place = is_taken ? place : held_place;
        }
    };
    if constexpr (kReduction == Reduction::sum) {
        held += value;
    } else if constexpr (kMayBeNan) {
        take_where((value > held) | (value != value));
    } else {
        take_where(value > held);
    }
}

// The same of pixels that come in any order: `to` of `held` and `from`, it may be either.
template <Reduction kReduction, bool kMayBeNan = true, typename W, int kLanes>
inline void combine(const Held<W, kLanes>& held, const Held<W, kLanes>& from, Held<W, kLanes>& to) {
    for (int part = 0; part < Held<W, kLanes>::kVectors; ++part) {
        const Vector<W> a = held.values[part];
        const Vector<W> b = from.values[part];
        if constexpr (kReduction == Reduction::sum) {
            to.values[part] = a + b;
        } else if constexpr (kReduction == Reduction::max) {
            to.values[part] = a;
            Indices<W> place{};
            take<kReduction, kMayBeNan>(b, place, to.values[part], place);
        } else {
            const Indices<W> place_a = held.places[part];
            const Indices<W> place_b = from.places[part];
            auto is_taken = (b > a) | ((b == a) & (place_b < place_a));
            if constexpr (kMayBeNan) {
                is_taken |= (b != b) & ((a == a) | (place_b > place_a));
            }
            to.values[part] = is_taken ? b : a;
            to.places[part] = is_taken ? place_b : place_a;
        }
    }
}

// Whether there may be a NaN among `count` numbers, which are whole vectors: there is none where
// the sum is a number.
template <typename W>
inline bool may_hold_nan(const W* numbers, std::int64_t count) {
    constexpr int kSums = 4;
    constexpr std::int64_t kStep = kSums * kSide<W>;
    Vector<W> sums[kSums] = {};
    std::int64_t at = 0;
    for (; at + kStep <= count; at += kStep) {
        for (int i = 0; i < kSums; ++i) {
            sums[i] += load_vector(numbers + at + i * kSide<W>);
        }
    }
    for (; at < count; at += kSide<W>) {
        sums[0] += load_vector(numbers + at);
    }
    return is_nan((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::spp
