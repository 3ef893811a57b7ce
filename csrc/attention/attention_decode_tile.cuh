// The tiles of decoding, and the products of a warp: on tensor cores for 16-bit types, by fused
// multiply-adds for float32.
#pragma once

#include "attention/attention_tile.cuh"

namespace warploom::attention {

// A block has kRows rows: pairs of a query and a head of one group, so that each key and value is
// read once for all of them. Its warps work on by themselves, each with its own tiles of kKeys
// keys, its own softmax and its own output, and meet at the end alone. The stages take 64 KiB
// whatever the columns, so that an sm_80 has room for two blocks: 4 warps of 128 columns leave room
// for 2 stages, and of 256 columns for 2 warps. 16 rows are what mma takes; a float32 row costs
// four times the arithmetic of its bytes, and 8 rows are what the reads of shared memory keep up
// with.
template <typename T, int kColumnCount>
struct DecodeTraits {
    static_assert(kColumnCount == 64 || kColumnCount == 128 || kColumnCount == 256,
                  "DecodeTraits: 64, 128 or 256 columns");
    using Element = T;
    static constexpr bool kTensorCores = sizeof(T) == 2;
    static constexpr int kColumns = kColumnCount;
    static constexpr int kRows = kTensorCores ? 16 : 8;
    static constexpr int kKeys = kRows;
    static constexpr int kWarps = kColumns == 256 ? 2 : 4;
    static constexpr int kThreads = kWarps * device::kWarpSize;
    static constexpr int kStages = kColumns == 64 ? 4 : 2;
    static constexpr int kStep = kWarps * kKeys;  // Keys that the block takes at once.

    // Of the scores of a tile a lane holds those of kLaneRows rows and kLaneKeys keys; kRowLanes
    // neighbours share a row. Tensor cores: the layout of their accumulators.
    static constexpr int kLaneRows = 2;
    static constexpr int kRowLanes = device::kWarpSize * kLaneRows / kRows;
    static constexpr int kLaneKeys = kKeys / kRowLanes;

    static WARPLOOM_DEVICE int row(int i) {
        return device::lane_index() / kRowLanes + i * (kRows / kLaneRows);
    }
    static WARPLOOM_DEVICE int key(int j) {
        const int lane = device::lane_index() % kRowLanes;
        return kTensorCores ? j / 2 * 8 + lane * 2 + j % 2 : lane;
    }

    using RowTile = Tile<T, kRows, kColumns>;
    using StageTile = Tile<T, kWarps * kStages * kKeys, kColumns>;  // Warp by warp, stage by stage.

    // What the warps hand over at the end. 8 floats more a row keep 8 rows in different banks.
    struct Handover {
        float maximum[kWarps][kRows];
        float sum[kWarps][kRows];
        alignas(16) float outputs[kWarps][kRows][kColumns + 8];
    };
    struct Stages {
        StageTile keys;
        StageTile values;
    };
    struct SharedPlan {
        RowTile queries;
        union {
            Stages stages;
            Handover handover;
        };
    };
    static_assert(sizeof(SharedPlan) <= 99 * 1024, "DecodeTraits: the plan exceeds 99 KiB");
};

// Of one lane, or probabilities in their place.
template <typename Traits>
struct DecodeScores {
    float values[Traits::kLaneRows][Traits::kLaneKeys];
};

// The products of a warp with the keys or values in rows [kept, kept + kKeys) of their tile, what
// it keeps of the queries, and its output.
template <typename Traits, bool = Traits::kTensorCores>
struct DecodeProducts;

template <typename Traits>
struct DecodeProducts<Traits, true> {
    using T = typename Traits::Element;
    static constexpr int kSteps = Traits::kColumns / 16;  // mma_m16n8k16: 16 terms of the sum.
    // Queries of 256 columns do not fit beside 128 accumulators: each key tile loads them again.
    static constexpr bool kHoldsQuery = Traits::kColumns <= 128;

    std::uint32_t query[kHoldsQuery ? kSteps : 1][4];
    float output[Traits::kColumns / 8][4] = {};

    WARPLOOM_DEVICE void load_query_step(const typename Traits::RowTile& queries, int step,
                                         int place) {
        const int lane = device::lane_index();
        device::load_matrix_x4(query[place],
                               queries.bytes + queries.offset(lane % 16, lane / 16 + step * 2));
    }

