// The products of absorbed backward for float32, in float32: fused multiply-adds of the ordinary
// cores. Tensor cores would round the operands to TF32.
#pragma once

#include "mla/mla_absorbed_backward_scores.cuh"

namespace warploom::mla {

// The owned rows lie in shared memory.
struct OwnedInShared {};

// Row i of a lane is row 8 i + lane / 4 of the owned ones; of the warp's g-th group of 16 columns
// it has the chunk lane % 4 of 4.
template <int kLaneRows>
struct ThreadSums {
    Chunk<float> values[BackwardSizes::kGroups][kLaneRows];
};

// 8 queries meet 16 keys at a time, whichever the block owns: of 512 + 256 columns their rows take
// 88 of the 99 KiB that a block may have on sm_86, sm_89 and sm_120.
template <bool kOwnsQueriesOf>
struct BackwardFloat32Traits : BackwardSizes {
    using Element = float;
    static constexpr bool kOwnsQueries = kOwnsQueriesOf;
    static constexpr int kQueries = 8;
    static constexpr int kKeys = 16;
    static constexpr int kOwnedRows = kOwnsQueries ? kQueries : kKeys;
    static constexpr int kPassingRows = kOwnsQueries ? kKeys : kQueries;
    static constexpr int kStages = 1;
    static constexpr int kDepthParts = 1;

