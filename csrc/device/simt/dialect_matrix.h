// Host twins of ../ptx/matrix.cuh.
#pragma once

#include "primitives.h"

namespace warploom::device {

namespace detail {

template <int kMatrices, bool kTransposed>
WARPLOOM_DEVICE void load_matrix(std::uint32_t (&fragment)[kMatrices], const void* shared_row,
                                 Where where) {
    const simt::Word4 words = simt::load_matrix(shared_row, kMatrices, kTransposed, where);
    WARPLOOM_UNROLL
    for (int index = 0; index < kMatrices; ++index) {
        fragment[index] = words[index];
    }
}

WARPLOOM_DEVICE std::uint64_t as_pair(const std::uint32_t (&words)[2]) {
    return words[0] | static_cast<std::uint64_t>(words[1]) << 32;
}

WARPLOOM_DEVICE void assign(float (&accumulator)[4], simt::Float4 value) {
    WARPLOOM_UNROLL
    for (int index = 0; index < 4; ++index) {
        accumulator[index] = value[index];
    }
}

}  // namespace detail

WARPLOOM_DEVICE void load_matrix_x1(std::uint32_t (&fragment)[1], const void* shared_row,
                                    Where where = Where::current()) {
    detail::load_matrix<1, false>(fragment, shared_row, where);
}

WARPLOOM_DEVICE void load_matrix_x2(std::uint32_t (&fragment)[2], const void* shared_row,
                                    Where where = Where::current()) {
    detail::load_matrix<2, false>(fragment, shared_row, where);
}

WARPLOOM_DEVICE void load_matrix_x4(std::uint32_t (&fragment)[4], const void* shared_row,
                                    Where where = Where::current()) {
    detail::load_matrix<4, false>(fragment, shared_row, where);
}

WARPLOOM_DEVICE void load_matrix_x2_transposed(std::uint32_t (&fragment)[2], const void* shared_row,
                                               Where where = Where::current()) {
    detail::load_matrix<2, true>(fragment, shared_row, where);
}

WARPLOOM_DEVICE void load_matrix_x4_transposed(std::uint32_t (&fragment)[4], const void* shared_row,
                                               Where where = Where::current()) {
    detail::load_matrix<4, true>(fragment, shared_row, where);
}

template <typename T>
WARPLOOM_DEVICE void mma_m16n8k16(float (&accumulator)[4], const std::uint32_t (&a)[4],
                                  const std::uint32_t (&b)[2], Where where = Where::current()) {
    static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, half>,
                  "mma_m16n8k16: bfloat16 or half");
    constexpr simt::Element kElement =
        std::is_same_v<T, bfloat16> ? simt::Element::bfloat16 : simt::Element::half;
    detail::assign(accumulator,
                   simt::multiply_16_8_16(
                       simt::Float4{accumulator[0], accumulator[1], accumulator[2], accumulator[3]},
                       simt::Word4{a[0], a[1], a[2], a[3]}, detail::as_pair(b), kElement, where));
}

WARPLOOM_DEVICE void mma_m16n8k8_tf32(float (&accumulator)[4], const std::uint32_t (&a)[4],
                                      const std::uint32_t (&b)[2], Where where = Where::current()) {
    detail::assign(accumulator,
                   simt::multiply_16_8_8(
                       simt::Float4{accumulator[0], accumulator[1], accumulator[2], accumulator[3]},
                       simt::Word4{a[0], a[1], a[2], a[3]}, detail::as_pair(b), where));
}

// Rounds to 10 mantissa bits, ties away from zero; the low 13 bits of the result are zero.
WARPLOOM_DEVICE std::uint32_t to_tf32(float value) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(value);
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    if (finite) {
        return (bits + 0x1000u) & ~0x1fffu;
    }
    const bool infinite = (bits & 0x007fffffu) == 0;
    return infinite ? bits : 0x7fffe000u;
}

}  // namespace warploom::device
