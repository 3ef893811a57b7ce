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

#include "common/launch.h"
#include "common/product.cuh"

namespace warploom::grouped_linear {

enum class Product { output, grad_x, grad_weight };

// One block makes
//   64 rows     a group of a few rows wastes little of the tile, and reading the weights bounds
//               such a group: 64 operations a byte of 16-bit weights, half of what an sm_80 can do
//   128 columns 4 warps of 32 x 64: 64 sums a lane
//   3 stages    of 24 KiB: two blocks on an sm_80, one where a block may have 99 KiB
template <typename T, Product kProduct>
using GroupedShape =
    ProductShape<T, kProduct == Product::grad_weight, kProduct != Product::output, 64, 128, 2, 2>;

template <typename T, Product kProduct>
struct ProductTraits : GroupedShape<T, kProduct> {
    using Shape = GroupedShape<T, kProduct>;
    using Sums = ProductSums<Shape>;
    using OutTile = Tile<T, Shape::kRows, Shape::kColumns>;
    static constexpr int kStages = 3;

    struct SharedPlan {
        union {
            typename Shape::Stage stages[kStages];
            OutTile out;  // After the last step.
        };
        int group;
    };
    static_assert(sizeof(SharedPlan) <= 99 * 1024, "ProductTraits: the plan exceeds 99 KiB");
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
    run_stages<Traits::kStages>(
        static_cast<int>(ceil_divide(task.terms, Traits::kTerms)),
        [&](int step) {
            auto& stage = shared.stages[step % Traits::kStages];
            fill_left<Traits>(stage, task.left, step * Traits::kTerms);
            fill_right<Traits>(stage, task.right, step * Traits::kTerms);
        },
        [&](int step) { sums.add(shared.stages[step % Traits::kStages]); });
    sums.store(shared.out);
    device::sync_threads();
    write_rows<Traits::kThreads>(task.out, params.out_columns, shared.out, task.rows, task.columns,
                                 params.out_copy_bytes);
}

}  // namespace warploom::grouped_linear
