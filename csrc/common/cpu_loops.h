// Loops over elements in memory for CPU kernels: what is computed is written once, per element, and
// these loops widen, narrow and vectorise. Included by <op>_cpu.cpp only (see cpu.h on namespaces).
//
// Two neighbouring bfloat16 are taken as one 32-bit word: its halves become floats by one shift and
// one mask, without moving between vector lanes, and go back the same way. Elements at even and at
// odd places then are two vectors of floats.
#pragma once

#include <bit>
#include <cstdint>

#include "cpu_float.h"

namespace warploom {
namespace WARPLOOM_CPU_ISA {

template <typename W>
struct Pair {
    W even;
    W odd;
};

template <typename T>
constexpr bool kInPairs = false;
template <>
inline constexpr bool kInPairs<BFloat16> = true;

template <typename T>
inline Pair<Wide<T>> widen_pair(const T* from) {
    return {widen(from[0]), widen(from[1])};
}
inline Pair<float> widen_pair(const BFloat16* from) {
    std::uint32_t word;
    __builtin_memcpy(&word, from, sizeof(word));
    return {std::bit_cast<float>(word << 16), std::bit_cast<float>(word & 0xffff0000u)};
}

// What narrow<BFloat16> does to the result of an operation, in the upper half; the lower half is
// undefined. Such a NaN is quiet already, and so remains one without its lower half.
inline std::uint32_t round_to_upper_half(float value) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return value != value ? bits : rounded;
}

template <typename T>
inline void store(T* to, Wide<T> value) {
    *to = narrow<T>(value);
}
template <typename T>
inline void store(T* to, Wide<T> even, Wide<T> odd) {
    to[0] = narrow<T>(even);
    to[1] = narrow<T>(odd);
}
template <>
inline void store<BFloat16>(BFloat16* to, float even, float odd) {
    const std::uint32_t word =
        (round_to_upper_half(even) >> 16) | (round_to_upper_half(odd) & 0xffff0000u);
    __builtin_memcpy(to, &word, sizeof(word));
}

// For elements i of the arrays `in`, T the type of the large ones: what compute(wide in[i]...)
// returns goes to write(i, result), or for the elements i and i + 1 at once to write(i, result,
// result).
template <typename T, typename Compute, typename Write, typename... In>
inline void for_each_element(std::int64_t count, Compute compute, Write write, const In*... in) {
    using W = Wide<T>;
    if constexpr (kInPairs<T>) {
        const std::int64_t pairs = count / 2;
#pragma omp simd
        for (std::int64_t i = 0; i < pairs; ++i) {
            write(2 * i, compute(static_cast<W>(widen_pair(in + 2 * i).even)...),
                  compute(static_cast<W>(widen_pair(in + 2 * i).odd)...));
        }
        if (count % 2 != 0) {
            write(count - 1, compute(static_cast<W>(widen(in[count - 1]))...));
        }
    } else {
#pragma omp simd
        for (std::int64_t i = 0; i < count; ++i) {
            write(i, compute(static_cast<W>(widen(in[i]))...));
        }
    }
}

// Calls body(first, count) for chunks that cover [0, size).
template <typename Body>
inline void for_each_chunk(std::int64_t size, Body body) {
    constexpr std::int64_t kChunk = 512;
    for (std::int64_t first = 0; first < size; first += kChunk) {
        body(first, size - first < kChunk ? size - first : kChunk);
    }
}

// Asks for elements that are read soon; reads nothing.
template <typename T>
inline void prefetch(const T* from, std::int64_t count) {
    constexpr std::int64_t kLine = 64;
    const char* const bytes = reinterpret_cast<const char*>(from);
    const std::int64_t size = count * static_cast<std::int64_t>(sizeof(T));
    for (std::int64_t offset = 0; offset < size; offset += kLine) {
        __builtin_prefetch(bytes + offset, 0, 2);
    }
}

// Sum over i of term(wide in[i]...), in a fixed order: kSums sums side by side, which are
// independent chains of additions, and an error that grows with count / kSums.
template <typename T, typename Term, typename... In>
inline Wide<T> sum_elements(std::int64_t count, Term term, const In*... in) {
    using W = Wide<T>;
    constexpr std::int64_t kSums = 64;
    constexpr std::int64_t kStep = kInPairs<T> ? 2 * kSums : kSums;
    W sums[kSums] = {};
    std::int64_t first = 0;
    for (; first + kStep <= count; first += kStep) {
#pragma omp simd
        for (std::int64_t i = 0; i < kSums; ++i) {
            if constexpr (kInPairs<T>) {
                sums[i] += term(static_cast<W>(widen_pair(in + first + 2 * i).even)...) +
                           term(static_cast<W>(widen_pair(in + first + 2 * i).odd)...);
            } else {
                sums[i] += term(static_cast<W>(widen(in[first + i]))...);
            }
        }
    }
    for (std::int64_t i = first; i < count; ++i) {
        sums[(i - first) % kSums] += term(static_cast<W>(widen(in[i]))...);
    }
    for (std::int64_t width = kSums / 2; width > 0; width /= 2) {
#pragma omp simd
        for (std::int64_t i = 0; i < width; ++i) {
            sums[i] += sums[i + width];
        }
    }
    return sums[0];
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom
