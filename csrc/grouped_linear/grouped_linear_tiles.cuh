// Tiles of the products and their stages in shared memory.
#pragma once

#include "common/tile.cuh"
#include "device/device.cuh"

namespace warploom::grouped_linear {

enum class Product { output, grad_x, grad_weight };

// One block makes kRows x kColumns of out from kTerms terms at a time.
//   64 rows     a group of a few rows wastes little of the tile, and reading the weights bounds
//               such a group: 64 operations a byte of 16-bit weights, half of what an sm_80 can do
//   128 columns 4 warps of 32 x 64: 64 sums a lane
//   128 bytes   of terms, the least that a tile's permutation takes; a stage has 24 KiB
//   3 stages    72 KiB: two blocks on an sm_80, one where a block may have 99 KiB
// An operand is transposed where its terms are rows in memory.
template <typename T, Product kProduct>
struct ProductShape {
    using Element = T;
    static constexpr bool kLeftTransposed = kProduct == Product::grad_weight;
    static constexpr bool kRightTransposed = kProduct != Product::output;
    static constexpr int kThreads = 128;
    static constexpr int kRows = 64;
    static constexpr int kColumns = 128;
    static constexpr int kTerms = 128 / static_cast<int>(sizeof(T));
    static constexpr int kStages = 3;

    using LeftTile = Tile<T, kLeftTransposed ? kTerms : kRows, kLeftTransposed ? kRows : kTerms>;
    using RightTile =
        Tile<T, kRightTransposed ? kTerms : kColumns, kRightTransposed ? kColumns : kTerms>;
    using OutTile = Tile<T, kRows, kColumns>;

    struct Stage {
        LeftTile left;
        RightTile right;
    };
    struct SharedPlan {
        union {
            Stage stages[kStages];
            OutTile out;  // After the last step.
        };
        int group;
    };
    static_assert(sizeof(SharedPlan) <= 99 * 1024, "ProductShape: the plan exceeds 99 KiB");
};

}  // namespace warploom::grouped_linear
