// Products of tiles for float32 in float32: fused multiply-adds of the ordinary cores. Tensor cores
// would round the operands to TF32.
#pragma once

#include "common/product_shape.cuh"

namespace warploom {

// What a thread has of one operand: kCount of its rows (of right: columns), interleaved with those
// of kLanes - 1 other threads so that threads side by side read different banks; chunks of 4 of
// them where rows lie side by side in memory.
template <bool kTransposed, int kThreadRows, int kLanes>
struct ThreadRows {
    static constexpr int kCount = kThreadRows;
    static constexpr int kChunk = Chunk<float>::kSize;

    int lane;

    WARPLOOM_DEVICE int row(int index) const {
        return kTransposed ? (index / kChunk * kLanes + lane) * kChunk + index % kChunk
                           : index * kLanes + lane;
    }

    // values[i][e] = term kChunk chunk + e of row(i).
    template <typename Tile>
    WARPLOOM_DEVICE void load(float (&values)[kCount][kChunk], const Tile& tile, int chunk) const {
        WARPLOOM_UNROLL
        for (int index = 0; index < kCount; ++index) {
            const int part = index / kChunk;  // Transposed: of the rows; else 4 rows a part.
            const int element = index % kChunk;
            const Chunk<float> loaded =
                kTransposed ? tile.load(chunk * kChunk + element, part * kLanes + lane)
                            : tile.load(row(index), chunk);
            WARPLOOM_UNROLL
            for (int other = 0; other < kChunk; ++other) {
                if constexpr (kTransposed) {
                    values[part * kChunk + other][element] = loaded.elements[other];
                } else {
                    values[index][other] = loaded.elements[other];
                }
            }
        }
    }
};

template <typename Shape>
struct FmaSums {
    // A thread has as many rows as columns: 8, or 4 of a small tile.
    static constexpr int kCount = Shape::kRows * Shape::kColumns == 64 * Shape::kThreads ? 8 : 4;
    static constexpr int kColumnLanes = Shape::kColumns / kCount;
    static constexpr int kRowLanes = Shape::kRows / kCount;
    using Rows = ThreadRows<Shape::kLeftTransposed, kCount, kRowLanes>;
    using Columns = ThreadRows<Shape::kRightTransposed, kCount, kColumnLanes>;
    static_assert(kRowLanes * kColumnLanes == Shape::kThreads,
                  "FmaSums: the threads must cover the tile");

    float values[Rows::kCount][Columns::kCount];

    static WARPLOOM_DEVICE Rows rows() { return {static_cast<int>(threadIdx.x) / kColumnLanes}; }
    static WARPLOOM_DEVICE Columns columns() {
        return {static_cast<int>(threadIdx.x) % kColumnLanes};
    }

    // Sums of sums lose less to rounding than one long sum. Those of columns from `columns` on may
    // be left out, but are not.
    WARPLOOM_DEVICE void add(const typename Shape::Stage& stage,
                             int /*columns*/ = Shape::kColumns) {
        constexpr int kChunk = Chunk<float>::kSize;
        float sums[Rows::kCount][Columns::kCount] = {};
        WARPLOOM_NO_UNROLL
        for (int chunk = 0; chunk < Shape::kTerms / kChunk; ++chunk) {
            float left[Rows::kCount][kChunk];
            float right[Columns::kCount][kChunk];
            rows().load(left, stage.left, chunk);
            columns().load(right, stage.right, chunk);
            WARPLOOM_UNROLL
            for (int term = 0; term < kChunk; ++term) {
                WARPLOOM_UNROLL
                for (int i = 0; i < Rows::kCount; ++i) {
                    WARPLOOM_UNROLL
                    for (int j = 0; j < Columns::kCount; ++j) {
                        sums[i][j] = fmaf(left[i][term], right[j][term], sums[i][j]);
                    }
                }
            }
        }
        WARPLOOM_UNROLL
        for (int i = 0; i < Rows::kCount; ++i) {
            WARPLOOM_UNROLL
            for (int j = 0; j < Columns::kCount; ++j) {
                values[i][j] += sums[i][j];
            }
        }
    }

    // Calls visit(value, row, column) for each of this thread's sums, columns one after the other.
    template <typename Visit>
    WARPLOOM_DEVICE void for_each(const Visit& visit) {
        WARPLOOM_UNROLL
        for (int j = 0; j < Columns::kCount; ++j) {
            WARPLOOM_UNROLL
            for (int i = 0; i < Rows::kCount; ++i) {
                visit(values[i][j], rows().row(i), columns().row(j));
            }
        }
    }

    template <typename OutTile>
    WARPLOOM_DEVICE void store(OutTile& tile) const {
        constexpr int kChunk = Chunk<float>::kSize;
        WARPLOOM_UNROLL
        for (int i = 0; i < Rows::kCount; ++i) {
            WARPLOOM_UNROLL
            for (int j = 0; j < Columns::kCount; ++j) {
                const int column = columns().row(j);
                device::store_vector(tile.bytes + tile.offset(rows().row(i), column / kChunk) +
                                         column % kChunk * static_cast<int>(sizeof(float)),
                                     values[i][j]);
            }
        }
    }
};

}  // namespace warploom
