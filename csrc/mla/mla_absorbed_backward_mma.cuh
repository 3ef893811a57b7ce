// The products of absorbed backward for float16 and bfloat16: tensor cores (mma.sync, from sm_80).
#pragma once

#include "mla/mla_absorbed_backward_scores.cuh"

namespace warploom::mla {

// Four warps multiply the first tensors, four the second ones: each 16 of the owned rows, over
// every other 32 columns of the depth.
struct WarpRole {
    bool second;
    int depth_part;
    int row_fragment;
};

WARPLOOM_DEVICE WarpRole warp_role() {
    const int warp = device::warp_index();
    return {warp / 4 == 1, warp / 2 % 2, warp % 2};
}

// What the warp's role needs of the owned rows: left operands of 16 columns, in pairs.
struct OwnedFragments {
    static constexpr int kPairs = BackwardSizes::kMaxColumns / 64;
    std::uint32_t values[kPairs][2][4];
};

// With g = lane / 4, t = lane % 4: values[i][m][n] covers the rows 16 m + g (elements 0, 1) and
// 16 m + g + 8 (elements 2, 3), and of the warp's i-th group of 16 columns the columns 8 n + 2 t
// and 8 n + 2 t + 1.
struct FragmentSums {
    float values[BackwardSizes::kGroups][2][2][4];
};

// A block owns 32 rows, whose gradient is 32 x 768 sums in registers, 96 a thread; 16 rows pass at
// a time. Owned rows stay in registers as left operands, 96 more a thread: two stages of passing
// rows then fit the 99 KiB that a block may have on sm_86, sm_89 and sm_120.
template <typename T, bool kOwnsQueriesOf>
struct BackwardTraits : BackwardSizes {
    using Element = T;
    static constexpr bool kOwnsQueries = kOwnsQueriesOf;
    static constexpr int kOwnedRows = 32;
    static constexpr int kPassingRows = 16;
    static constexpr int kQueries = kOwnsQueries ? kOwnedRows : kPassingRows;
    static constexpr int kStages = 2;
    static constexpr int kDepthParts = 2;

    using PassingTile =
        std::conditional_t<kOwnsQueries, KeyTile<T, kPassingRows>, QueryTile<T, kPassingRows>>;
    struct OwnedTile {};
    using SharedPlan = BackwardPlan<BackwardTraits>;
    using Owned = OwnedFragments;
    using Sums = FragmentSums;
};

// Two neighbouring elements, the first one at an even column.
template <typename T>
WARPLOOM_DEVICE std::uint32_t load_pair(const T* from, int copy_bytes) {
    if (copy_bytes >= 4) {
        return device::load_vector<std::uint32_t>(from);
    }
    struct Pair {
        T low;
        T high;
    };
    return device::bit_cast<std::uint32_t>(Pair{from[0], from[1]});
}

template <typename Traits>
WARPLOOM_DEVICE void load_owned(OwnedFragments& owned, typename Traits::SharedPlan&,
                                const BackwardTask& task, const BackwardKernelParams& params) {
    using T = typename Traits::Element;
    const WarpRole role = warp_role();
    const SourceRows<T> source = owned_source<Traits>(task, params, role.second);
    const int lane = device::lane_index();
    const int row = task.first_owned + role.row_fragment * 16 + lane / 4;
    const bool exists[2] = {row < source.rows, row + 8 < source.rows};
    const T* rows[2] = {source.row(exists[0] ? row : 0), source.row(exists[1] ? row + 8 : 0)};
    WARPLOOM_UNROLL
    for (int pair = 0; pair < OwnedFragments::kPairs; ++pair) {
        WARPLOOM_UNROLL
        for (int step = 0; step < 2; ++step) {
            const int column = (pair * 2 + role.depth_part) * 32 + step * 16;
            WARPLOOM_UNROLL
            for (int part = 0; part < 4; ++part) {
                owned.values[pair][step][part] =
                    exists[part % 2] && column < source.columns
                        ? load_pair(rows[part % 2] + column + part / 2 * 8 + lane % 4 * 2,
                                    source.copy_bytes)
                        : 0u;
            }
        }
    }
}

// Loads two right operands of 16 columns each, zeros from column `depth` on.
template <typename T>
WARPLOOM_DEVICE void load_depth_pair(std::uint32_t (&operands)[2][4], const T* row, int column,
                                     int depth) {
    WARPLOOM_UNROLL
    for (int step = 0; step < 2; ++step) {
        if (column + step * 16 < depth) {
            device::load_matrix_x4(operands[step], row + column + step * 16);
        } else {
            WARPLOOM_UNROLL
            for (int part = 0; part < 4; ++part) {
                operands[step][part] = 0;
            }
        }
    }
}

// The products of the warp's role with a tile of passing rows, to shared memory.
template <typename Traits>
WARPLOOM_DEVICE void multiply_rows(typename Traits::SharedPlan& shared, const OwnedFragments& owned,
                                   const typename Traits::PassingTile& passing,
                                   const BackwardKernelParams& params) {
    using T = typename Traits::Element;
    const WarpRole role = warp_role();
    const int lane = device::lane_index();
    const int row = lane / 16 * 8 + lane % 8;
    const int depth = params.mla.d_latent + (role.second ? 0 : params.mla.d_rope);
    const T* from = (role.second ? passing.second(row) : passing.first(row)) + lane / 8 % 2 * 8;
    // Two sums of each product, so that half as many steps wait for one before them; the operands
    // of a pair of steps are loaded while the pair before it is multiplied.
    float sums[2][2][4] = {};
    std::uint32_t operands[2][2][4] = {};
    load_depth_pair(operands[0], from, role.depth_part * 32, depth);
    WARPLOOM_UNROLL
    for (int pair = 0; pair < OwnedFragments::kPairs; ++pair) {
        const int column = (pair * 2 + role.depth_part) * 32;
        if (column >= depth) {
            break;
        }
        load_depth_pair(operands[(pair + 1) % 2], from, column + 64, depth);
        WARPLOOM_UNROLL
        for (int step = 0; step < 2; ++step) {
            const std::uint32_t (&operand)[4] = operands[pair % 2][step];
            const std::uint32_t left[2] = {operand[0], operand[1]};
            const std::uint32_t right[2] = {operand[2], operand[3]};
            device::mma_m16n8k16<T>(sums[step][0], owned.values[pair][step], left);
            device::mma_m16n8k16<T>(sums[step][1], owned.values[pair][step], right);
        }
    }
    float* products = shared.products[role.second ? 1 : 0][role.depth_part];
    WARPLOOM_UNROLL
    for (int n = 0; n < 2; ++n) {
        WARPLOOM_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int owned_row = role.row_fragment * 16 + half * 8 + lane / 4;
            store_pair(products + (n * Traits::kOwnedRows + owned_row) * 8 + lane % 4 * 2,
                       sums[0][n][2 * half] + sums[1][n][2 * half],
                       sums[0][n][2 * half + 1] + sums[1][n][2 * half + 1]);
        }
    }
}

