// Absorbed latent attention on a cache, after FlashMLA's schedule and FlashInfer's tiles for
// Ampere. A row of the cache is read from memory once for all rows of a tile, and is key and value
// of them. With few rows bound by memory, with 64 about balanced.
#pragma once

#include <cmath>

#include "mla/mla_decode_cache.cuh"

namespace warploom::mla {

using attention::kInfinity;
using attention::kLogE2;

// The softmax of a lane's rows so far: the maxima of their scores (times log2(e)), and this lane's
// parts of the sums of exp2(score - maximum).
template <typename Traits>
struct DecodeSoftmax {
    float maximum[Traits::kLaneRows];
    float sum[Traits::kLaneRows];
    int end[Traits::kLaneRows];  // The row sees no key from here on.
};

// Where what a query sees ends.
WARPLOOM_DEVICE int end_key(const MlaDecodeParams& decode, int length, int query) {
    const int end = query + length - decode.query_length + 1;
    return decode.causal && end < length ? end : length;
}

template <typename Traits>
WARPLOOM_DEVICE DecodeTask decode_task(const DecodeWork& work, const Piece& piece, int row_tile) {
    const MlaDecodeParams& decode = work.decode;
    const int first_row = row_tile * Traits::kRows;
    const int left = decode.query_length * decode.heads - first_row;
    DecodeTask task = {piece, first_row, left < Traits::kRows ? left : Traits::kRows, 0};
    const int end = end_key(decode, piece.length, (first_row + task.rows - 1) / decode.heads);
    const int seen_tiles = end > 0 ? (end - 1) / Traits::kKeys + 1 : 0;
    task.end_tile = seen_tiles < piece.end_tile ? seen_tiles : piece.end_tile;
    return task;
}

template <typename Traits>
WARPLOOM_DEVICE DecodeSoftmax<Traits> begin_softmax(const MlaDecodeParams& decode,
                                                    const DecodeTask& task) {
    DecodeSoftmax<Traits> softmax;
    WARPLOOM_UNROLL
    for (int i = 0; i < Traits::kLaneRows; ++i) {
        softmax.maximum[i] = -kInfinity;
        softmax.sum[i] = 0.0f;
        softmax.end[i] =
            end_key(decode, task.piece.length, (task.first_row + Traits::row(i)) / decode.heads);
    }
    return softmax;
}

// Turns products into exp2(score - maximum), the maxima being those of all warps of a row.
// `factors`: for what was accumulated under the old maxima. Every warp comes here; those without
// scores learn the factors.
template <typename Traits>
WARPLOOM_DEVICE void update_softmax(DecodeScores<Traits>& scores, DecodeSoftmax<Traits>& softmax,
                                    float (&factors)[Traits::kLaneRows],
                                    typename Traits::SharedPlan& plan, float scale, int tile_key) {
    float maxima[Traits::kLaneRows] = {};
    if (Traits::scores()) {
        WARPLOOM_UNROLL
        for (int i = 0; i < Traits::kLaneRows; ++i) {
            maxima[i] = -kInfinity;
            WARPLOOM_UNROLL
            for (int j = 0; j < Traits::kLaneKeys; ++j) {
                const bool seen = tile_key + Traits::key(j) < softmax.end[i];
                scores.values[i][j] = seen ? scores.values[i][j] * scale : -kInfinity;
                maxima[i] = fmaxf(maxima[i], scores.values[i][j]);
            }
            WARPLOOM_UNROLL
            for (int lane_mask = 1; lane_mask < Traits::kRowLanes; lane_mask *= 2) {
                maxima[i] = fmaxf(maxima[i], device::shuffle_xor(maxima[i], lane_mask));
            }
        }
    }
    if constexpr (Traits::kColumnWarps > 1) {
        if (Traits::scores() && device::lane_index() % Traits::kRowLanes == 0) {
            WARPLOOM_UNROLL
            for (int i = 0; i < Traits::kLaneRows; ++i) {
                plan.exchange[Traits::column_warp()][Traits::row(i)] = maxima[i];
            }
        }
        Traits::sync_rows();
        WARPLOOM_UNROLL
        for (int i = 0; i < Traits::kLaneRows; ++i) {
            maxima[i] = plan.exchange[0][Traits::row(i)];
            WARPLOOM_UNROLL
            for (int warp = 1; warp < Traits::kScoreWarps; ++warp) {
                maxima[i] = fmaxf(maxima[i], plan.exchange[warp][Traits::row(i)]);
            }
        }
    }
    WARPLOOM_UNROLL
    for (int i = 0; i < Traits::kLaneRows; ++i) {
        const float maximum = fmaxf(softmax.maximum[i], maxima[i]);
        // 0 while every score is -inf, so that no -inf - -inf arises.
        const float shift = maximum == -kInfinity ? 0.0f : maximum;
        factors[i] = device::exp2_approximate(softmax.maximum[i] - shift);
        softmax.maximum[i] = maximum;
        softmax.sum[i] *= factors[i];
        if (Traits::scores()) {
            WARPLOOM_UNROLL
            for (int j = 0; j < Traits::kLaneKeys; ++j) {
                scores.values[i][j] = device::exp2_approximate(scores.values[i][j] - shift);
                softmax.sum[i] += scores.values[i][j];
            }
        }
    }
}

// Leaves the rows' sums over all lanes and warps in `exchange`, whose maxima are read.
template <typename Traits>
WARPLOOM_DEVICE void add_up_sums(DecodeSoftmax<Traits>& softmax,
                                 typename Traits::SharedPlan& plan) {
    WARPLOOM_UNROLL
    for (int i = 0; i < Traits::kLaneRows; ++i) {
        WARPLOOM_UNROLL
        for (int lane_mask = 1; lane_mask < Traits::kRowLanes; lane_mask *= 2) {
            softmax.sum[i] += device::shuffle_xor(softmax.sum[i], lane_mask);
        }
        if (device::lane_index() % Traits::kRowLanes == 0) {
            plan.exchange[Traits::column_warp()][Traits::row(i)] = softmax.sum[i];
        }
    }
    device::sync_threads();
}

template <typename Traits>
WARPLOOM_DEVICE float row_sum(const typename Traits::SharedPlan& plan, int row) {
    float sum = plan.exchange[0][row];
    WARPLOOM_UNROLL
    for (int warp = 1; warp < Traits::kColumnWarps; ++warp) {
        sum += plan.exchange[warp][row];
    }
    return sum;
}

// Takes one row of the output: of the op, or of this piece.
template <typename T>
struct RowWriter {
    T* out;
    float* partial;  // null: the op's
    float normalizer;
    bool exists;

