// Matrix loads and products of a warp, in the fragment layouts of the PTX ISA (Warp-level Matrix
// Instructions).
#include <cstring>

#include "executor.h"

namespace warploom::device::simt {

namespace {

constexpr int kRows = 16;
constexpr int kColumns = 8;
constexpr int kMaxDepth = 16;

using Row = float __attribute__((vector_size(kColumns * sizeof(float))));

struct LoadOperand {
    const void* row;
    int matrices;
    bool transposed;
    Word4 fragment;
};

struct ProductOperand {
    float accumulator[4];
    std::uint32_t a[4];
    std::uint32_t b[2];
};

void load_matrices(Executor& executor, Collective& collective) {
    constexpr int kRowBytes = 16;
    const auto& first = *static_cast<const LoadOperand*>(collective.operands[0]);
    std::uint16_t matrices[4][8][8];
    std::size_t offsets[kWarpSize];
    for (int lane = 0; lane < 8 * first.matrices; ++lane) {
        const void* row = static_cast<const LoadOperand*>(collective.operands[lane])->row;
        std::memcpy(matrices[lane / 8][lane % 8], row, kRowBytes);
        offsets[lane] = static_cast<std::size_t>(static_cast<const std::byte*>(row) -
                                                 static_cast<std::byte*>(executor.shared_begin()));
    }
    if (executor.hazards() != nullptr) {
        executor.hazards()->count_matrix_load(offsets, first.matrices, collective.site);
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
        auto& operand = *static_cast<LoadOperand*>(collective.operands[lane]);
        const int row = lane / 4;
        const int column = lane % 4 * 2;
        for (int index = 0; index < first.matrices; ++index) {
            const auto& matrix = matrices[index];
            const std::uint32_t low = first.transposed ? matrix[column][row] : matrix[row][column];
            const std::uint32_t high =
                first.transposed ? matrix[column + 1][row] : matrix[row][column + 1];
            operand.fragment[index] = low | high << 16;
        }
    }
}

float from_bfloat16(std::uint32_t bits) {
    return std::bit_cast<float>(bits << 16);
}

// Moves the exponent by a product, which is exact and normalises what is subnormal.
float from_half(std::uint32_t bits) {
    const std::uint32_t magnitude = (bits & 0x7fffu) << 13;
    const bool special = (bits & 0x7c00u) == 0x7c00u;
    const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
    const std::uint32_t value =
        special ? magnitude | 0x7f800000u : std::bit_cast<std::uint32_t>(scaled);
    return std::bit_cast<float>(value | (bits & 0x8000u) << 16);
}

struct Tile {
    alignas(32) float a[kRows][kMaxDepth];
    alignas(32) Row b[kMaxDepth];
    alignas(32) Row sum[kRows];
};

// The products of 16-bit and TF32 numbers are exact in float32, so fused and separate rounding give
// equal bits.
#if defined(__x86_64__)
__attribute__((target_clones("arch=x86-64-v3", "default")))
#endif
void multiply_tile(Tile& tile, int depth) {
    for (int row = 0; row < kRows; row += 4) {
        Row sum0 = tile.sum[row];
        Row sum1 = tile.sum[row + 1];
        Row sum2 = tile.sum[row + 2];
        Row sum3 = tile.sum[row + 3];
        for (int k = 0; k < depth; ++k) {
            const Row b = tile.b[k];
            sum0 += tile.a[row][k] * b;
            sum1 += tile.a[row + 1][k] * b;
            sum2 += tile.a[row + 2][k] * b;
            sum3 += tile.a[row + 3][k] * b;
        }
        tile.sum[row] = sum0;
        tile.sum[row + 1] = sum1;
        tile.sum[row + 2] = sum2;
        tile.sum[row + 3] = sum3;
    }
}

ProductOperand& operand_of(Collective& collective, int lane) {
    return *static_cast<ProductOperand*>(collective.operands[lane]);
}

void multiply(Executor& executor, Collective& collective, Tile& tile, int depth) {
    ++executor.report().products;
    for (int lane = 0; lane < kWarpSize; ++lane) {
        const float* accumulator = operand_of(collective, lane).accumulator;
        const int row = lane / 4;
        const int column = lane % 4 * 2;
        tile.sum[row][column] = accumulator[0];
        tile.sum[row][column + 1] = accumulator[1];
        tile.sum[row + 8][column] = accumulator[2];
        tile.sum[row + 8][column + 1] = accumulator[3];
    }
    multiply_tile(tile, depth);
    for (int lane = 0; lane < kWarpSize; ++lane) {
        float* accumulator = operand_of(collective, lane).accumulator;
        const int row = lane / 4;
        const int column = lane % 4 * 2;
        accumulator[0] = tile.sum[row][column];
        accumulator[1] = tile.sum[row][column + 1];
        accumulator[2] = tile.sum[row + 8][column];
        accumulator[3] = tile.sum[row + 8][column + 1];
    }
}

template <float (*kConvert)(std::uint32_t)>
void multiply_16_bit(Executor& executor, Collective& collective) {
    Tile tile;
    for (int lane = 0; lane < kWarpSize; ++lane) {
        const ProductOperand& operand = operand_of(collective, lane);
        const int group = lane / 4;
        const int pair = lane % 4 * 2;
        for (int index = 0; index < 4; ++index) {
            float* pointer = &tile.a[group + index % 2 * 8][pair + index / 2 * 8];
            pointer[0] = kConvert(operand.a[index] & 0xffffu);
            pointer[1] = kConvert(operand.a[index] >> 16);
        }
        for (int index = 0; index < 2; ++index) {
            tile.b[pair + index * 8][group] = kConvert(operand.b[index] & 0xffffu);
            tile.b[pair + index * 8 + 1][group] = kConvert(operand.b[index] >> 16);
        }
    }
    multiply(executor, collective, tile, 16);
}

void multiply_tf32(Executor& executor, Collective& collective) {
    // The unit reads the upper 19 bits of an operand.
    const auto convert = [](std::uint32_t bits) { return std::bit_cast<float>(bits & ~0x1fffu); };
    Tile tile;
    for (int lane = 0; lane < kWarpSize; ++lane) {
        const ProductOperand& operand = operand_of(collective, lane);
        const int group = lane / 4;
        const int column = lane % 4;
        for (int index = 0; index < 4; ++index) {
            tile.a[group + index % 2 * 8][column + index / 2 * 4] = convert(operand.a[index]);
        }
        tile.b[column][group] = convert(operand.b[0]);
        tile.b[column + 4][group] = convert(operand.b[1]);
    }
    multiply(executor, collective, tile, 8);
}

Float4 product(Collective::Body body, Float4 accumulator, Word4 a, std::uint64_t b, Where where) {
    ProductOperand operand;
    std::memcpy(operand.accumulator, &accumulator, sizeof(accumulator));
    std::memcpy(operand.a, &a, sizeof(a));
    std::memcpy(operand.b, &b, sizeof(b));
    const Stay stay;
    stay->meet(body, "mma", &operand, kFullMask, Site(where));
    std::memcpy(&accumulator, operand.accumulator, sizeof(accumulator));
    return accumulator;
}

}  // namespace

Word4 load_matrix(const void* row, int matrices, bool transposed, Where where) {
    const Stay stay;
    Executor& executor = *stay;
    const Site site(where);
    if (executor.running().lane < 8 * matrices) {
        executor.check_shared(row, 16, 16, "load_matrix", site);
        if (executor.hazards() != nullptr) {
            const auto offset = static_cast<const std::byte*>(row) -
                                static_cast<std::byte*>(executor.shared_begin());
            executor.hazards()->read_row(executor, static_cast<std::size_t>(offset), site);
        }
    }
    LoadOperand operand{row, matrices, transposed, {}};
    executor.meet(&load_matrices, "load_matrix", &operand, kFullMask, site);
    return operand.fragment;
}

Float4 multiply_16_8_16(Float4 accumulator, Word4 a, std::uint64_t b, Element element,
                        Where where) {
    const Collective::Body body = element == Element::bfloat16 ? &multiply_16_bit<from_bfloat16>
                                                               : &multiply_16_bit<from_half>;
    return product(body, accumulator, a, b, where);
}

Float4 multiply_16_8_8(Float4 accumulator, Word4 a, std::uint64_t b, Where where) {
    return product(&multiply_tf32, accumulator, a, b, where);
}

}  // namespace warploom::device::simt
