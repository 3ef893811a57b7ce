// Every other element of a row, as packed checkerboards and interleaved parameters have them, read
// and written by whole vectors. Included by <op>_cpu.cpp only (see common/cpu.h on namespaces).
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/cpu_float.h"

namespace warploom::coupling {
namespace WARPLOOM_CPU_ISA {

using namespace ::warploom::WARPLOOM_CPU_ISA;

// Vectors of the bits of elements, for moves that a loop is not vectorised with: the compiler gives
// each row of one that skips elements a remainder, and rows are short.
#if defined(__AVX512F__)
constexpr std::int64_t kVectorBytes = 64;
#else
constexpr std::int64_t kVectorBytes = 32;
#endif

template <typename T>
struct Vector {
    using Bits =
        std::conditional_t<sizeof(T) == 2, std::uint16_t,
                           std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>>;
    static constexpr std::int64_t kLanes = kVectorBytes / sizeof(T);
    typedef Bits Lanes __attribute__((vector_size(kVectorBytes)));

    [[gnu::always_inline]] static Lanes load(const void* from) {
        Lanes lanes;
        __builtin_memcpy(&lanes, from, sizeof(lanes));
        return lanes;
    }
    [[gnu::always_inline]] static void store(Lanes lanes, void* to) {
        __builtin_memcpy(to, &lanes, sizeof(lanes));
    }

    struct Numbers {
        Bits numbers[kLanes];

        constexpr Numbers() : numbers() {
            for (std::int64_t i = 0; i < kLanes; ++i) {
                numbers[i] = static_cast<Bits>(i);
            }
        }
    };
    static constexpr Numbers kNumbers{};  // 0, 1, 2, ...
};

// A run of every other element, the first one's place in a row of pairs being `odd`: all of the row
// is read.
template <typename T, typename W>
inline void read_between(const T* from, bool odd, std::int64_t length, W* to) {
    using V = Vector<T>;
    using Lanes = typename V::Lanes;
    constexpr std::int64_t kLanes = V::kLanes;
    const T* row = from - (odd ? 1 : 0);
    const auto parity = static_cast<typename V::Bits>(odd ? 1 : 0);
    const Lanes places = V::load(V::kNumbers.numbers) * 2 + parity;
    std::int64_t first = 0;
    for (; first + kLanes <= length; first += kLanes) {
        const Lanes picked =
            __builtin_shuffle(V::load(row + 2 * first), V::load(row + 2 * first + kLanes), places);
        T values[kLanes];
        V::store(picked, values);
#pragma omp simd
        for (std::int64_t i = 0; i < kLanes; ++i) {
            to[first + i] = static_cast<W>(widen(values[i]));
        }
    }
    for (; first < length; ++first) {
        to[first] = static_cast<W>(widen(from[2 * first]));
    }
}

// A run of every other element, and between them what `passing` has there: whole rows are read and
// written. The first element's place in a row of pairs is `odd`.
template <typename T, typename W>
inline void write_between(const W* from, const T* passing, bool odd, std::int64_t length, T* to) {
    using V = Vector<T>;
    using Lanes = typename V::Lanes;
    constexpr std::int64_t kLanes = V::kLanes;
    const T* passing_row = passing - (odd ? 1 : 0);
    T* row = to - (odd ? 1 : 0);
    const auto parity = static_cast<typename V::Bits>(odd ? 1 : 0);
    const auto lanes = static_cast<typename V::Bits>(kLanes);
    const Lanes numbers = V::load(V::kNumbers.numbers);
    const Lanes low = (numbers & 1) == parity ? numbers / 2 + lanes : numbers;
    const Lanes high = (numbers & 1) == parity ? numbers / 2 + (lanes + lanes / 2) : numbers;
    std::int64_t first = 0;
    for (; first + kLanes <= length; first += kLanes) {
        T values[kLanes];
#pragma omp simd
        for (std::int64_t i = 0; i < kLanes; ++i) {
            values[i] = narrow<T>(from[first + i]);
        }
        const Lanes moved = V::load(values);
        const std::int64_t at = 2 * first;
        V::store(__builtin_shuffle(V::load(passing_row + at), moved, low), row + at);
        V::store(__builtin_shuffle(V::load(passing_row + at + kLanes), moved, high),
                 row + at + kLanes);
    }
    for (; first < length; ++first) {
        const std::int64_t other = 2 * first + (odd ? -1 : 1);
        to[2 * first] = narrow<T>(from[first]);
        to[other] = passing[other];
    }
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::coupling
