// A product with a low-rank update, forward and to x:
//
//   product   out [rows, columns]          low-rank product         base product
//   output    out [rows, out_features]     shrunk lora_b^T          x weight^T
//   grad_x    grad_x [rows, in_features]   grad_shrunk lora_a       grad weight
//
// Grid: one block a tile of out. Blocks that run together have a patch of kPatchRows row tiles by
// many column tiles, so that both operands are read from the L2 cache.
//
// The low-rank product comes first: its sums are multiplied in registers (by scaling, or by the
// mask over 1 - dropout_p), and the base product goes on adding to them. In the other order a
// second set of sums would be needed. Its steps are the first of one sequence, so that the copies
// for the base product's first steps are under way while the last of the update are being
// multiplied.
#pragma once

#include <cstdint>

#include "common/launch.h"
#include "lora/dropout.cuh"
#include "lora/operands.cuh"
#include "lora/quantized_weight.cuh"

namespace warploom::lora {

// One block makes
//   128 x 128  8 warps of 32 x 64: 64 sums a lane. A tile of a quantised weight is decoded for
//              twice as many rows as in 64 x 128
//   3 stages   of 32 KiB: within the 99 KiB that a block may have everywhere
template <typename T, bool kIsBackward>
struct UpdateTraits : ProductShape<T, false, kIsBackward, 128, 128, 4, 2> {
    using Shape = ProductShape<T, false, kIsBackward, 128, 128, 4, 2>;
    using Sums = ProductSums<Shape>;
    using OutTile = Tile<T, Shape::kRows, Shape::kColumns>;
    static constexpr bool kBackward = kIsBackward;
    static constexpr int kStages = 3;

    struct SharedPlan {
        union {
            typename Shape::Stage stages[kStages];
            OutTile out;  // After the last step.
        };
        Nf4Table nf4;
    };
    static_assert(sizeof(SharedPlan) <= 99 * 1024, "UpdateTraits: the plan exceeds 99 KiB");
};

struct UpdateParams {
    MatrixPlace left;       // [rows, terms]
    MatrixPlace right;      // A dense weight.
    MatrixPlace low_left;   // [rows, rank]
    MatrixPlace low_right;  // lora_b or lora_a
    QuantizedWeight weight;
    Nf4Table nf4;
    void* out;                  // [rows, columns]
    void* unscaled;             // as out, or null
    const float* column_scale;  // [columns] or null
    const void* bias;           // [columns] or null
    Mask mask;                  // of the low-rank product
    float low_scale;            // The low-rank product's factor.
    int rows;
    int columns;
    int terms;
    int rank;
    int row_tiles;
    int column_tiles;
    int out_copy_bytes;
};

struct TilePlace {
    int row;
    int column;
};

template <typename Traits>
WARPLOOM_DEVICE TilePlace tile_of_block(const UpdateParams& params) {
    constexpr int kPatchRows = 8;
    const int block = static_cast<int>(blockIdx.x);
    const int patch_blocks = kPatchRows * params.column_tiles;
    const int patch = block / patch_blocks;
    const int in_patch = block - patch * patch_blocks;
    const int rows_left = params.row_tiles - patch * kPatchRows;
    const int patch_rows = rows_left < kPatchRows ? rows_left : kPatchRows;
    const int column = in_patch / patch_rows;
    return {(patch * kPatchRows + in_patch - column * patch_rows) * Traits::kRows,
            column * Traits::kColumns};
}

template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 1)
updated_product_kernel(WARPLOOM_GRID_CONSTANT UpdateParams params) {
    using T = typename Traits::Element;
    auto& shared = device::shared_memory<typename Traits::SharedPlan>();
    const TilePlace place = tile_of_block<Traits>(params);
    const int rows = params.rows - place.row;
    const int columns = params.columns - place.column;
    const bool quantized = params.weight.format != WeightFormat::dense;
    if (quantized) {
        copy_table(shared.nf4, params.nf4);
        device::sync_threads();
    }
    typename Traits::Sums sums = {};
    const int low_steps = static_cast<int>(ceil_divide(params.rank, Traits::kTerms));
    // A base product without terms has one step of zeros, before which the update is finished.
    const int base_steps = static_cast<int>(ceil_divide(params.terms, Traits::kTerms));
    const int steps = low_steps + (base_steps > 0 ? base_steps : 1);
    // The steps before 0 only start copies, see run_stages.
    for (int step = 1 - Traits::kStages; step < steps; ++step) {
        if (step >= 0) {
            device::copy_async_wait<Traits::kStages - 2>();
            device::sync_threads();
        }
        const int next = step + Traits::kStages - 1;
        const bool is_low = next < low_steps;
        const int first = (is_low ? next : next - low_steps) * Traits::kTerms;
        const bool decodes = quantized && !is_low && next < steps;
        const int weight_row = Traits::kBackward ? first : place.column;
        const int weight_column = Traits::kBackward ? place.column : first;
        auto& stage = shared.stages[next % Traits::kStages];
        QuantizedChunks<typename Traits::RightTile, Traits::kThreads> chunks;
        if (next < steps) {
            const int terms = is_low ? params.rank : params.terms;
            fill_left<Traits>(stage,
                              operand_rows<false, T>(is_low ? params.low_left : params.left,
                                                     place.row, params.rows, terms),
                              first);
            if (decodes) {
                chunks.load(params.weight, weight_row, weight_column);
            } else {
                fill_right<Traits>(stage,
                                   operand_rows<Traits::kRightTransposed, T>(
                                       is_low ? params.low_right : params.right, place.column,
                                       params.columns, terms),
                                   first);
            }
        }
        device::copy_async_commit();
        if (step >= 0) {
            if (step == low_steps) {
                sums.for_each([&](float& value, int, int) { value *= params.low_scale; });
                if constexpr (Traits::kBackward) {
                    if (params.mask.seed != nullptr) {
                        drop_sums(sums, drawing_of(params.mask), place.row, place.column);
                    }
                }
            }
            sums.add(shared.stages[step % Traits::kStages]);
        }
        if (decodes) {
            chunks.store(stage.right, params.weight, shared.nf4, weight_row, weight_column);
        }
    }
    device::sync_threads();

    const std::int64_t offset =
        place.row * static_cast<std::int64_t>(params.columns) + place.column;
    const auto write = [&](void* out) {
        sums.store(shared.out);
        device::sync_threads();
        write_rows<Traits::kThreads>(static_cast<T*>(out) + offset, params.columns, shared.out,
                                     rows, columns, params.out_copy_bytes);
    };
    if (params.column_scale != nullptr) {
        write(params.unscaled);
        device::sync_threads();
        sums.for_each([&](float& value, int, int column) {
            value *= column < columns ? params.column_scale[place.column + column] : 0.0f;
        });
    }
    if (params.bias != nullptr) {
        const T* bias = static_cast<const T*>(params.bias) + place.column;
        sums.for_each([&](float& value, int, int column) {
            value += column < columns ? device::to_float(bias[column]) : 0.0f;
        });
    }
    write(params.out);
}

}  // namespace warploom::lora
