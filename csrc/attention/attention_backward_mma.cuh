// The products of attention backward for float16 and bfloat16: tensor cores
// (mma.sync, from sm_80).
#pragma once

#include "attention/attention_backward_scores.cuh"

namespace warploom::attention {

// What one lane holds of its warp's rows. With g = lane / 4, t = lane % 4,
// fragment [m][n] covers the rows 16 m + g (elements 0, 1) and 16 m + g + 8
// (elements 2, 3) and the columns 8 n + 2 t and 8 n + 2 t + 1.
template <int kRowFragments, int kColumnFragments>
struct WarpFragments {
    float values[kRowFragments][kColumnFragments][4];

    WARPLOOM_DEVICE float& at(int index) {
        return values[index / (kColumnFragments * 4)][index / 4 % kColumnFragments][index % 4];
    }
    WARPLOOM_DEVICE float at(int index) const {
        return values[index / (kColumnFragments * 4)][index / 4 % kColumnFragments][index % 4];
    }
};

// Tile sizes for head_dim up to kHeadColumns and value_dim up to kValueColumns;
// smaller ones are filled up with zeros. Each plan fits the 99 KiB that a block
// may have on sm_86, sm_89 and sm_120.
//   columns   owned x passing  rows a warp  shared memory  why
//   64, 64    128 x 32         32           48 KiB         each passing
//   fragment feeds two products;
//                                                          16 with features,
//                                                          for the registers
//   128, 128  128 x 32         16           96 KiB         two sums of 32 need
//   256 accumulators 192, 128  64 x 32          16           80 KiB         128
//   rows would take 120 KiB 256, 256  64 x 16          16           96 KiB 128
//   rows would take 160 KiB
template <typename T, Gradient kGradientOf, int kColumnsOfHead, int kColumnsOfValue,
          bool kHasFeatures>
struct BackwardTraits {
    using Element = T;
    static constexpr int kHeadColumns = kColumnsOfHead;
    static constexpr int kValueColumns = kColumnsOfValue;
    static constexpr bool kFeatures = kHasFeatures;
    static constexpr bool kOwnsQueries = kGradientOf == Gradient::query;
    static constexpr bool kSumsFirst = kGradientOf != Gradient::value;  // grad_q or grad_k.
    static constexpr bool kSumsValue =
        kGradientOf == Gradient::value || kGradientOf == Gradient::key_and_value;

    static constexpr int kWarpRows = kHeadColumns == 64 && !kFeatures ? 32 : 16;
    static constexpr int kOwnedRows = kHeadColumns <= 128 ? 128 : 64;
    static constexpr int kWarps = kOwnedRows / kWarpRows;
    static constexpr int kThreads = kWarps * device::kWarpSize;
    static constexpr int kPassingRows = kHeadColumns == 256 ? 16 : 32;
    static constexpr int kStages = 2;
    // Of the passing rows, those that meet the owned ones at a time: 16 where
    // registers are few.
    static constexpr int kScoreRows = kHeadColumns == 128 && !kFeatures ? kPassingRows : 16;

    static constexpr int kRowFragments = kWarpRows / 16;    // mma_m16n8k16: 16 rows,
    static constexpr int kScoreFragments = kScoreRows / 8;  // 8 columns, 16 terms of the sum.

    using Scores = WarpFragments<kRowFragments, kScoreFragments>;
    using FirstSums = WarpFragments<kRowFragments, kHeadColumns / 8>;
    using ValueSums = WarpFragments<kRowFragments, kValueColumns / 8>;
    using SharedPlan = BackwardPlan<BackwardTraits>;

