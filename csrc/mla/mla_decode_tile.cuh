// The tiles of decoding, and the products of a block: on tensor cores for 16-bit types, by fused
// multiply-adds for float32.
#pragma once

#include <type_traits>

#include "attention/attention_tile.cuh"
#include "common/vec.cuh"
#include "mla/mla_decode.h"

namespace warploom::mla {

inline constexpr int kMaxLatent = 512;
inline constexpr int kMaxRope = 256;

// A block has kRows rows, pairs of a query and a head with the head fastest, and takes tiles of
// kKeys tokens: each is read from memory once, and is key and value of all rows. Warps stand in a
// grid: kRowWarps of them have different rows; the kColumnWarps of one row share out the keys of a
// score tile, and the columns of the output.
template <typename T, int kRowCount, int kKeyCount, int kColumnCount>
struct DecodeTraits {
    using Element = T;
    static constexpr bool kTensorCores = sizeof(T) == 2;
    static constexpr int kRows = kRowCount;
    static constexpr int kKeys = kKeyCount;
    static constexpr int kColumns = kColumnCount;  // The most that a row of the cache has.
    static constexpr int kWarpRows = kTensorCores ? 16 : 2;  // 16: what mma takes.
    static constexpr int kRowWarps = kRows / kWarpRows;
    static constexpr int kColumnWarps = !kTensorCores ? 1 : kRowWarps > 1 ? 2 : 4;
    static constexpr int kThreads = kRowWarps * kColumnWarps * device::kWarpSize;
    static constexpr int kWarpKeys = kKeys / kColumnWarps > 8 ? kKeys / kColumnWarps : 8;
    static constexpr int kScoreWarps = kTensorCores ? kKeys / kWarpKeys : 1;
    static constexpr int kStages = kTensorCores ? 2 : 1;
    static_assert(kTensorCores ? kKeys % 16 == 0 : kKeys == 16, "DecodeTraits: 16 keys at a time");

    // Of the scores of a tile a lane holds those of kLaneRows rows and kLaneKeys keys; kRowLanes
    // neighbours share a row. Tensor cores: the layout of their accumulators.
    static constexpr int kLaneRows = kTensorCores ? 2 : 1;
    static constexpr int kRowLanes = kTensorCores ? 4 : 16;
    static constexpr int kLaneKeys = kTensorCores ? kWarpKeys / 4 : 1;

    static WARPLOOM_DEVICE int row_warp() { return device::warp_index() % kRowWarps; }
    static WARPLOOM_DEVICE int column_warp() { return device::warp_index() / kRowWarps; }
    static WARPLOOM_DEVICE bool scores() {
        return kScoreWarps == kColumnWarps || column_warp() < kScoreWarps;
    }
    static WARPLOOM_DEVICE int row(int i) {
        return row_warp() * kWarpRows + device::lane_index() / kRowLanes + i * 8;
    }
    static WARPLOOM_DEVICE int key(int j) {
        const int lane = device::lane_index() % kRowLanes;
        return kTensorCores ? column_warp() * kWarpKeys + j / 2 * 8 + lane * 2 + j % 2 : lane;
    }
    // Of warps that share rows.
    static WARPLOOM_DEVICE void sync_rows() {
        if constexpr (kRowWarps == 1) {
            device::sync_threads();
        } else if constexpr (kColumnWarps > 1) {
            device::named_barrier_sync(1 + row_warp(), kColumnWarps * device::kWarpSize);
        }
    }

    using RowTile = Tile<T, kRows, kColumns>;
    using StageTile = Tile<T, kKeys, kColumns>;

    // 16 bytes more a row keep 8 rows in different banks.
    struct TensorProbabilities {
        alignas(16) T values[kRows][kKeys + 8];
    };
    struct FmaProbabilities {
        alignas(16) float values[kKeys][kRows + 4];
        alignas(16) float factors[kRows];
    };
    // Rows of a compressed cache as they are, before they are expanded into the first stage: in
    // place of the second stage, or behind the only one. 64 bytes more than the longest row's 8
    // times 128 let two rows be read from different banks.
    static constexpr int kRawRowBytes = 1088;
    static_assert(kRawRowBytes >= compressed_row_bytes(kMaxLatent, kMaxRope) &&
                      (kStages == 1 || kRawRowBytes <= StageTile::kRowBytes),
                  "DecodeTraits: room for a compressed row");
    struct NoRawRows {};
    struct RawRows {
        alignas(16) unsigned char bytes[kKeys * kRawRowBytes];
    };

