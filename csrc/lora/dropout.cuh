// Dropout of tiles and of sums: element (i, j) of a matrix is drawn by its place alone, so that
// products of any tiling, forward and backward, see one mask.
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "common/product.cuh"

namespace warploom::lora {

struct Mask {
    const std::int64_t* seed;  // null: nothing is dropped
    std::uint32_t drop_below;  // dropout_threshold
};

// What threads of one block draw with.
struct Drawing {
    std::uint64_t seed;
    std::uint32_t drop_below;

    // Bit e: whether element (row, 4 quad + e) stays.
    WARPLOOM_DEVICE std::uint32_t kept(int row, int quad) const {
        const PhiloxNumbers numbers =
            philox(seed, static_cast<std::uint32_t>(quad), static_cast<std::uint32_t>(row), 0, 0);
        std::uint32_t bits = 0;
        WARPLOOM_UNROLL
        for (int element = 0; element < 4; ++element) {
            bits |= static_cast<std::uint32_t>(numbers.values[element] >= drop_below) << element;
        }
        return bits;
    }
};

WARPLOOM_DEVICE Drawing drawing_of(const Mask& mask) {
    return {static_cast<std::uint64_t>(*mask.seed), mask.drop_below};
}

// Clears what is dropped of a tile that begins at (row, column), a multiple of 4.
template <int kThreads, typename Tile>
WARPLOOM_DEVICE void drop_tile(Tile& tile, const Drawing& drawing, int row, int column) {
    using T = typename Tile::Element;
    WARPLOOM_NO_UNROLL
    for (int unit = static_cast<int>(threadIdx.x); unit < Tile::kRows * Tile::kRowChunks;
         unit += kThreads) {
        const int tile_row = unit / Tile::kRowChunks;
        const int place = unit % Tile::kRowChunks;
        const int first = column + place * Chunk<T>::kSize;
        Chunk<T> chunk = tile.load(tile_row, place);
        WARPLOOM_UNROLL
        for (int quad = 0; quad < Chunk<T>::kSize / 4; ++quad) {
            const std::uint32_t kept = drawing.kept(row + tile_row, first / 4 + quad);
            WARPLOOM_UNROLL
            for (int element = 0; element < 4; ++element) {
                if ((kept >> element & 1) == 0) {
                    chunk.elements[quad * 4 + element] = device::from_float<T>(0.0f);
                }
            }
        }
        device::store_vector(tile.bytes + tile.offset(tile_row, place), chunk);
    }
}

// Clears what is dropped of sums whose tile begins at (row, column), a multiple of 4.
//
// Two lanes side by side have two columns each of one quad, in two rows: each draws one of the rows
// for both.
template <typename Shape>
WARPLOOM_DEVICE void drop_sums(MmaSums<Shape>& sums, const Drawing& drawing, int row, int column) {
    using Sums = MmaSums<Shape>;
    const int lane = device::lane_index();
    const int odd = lane % 2;
    row += sums.warp_row() + lane / 4 + odd * 8;
    column += sums.warp_column() + lane % 4 / 2 * 4;
    WARPLOOM_UNROLL
    for (int m = 0; m < Sums::kRowFragments; ++m) {
        WARPLOOM_UNROLL
        for (int n = 0; n < Sums::kColumnFragments; ++n) {
            const std::uint32_t own = drawing.kept(row + m * 16, (column + n * 8) / 4);
            const std::uint32_t other = device::shuffle_xor(own, 1);
            WARPLOOM_UNROLL
            for (int half = 0; half < 2; ++half) {
                const std::uint32_t kept = (half == odd ? own : other) >> (odd * 2);
                WARPLOOM_UNROLL
                for (int element = 0; element < 2; ++element) {
                    float& value = sums.values[m][n][half * 2 + element];
                    value = (kept >> element & 1) != 0 ? value : 0.0f;
                }
            }
        }
    }
}

// Of float32 a thread has whole quads where the right operand is transposed.
template <typename Shape>
WARPLOOM_DEVICE void drop_sums(FmaSums<Shape>& sums, const Drawing& drawing, int row, int column) {
    using Sums = FmaSums<Shape>;
    static_assert(Shape::kRightTransposed, "drop_sums: a thread must have quads of columns");
    WARPLOOM_UNROLL
    for (int i = 0; i < Sums::kCount; ++i) {
        WARPLOOM_UNROLL
        for (int j = 0; j < Sums::kCount; j += 4) {
            const std::uint32_t kept =
                drawing.kept(row + sums.rows().row(i), (column + sums.columns().row(j)) / 4);
            WARPLOOM_UNROLL
            for (int element = 0; element < 4; ++element) {
                float& value = sums.values[i][j + element];
                value = (kept >> element & 1) != 0 ? value : 0.0f;
            }
        }
    }
}

}  // namespace warploom::lora