    // Of Scores::at(index).
    static constexpr int kElements = kRowFragments * kScoreFragments * 4;
    static WARPLOOM_DEVICE int row(int index) { return row_of_lane_row(lane_row(index)); }
    static WARPLOOM_DEVICE int column(int index) {
        return index / 4 % kScoreFragments * 8 + device::lane_index() % 4 * 2 + index % 2;
    }
    // A lane has parts of kLaneRows rows and shares each with kRowLanes - 1
    // neighbours.
    static constexpr int kLaneRows = 2 * kRowFragments;
    static constexpr int kRowLanes = 4;
    static WARPLOOM_DEVICE int lane_row(int index) {
        return index / (kScoreFragments * 4) * 2 + index / 2 % 2;
    }
    static WARPLOOM_DEVICE int row_of_lane_row(int lane_row) {
        return lane_row * 8 + device::lane_index() / 4;
    }
};

// True where one kernel makes the gradients of keys and values. Two sums of 256 columns would be
// 256 accumulators a lane; of 192 and 128 they are 160, too many beside the features of the scores.
// Two kernels compute the scores once more: 8 products instead of 7 in all.
template <int kHeadColumns, int kValueColumns, bool kFeatures>
inline constexpr bool kKeysWithValues = kHeadColumns + kValueColumns <= (kFeatures ? 256 : 320);

// scores = owned passing^T, for the warp's rows from `row` on and the passing
// rows from `kept` on.
template <typename Traits, typename Owned, typename Passing>
WARPLOOM_DEVICE void multiply_rows(
    WarpFragments<Traits::kRowFragments, Traits::kScoreFragments>& scores, const Owned& owned,
    int row, const Passing& passing, int kept) {
    using T = typename Traits::Element;
    const int lane = device::lane_index();
    const int owned_offset = owned.offset(row + lane % 16, lane / 16);
    const int passing_offset = passing.offset(kept + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    scores = {};
    // A loop over parts of 64 columns: given all steps at once, the compiler
    // loads operands so far ahead that it runs out of registers.
    constexpr int kSteps = Owned::kColumns / 16;
    constexpr int kPartSteps = kSteps > 8 ? 4 : kSteps;
    WARPLOOM_NO_UNROLL
    for (int first = 0; first < kSteps; first += kPartSteps) {
        WARPLOOM_UNROLL
        for (int step = first; step < first + kPartSteps; ++step) {
            std::uint32_t rows[Traits::kRowFragments][4];
            WARPLOOM_UNROLL
            for (int m = 0; m < Traits::kRowFragments; ++m) {
                device::load_matrix_x4(rows[m], owned.bytes +
                                                    owned.advance(owned_offset, 2 * step) +
                                                    m * 16 * Owned::kRowBytes);
            }
            WARPLOOM_UNROLL
            for (int n = 0; n < Traits::kScoreFragments; n += 2) {
                std::uint32_t pair[4];
                device::load_matrix_x4(pair, passing.bytes +
                                                 passing.advance(passing_offset, 2 * step) +
                                                 n * 8 * Passing::kRowBytes);
                const std::uint32_t left[2] = {pair[0], pair[1]};
                const std::uint32_t right[2] = {pair[2], pair[3]};
                WARPLOOM_UNROLL
                for (int m = 0; m < Traits::kRowFragments; ++m) {
                    device::mma_m16n8k16<T>(scores.values[m][n], rows[m], left);
                    device::mma_m16n8k16<T>(scores.values[m][n + 1], rows[m], right);
                }
            }
        }
    }
}

// sums += weights passing, for the passing rows from `kept` on. Two fragments
// of weights, rounded to the tensors' dtype, are one left operand: the layouts
// agree.
template <typename Traits, typename Passing>
WARPLOOM_DEVICE void add_product(
    WarpFragments<Traits::kRowFragments, Passing::kColumns / 8>& sums,
    const WarpFragments<Traits::kRowFragments, Traits::kScoreFragments>& weights,
    const Passing& passing, int kept) {
    using T = typename Traits::Element;
    const int lane = device::lane_index();
    const int offset = passing.offset(kept + lane % 16, lane / 16);
    WARPLOOM_UNROLL
    for (int step = 0; step < Traits::kScoreRows / 16; ++step) {
        std::uint32_t rounded[Traits::kRowFragments][4];
        WARPLOOM_UNROLL
        for (int m = 0; m < Traits::kRowFragments; ++m) {
            WARPLOOM_UNROLL
            for (int part = 0; part < 4; ++part) {
                const float (&values)[4] = weights.values[m][2 * step + part / 2];
                rounded[m][part] = device::pack<T>(values[part % 2 * 2], values[part % 2 * 2 + 1]);
            }
        }
        WARPLOOM_UNROLL
        for (int n = 0; n < Passing::kColumns / 8; n += 2) {
            std::uint32_t pair[4];
            device::load_matrix_x4_transposed(
                pair, passing.bytes + passing.advance(offset, n) + step * 16 * Passing::kRowBytes);
            const std::uint32_t left[2] = {pair[0], pair[1]};
            const std::uint32_t right[2] = {pair[2], pair[3]};
            WARPLOOM_UNROLL
            for (int m = 0; m < Traits::kRowFragments; ++m) {
                device::mma_m16n8k16<T>(sums.values[m][n], rounded[m], left);
                device::mma_m16n8k16<T>(sums.values[m][n + 1], rounded[m], right);
            }
        }
    }
}

// Writes factor sums by way of the warp's own rows of `tile`, so that a warp
// stores whole rows.
template <typename Traits, typename Tile>
WARPLOOM_DEVICE void write_sums(
    const WarpFragments<Traits::kRowFragments, Tile::kColumns / 8>& sums, float factor, Tile& tile,
    const GradientRows<typename Traits::Element>& destination) {
    using T = typename Traits::Element;
    const int lane = device::lane_index();
    const int first_row = device::warp_index() * Traits::kWarpRows;
    WARPLOOM_UNROLL
    for (int m = 0; m < Traits::kRowFragments; ++m) {
        WARPLOOM_UNROLL
        for (int half = 0; half < 2; ++half) {
            WARPLOOM_UNROLL
            for (int n = 0; n < Tile::kColumns / 8; ++n) {
                const float (&values)[4] = sums.values[m][n];
                device::store_vector(
                    tile.bytes + tile.offset(first_row + m * 16 + half * 8 + lane / 4, n) +
                        lane % 4 * 4,
                    device::pack<T>(values[half * 2] * factor, values[half * 2 + 1] * factor));
            }
        }
    }
    device::sync_warp();
    for (int unit = lane; unit < Traits::kWarpRows * Tile::kRowChunks; unit += device::kWarpSize) {
        const int row = first_row + unit / Tile::kRowChunks;
        const int chunk = unit % Tile::kRowChunks;
        const int column = chunk * Chunk<T>::kSize;
        if (row < destination.rows) {
            write_chunk(destination.first + row * destination.stride + column,
                        tile.load(row, chunk), destination.columns - column,
                        destination.copy_bytes);
        }
    }
}

}  // namespace warploom::attention
