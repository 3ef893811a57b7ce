// Products of tiles, out += left right: the tiles of one step, and how they are filled.
#pragma once

#include <cstdint>

#include "common/tile.cuh"

namespace warploom {

// One block makes kRows x kColumns of out from kTerms terms at a time: 128 bytes of them, the least
// that a tile's permutation takes. An operand is transposed where its terms are rows in memory; it
// lies in its tile as it does in memory. kRowWarps x kColumnWarps warps share out (float32: as many
// threads).
template <typename T, bool kIsLeftTransposed, bool kIsRightTransposed, int kTileRows,
          int kTileColumns, int kWarpsDown, int kWarpsAcross>
struct ProductShape {
    using Element = T;
    static constexpr bool kLeftTransposed = kIsLeftTransposed;
    static constexpr bool kRightTransposed = kIsRightTransposed;
    static constexpr int kRows = kTileRows;
    static constexpr int kColumns = kTileColumns;
    static constexpr int kRowWarps = kWarpsDown;
    static constexpr int kColumnWarps = kWarpsAcross;
    static constexpr int kThreads = kRowWarps * kColumnWarps * device::kWarpSize;
    static constexpr int kTerms = 128 / static_cast<int>(sizeof(T));

    using LeftTile = Tile<T, kLeftTransposed ? kTerms : kRows, kLeftTransposed ? kRows : kTerms>;
    using RightTile =
        Tile<T, kRightTransposed ? kTerms : kColumns, kRightTransposed ? kColumns : kTerms>;

    struct Stage {
        LeftTile left;
        RightTile right;
    };
};

// The same rows from term `first` on, where terms are rows or columns in memory.
template <bool kTransposed, typename T>
WARPLOOM_DEVICE MatrixRows<T> from_term(MatrixRows<T> source, int first) {
    if constexpr (kTransposed) {
        source.first += first * source.stride;
        source.rows -= first;
    } else {
        source.first += first;
        source.columns -= first;
    }
    return source;
}

// Starts filling a tile of either operand with the kTerms terms from `first` on.
template <typename Shape, typename T>
WARPLOOM_DEVICE void fill_left(typename Shape::Stage& stage, const MatrixRows<T>& left, int first) {
    fill_rows<Shape::LeftTile::kRows, Shape::kThreads>(
        stage.left, 0, from_term<Shape::kLeftTransposed>(left, first));
}
template <typename Shape, typename T>
WARPLOOM_DEVICE void fill_right(typename Shape::Stage& stage, const MatrixRows<T>& right,
                                int first) {
    fill_rows<Shape::RightTile::kRows, Shape::kThreads>(
        stage.right, 0, from_term<Shape::kRightTransposed>(right, first));
}

// Calls use(step) for steps 0 to steps - 1, each after what fill(step) started to copy has come,
// and fill(step) kStages - 1 steps before it. On return no thread reads a stage any more.
template <int kStages, typename Fill, typename Use>
WARPLOOM_DEVICE void run_stages(int steps, const Fill& fill, const Use& use) {
    // The steps before 0 only start copies.
    for (int step = 1 - kStages; step < steps; ++step) {
        if (step >= 0) {
            // After the barrier all see this step's stage, and none reads the one before any more.
            device::copy_async_wait<kStages - 2>();
            device::sync_threads();
        }
        const int next = step + kStages - 1;
        if (next < steps) {
            fill(next);
        }
        device::copy_async_commit();
        if (step >= 0) {
            use(step);
        }
    }
    // No copy is under way: the groups behind the last step's are empty.
    device::sync_threads();
}

// Writes the rows and columns of a tile that exist to `out`, whose rows lie `stride` apart.
template <int kThreads, typename Tile, typename T>
WARPLOOM_DEVICE void write_rows(T* out, std::int64_t stride, const Tile& tile, int rows,
                                int columns, int copy_bytes) {
    for (int unit = static_cast<int>(threadIdx.x); unit < Tile::kRows * Tile::kRowChunks;
         unit += kThreads) {
        const int row = unit / Tile::kRowChunks;
        const int chunk = unit % Tile::kRowChunks;
        const int column = chunk * Chunk<T>::kSize;
        if (row < rows) {
            write_chunk(out + row * stride + column, tile.load(row, chunk), columns - column,
                        copy_bytes);
        }
    }
}

}  // namespace warploom
