// A linear map per group of rows and its two gradients: three products of tiles, one kernel.
//
//   product      out [rows, columns]                  left [rows, terms]    right [terms, columns]
//   output       out [rows, out_features]             x                     weight[g]^T
//   grad_x       grad_x [rows, in_features]           grad_out              weight[g]
//   grad_weight  grad_weight[g] [out_f., in_features] grad_out^T            x, of the group's rows
//
// Grid: one block a tile of out, the tiles of one row of tiles side by side, so that blocks that
// run together read the same rows, and those of one group the same weights, from the L2 cache.
// grad_weight has its tiles group after group. Of output and grad_x the number of row tiles is
// known on the device alone: the grid has the most there can be, and the others leave.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/launch.h"
#include "grouped_linear/grouped_linear_fma.cuh"
#include "grouped_linear/grouped_linear_mma.cuh"

namespace warploom::grouped_linear {

template <typename T, Product kProduct>
struct ProductTraits : ProductShape<T, kProduct> {
    using Shape = ProductShape<T, kProduct>;
    using Sums = std::conditional_t<std::is_same_v<T, float>, FmaSums<Shape>, MmaSums<Shape>>;
};

struct ProductParams {
    const void* left;
    const void* right;
    void* out;
    const std::int32_t* group_offsets;  // [groups + 1]
    std::int64_t left_stride;           // Between rows in memory, which grad_weight sums over.
    std::int64_t right_stride;
    int rows;  // Of all groups, and behind them.
    int groups;
    int terms;        // output, grad_x: of a sum.
    int out_rows;     // grad_weight: of one group.
    int out_columns;  // Rows of out lie that far apart.
    int out_row_tiles;
    int out_column_tiles;
    // A copy moves units of this many bytes: see copy_unit.
    int left_copy_bytes;
    int right_copy_bytes;
    int out_copy_bytes;
};

// What one block computes.
template <typename T>
struct BlockTask {
    MatrixRows<T> left;
    MatrixRows<T> right;
    T* out;
    int terms;
    int rows;  // Of the tile, those that exist; 0 or less: the block has nothing to do.
    int columns;
};

// Row tiles are numbered without a scan over the groups: group g has those from
// offsets[g] / kRows + g up to the next group's first. They are enough, since
//   ceil((end - begin) / kRows) <= end / kRows - begin / kRows + 1,
// and a tile too many has no rows. The rows behind the last offset are a group of their own, whose
// sums have no terms.
template <typename Traits>
WARPLOOM_DEVICE int first_row_tile(const ProductParams& params, int group) {
    return params.group_offsets[group] / Traits::kRows + group;
}

template <typename Traits>
WARPLOOM_DEVICE int group_of_row_tile(const ProductParams& params, int tile, int& shared_group) {
    for (int group = static_cast<int>(threadIdx.x); group <= params.groups;
         group += Traits::kThreads) {
        if (first_row_tile<Traits>(params, group) <= tile &&
            (group == params.groups || tile < first_row_tile<Traits>(params, group + 1))) {
            shared_group = group;
        }
    }
    device::sync_threads();
    return shared_group;
}

// A tile of output or grad_x.
template <typename Traits>
WARPLOOM_DEVICE BlockTask<typename Traits::Element> row_task(const ProductParams& params,
                                                             typename Traits::SharedPlan& shared) {
    using T = typename Traits::Element;
    const int block = static_cast<int>(blockIdx.x);
    const int tile = block / params.out_column_tiles;
    const int column = (block - tile * params.out_column_tiles) * Traits::kColumns;
    const int group = group_of_row_tile<Traits>(params, tile, shared.group);
    const bool is_behind = group == params.groups;
    const int end = is_behind ? params.rows : params.group_offsets[group + 1];
    const int row = params.group_offsets[group] +
                    (tile - first_row_tile<Traits>(params, group)) * Traits::kRows;
    const T* weight = static_cast<const T*>(params.right) +
                      static_cast<std::int64_t>(group) * params.terms * params.out_columns;
    BlockTask<T> task;
    task.rows = end - row;
    task.columns = params.out_columns - column;
    task.terms = is_behind ? 0 : params.terms;
    task.out =
        static_cast<T*>(params.out) + row * static_cast<std::int64_t>(params.out_columns) + column;
    task.left = {static_cast<const T*>(params.left) + row * params.left_stride, params.left_stride,
                 task.rows, params.terms, params.left_copy_bytes};
    if constexpr (Traits::kRightTransposed) {
        task.right = {weight + column, params.right_stride, params.terms, task.columns,
                      params.right_copy_bytes};
    } else {
        task.right = {weight + column * params.right_stride, params.right_stride, task.columns,
                      params.terms, params.right_copy_bytes};
    }
    return task;
}

// A tile of grad_weight.
template <typename Traits>
WARPLOOM_DEVICE BlockTask<typename Traits::Element> weight_task(const ProductParams& params) {
    using T = typename Traits::Element;
    const int block = static_cast<int>(blockIdx.x);
    const int row_tile = block / params.out_column_tiles;
    const int column = (block - row_tile * params.out_column_tiles) * Traits::kColumns;
    const int group = row_tile / params.out_row_tiles;
    const int row = (row_tile - group * params.out_row_tiles) * Traits::kRows;
    const int first = params.group_offsets[group];
    BlockTask<T> task;
    task.rows = params.out_rows - row;
    task.columns = params.out_columns - column;
    task.terms = params.group_offsets[group + 1] - first;
    task.out = static_cast<T*>(params.out) +
               (static_cast<std::int64_t>(group) * params.out_rows + row) * params.out_columns +
               column;
    task.left = {static_cast<const T*>(params.left) + first * params.left_stride + row,
                 params.left_stride, task.terms, task.rows, params.left_copy_bytes};
    task.right = {static_cast<const T*>(params.right) + first * params.right_stride + column,
                  params.right_stride, task.terms, task.columns, params.right_copy_bytes};
    return task;
}

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

template <typename Traits, typename T>
WARPLOOM_DEVICE void fill_stage(typename Traits::Stage& stage, const BlockTask<T>& task,
                                int first) {
    fill_rows<Traits::LeftTile::kRows, Traits::kThreads>(
        stage.left, 0, from_term<Traits::kLeftTransposed>(task.left, first));
    fill_rows<Traits::RightTile::kRows, Traits::kThreads>(
        stage.right, 0, from_term<Traits::kRightTransposed>(task.right, first));
}

template <typename Traits, typename T>
WARPLOOM_DEVICE void write_out(const typename Traits::OutTile& tile, const BlockTask<T>& task,
                               const ProductParams& params) {
    constexpr int kRowChunks = Traits::OutTile::kRowChunks;
    for (int unit = static_cast<int>(threadIdx.x); unit < Traits::kRows * kRowChunks;
         unit += Traits::kThreads) {
        const int row = unit / kRowChunks;
        const int chunk = unit % kRowChunks;
        const int column = chunk * Chunk<T>::kSize;
        if (row < task.rows) {
            write_chunk(task.out + row * static_cast<std::int64_t>(params.out_columns) + column,
                        tile.load(row, chunk), task.columns - column, params.out_copy_bytes);
        }
    }
}

template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 2)
grouped_product_kernel(WARPLOOM_GRID_CONSTANT ProductParams params) {
    using T = typename Traits::Element;
    auto& shared = device::shared_memory<typename Traits::SharedPlan>();
    BlockTask<T> task;
    if constexpr (Traits::kLeftTransposed) {
        task = weight_task<Traits>(params);
    } else {
        task = row_task<Traits>(params, shared);
    }
    if (task.rows <= 0) {
        return;
    }
    typename Traits::Sums sums = {};
    const int steps = static_cast<int>(ceil_divide(task.terms, Traits::kTerms));
    // The steps before 0 only start copies.
    for (int step = 1 - Traits::kStages; step < steps; ++step) {
        if (step >= 0) {
            // After the barrier all see this step's stage, and none reads the one before any more.
            device::copy_async_wait<Traits::kStages - 2>();
            device::sync_threads();
        }
        const int next = step + Traits::kStages - 1;
        if (next < steps) {
            fill_stage<Traits>(shared.stages[next % Traits::kStages], task, next * Traits::kTerms);
        }
        device::copy_async_commit();
        if (step >= 0) {
            sums.add(shared.stages[step % Traits::kStages]);
        }
    }
    // No copy is under way: the groups behind the last step's are empty.
    device::sync_threads();
    sums.store(shared.out);
    device::sync_threads();
    write_out<Traits>(shared.out, task, params);
}

}  // namespace warploom::grouped_linear