    WARPLOOM_DEVICE void load_queries(const typename Traits::RowTile& queries) {
        if constexpr (kHoldsQuery) {
            WARPLOOM_UNROLL
            for (int step = 0; step < kSteps; ++step) {
                load_query_step(queries, step, step);
            }
        }
    }

    WARPLOOM_DEVICE void multiply_keys(DecodeScores<Traits>& scores,
                                       const typename Traits::RowTile& queries,
                                       const typename Traits::StageTile& keys, int kept) {
        const int lane = device::lane_index();
        const int row = kept + lane / 16 * 8 + lane % 8;
        float products[2][4] = {};  // Of keys 0 to 7, and 8 to 15.
        WARPLOOM_UNROLL
        for (int step = 0; step < kSteps; ++step) {
            const int place = kHoldsQuery ? step : 0;
            if constexpr (!kHoldsQuery) {
                load_query_step(queries, step, place);
            }
            std::uint32_t pair[4];
            device::load_matrix_x4(pair, keys.bytes + keys.offset(row, lane / 8 % 2 + step * 2));
            const std::uint32_t left[2] = {pair[0], pair[1]};
            const std::uint32_t right[2] = {pair[2], pair[3]};
            device::mma_m16n8k16<T>(products[0], query[place], left);
            device::mma_m16n8k16<T>(products[1], query[place], right);
        }
        WARPLOOM_UNROLL
        for (int i = 0; i < Traits::kLaneRows; ++i) {
            WARPLOOM_UNROLL
            for (int j = 0; j < Traits::kLaneKeys; ++j) {
                scores.values[i][j] = products[j / 2][i * 2 + j % 2];
            }
        }
    }

    // output = output * factors + probabilities values. `raised`: some factor of the warp is not 1.
    WARPLOOM_DEVICE void multiply_values(const DecodeScores<Traits>& probabilities,
                                         const float (&factors)[Traits::kLaneRows], bool raised,
                                         const typename Traits::StageTile& values, int kept) {
        const int lane = device::lane_index();
        if (raised) {
            WARPLOOM_UNROLL
            for (int n = 0; n < Traits::kColumns / 8; ++n) {
                WARPLOOM_UNROLL
                for (int element = 0; element < 4; ++element) {
                    output[n][element] *= factors[element / 2];
                }
            }
        }
        std::uint32_t rounded[4];
        WARPLOOM_UNROLL
        for (int part = 0; part < 4; ++part) {
            const float (&row)[Traits::kLaneKeys] = probabilities.values[part % 2];
            rounded[part] = device::pack<T>(row[part / 2 * 2], row[part / 2 * 2 + 1]);
        }
        WARPLOOM_UNROLL
        for (int n = 0; n < Traits::kColumns / 8; n += 2) {
            std::uint32_t pair[4];
            device::load_matrix_x4_transposed(
                pair, values.bytes + values.offset(kept + lane % 16, lane / 16 + n));
            const std::uint32_t left[2] = {pair[0], pair[1]};
            const std::uint32_t right[2] = {pair[2], pair[3]};
            device::mma_m16n8k16<T>(output[n], rounded, left);
            device::mma_m16n8k16<T>(output[n + 1], rounded, right);
        }
    }

    WARPLOOM_DEVICE void store(float (&rows)[Traits::kRows][Traits::kColumns + 8]) const {
        const int lane = device::lane_index();
        WARPLOOM_UNROLL
        for (int n = 0; n < Traits::kColumns / 8; ++n) {
            WARPLOOM_UNROLL
            for (int half = 0; half < 2; ++half) {
                device::store_vector(&rows[half * 8 + lane / 4][n * 8 + lane % 4 * 2],
                                     float2{output[n][half * 2], output[n][half * 2 + 1]});
            }
        }
    }
};

// A lane keeps kLaneChunks chunks of kOutputRows rows of the output, the rows of its group of
// lanes: with 64 columns the warp is two groups.
template <typename Traits>
struct DecodeProducts<Traits, false> {
    static constexpr int kChunks = Traits::kColumns / 4;
    static constexpr int kChunkLanes = kChunks < device::kWarpSize ? kChunks : device::kWarpSize;
    static constexpr int kLaneChunks = kChunks / kChunkLanes;
    static constexpr int kGroups = device::kWarpSize / kChunkLanes;
    static constexpr int kOutputRows = Traits::kRows / kGroups;
    static constexpr int kHalfRows = kOutputRows / Traits::kLaneRows;

