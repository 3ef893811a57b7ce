// Numbers of several planes turned so that those of one pixel are neighbours, and back. Included by
// <op>_cpu.cpp only (see common/cpu.h on namespaces).
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/cpu_float.h"

namespace warploom::spp {
namespace WARPLOOM_CPU_ISA {

using namespace ::warploom::WARPLOOM_CPU_ISA;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#else
constexpr int kVectorBytes = 32;
#endif

template <typename W>
struct VectorType {
    using Integer = std::conditional_t<sizeof(W) == 4, std::int32_t, std::int64_t>;
    typedef W Type __attribute__((vector_size(kVectorBytes)));
    typedef Integer Index __attribute__((vector_size(kVectorBytes)));
};
template <typename W>
using Vector = typename VectorType<W>::Type;
// Integers of a vector's width, one a lane.
template <typename W>
using Indices = typename VectorType<W>::Index;
// The side of a block.
template <typename W>
constexpr int kSide = kVectorBytes / static_cast<int>(sizeof(W));

// a[k], b[k], a[k + 1], b[k + 1], ... from the first lane on, or from the middle.
template <bool kFromMiddle, typename W, typename Rows, int... kLane>
inline Rows interleave(Rows a, Rows b, std::integer_sequence<int, kLane...>) {
    constexpr int kFirst = kFromMiddle ? kSide<W> / 2 : 0;
    const Indices<W> index = {(kFirst + kLane / 2 + kLane % 2 * kSide<W>)...};
    return __builtin_shuffle(a, b, index);
}

// Transposes a block. A step makes of the number of a row and that of a lane, as one string of
// bits, the string rotated by one bit.
template <typename W, int kStep = 1, typename Rows>
inline void transpose(Rows* rows) {
    if constexpr (kStep < kSide<W>) {
        constexpr int kHalf = kSide<W> / 2;
        constexpr auto kAllLanes = std::make_integer_sequence<int, kSide<W>>();
        Rows next[kSide<W>];
#pragma GCC unroll 16
        for (int i = 0; i < kHalf; ++i) {
            next[2 * i] = interleave<false, W>(rows[i], rows[i + kHalf], kAllLanes);
            next[2 * i + 1] = interleave<true, W>(rows[i], rows[i + kHalf], kAllLanes);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kSide<W>; ++i) {
            rows[i] = next[i];
        }
        transpose<W, 2 * kStep>(rows);
    }
}

template <typename T, typename W = Wide<T>>
inline Vector<W> load_vector(const T* from) {
    Vector<W> vector;
    if constexpr (std::is_same_v<T, W>) {
        __builtin_memcpy(&vector, from, sizeof(vector));
    } else {
        W numbers[kSide<W>];
#pragma omp simd
        for (int lane = 0; lane < kSide<W>; ++lane) {
            numbers[lane] = widen(from[lane]);
        }
        __builtin_memcpy(&vector, numbers, sizeof(vector));
    }
    return vector;
}

// The same, not by way of an array: its two stores would hold up the one load.
inline Vector<float> load_vector(const BFloat16* from) {
    typedef std::uint16_t Upper __attribute__((vector_size(kVectorBytes / 2)));
    typedef std::uint32_t Words __attribute__((vector_size(kVectorBytes)));
    Upper upper;
    __builtin_memcpy(&upper, from, sizeof(upper));
    const Words words = __builtin_convertvector(upper, Words) << 16;
    Vector<float> vector;
    __builtin_memcpy(&vector, &words, sizeof(vector));
    return vector;
}

// to[pixel][plane] = from[plane * stride + pixel] of kSide pixels of kPlanes planes. If kAhead,
// asks for those of the next planes.
template <int kPlanes, bool kAhead, typename T, typename W = Wide<T>>
inline void turn_block(const T* from, std::int64_t stride, W (*to)[kPlanes]) {
    constexpr int kRows = kSide<W>;
    static_assert(kPlanes % kRows == 0);
    for (int plane = 0; plane < kPlanes; plane += kRows) {
        Vector<W> rows[kRows];
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
            rows[i] = load_vector(from + (plane + i) * stride);
            if constexpr (kAhead) {
                __builtin_prefetch(from + (kPlanes + plane + i) * stride, 0, 2);
            }
        }
        transpose<W>(rows);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
            __builtin_memcpy(&to[i][plane], &rows[i], sizeof(rows[i]));
        }
    }
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::spp
