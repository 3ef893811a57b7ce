// What the attention kernels share: the kernel's parameters, the part of the problem that a block
// has, and tiles in shared memory.
#pragma once

#include <cmath>
#include <limits>

#include "attention/attention.h"
#include "device/device.cuh"

namespace warploom::attention {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A copy into shared memory moves units of this many bytes: the largest that divides the address of
// every row of a tensor and the length of a row.
struct CopyBytes {
    int q;
    int k;
    int v;
    int out;
};

struct ForwardKernelParams {
    AttentionParams attention;
    // Probabilities are exp2(score_scale * score - maximum) with a positive score_scale; the scores
    // of a negative softmax_scale are negated first.
    float score_scale;
    bool negate_scores;
    int query_tiles;
    CopyBytes copy_bytes;
};

// One block's query tile, head and batch entry.
struct BlockTask {
    int batch;
    int head;
    int kv_head;
    int first_query;
    int queries;    // Of the tile, those that exist.
    int key_tiles;  // Those beyond are hidden from every query of the tile.
};

// The keys below this index are visible to the query; negative or 0: none is.
WARPLOOM_DEVICE int visible_keys(const AttentionParams& attention, int query) {
    if (!attention.causal) {
        return attention.key_length;
    }
    const int aligned = attention.key_length - attention.query_length + query + 1;
    return aligned < attention.key_length ? aligned : attention.key_length;
}

// Blocks are numbered with the query tile fastest, so that those that run at one time share keys
// and values in the L2 cache. Under a causal mask the longest tiles of a head start first: short
// ones fill the end of the run.
template <typename Traits>
WARPLOOM_DEVICE BlockTask block_task(const ForwardKernelParams& params) {
    const AttentionParams& attention = params.attention;
    const int block = static_cast<int>(blockIdx.x);
    const int batch_head = block / params.query_tiles;
    const int tile = block - batch_head * params.query_tiles;

    BlockTask task;
    task.batch = batch_head / attention.heads;
    task.head = batch_head - task.batch * attention.heads;
    task.kv_head = task.head / (attention.heads / attention.kv_heads);
    task.first_query = (attention.causal ? params.query_tiles - 1 - tile : tile) * Traits::kQueries;
    const int queries_left = attention.query_length - task.first_query;
    task.queries = queries_left < Traits::kQueries ? queries_left : Traits::kQueries;
    const int keys = visible_keys(attention, task.first_query + task.queries - 1);
    task.key_tiles = keys > 0 ? (keys - 1) / Traits::kKeys + 1 : 0;
    return task;
}

// The offset, in elements, of a row of a tensor [batch, sequence, head, columns].
WARPLOOM_DEVICE std::int64_t row_offset(const HeadStrides& strides, int batch, int row, int head) {
    return batch * strides.batch + row * strides.sequence + head * strides.head;
}

// 16 bytes of a tile: what one thread copies, loads or stores at once.
template <typename T>
struct alignas(16) Chunk {
    static constexpr int kSize = 16 / sizeof(T);
    T elements[kSize];
};

// Rows in shared memory, whose chunks are permuted so that the same chunk of 8 consecutive rows
// lies in 8 different groups of 4 banks: chunk c of row r is stored at place c ^ (r % 8). kRowBytes
// is a multiple of 128, so a chunk stays in its row.
template <typename T, int kTileRows, int kTileColumns>
struct alignas(128) Tile {
    static constexpr int kRows = kTileRows;
    static constexpr int kColumns = kTileColumns;
    static constexpr int kRowBytes = kColumns * static_cast<int>(sizeof(T));
    static constexpr int kRowChunks = kRowBytes / 16;
    static_assert(kRowBytes % 128 == 0, "Tile: the permutation needs rows of 8, 16, ... chunks");

    unsigned char bytes[kRows * kRowBytes];

