// The products of attention backward for float32, in float32: fused multiply-adds of the ordinary
// cores. Tensor cores would round the operands to TF32.
#pragma once

#include "attention/attention_backward_scores.cuh"

namespace warploom::attention {

// What a thread holds: scores of some rows with some passing rows, and chunks of the rows' sums.
template <int kRows, int kPassing>
struct ThreadScores {
    float values[kRows][kPassing];

    WARPLOOM_DEVICE float& at(int index) { return values[index / kPassing][index % kPassing]; }
    WARPLOOM_DEVICE float at(int index) const { return values[index / kPassing][index % kPassing]; }
};
template <int kRows, int kChunks>
struct ThreadSums {
    Chunk<float> values[kRows][kChunks];
};

// A thread has kThreadRows owned rows and shares them with kRowLanes - 1 neighbours: of a passing
// tile it scores every kRowLanes-th row, of the sums it keeps every kRowLanes-th chunk of 4
// columns.
// A thread's row i is row i * kWarpRowGroups + lane / kRowLanes of its warp, its passing row j is
// row j * kRowLanes + lane % kRowLanes of the tile, and its chunk c is chunk c * kRowLanes + lane %
// kRowLanes of a row.
//   columns  owned x passing  shared memory  why
//   64       64 x 32          64 KiB         4 rows a thread: each passing chunk feeds 16 products
//   128      64 x 16          96 KiB         the same; with features 32 rows, for the registers
//   256      16 x 16          96 KiB         2 rows a thread, 16 lanes a row: shared memory is full
template <Gradient kGradientOf, int kColumns, bool kHasFeatures>
struct BackwardFloat32Traits {
    using Element = float;
    static constexpr int kHeadColumns = kColumns;
    static constexpr int kValueColumns = kColumns;
    static constexpr bool kFeatures = kHasFeatures;
    static constexpr bool kOwnsQueries = kGradientOf == Gradient::query;
    static constexpr bool kSumsFirst = true;  // grad_q or grad_k.
    static constexpr bool kSumsValue = !kOwnsQueries;

    static constexpr int kThreads = 128;
    static constexpr int kStages = 2;
    static constexpr int kRowLanes = kColumns == 256 ? 16 : 8;
    static constexpr int kThreadRows = kColumns == 256 || (kColumns == 128 && kFeatures) ? 2 : 4;
    static constexpr int kPassingRows = kColumns == 64 ? 32 : 16;
    static constexpr int kScoreRows = kPassingRows;

    static constexpr int kWarpRowGroups = device::kWarpSize / kRowLanes;
    static constexpr int kWarpRows = kWarpRowGroups * kThreadRows;
    static constexpr int kOwnedRows = kThreads / device::kWarpSize * kWarpRows;
    static constexpr int kThreadPassing = kPassingRows / kRowLanes;
    static constexpr int kRowChunks = kColumns / Chunk<float>::kSize;
    static constexpr int kThreadChunks = kRowChunks / kRowLanes;

    using Scores = ThreadScores<kThreadRows, kThreadPassing>;
    using FirstSums = ThreadSums<kThreadRows, kThreadChunks>;
    using ValueSums = FirstSums;
    using SharedPlan = BackwardPlan<BackwardFloat32Traits>;