    using Queries = QueryTile<float, kQueries>;
    using Keys = KeyTile<float, kKeys>;
    using OwnedTile = std::conditional_t<kOwnsQueries, Queries, Keys>;
    using PassingTile = std::conditional_t<kOwnsQueries, Keys, Queries>;
    using SharedPlan = BackwardPlan<BackwardFloat32Traits>;
    using Owned = OwnedInShared;
    using Sums = ThreadSums<kOwnedRows / 8>;
};

template <typename Traits>
WARPLOOM_DEVICE void load_owned(OwnedInShared&, typename Traits::SharedPlan& shared,
                                const BackwardTask& task, const BackwardKernelParams& params) {
    fill_tile(shared.owned, task, params, task.first_owned);
}

// The sum of 2 kWidth numbers, as warp_reduce_sum adds those of lanes.
template <int kWidth>
WARPLOOM_DEVICE float tree_sum(float (&values)[device::kWarpSize]) {
    WARPLOOM_UNROLL
    for (int index = 0; index < kWidth; ++index) {
        values[index] += values[index + kWidth];
    }
    if constexpr (kWidth > 1) {
        return tree_sum<kWidth / 2>(values);
    }
    return values[0];
}

// The products of the owned rows with a tile of passing rows, one a thread: the first half of the
// threads has those of the first tensors. The order of sums is that of the kernel of delta, column
// c with the columns c mod 32 and these in a tree. So where one key has all of a query's
// probability, and out is its latent, product and delta agree to the bit: their difference is 0.
template <typename Traits>
WARPLOOM_DEVICE void multiply_rows(typename Traits::SharedPlan& shared, const OwnedInShared&,
                                   const typename Traits::PassingTile& passing,
                                   const BackwardKernelParams& params) {
    constexpr int kElements = Traits::SharedPlan::kElements;
    static_assert(2 * kElements == Traits::kThreads, "multiply_rows: one product a thread");
    const int thread = static_cast<int>(threadIdx.x);
    const bool second = thread >= kElements;
    const int index = thread % kElements;
    const int owned_row = index / 8 % Traits::kOwnedRows;
    const int passing_row = index / (8 * Traits::kOwnedRows) * 8 + index % 8;
    const float* owned = second ? shared.owned.second(owned_row) : shared.owned.first(owned_row);
    const float* other = second ? passing.second(passing_row) : passing.first(passing_row);
    const int depth = params.mla.d_latent + (second ? 0 : params.mla.d_rope);
    float sums[device::kWarpSize] = {};
    WARPLOOM_NO_UNROLL
    for (int first = 0; first < depth; first += device::kWarpSize) {
        WARPLOOM_UNROLL
        for (int half = 0; half < device::kWarpSize; half += 16) {
            if (first + half >= depth) {
                break;
            }
            WARPLOOM_UNROLL
            for (int column = half; column < half + 16; column += Chunk<float>::kSize) {
                const auto left = device::load_vector<Chunk<float>>(owned + first + column);
                const auto right = device::load_vector<Chunk<float>>(other + first + column);
                WARPLOOM_UNROLL
                for (int element = 0; element < Chunk<float>::kSize; ++element) {
                    float& sum = sums[column + element];
                    sum = fmaf(left.elements[element], right.elements[element], sum);
                }
            }
        }
    }
    shared.products[second ? 1 : 0][0][index] = tree_sum<device::kWarpSize / 2>(sums);
}

// sums += weights passing for a lane's chunk, whose place in passing row 0 is `passing`.
template <typename Traits, int kStride, int kLaneRows>
WARPLOOM_DEVICE void add_product(Chunk<float> (&sums)[kLaneRows], const float* weights,
                                 const float* passing) {
    Chunk<float> part[kLaneRows] = {};
    WARPLOOM_NO_UNROLL
    for (int row = 0; row < Traits::kPassingRows; row += Chunk<float>::kSize) {
        Chunk<float> factors[kLaneRows];
        WARPLOOM_UNROLL
        for (int i = 0; i < kLaneRows; ++i) {
            const int owned_row = row / 8 * Traits::kOwnedRows + i * 8 + device::lane_index() / 4;
            factors[i] = device::load_vector<Chunk<float>>(weights + owned_row * 8 + row % 8);
        }
        WARPLOOM_UNROLL
        for (int j = 0; j < Chunk<float>::kSize; ++j) {
            const auto chunk = device::load_vector<Chunk<float>>(passing + (row + j) * kStride);
            WARPLOOM_UNROLL
            for (int i = 0; i < kLaneRows; ++i) {
                WARPLOOM_UNROLL
                for (int element = 0; element < Chunk<float>::kSize; ++element) {
                    float& sum = part[i].elements[element];
                    sum = fmaf(factors[i].elements[j], chunk.elements[element], sum);
                }
            }
        }
    }
    WARPLOOM_UNROLL
    for (int i = 0; i < kLaneRows; ++i) {
        add(sums[i], part[i]);
    }
}

// Adds what a tile of passing rows gives to the warp's columns.
template <typename Traits, int kLaneRows>
WARPLOOM_DEVICE void add_products(ThreadSums<kLaneRows>& sums,
                                  const typename Traits::SharedPlan& shared,
                                  const typename Traits::PassingTile& passing,
                                  const BackwardKernelParams& params) {
    using Passing = typename Traits::PassingTile;
    const int d_latent = params.mla.d_latent;
    WARPLOOM_UNROLL
    for (int group = 0; group < Traits::kGroups; ++group) {
        const int column = (group * Traits::kWarps + device::warp_index()) * 16;
        if (column >= d_latent + params.mla.d_rope) {
            break;
        }
        const int place = column + device::lane_index() % 4 * Chunk<float>::kSize;
        add_product<Traits, Passing::First::kStride>(sums.values[group], shared.score_grads,
                                                     passing.first(0) + place);
        if constexpr (!Traits::kOwnsQueries) {
            if (column < d_latent) {
                add_product<Traits, Passing::Second::kStride>(
                    sums.values[group], shared.probabilities, passing.second(0) + place);
            }
        }
    }
}

template <int kLaneRows>
WARPLOOM_DEVICE void write_sums(const ThreadSums<kLaneRows>& sums,
                                const GradientRows<float>& destination) {
    const int lane = device::lane_index();
    WARPLOOM_UNROLL
    for (int group = 0; group < BackwardSizes::kGroups; ++group) {
        const int column = (group * BackwardSizes::kWarps + device::warp_index()) * 16;
        if (column >= destination.columns) {
            break;
        }
        WARPLOOM_UNROLL
        for (int i = 0; i < kLaneRows; ++i) {
            const int row = i * 8 + lane / 4;
            if (row < destination.rows) {
                device::store_vector(destination.row(row) + column + lane % 4 * Chunk<float>::kSize,
                                     sums.values[group][i]);
            }
        }
    }
}

}  // namespace warploom::mla
