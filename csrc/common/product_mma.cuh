// Products of tiles for float16 and bfloat16: tensor cores (mma.sync, from sm_80).
#pragma once

#include "common/product_shape.cuh"

namespace warploom {

// With g = lane / 4, t = lane % 4, values[m][n] covers the warp's rows 16 m + g (elements 0, 1) and
// 16 m + g + 8 (elements 2, 3) and its columns 8 n + 2 t and 8 n + 2 t + 1.
template <typename Shape>
struct MmaSums {
    using T = typename Shape::Element;
    static constexpr int kWarpRows = Shape::kRows / Shape::kRowWarps;
    static constexpr int kWarpColumns = Shape::kColumns / Shape::kColumnWarps;
    static constexpr int kRowFragments = kWarpRows / 16;
    static constexpr int kColumnFragments = kWarpColumns / 8;
    static_assert(kWarpRows % 16 == 0 && kWarpColumns % 16 == 0,
                  "MmaSums: a warp has whole fragments, of columns whole pairs");

    float values[kRowFragments][kColumnFragments][4];

    static WARPLOOM_DEVICE int warp_row() {
        return device::warp_index() / Shape::kColumnWarps * kWarpRows;
    }
    static WARPLOOM_DEVICE int warp_column() {
        return device::warp_index() % Shape::kColumnWarps * kWarpColumns;
    }

    // Rows 16 m to 16 m + 15 of the warp, terms 16 step to 16 step + 15.
    static WARPLOOM_DEVICE void load_left(std::uint32_t (&fragment)[4],
                                          const typename Shape::LeftTile& tile, int m, int step) {
        const int lane = device::lane_index();
        if constexpr (Shape::kLeftTransposed) {
            const int offset = tile.offset(step * 16 + lane / 16 * 8 + lane % 8, lane / 8 % 2);
            device::load_matrix_x4_transposed(
                fragment, tile.bytes + tile.advance(offset, warp_row() / 8 + 2 * m));
        } else {
            const int offset = tile.offset(warp_row() + m * 16 + lane % 16, lane / 16);
            device::load_matrix_x4(fragment, tile.bytes + tile.advance(offset, 2 * step));
        }
    }

    // Columns 8 n to 8 n + 15 of the warp, the same terms: two operands side by side.
    static WARPLOOM_DEVICE void load_right(std::uint32_t (&pair)[4],
                                           const typename Shape::RightTile& tile, int n, int step) {
        const int lane = device::lane_index();
        if constexpr (Shape::kRightTransposed) {
            const int offset = tile.offset(step * 16 + lane % 16, lane / 16);
            device::load_matrix_x4_transposed(
                pair, tile.bytes + tile.advance(offset, warp_column() / 8 + n));
        } else {
            const int offset =
                tile.offset(warp_column() + n * 8 + lane / 16 * 8 + lane % 8, lane / 8 % 2);
            device::load_matrix_x4(pair, tile.bytes + tile.advance(offset, 2 * step));
        }
    }

    // Sums of columns from `columns` on may be left out.
    WARPLOOM_DEVICE void add(const typename Shape::Stage& stage, int columns = Shape::kColumns) {
        WARPLOOM_UNROLL
        for (int step = 0; step < Shape::kTerms / 16; ++step) {
            std::uint32_t rows[kRowFragments][4];
            WARPLOOM_UNROLL
            for (int m = 0; m < kRowFragments; ++m) {
                load_left(rows[m], stage.left, m, step);
            }
            WARPLOOM_UNROLL
            for (int n = 0; n < kColumnFragments; n += 2) {
                if (warp_column() + n * 8 >= columns) {
                    break;
                }
                std::uint32_t pair[4];
                load_right(pair, stage.right, n, step);
                const std::uint32_t first[2] = {pair[0], pair[1]};
                const std::uint32_t second[2] = {pair[2], pair[3]};
                WARPLOOM_UNROLL
                for (int m = 0; m < kRowFragments; ++m) {
                    device::mma_m16n8k16<T>(values[m][n], rows[m], first);
                    device::mma_m16n8k16<T>(values[m][n + 1], rows[m], second);
                }
            }
        }
    }

    // Calls visit(value, row, column) for each of this thread's sums, columns one after the other.
    template <typename Visit>
    WARPLOOM_DEVICE void for_each(const Visit& visit) {
        const int lane = device::lane_index();
        WARPLOOM_UNROLL
        for (int n = 0; n < kColumnFragments; ++n) {
            WARPLOOM_UNROLL
            for (int element = 0; element < 2; ++element) {
                WARPLOOM_UNROLL
                for (int index = 0; index < 2 * kRowFragments; ++index) {
                    const int half = index % 2;
                    visit(values[index / 2][n][half * 2 + element],
                          warp_row() + index * 8 + lane / 4,
                          warp_column() + n * 8 + lane % 4 * 2 + element);
                }
            }
        }
    }

    template <typename OutTile>
    WARPLOOM_DEVICE void store(OutTile& tile) const {
        const int lane = device::lane_index();
        WARPLOOM_UNROLL
        for (int m = 0; m < kRowFragments; ++m) {
            WARPLOOM_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int row = warp_row() + m * 16 + half * 8 + lane / 4;
                WARPLOOM_UNROLL
                for (int n = 0; n < kColumnFragments; ++n) {
                    const float (&sums)[4] = values[m][n];
                    device::store_vector(
                        tile.bytes + tile.offset(row, warp_column() / 8 + n) + lane % 4 * 4,
                        device::pack<T>(sums[half * 2], sums[half * 2 + 1]));
                }
            }
        }
    }
};

}  // namespace warploom