    struct SharedPlan {
        RowTile queries;
        StageTile stages[kStages];
        [[no_unique_address]] std::conditional_t<kStages == 1, RawRows, NoRawRows> raw;
        std::conditional_t<kTensorCores, TensorProbabilities, FmaProbabilities> probabilities;
        float exchange[kColumnWarps][kRows];  // Maxima, at the end sums, of the warps of a row.
        std::int64_t row_offsets[2][kKeys];   // In the cache, of this tile's and the next one's.

        WARPLOOM_DEVICE unsigned char* raw_row(int row) {
            if constexpr (kStages == 2) {
                return stages[1].bytes + row * kRawRowBytes;
            } else {
                return raw.bytes + row * kRawRowBytes;
            }
        }
    };
    static_assert(sizeof(SharedPlan) <= (kRows <= 16   ? 99
                                         : kKeys <= 32 ? 163
                                                       : 227) *
                                            1024,
                  "DecodeTraits: few rows fit everywhere, many an sm_80, with many keys an sm_90");
};

// Of one lane, or probabilities in their place.
template <typename Traits>
struct DecodeScores {
    float values[Traits::kLaneRows][Traits::kLaneKeys];
};

// The products of a warp, and its output: 32 neighbouring columns, units of them dealt out to the
// warps of a row in turn.
template <typename Traits, bool = Traits::kTensorCores>
struct DecodeProducts;

template <typename Traits>
struct DecodeProducts<Traits, true> {
    using T = typename Traits::Element;
    using Plan = typename Traits::SharedPlan;
    static constexpr int kUnitColumns = 32;
    static constexpr int kUnits = kMaxLatent / kUnitColumns / Traits::kColumnWarps;

    float output[kUnits][kUnitColumns / 8][4] = {};

    static WARPLOOM_DEVICE int unit_column(int unit) {
        return (unit * Traits::kColumnWarps + Traits::column_warp()) * kUnitColumns;
    }

    // columns: d_latent + d_rope, a multiple of 16.
    WARPLOOM_DEVICE void multiply_keys(DecodeScores<Traits>& scores, const Plan& plan,
                                       const typename Traits::StageTile& keys, int columns) const {
        constexpr int kKeyTiles = Traits::kWarpKeys / 8;
        const int lane = device::lane_index();
        const int first_key = Traits::column_warp() * Traits::kWarpKeys;
        const int query = plan.queries.offset(Traits::row_warp() * 16 + lane % 16, lane / 16);
        const int key =
            keys.offset(first_key + lane / 16 * 8 % Traits::kWarpKeys + lane % 8, lane / 8 % 2);
        float products[kKeyTiles][4] = {};
        for (int step = 0; step < columns / 16; ++step) {
            std::uint32_t a[4];
            device::load_matrix_x4(a, plan.queries.bytes + plan.queries.advance(query, 2 * step));
            const unsigned char* source = keys.bytes + keys.advance(key, 2 * step);
            if constexpr (kKeyTiles == 1) {
                std::uint32_t b[2];
                device::load_matrix_x2(b, source);
                device::mma_m16n8k16<T>(products[0], a, b);
            } else {
                WARPLOOM_UNROLL
                for (int tile = 0; tile < kKeyTiles; tile += 2) {
                    std::uint32_t pair[4];
                    device::load_matrix_x4(pair, source + tile * 8 * keys.kRowBytes);
                    const std::uint32_t left[2] = {pair[0], pair[1]};
                    const std::uint32_t right[2] = {pair[2], pair[3]};
                    device::mma_m16n8k16<T>(products[tile], a, left);
                    device::mma_m16n8k16<T>(products[tile + 1], a, right);
                }
            }
        }
        WARPLOOM_UNROLL
        for (int i = 0; i < Traits::kLaneRows; ++i) {
            WARPLOOM_UNROLL
            for (int j = 0; j < Traits::kLaneKeys; ++j) {
                scores.values[i][j] = products[j / 2][i * 2 + j % 2];
            }
        }
    }