    // Of Scores::at(index).
    static constexpr int kElements = kThreadRows * kThreadPassing;
    static WARPLOOM_DEVICE int row(int index) { return row_of_lane_row(lane_row(index)); }
    static WARPLOOM_DEVICE int column(int index) {
        return index % kThreadPassing * kRowLanes + device::lane_index() % kRowLanes;
    }
    static constexpr int kLaneRows = kThreadRows;
    static WARPLOOM_DEVICE int lane_row(int index) { return index / kThreadPassing; }
    static WARPLOOM_DEVICE int row_of_lane_row(int lane_row) {
        return lane_row * kWarpRowGroups + device::lane_index() / kRowLanes;
    }
};

// scores = owned passing^T, for the warp's rows and the passing rows from `kept` on. Sums of sums
// lose less to rounding than one long sum.
template <typename Traits, typename Owned, typename Passing>
WARPLOOM_DEVICE void multiply_rows(
    ThreadScores<Traits::kThreadRows, Traits::kThreadPassing>& scores, const Owned& owned, int row,
    const Passing& passing, int kept) {
    constexpr int kPartChunks = 4;
    const int first_passing = kept + device::lane_index() % Traits::kRowLanes;
    scores = {};
    WARPLOOM_NO_UNROLL
    for (int first_chunk = 0; first_chunk < Traits::kRowChunks; first_chunk += kPartChunks) {
        typename Traits::Scores part = {};
        WARPLOOM_UNROLL
        for (int chunk = first_chunk; chunk < first_chunk + kPartChunks; ++chunk) {
            Chunk<float> columns[Traits::kThreadPassing];
            WARPLOOM_UNROLL
            for (int j = 0; j < Traits::kThreadPassing; ++j) {
                columns[j] = passing.load(first_passing + j * Traits::kRowLanes, chunk);
            }
            WARPLOOM_UNROLL
            for (int i = 0; i < Traits::kThreadRows; ++i) {
                const Chunk<float> rows = owned.load(row + Traits::row_of_lane_row(i), chunk);
                WARPLOOM_UNROLL
                for (int j = 0; j < Traits::kThreadPassing; ++j) {
                    WARPLOOM_UNROLL
                    for (int element = 0; element < Chunk<float>::kSize; ++element) {
                        part.values[i][j] = fmaf(rows.elements[element],
                                                 columns[j].elements[element], part.values[i][j]);
                    }
                }
            }
        }
        WARPLOOM_UNROLL
        for (int i = 0; i < Traits::kThreadRows; ++i) {
            WARPLOOM_UNROLL
            for (int j = 0; j < Traits::kThreadPassing; ++j) {
                scores.values[i][j] += part.values[i][j];
            }
        }
    }
}

// sums += weights passing, for the passing rows from `kept` on, by way of one sum per tile. The
// lanes of a row hand each other its weights.
template <typename Traits, typename Passing>
WARPLOOM_DEVICE void add_product(
    ThreadSums<Traits::kThreadRows, Traits::kThreadChunks>& sums,
    const ThreadScores<Traits::kThreadRows, Traits::kThreadPassing>& weights,
    const Passing& passing, int kept) {
    const int lane = device::lane_index();
    const int own = lane % Traits::kRowLanes;
    typename Traits::FirstSums part = {};
    WARPLOOM_UNROLL
    for (int j = 0; j < Traits::kThreadPassing; ++j) {
        WARPLOOM_NO_UNROLL
        for (int source = 0; source < Traits::kRowLanes; ++source) {
            float weight[Traits::kThreadRows];
            WARPLOOM_UNROLL
            for (int i = 0; i < Traits::kThreadRows; ++i) {
                weight[i] = device::shuffle(weights.values[i][j], lane - own + source);
            }
            WARPLOOM_UNROLL
            for (int c = 0; c < Traits::kThreadChunks; ++c) {
                const Chunk<float> columns = passing.load(kept + j * Traits::kRowLanes + source,
                                                          c * Traits::kRowLanes + own);
                WARPLOOM_UNROLL
                for (int i = 0; i < Traits::kThreadRows; ++i) {
                    WARPLOOM_UNROLL
                    for (int element = 0; element < Chunk<float>::kSize; ++element) {
                        float& sum = part.values[i][c].elements[element];
                        sum = fmaf(weight[i], columns.elements[element], sum);
                    }
                }
            }
        }
    }
    WARPLOOM_UNROLL
    for (int i = 0; i < Traits::kThreadRows; ++i) {
        WARPLOOM_UNROLL
        for (int c = 0; c < Traits::kThreadChunks; ++c) {
            WARPLOOM_UNROLL
            for (int element = 0; element < Chunk<float>::kSize; ++element) {
                sums.values[i][c].elements[element] += part.values[i][c].elements[element];
            }
        }
    }
}

// Writes factor sums: 128 bytes of a row at a time, without the detour that 16-bit kernels take.
template <typename Traits, typename Tile>
WARPLOOM_DEVICE void write_sums(ThreadSums<Traits::kThreadRows, Traits::kThreadChunks>& sums,
                                float factor, const Tile&, const GradientRows<float>& destination) {
    const int own = device::lane_index() % Traits::kRowLanes;
    WARPLOOM_UNROLL
    for (int i = 0; i < Traits::kThreadRows; ++i) {
        const int row = device::warp_index() * Traits::kWarpRows + Traits::row_of_lane_row(i);
        WARPLOOM_UNROLL
        for (int c = 0; c < Traits::kThreadChunks; ++c) {
            const int column = (c * Traits::kRowLanes + own) * Chunk<float>::kSize;
            Chunk<float>& chunk = sums.values[i][c];
            WARPLOOM_UNROLL
            for (int element = 0; element < Chunk<float>::kSize; ++element) {
                chunk.elements[element] *= factor;
            }
            if (row < destination.rows) {
                write_chunk(destination.first + row * destination.stride + column, chunk,
                            destination.columns - column, destination.copy_bytes);
            }
        }
    }
}

}  // namespace warploom::attention
