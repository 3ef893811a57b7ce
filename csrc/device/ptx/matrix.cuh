// Warp-level matrix loads and products. All 32 lanes take part in every call.
#pragma once

#include "memory.cuh"

namespace warploom::device {

// ldmatrix reads 8x8 matrices of 16-bit elements from shared memory. Lane 8 i + r gives the 16-byte
// aligned address of row r of matrix i (of the first x1: lanes 0-7, x2: lanes 0-15, x4: all lanes).
// Lane l receives in fragment[i] the elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1) of
// matrix i; transposed: of its transpose.

// PTX ISA, Warp-level Matrix Instructions: ldmatrix .x1
WARPLOOM_DEVICE void load_matrix_x1(std::uint32_t (&fragment)[1], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(fragment[0])
                 : "r"(detail::shared_address(shared_row))
                 : "memory");
}

// PTX ISA, Warp-level Matrix Instructions: ldmatrix .x2
WARPLOOM_DEVICE void load_matrix_x2(std::uint32_t (&fragment)[2], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(detail::shared_address(shared_row))
                 : "memory");
}

// PTX ISA, Warp-level Matrix Instructions: ldmatrix .x4
WARPLOOM_DEVICE void load_matrix_x4(std::uint32_t (&fragment)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(detail::shared_address(shared_row))
                 : "memory");
}

// PTX ISA, Warp-level Matrix Instructions: ldmatrix .x2.trans
WARPLOOM_DEVICE void load_matrix_x2_transposed(std::uint32_t (&fragment)[2],
                                               const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(detail::shared_address(shared_row))
                 : "memory");
}

// PTX ISA, Warp-level Matrix Instructions: ldmatrix .x4.trans
WARPLOOM_DEVICE void load_matrix_x4_transposed(std::uint32_t (&fragment)[4],
                                               const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(detail::shared_address(shared_row))
                 : "memory");
}

// PTX ISA, Warp-level Matrix Instructions: mma.sync.aligned.m16n8k16.row.col
// accumulator (16, 8) += a (16, 16) b (16, 8). With g = lane / 4, t = lane % 4:
//   a[0]: (g, 2t), (g, 2t + 1)    a[1]: the same of row g + 8    a[2], a[3]: those 8 columns on
//   b[0]: (2t, g), (2t + 1, g)    b[1]: the same 8 rows on
//   accumulator[0], [1]: (g, 2t), (g, 2t + 1)    accumulator[2], [3]: the same of row g + 8
template <typename T>
WARPLOOM_DEVICE void mma_m16n8k16(float (&accumulator)[4], const std::uint32_t (&a)[4],
                                  const std::uint32_t (&b)[2]) {
    static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, half>,
                  "mma_m16n8k16: bfloat16 or half");
    if constexpr (std::is_same_v<T, bfloat16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

// PTX ISA, Warp-level Matrix Instructions: mma.sync.aligned.m16n8k8.row.col
// accumulator (16, 8) += a (16, 8) b (8, 8); to_tf32 makes the bits of a and b.
// With g = lane / 4, t = lane % 4:
//   a[0]: (g, t)    a[1]: (g + 8, t)    a[2]: (g, t + 4)    a[3]: (g + 8, t + 4)
//   b[0]: (t, g)    b[1]: (t + 4, g)    accumulator: as of mma_m16n8k16
WARPLOOM_DEVICE void mma_m16n8k8_tf32(float (&accumulator)[4], const std::uint32_t (&a)[4],
                                      const std::uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// PTX ISA, Data Movement and Conversion Instructions: cvt.rna.tf32.f32
// Rounds to 10 mantissa bits, ties away from zero; the low 13 bits of the result are zero.
WARPLOOM_DEVICE std::uint32_t to_tf32(float value) {
    std::uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
}

}  // namespace warploom::device
