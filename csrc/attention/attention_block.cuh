// What the forward kernels share: the kernel's parameters, the part of the problem that a block
// has, and the rows of the softmax.
#pragma once

#include "attention/attention_tile.cuh"

namespace warploom::attention {

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
    ScoreConstants constants;
    // Probabilities are exp2(score_scale * score - maximum), and score_scale is positive. Where it
    // is all that turns products into scores they stay as they are; otherwise scores.cuh makes the
    // scores, and it is 1.
    float score_scale;
    int query_tiles;
    CopyBytes copy_bytes;
};

// One block's query tile and head. Rows count from the beginning of the sequence.
struct BlockTask {
    Sequence sequence;
    KeyWindow window;
    int head;
    int kv_head;
    int first_query;
    int queries;     // Of the tile, those that exist; 0 or less: the block has nothing to do.
    int first_tile;  // Key tiles before this one are hidden from every query of the tile,
    int end_tile;    // and so is this one and those behind it.
};

// Blocks are numbered with the query tile fastest, so that those that run at one time share keys
// and values in the L2 cache. Where no key lies behind a query, the last tiles have most to do and
// start first: short ones fill the end of the run.
template <typename Traits>
WARPLOOM_DEVICE BlockTask block_task(const ForwardKernelParams& params) {
    const AttentionParams& attention = params.attention;
    const int block = static_cast<int>(blockIdx.x);
    const int batch_head = block / params.query_tiles;
    const int tile = block - batch_head * params.query_tiles;
    const int batch = batch_head / attention.heads;

    BlockTask task;
    task.sequence = sequence_of(attention.sequences, batch);
    task.window = window_of(attention.scoring, task.sequence);
    task.head = batch_head - batch * attention.heads;
    task.kv_head = task.head / (attention.heads / attention.kv_heads);
    task.first_query =
        (attention.scoring.window_right >= 0 ? params.query_tiles - 1 - tile : tile) *
        Traits::kQueries;
    const int queries_left = task.sequence.queries - task.first_query;
    task.queries = queries_left < Traits::kQueries ? queries_left : Traits::kQueries;
    const int end_key = task.window.end_key(task.first_query + task.queries - 1);
    task.first_tile = task.window.first_key(task.first_query) / Traits::kKeys;
    task.end_tile = end_key > 0 ? (end_key - 1) / Traits::kKeys + 1 : 0;
    return task;
}

// Starts filling rows [kept, kept + kKeys) of a tile with one sequence's keys or values from
// first_key on.
template <typename Traits, typename Tile>
WARPLOOM_DEVICE void fill_from_sequence(Tile& tile, int kept, const void* tensor,
                                        const HeadStrides& strides, int columns, int copy_bytes,
                                        const BlockTask& task, const Sequences& sequences,
                                        int first_key) {
    using T = typename Traits::Element;
    const T* elements = static_cast<const T*>(tensor);
    const int rows = task.sequence.keys - first_key;
    if (sequences.block_table == nullptr) {
        const T* first = elements + row_offset(strides, task.sequence.batch,
                                               task.sequence.first_key + first_key, task.kv_head);
        fill_rows<Traits::kKeys, Traits::kThreads>(
            tile, kept, MatrixRows<T>{first, strides.sequence, rows, columns, copy_bytes});
    } else {
        const PagedRows<T> source = {
            .pages = elements + task.kv_head * strides.head,
            .block_table =
                sequences.block_table + task.sequence.batch * sequences.block_table_stride,
            .page_stride = strides.batch,
            .stride = strides.sequence,
            .page_size = sequences.page_size,
            .first_row = first_key,
            .rows = rows,
            .columns = columns,
            .copy_bytes = copy_bytes,
        };
        fill_rows<Traits::kKeys, Traits::kThreads>(tile, kept, source);
    }
}

// Starts filling the stage of tile number `index` of the keys and values.
template <typename Traits>
WARPLOOM_DEVICE void fill_keys_values(typename Traits::SharedPlan& shared, const BlockTask& task,
                                      const ForwardKernelParams& params, int index) {
    const AttentionParams& attention = params.attention;
    const int kept = index % Traits::kStages * Traits::kKeys;
    const int first_key = index * Traits::kKeys;
    fill_from_sequence<Traits>(shared.keys, kept, attention.k, attention.k_strides,
                               attention.head_dim, params.copy_bytes.k, task, attention.sequences,
                               first_key);
    fill_from_sequence<Traits>(shared.values, kept, attention.v, attention.v_strides,
                               attention.value_dim, params.copy_bytes.v, task, attention.sequences,
                               first_key);
}

template <typename Traits>
WARPLOOM_DEVICE void fill_queries(typename Traits::SharedPlan& shared, const BlockTask& task,
                                  const ForwardKernelParams& params) {
    using T = typename Traits::Element;
    const AttentionParams& attention = params.attention;
    const T* first = static_cast<const T*>(attention.q) +
                     row_offset(attention.q_strides, task.sequence.batch,
                                task.sequence.first_query + task.first_query, task.head);
    const MatrixRows<T> queries = {first, attention.q_strides.sequence, task.queries,
                                   attention.head_dim, params.copy_bytes.q};
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
    const int row = task.sequence.first_query + task.first_query;
    const int batch = task.sequence.batch;
    return {
        static_cast<T*>(attention.out) + row_offset(attention.out_strides, batch, row, task.head),
        static_cast<float*>(attention.lse) + batch * attention.lse_batch_stride +
            task.head * attention.lse_head_stride + row,
        attention.out_strides.sequence};
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

// Takes in the sink of the head, a score without a value, once `sum` is that of all lanes. Returns
// the factor for what was accumulated.
WARPLOOM_DEVICE float add_sink(SoftmaxRow& row, const Scoring& scoring, int head) {
    if (scoring.sinks == nullptr) {
        return 1.0f;
    }
    const float sink = kLog2E * static_cast<const float*>(scoring.sinks)[head];
    const float factor = raise_maximum(row, sink);
    row.sum += device::exp2_approximate(sink - softmax_shift(row));
    return factor;
}

// The natural logarithm of the whole sum of exp(score).
WARPLOOM_DEVICE float log_sum_exp(const SoftmaxRow& row) {
    return row.sum == 0.0f ? -kInfinity : row.maximum * kLogE2 + logf(row.sum);
}

// The factor that turns accumulated values into the output: 0 for a row without visible keys.
WARPLOOM_DEVICE float normalizer(const SoftmaxRow& row) {
    return row.sum == 0.0f ? 0.0f : 1.0f / row.sum;
}

}  // namespace warploom::attention