    Chunk<float> output[kOutputRows][kLaneChunks] = {};

    // Output row r of this lane is a row whose scores are in place r / kHalfRows of the lanes from
    // row_lane(r) on.
    static WARPLOOM_DEVICE int row_lane(int r) {
        return (device::lane_index() / kChunkLanes * kHalfRows + r % kHalfRows) * Traits::kRowLanes;
    }

    WARPLOOM_DEVICE void load_queries(const typename Traits::RowTile&) {}

    // Sums of sums lose less to rounding than one long sum.
    WARPLOOM_DEVICE void multiply_keys(DecodeScores<Traits>& scores,
                                       const typename Traits::RowTile& queries,
                                       const typename Traits::StageTile& keys, int kept) {
        constexpr int kPartChunks = 4;
        scores = {};
        for (int first_chunk = 0; first_chunk < kChunks; first_chunk += kPartChunks) {
            float part[Traits::kLaneRows] = {};
            WARPLOOM_UNROLL
            for (int chunk = first_chunk; chunk < first_chunk + kPartChunks; ++chunk) {
                const Chunk<float> key = keys.load(kept + Traits::key(0), chunk);
                WARPLOOM_UNROLL
                for (int i = 0; i < Traits::kLaneRows; ++i) {
                    const Chunk<float> query = queries.load(Traits::row(i), chunk);
                    WARPLOOM_UNROLL
                    for (int element = 0; element < Chunk<float>::kSize; ++element) {
                        part[i] = fmaf(query.elements[element], key.elements[element], part[i]);
                    }
                }
            }
            WARPLOOM_UNROLL
            for (int i = 0; i < Traits::kLaneRows; ++i) {
                scores.values[i][0] += part[i];
            }
        }
    }

    WARPLOOM_DEVICE void multiply_values(const DecodeScores<Traits>& probabilities,
                                         const float (&factors)[Traits::kLaneRows], bool,
                                         const typename Traits::StageTile& values, int kept) {
        const int chunk = device::lane_index() % kChunkLanes;
        Chunk<float> part[kOutputRows][kLaneChunks] = {};
        for (int key = 0; key < Traits::kKeys; ++key) {
            Chunk<float> value[kLaneChunks];
            WARPLOOM_UNROLL
            for (int c = 0; c < kLaneChunks; ++c) {
                value[c] = values.load(kept + key, c * kChunkLanes + chunk);
            }
            WARPLOOM_UNROLL
            for (int r = 0; r < kOutputRows; ++r) {
                const float probability =
                    device::shuffle(probabilities.values[r / kHalfRows][0], row_lane(r) + key);
                WARPLOOM_UNROLL
                for (int c = 0; c < kLaneChunks; ++c) {
                    WARPLOOM_UNROLL
                    for (int element = 0; element < Chunk<float>::kSize; ++element) {
                        float& sum = part[r][c].elements[element];
                        sum = fmaf(probability, value[c].elements[element], sum);
                    }
                }
            }
        }
        WARPLOOM_UNROLL
        for (int r = 0; r < kOutputRows; ++r) {
            const float factor = device::shuffle(factors[r / kHalfRows], row_lane(r));
            WARPLOOM_UNROLL
            for (int c = 0; c < kLaneChunks; ++c) {
                WARPLOOM_UNROLL
                for (int element = 0; element < Chunk<float>::kSize; ++element) {
                    float& sum = output[r][c].elements[element];
                    sum = fmaf(sum, factor, part[r][c].elements[element]);
                }
            }
        }
    }

    WARPLOOM_DEVICE void store(float (&rows)[Traits::kRows][Traits::kColumns + 8]) const {
        const int chunk = device::lane_index() % kChunkLanes;
        WARPLOOM_UNROLL
        for (int r = 0; r < kOutputRows; ++r) {
            const int row = row_lane(r) / Traits::kRowLanes +
                            r / kHalfRows * (Traits::kRows / Traits::kLaneRows);
            WARPLOOM_UNROLL
            for (int c = 0; c < kLaneChunks; ++c) {
                device::store_vector(&rows[row][(c * kChunkLanes + chunk) * 4], output[r][c]);
            }
        }
    }
};

}  // namespace warploom::attention