    template <int kCount>
    WARPLOOM_DEVICE void operator()(int column, const float (&values)[kCount]) const {
        if (!exists) {
            return;
        }
        float scaled[kCount];
        WARPLOOM_UNROLL
        for (int index = 0; index < kCount; ++index) {
            scaled[index] = values[index] * normalizer;
        }
        if constexpr (sizeof(T) == 2) {
            static_assert(kCount == 2, "RowWriter: a pair");
            if (partial != nullptr) {
                device::store_vector(partial + column, float2{scaled[0], scaled[1]});
            } else {
                device::store_vector(out + column, device::pack<T>(scaled[0], scaled[1]));
            }
        } else {
            store_floats((partial != nullptr ? partial : out) + column, scaled);
        }
    }
};

template <typename Traits>
WARPLOOM_DEVICE void write_piece(const DecodeWork& work, const DecodeTask& task,
                                 const DecodeProducts<Traits>& products,
                                 DecodeSoftmax<Traits>& softmax,
                                 typename Traits::SharedPlan& plan) {
    using T = typename Traits::Element;
    const MlaDecodeParams& decode = work.decode;
    const std::int64_t rows = static_cast<std::int64_t>(decode.query_length) * decode.heads;
    const std::int64_t first_out = task.piece.batch * rows + task.first_row;
    const std::int64_t first_partial = task.piece.partial * rows + task.first_row;
    add_up_sums(softmax, plan);
    if (device::lane_index() % Traits::kRowLanes == 0 && Traits::column_warp() == 0) {
        WARPLOOM_UNROLL
        for (int i = 0; i < Traits::kLaneRows; ++i) {
            const int row = Traits::row(i);
            if (row < task.rows) {
                const float sum = row_sum<Traits>(plan, row);
                const float lse =
                    sum == 0.0f ? -kInfinity : fmaf(softmax.maximum[i], kLogE2, logf(sum));
                if (task.piece.whole) {
                    const int query = (task.first_row + row) / decode.heads;
                    const int head = task.first_row + row - query * decode.heads;
                    const std::int64_t place =
                        (static_cast<std::int64_t>(task.piece.batch) * decode.heads + head) *
                            decode.query_length +
                        query;
                    static_cast<float*>(decode.lse)[place] = lse;
                } else {
                    decode.partial_lse[first_partial + row] = lse;
                }
            }
        }
    }
    products.write_rows(decode.d_latent, [&](int row) {
        const float sum = row_sum<Traits>(plan, row);
        return RowWriter<T>{
            .out = static_cast<T*>(decode.out) + (first_out + row) * decode.d_latent,
            .partial = task.piece.whole
                           ? nullptr
                           : decode.partial_out + (first_partial + row) * decode.d_latent,
            .normalizer = sum == 0.0f ? 0.0f : 1.0f / sum,
            .exists = row < task.rows};
    });
}

template <typename Traits>
WARPLOOM_DEVICE void decode_piece(const DecodeWork& work, const DecodeTask& task,
                                  typename Traits::SharedPlan& plan) {
    const MlaDecodeParams& decode = work.decode;
    const bool compressed = decode.cache.format != CacheFormat::dense;
    // Whether the next tile goes elsewhere than where this one is read.
    const bool copies_ahead = Traits::kStages > 1 || compressed;
    DecodeProducts<Traits> products;
    DecodeSoftmax<Traits> softmax = begin_softmax<Traits>(decode, task);

    device::sync_threads();  // The last piece's sums are read.
    int tile = task.piece.first_tile;
    if (tile < task.end_tile) {
        store_offset<Traits>(plan, tile, look_up<Traits>(work, task, tile));
        store_offset<Traits>(plan, tile + 1, look_up<Traits>(work, task, tile + 1));
        copy_queries<Traits>(work, task, plan);
        device::sync_threads();
        copy_keys<Traits>(work, task, tile, plan);
    }
    WARPLOOM_NO_UNROLL
    for (; tile < task.end_tile; ++tile) {
        const auto copy_next = [&]() {
            if (tile + 1 < task.end_tile) {
                copy_keys<Traits>(work, task, tile + 1, plan);
            }
        };
        device::copy_async_wait<0>();
        device::sync_threads();
        if (compressed) {
            expand_rows<Traits>(work, task, tile, plan);
            device::sync_threads();
        }
        if (copies_ahead) {
            copy_next();
        }
        const std::int64_t offset = look_up<Traits>(work, task, tile + 2);
        const auto& stage = plan.stages[compressed ? 0 : tile % Traits::kStages];
        DecodeScores<Traits> scores;
        float factors[Traits::kLaneRows];
        if (Traits::scores()) {
            products.multiply_keys(scores, plan, stage, decode.d_latent + decode.d_rope);
        }
        update_softmax(scores, softmax, factors, plan, work.scale, tile * Traits::kKeys);
        if (Traits::scores()) {
            products.store_probabilities(scores, factors, plan);
        }
        // With float32 every thread reads all rows.
        if constexpr (Traits::kTensorCores) {
            Traits::sync_rows();
        } else {
            device::sync_threads();
        }
        products.multiply_values(plan, factors, stage, decode.d_latent);
        store_offset<Traits>(plan, tile + 2, offset);
        if (!copies_ahead) {
            device::sync_threads();
            copy_next();
        }
    }
    write_piece(work, task, products, softmax, plan);
}

// grid [row_tiles * parts], the row tiles of a part side by side: they read the same tokens
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 1)
mla_decode_kernel(WARPLOOM_GRID_CONSTANT DecodeWork work) {
    auto& plan = device::shared_memory<typename Traits::SharedPlan>();
    const int part = static_cast<int>(blockIdx.x) / work.cut.row_tiles;
    const int row_tile = static_cast<int>(blockIdx.x) % work.cut.row_tiles;
    const PartSequences sequences = sequences_of(work, part);
    WARPLOOM_NO_UNROLL
    for (int batch = sequences.first; batch < sequences.end; ++batch) {
        const Piece piece = piece_of(work, part, batch);
        if (piece.first_tile < piece.end_tile) {
            decode_piece<Traits>(work, decode_task<Traits>(work, piece, row_tile), plan);
        }
    }
}

}  // namespace warploom::mla