    WARPLOOM_DEVICE void store_probabilities(const DecodeScores<Traits>& scores,
                                             const float (&)[Traits::kLaneRows], Plan& plan) const {
        WARPLOOM_UNROLL
        for (int i = 0; i < Traits::kLaneRows; ++i) {
            WARPLOOM_UNROLL
            for (int j = 0; j < Traits::kLaneKeys; j += 2) {
                device::store_vector(&plan.probabilities.values[Traits::row(i)][Traits::key(j)],
                                     device::pack<T>(scores.values[i][j], scores.values[i][j + 1]));
            }
        }
    }

    // output = output * factors + probabilities values.
    WARPLOOM_DEVICE void multiply_values(const Plan& plan,
                                         const float (&factors)[Traits::kLaneRows],
                                         const typename Traits::StageTile& values, int d_latent) {
        constexpr int kSteps = Traits::kKeys / 16;
        const int lane = device::lane_index();
        if (device::any(factors[0] != 1.0f || factors[1] != 1.0f)) {
            WARPLOOM_UNROLL
            for (int unit = 0; unit < kUnits; ++unit) {
                WARPLOOM_UNROLL
                for (int n = 0; n < kUnitColumns / 8; ++n) {
                    WARPLOOM_UNROLL
                    for (int element = 0; element < 4; ++element) {
                        output[unit][n][element] *= factors[element / 2];
                    }
                }
            }
        }
        std::uint32_t probabilities[kSteps][4];
        WARPLOOM_UNROLL
        for (int step = 0; step < kSteps; ++step) {
            device::load_matrix_x4(probabilities[step],
                                   &plan.probabilities.values[Traits::row_warp() * 16 + lane % 16]
                                                             [step * 16 + lane / 16 * 8]);
        }
        WARPLOOM_UNROLL
        for (int unit = 0; unit < kUnits; ++unit) {
            if (unit_column(unit) < d_latent) {
                WARPLOOM_UNROLL
                for (int half = 0; half < 2; ++half) {
                    // A unit may end behind the latent: its second half then is not stored.
                    const int column = unit_column(unit) + half * 16;
                    const int chunk = (column < d_latent ? column : d_latent - 16) / 8;
                    const unsigned char* source =
                        values.bytes + values.offset(lane % 16, chunk + lane / 16);
                    WARPLOOM_UNROLL
                    for (int step = 0; step < kSteps; ++step) {
                        std::uint32_t pair[4];
                        device::load_matrix_x4_transposed(pair,
                                                          source + step * 16 * values.kRowBytes);
                        const std::uint32_t left[2] = {pair[0], pair[1]};
                        const std::uint32_t right[2] = {pair[2], pair[3]};
                        device::mma_m16n8k16<T>(output[unit][half * 2], probabilities[step], left);
                        device::mma_m16n8k16<T>(output[unit][half * 2 + 1], probabilities[step],
                                                right);
                    }
                }
            }
        }
    }

    // begin(row) makes what takes the row's output: write(column, values), some columns at a time.
    template <typename Begin>
    WARPLOOM_DEVICE void write_rows(int d_latent, const Begin& begin) const {
        WARPLOOM_UNROLL
        for (int i = 0; i < Traits::kLaneRows; ++i) {
            const auto write = begin(Traits::row(i));
            WARPLOOM_UNROLL
            for (int unit = 0; unit < kUnits; ++unit) {
                WARPLOOM_UNROLL
                for (int n = 0; n < kUnitColumns / 8; ++n) {
                    const int column = unit_column(unit) + n * 8 + device::lane_index() % 4 * 2;
                    const float values[2] = {output[unit][n][i * 2], output[unit][n][i * 2 + 1]};
                    if (column < d_latent) {
                        write(column, values);
                    }
                }
            }
        }
    }
};

// A warp has the scores of two rows, in blocks of 2 rows and 2 keys: four lanes, that differ in
// bits 0 and 4, share out the columns of the product, and each is left with one score. Of the
// output a thread has four columns of all rows.
template <typename Traits>
struct DecodeProducts<Traits, false> {
    using Plan = typename Traits::SharedPlan;
    static constexpr int kChunkSize = Chunk<float>::kSize;
    static_assert(Traits::kThreads * kChunkSize == kMaxLatent && Traits::kRows % kChunkSize == 0,
                  "DecodeProducts: a thread for each chunk of the output");

    float output[Traits::kRows][kChunkSize] = {};