    // The byte at which a chunk begins. Others are reached from it with less arithmetic:
    //   offset(row, c ^ d) == offset(row, c) ^ 16 d
    //   offset(row + 8, c) == offset(row, c) + 8 kRowBytes
    static WARPLOOM_DEVICE int offset(int row, int chunk) {
        return row * kRowBytes + ((chunk ^ (row % 8)) * 16);
    }
    WARPLOOM_DEVICE Chunk<T> load(int row, int chunk) const {
        return device::load_vector<Chunk<T>>(bytes + offset(row, chunk));
    }
};

// Rows of a tensor in global memory, of which `rows` and `columns` exist. What lies behind them is
// never read.
template <typename T>
struct Rows {
    const T* first;
    std::int64_t stride;
    int rows;
    int columns;
    int copy_bytes;
};

// Starts copying to rows [kept, kept + kRows) of the tile, in units of kBytes.
template <int kBytes, int kRows, typename Tile, typename T>
WARPLOOM_DEVICE void copy_units(Tile& tile, int kept, const Rows<T>& source) {
    constexpr int kUnit = kBytes / static_cast<int>(sizeof(T));
    constexpr int kRowUnits = Tile::kColumns / kUnit;
    constexpr int kChunkUnits = 16 / kBytes;
    for (unsigned unit = threadIdx.x; unit < kRows * kRowUnits; unit += blockDim.x) {
        const int row = static_cast<int>(unit / kRowUnits);
        const int place = static_cast<int>(unit % kRowUnits);
        const bool valid = row < source.rows && place * kUnit < source.columns;
        const int offset = tile.offset(kept + row, place / kChunkUnits);
        device::copy_async<kBytes>(tile.bytes + offset + place % kChunkUnits * kBytes,
                                   source.first + row * source.stride + place * kUnit, valid);
    }
}

// The same for 16 bytes, where each thread keeps to one column of chunks.
template <int kRows, int kThreads, typename Tile, typename T>
WARPLOOM_DEVICE void copy_chunks(Tile& tile, int kept, const Rows<T>& source) {
    constexpr int kPassRows = kThreads / Tile::kRowChunks;
    static_assert(kThreads % Tile::kRowChunks == 0 && kRows % kPassRows == 0,
                  "copy_chunks: the threads must copy whole rows");
    const int chunk = static_cast<int>(threadIdx.x % Tile::kRowChunks);
    const int first_row = static_cast<int>(threadIdx.x / Tile::kRowChunks);
    const int rows = chunk * Chunk<T>::kSize < source.columns ? source.rows - first_row : 0;
    const T* from = source.first + first_row * source.stride + chunk * Chunk<T>::kSize;
    WARPLOOM_UNROLL
    for (int pass = 0; pass < kRows / kPassRows; ++pass) {
        const int offset = tile.offset(kept + first_row + pass * kPassRows, chunk);
        device::copy_async<16>(tile.bytes + offset, from, pass * kPassRows < rows);
        from += kPassRows * source.stride;
    }
}

// The same for rows whose elements lie at any address: plain loads, finished on return.
template <int kRows, typename Tile, typename T>
WARPLOOM_DEVICE void copy_elements(Tile& tile, int kept, const Rows<T>& source) {
    for (unsigned unit = threadIdx.x; unit < kRows * Tile::kRowChunks; unit += blockDim.x) {
        const int row = static_cast<int>(unit / Tile::kRowChunks);
        const int place = static_cast<int>(unit % Tile::kRowChunks);
        Chunk<T> chunk;
        WARPLOOM_UNROLL
        for (int index = 0; index < Chunk<T>::kSize; ++index) {
            const int column = place * Chunk<T>::kSize + index;
            chunk.elements[index] = row < source.rows && column < source.columns
                                        ? source.first[row * source.stride + column]
                                        : device::from_float<T>(0.0f);
        }
        device::store_vector(tile.bytes + tile.offset(kept + row, place), chunk);
    }
}

// Starts filling rows [kept, kept + kRows) of the tile by all kThreads threads of the block, with
// zeros where the source has no rows or columns. They are complete after the caller's commit, the
// wait for it and a barrier.
template <int kRows, int kThreads, typename Tile, typename T>
WARPLOOM_DEVICE void fill_rows(Tile& tile, int kept, const Rows<T>& source) {
    if (source.copy_bytes == 16) {
        copy_chunks<kRows, kThreads>(tile, kept, source);
    } else if (source.copy_bytes == 8) {
        copy_units<8, kRows>(tile, kept, source);
    } else if (source.copy_bytes == 4) {
        copy_units<4, kRows>(tile, kept, source);
    } else {
        copy_elements<kRows>(tile, kept, source);
    }
}

// Starts filling the stage of tile number `index` of the keys and values.
template <typename Traits>
WARPLOOM_DEVICE void fill_keys_values(typename Traits::SharedPlan& shared, const BlockTask& task,
                                      const ForwardKernelParams& params, int index) {
    using T = typename Traits::Element;
    const AttentionParams& attention = params.attention;
    const int kept = index % Traits::kStages * Traits::kKeys;
    const int first_key = index * Traits::kKeys;
    const auto rows_of = [&](const void* tensor, const HeadStrides& strides, int columns,
                             int copy_bytes) -> Rows<T> {
        const T* first = static_cast<const T*>(tensor) +
                         row_offset(strides, task.batch, first_key, task.kv_head);
        return {first, strides.sequence, attention.key_length - first_key, columns, copy_bytes};
    };
    fill_rows<Traits::kKeys, Traits::kThreads>(
        shared.keys, kept,
        rows_of(attention.k, attention.k_strides, attention.head_dim, params.copy_bytes.k));
    fill_rows<Traits::kKeys, Traits::kThreads>(
        shared.values, kept,
        rows_of(attention.v, attention.v_strides, attention.value_dim, params.copy_bytes.v));
}

template <typename Traits>
WARPLOOM_DEVICE void fill_queries(typename Traits::SharedPlan& shared, const BlockTask& task,
                                  const ForwardKernelParams& params) {
    using T = typename Traits::Element;
    const AttentionParams& attention = params.attention;
    const T* first = static_cast<const T*>(attention.q) +
                     row_offset(attention.q_strides, task.batch, task.first_query, task.head);
    const Rows<T> queries = {first, attention.q_strides.sequence, task.queries, attention.head_dim,
                             params.copy_bytes.q};
    fill_rows<Traits::kQueries, Traits::kThreads>(shared.queries, 0, queries);
}

// Where the block writes: row 0 is that of its first query.
template <typename T>
struct BlockResult {
    T* out;      // [queries, value_dim], rows `stride` apart
    float* lse;  // [queries]
    std::int64_t stride;
};

template <typename T>
WARPLOOM_DEVICE BlockResult<T> block_result(const AttentionParams& attention,
                                            const BlockTask& task) {
    const std::int64_t batch_head =
        static_cast<std::int64_t>(task.batch) * attention.heads + task.head;
    return {
        static_cast<T*>(attention.out) +
            row_offset(attention.out_strides, task.batch, task.first_query, task.head),
        static_cast<float*>(attention.lse) + batch_head * attention.query_length + task.first_query,
        attention.out_strides.sequence};
}

// Writes one chunk of an output row, of which `columns` columns are left.
template <typename T>
WARPLOOM_DEVICE void write_chunk(T* destination, const Chunk<T>& chunk, int columns,
                                 int copy_bytes) {
    if (copy_bytes == 16) {
        if (columns > 0) {
            device::store_vector(destination, chunk);
        }
    } else {
        WARPLOOM_UNROLL
        for (int index = 0; index < Chunk<T>::kSize; ++index) {
            if (index < columns) {
                destination[index] = chunk.elements[index];
            }
        }
    }
}

// One row of the online softmax (Milakov and Gimelshein 2018), spread over the lanes that share it:
// the maximum over the keys so far of score_scale * score, and this lane's part of the sum of
// exp2(score_scale * score - maximum).
struct SoftmaxRow {
    float maximum = -kInfinity;
    float sum = 0.0f;
};

// What to subtract from score_scale * score: 0 while every score is -inf, so that no -inf - -inf
// arises.
WARPLOOM_DEVICE float softmax_shift(const SoftmaxRow& row) {
    return row.maximum == -kInfinity ? 0.0f : row.maximum;
}

// Takes in the maximum of a tile's score_scale * score. Returns the factor for what was accumulated
// under the old maximum: exactly 1 if that stands.
WARPLOOM_DEVICE float raise_maximum(SoftmaxRow& row, float tile_maximum) {
    const float old = row.maximum;
    row.maximum = fmaxf(old, tile_maximum);
    const float factor = device::exp2_approximate(old - softmax_shift(row));
    row.sum *= factor;
    return factor;
}

// The natural logarithm of the sum over all keys of exp(score), once `sum` is that of all lanes.
WARPLOOM_DEVICE float log_sum_exp(const SoftmaxRow& row) {
    constexpr float kLogE2 = 0.693147180559945309f;
    return row.sum == 0.0f ? -kInfinity : row.maximum * kLogE2 + logf(row.sum);
}

// The factor that turns accumulated values into the output: 0 for a row without visible keys.
WARPLOOM_DEVICE float normalizer(const SoftmaxRow& row) {
    return row.sum == 0.0f ? 0.0f : 1.0f / row.sum;
}

}  // namespace warploom::attention
