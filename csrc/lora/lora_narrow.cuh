// The products that have the adapter's rank as one of their sizes:
//
//   product       out                                left            right      dropout of
//   shrink        shrunk [rows, rank]                x               lora_a^T   x
//   grad_shrunk   grad_shrunk [rows, rank]           grad            lora_b     nothing
//   adapter_grad  grad_a^T, grad_b [columns, rank]   wide^T          narrow     wide
//
// Grid: one block 64 rows of out by 64 columns (float32: 32) of the rank, those of one row of tiles
// side by side. What bounds them is reading the left operand: a rank up to 64 reads it once, and
// 64 rows make blocks enough for a large GPU. A block sums over all terms, in order.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/launch.h"
#include "lora/dropout.cuh"
#include "lora/operands.cuh"

namespace warploom::lora {

enum class NarrowProduct { shrink, grad_shrunk, adapter_grad };

// 4 warps of 16 rows and all columns: those that a small rank has not cost no warp its work.
// 5 stages of 16 KiB: two blocks on an sm_80, and 32 KiB of the left operand under way in each.
template <typename T, NarrowProduct kProduct>
using NarrowShape =
    ProductShape<T, kProduct == NarrowProduct::adapter_grad, kProduct != NarrowProduct::shrink, 64,
                 std::is_same_v<T, float> ? 32 : 64, 4, 1>;

template <typename T, NarrowProduct kNarrowProduct>
struct NarrowTraits : NarrowShape<T, kNarrowProduct> {
    using Shape = NarrowShape<T, kNarrowProduct>;
    using Sums = ProductSums<Shape>;
    using Out = std::conditional_t<kNarrowProduct == NarrowProduct::adapter_grad, float, T>;
    static constexpr NarrowProduct kProduct = kNarrowProduct;
    static constexpr int kStages = 5;

    struct SharedPlan {
        typename Shape::Stage stages[kStages];
    };
};

struct NarrowParams {
    MatrixPlace left;
    MatrixPlace right;
    void* out;
    std::int64_t out_row_stride;
    std::int64_t out_column_stride;
    Mask mask;  // of left
    float scale;
    int rows;     // of out
    int columns;  // The rank.
    int terms;
    int column_tiles;
};

template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 2)
narrow_product_kernel(WARPLOOM_GRID_CONSTANT NarrowParams params) {
    using T = typename Traits::Element;
    using Out = typename Traits::Out;
    auto& shared = device::shared_memory<typename Traits::SharedPlan>();
    const int row_tile = static_cast<int>(blockIdx.x) / params.column_tiles;
    const int first_row = row_tile * Traits::kRows;
    const int first_column =
        (static_cast<int>(blockIdx.x) - row_tile * params.column_tiles) * Traits::kColumns;
    const int rows = params.rows - first_row;
    const int columns = params.columns - first_column;
    const auto left =
        operand_rows<Traits::kLeftTransposed, T>(params.left, first_row, params.rows, params.terms);
    const auto right = operand_rows<Traits::kRightTransposed, T>(params.right, first_column,
                                                                 params.columns, params.terms);
    typename Traits::Sums sums = {};
    run_stages<Traits::kStages>(
        static_cast<int>(ceil_divide(params.terms, Traits::kTerms)),
        [&](int step) {
            auto& stage = shared.stages[step % Traits::kStages];
            fill_left<Traits>(stage, left, step * Traits::kTerms);
            fill_right<Traits>(stage, right, step * Traits::kTerms);
        },
        [&](int step) {
            auto& stage = shared.stages[step % Traits::kStages];
            if constexpr (Traits::kProduct != NarrowProduct::grad_shrunk) {
                if (params.mask.seed != nullptr) {
                    // Where the tile lies in memory.
                    const int term = step * Traits::kTerms;
                    drop_tile<Traits::kThreads>(stage.left, drawing_of(params.mask),
                                                Traits::kLeftTransposed ? term : first_row,
                                                Traits::kLeftTransposed ? first_row : term);
                    device::sync_threads();
                }
            }
            sums.add(stage, columns);
        });
    Out* out = static_cast<Out*>(params.out) + first_row * params.out_row_stride +
               first_column * params.out_column_stride;
    sums.for_each([&](float value, int row, int column) {
        if (row < rows && column < columns) {
            out[row * params.out_row_stride + column * params.out_column_stride] =
                device::from_float<Out>(value * params.scale);
        }
    });
}

}  // namespace warploom::lora