    // Sums of sums lose less to rounding than one long sum.
    WARPLOOM_DEVICE void multiply_keys(DecodeScores<Traits>& scores, const Plan& plan,
                                       const typename Traits::StageTile& keys, int columns) const {
        constexpr int kPartChunks = 4;
        const int lane = device::lane_index();
        const int key = lane % 16 / 2 * 2;
        const int row = Traits::row_warp() * 2;
        const int chunks = columns / kChunkSize;
        float sums[2][2] = {};
        int chunk = lane / 16 * 2 + lane % 2;
        while (chunk < chunks) {
            float part[2][2] = {};
            for (int step = 0; step < kPartChunks && chunk < chunks; ++step, chunk += 4) {
                const Chunk<float> queries[2] = {plan.queries.load(row, chunk),
                                                 plan.queries.load(row + 1, chunk)};
                const Chunk<float> rows[2] = {keys.load(key, chunk), keys.load(key + 1, chunk)};
                WARPLOOM_UNROLL
                for (int place = 0; place < 4; ++place) {
                    WARPLOOM_UNROLL
                    for (int element = 0; element < kChunkSize; ++element) {
                        float& sum = part[place / 2][place % 2];
                        sum = fmaf(queries[place / 2].elements[element],
                                   rows[place % 2].elements[element], sum);
                    }
                }
            }
            WARPLOOM_UNROLL
            for (int place = 0; place < 4; ++place) {
                sums[place / 2][place % 2] += part[place / 2][place % 2];
            }
        }
        // Each lane gives away the row, then the key, that is not its own.
        const bool second_row = lane >= 16;
        const bool second_key = lane % 2 == 1;
        float own[2];
        WARPLOOM_UNROLL
        for (int j = 0; j < 2; ++j) {
            const float other = device::shuffle_xor(second_row ? sums[0][j] : sums[1][j], 16);
            own[j] = (second_row ? sums[1][j] : sums[0][j]) + other;
        }
        const float other = device::shuffle_xor(second_key ? own[0] : own[1], 1);
        scores.values[0][0] = (second_key ? own[1] : own[0]) + other;
    }

    WARPLOOM_DEVICE void store_probabilities(const DecodeScores<Traits>& scores,
                                             const float (&factors)[Traits::kLaneRows],
                                             Plan& plan) const {
        plan.probabilities.values[Traits::key(0)][Traits::row(0)] = scores.values[0][0];
        if (Traits::key(0) == 0) {
            plan.probabilities.factors[Traits::row(0)] = factors[0];
        }
    }

    // output = output * factors + probabilities values.
    WARPLOOM_DEVICE void multiply_values(const Plan& plan, const float (&)[Traits::kLaneRows],
                                         const typename Traits::StageTile& values, int d_latent) {
        const int chunk = static_cast<int>(threadIdx.x);
        if (chunk * kChunkSize >= d_latent) {
            return;
        }
        float part[Traits::kRows][kChunkSize] = {};
        for (int key = 0; key < Traits::kKeys; ++key) {
            const Chunk<float> value = values.load(key, chunk);
            float probabilities[Traits::kRows];
            load_floats(plan.probabilities.values[key], probabilities);
            WARPLOOM_UNROLL
            for (int row = 0; row < Traits::kRows; ++row) {
                WARPLOOM_UNROLL
                for (int element = 0; element < kChunkSize; ++element) {
                    part[row][element] =
                        fmaf(probabilities[row], value.elements[element], part[row][element]);
                }
            }
        }
        float factors[Traits::kRows];
        load_floats(plan.probabilities.factors, factors);
        WARPLOOM_UNROLL
        for (int row = 0; row < Traits::kRows; ++row) {
            WARPLOOM_UNROLL
            for (int element = 0; element < kChunkSize; ++element) {
                output[row][element] = fmaf(output[row][element], factors[row], part[row][element]);
            }
        }
    }

    template <typename Begin>
    WARPLOOM_DEVICE void write_rows(int d_latent, const Begin& begin) const {
        const int column = static_cast<int>(threadIdx.x) * kChunkSize;
        WARPLOOM_UNROLL
        for (int row = 0; row < Traits::kRows; ++row) {
            const auto write = begin(row);
            if (column < d_latent) {
                write(column, output[row]);
            }
        }
    }
};

}  // namespace warploom::mla