// Loads a matrix of owned and passing rows as left operands.
template <typename Traits, typename T>
WARPLOOM_DEVICE void load_weights(std::uint32_t (&weights)[2][4], const T* matrix) {
    const int lane = device::lane_index();
    WARPLOOM_UNROLL
    for (int m = 0; m < 2; ++m) {
        const int place = lane / 16 * Traits::kOwnedRows + m * 16 + lane % 16;
        device::load_matrix_x4(weights[m], matrix + place * 8);
    }
}

// sums += weights passing, for the 16 columns of a right operand.
template <typename T>
WARPLOOM_DEVICE void add_product(float (&sums)[2][2][4], const std::uint32_t (&weights)[2][4],
                                 const std::uint32_t (&passing)[4]) {
    const std::uint32_t left[2] = {passing[0], passing[1]};
    const std::uint32_t right[2] = {passing[2], passing[3]};
    WARPLOOM_UNROLL
    for (int m = 0; m < 2; ++m) {
        device::mma_m16n8k16<T>(sums[m][0], weights[m], left);
        device::mma_m16n8k16<T>(sums[m][1], weights[m], right);
    }
}

// Adds what a tile of passing rows gives to the warp's columns.
template <typename Traits>
WARPLOOM_DEVICE void add_products(FragmentSums& sums, const typename Traits::SharedPlan& shared,
                                  const typename Traits::PassingTile& passing,
                                  const BackwardKernelParams& params) {
    using T = typename Traits::Element;
    const int lane = device::lane_index();
    const int d_latent = params.mla.d_latent;
    const T* first = passing.first(lane % 16) + lane / 16 * 8;
    const T* second = passing.second(lane % 16) + lane / 16 * 8;
    std::uint32_t score_grads[2][4];
    std::uint32_t probabilities[2][4];
    load_weights<Traits>(score_grads, shared.score_grads);
    if constexpr (!Traits::kOwnsQueries) {
        load_weights<Traits>(probabilities, shared.probabilities);
    }
    WARPLOOM_UNROLL
    for (int group = 0; group < Traits::kGroups; ++group) {
        const int column = (group * Traits::kWarps + device::warp_index()) * 16;
        if (column >= d_latent + params.mla.d_rope) {
            break;
        }
        const bool has_value = !Traits::kOwnsQueries && column < d_latent;
        std::uint32_t operands[2][4];
        device::load_matrix_x4_transposed(operands[0], first + column);
        if (has_value) {
            device::load_matrix_x4_transposed(operands[1], second + column);
        }
        add_product<T>(sums.values[group], score_grads, operands[0]);
        if (has_value) {
            add_product<T>(sums.values[group], probabilities, operands[1]);
        }
    }
}

template <typename T>
WARPLOOM_DEVICE void write_sums(const FragmentSums& sums, const GradientRows<T>& destination) {
    const int lane = device::lane_index();
    WARPLOOM_UNROLL
    for (int group = 0; group < BackwardSizes::kGroups; ++group) {
        const int column = (group * BackwardSizes::kWarps + device::warp_index()) * 16;
        if (column >= destination.columns) {
            break;
        }
        WARPLOOM_UNROLL
        for (int part = 0; part < 8; ++part) {
            const int half = part / 2 % 2;
            const int row = part / 4 * 16 + half * 8 + lane / 4;
            if (row < destination.rows) {
                const float (&values)[4] = sums.values[group][part / 4][part % 2];
                store_pair(destination.row(row) + column + part % 2 * 8 + lane % 4 * 2,
                           values[2 * half], values[2 * half + 1]);
            }
        }
    }
}

}  // namespace warploom::mla
