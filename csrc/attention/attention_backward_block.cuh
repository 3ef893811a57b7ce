// What the backward kernels share: parameters, the part of the problem that a block has, its shared
// memory and how it is filled.
//
// A block owns a tile of rows and walks over the tiles of the other side, which pass by. The first
// tensor of a side makes the scores, the second one the gradients of the probabilities:
//   gradient        owned rows      passing rows
//   query           q, grad_out     k, v             of one query head
//   key, value      k, v            q, grad_out      of all query heads that read the kv head
// So one block sums a gradient in one order: no atomics, the same bits in every run.
#pragma once

#include "attention/attention_backward.h"
#include "attention/attention_tile.cuh"
#include "attention/scores.cuh"

namespace warploom::attention {

// What a kernel computes. The gradients of keys and values are two kernels where the accumulators
// of both exceed the registers.
enum class Gradient { query, key, value, key_and_value };

struct BackwardKernelParams {
    AttentionBackwardParams attention;
    ScoreConstants constants;
    float softmax_scale;
    int tiles;  // Owned tiles of one head.
    struct {
        int q;
        int k;
        int v;
        int grad_out;
        int grad_q;
        int grad_k;
        int grad_v;
    } copy_bytes;  // As CopyBytes.
};

// One block's part of the problem. Rows count from the beginning of their sequence.
struct BackwardTask {
    Sequence sequence;
    KeyWindow window;
    int kv_head;
    int first_head;  // Of the query heads.
    int heads;
    int first_owned;
    int owned;          // Of the tile, those that exist; 0 or less: the block has nothing to do.
    int first_passing;  // Of the tiles that may meet the owned rows.
    int passing_tiles;  // Of one query head.
};

// The place of query `row` of its tensor in lse, grad_lse, delta and grad_distance.
WARPLOOM_DEVICE std::int64_t statistics_offset(const AttentionBackwardParams& attention, int batch,
                                               int head, int row) {
    return batch * attention.lse_batch_stride + head * attention.lse_head_stride + row;
}

// True where the block also writes the gradients of biases, 0 for hidden keys.
template <typename Traits>
WARPLOOM_DEVICE bool writes_bias(const AttentionBackwardParams& attention) {
    return Traits::kFeatures && Traits::kOwnsQueries && attention.grad_bias != nullptr;
}

// Blocks are numbered with the owned tile fastest, so that those that run at one time share the
// passing rows in the L2 cache. Under a causal mask the last queries and the first keys have most
// to do and start first.
template <typename Traits>
WARPLOOM_DEVICE BackwardTask backward_task(const BackwardKernelParams& params) {
    const AttentionBackwardParams& attention = params.attention;
    const int group = attention.heads / attention.kv_heads;
    const int block = static_cast<int>(blockIdx.x);
    const int batch_head = block / params.tiles;
    const int tile = block - batch_head * params.tiles;
    const int heads = Traits::kOwnsQueries ? attention.heads : attention.kv_heads;
    const int batch = batch_head / heads;
    const int head = batch_head - batch * heads;

    BackwardTask task;
    task.sequence = sequence_of(attention.sequences, batch);
    task.window = window_of(attention.scoring, task.sequence);
    int first;  // Of the passing rows,
    int end;    // those that may meet the owned ones.
    if constexpr (Traits::kOwnsQueries) {
        const bool reverse = attention.scoring.window_right >= 0;
        task.first_owned = (reverse ? params.tiles - 1 - tile : tile) * Traits::kOwnedRows;
        task.owned = task.sequence.queries - task.first_owned;
        task.kv_head = head / group;
        task.first_head = head;
        task.heads = 1;
        const int last = task.first_owned + Traits::kOwnedRows - 1;
        const bool all = writes_bias<Traits>(attention);
        first = all ? 0 : task.window.first_key(task.first_owned);
        end = all ? task.sequence.keys : task.window.end_key(last);
    } else {
        task.first_owned = tile * Traits::kOwnedRows;
        task.owned = task.sequence.keys - task.first_owned;
        task.kv_head = head;
        task.first_head = head * group;
        task.heads = group;
        // Query i sees the keys from i + window.first to i + window.end - 1.
        first = task.first_owned - task.window.end + 1;
        first = first > 0 ? first : 0;
        end = task.first_owned + Traits::kOwnedRows - task.window.first;
        end = end < task.sequence.queries ? end : task.sequence.queries;
    }
    task.first_passing = first / Traits::kPassingRows * Traits::kPassingRows;
    task.passing_tiles =
        end <= first ? 0 : (end - 1 - task.first_passing) / Traits::kPassingRows + 1;
    return task;
}

// The block's shared memory. Passing rows come in kStages stages: one is computed on while the next
// one is filled. At the end each warp puts its sums in its owned rows.
template <typename Traits>
struct BackwardPlan {
    using T = typename Traits::Element;
    static constexpr int kPassingPlaces = Traits::kStages * Traits::kPassingRows;
    static constexpr int kQueries = Traits::kOwnsQueries ? Traits::kOwnedRows : kPassingPlaces;

    Tile<T, Traits::kOwnedRows, Traits::kHeadColumns> owned_first;
    Tile<T, Traits::kOwnedRows, Traits::kValueColumns> owned_second;
    Tile<T, kPassingPlaces, Traits::kHeadColumns> passing_first;
    Tile<T, kPassingPlaces, Traits::kValueColumns> passing_second;
    float lse[kQueries];
    float delta[kQueries];
};

// Starts filling kRows rows of two tiles, from row `kept` on, with rows of q and grad_out, and the
// statistics with theirs. Rows behind the last query get zeros: they add nothing to any sum.
template <typename Traits, int kRows, typename First, typename Second>
WARPLOOM_DEVICE void fill_queries(typename Traits::SharedPlan& shared, First& first, Second& second,
                                  int kept, const BackwardTask& task,
                                  const BackwardKernelParams& params, int head, int query) {
    using T = typename Traits::Element;
    const AttentionBackwardParams& attention = params.attention;
    const int row = task.sequence.first_query + query;
    const int rows = task.sequence.queries - query;
    const HeadStrides& strides = attention.q_strides;
    const HeadStrides& grad_strides = attention.grad_out_strides;
    fill_rows<kRows, Traits::kThreads>(
        first, kept,
        MatrixRows<T>{static_cast<const T*>(attention.q) +
                          row_offset(strides, task.sequence.batch, row, head),
                      strides.sequence, rows, attention.head_dim, params.copy_bytes.q});
    fill_rows<kRows, Traits::kThreads>(
        second, kept,
        MatrixRows<T>{static_cast<const T*>(attention.grad_out) +
                          row_offset(grad_strides, task.sequence.batch, row, head),
                      grad_strides.sequence, rows, attention.value_dim,
                      params.copy_bytes.grad_out});
    static_assert(kRows <= Traits::kThreads, "fill_queries: a thread copies one row's statistics");
    const int index = static_cast<int>(threadIdx.x);
    if (index < kRows) {
        const std::int64_t from =
            statistics_offset(attention, task.sequence.batch, head, row) + index;
        device::copy_async<4>(shared.lse + kept + index,
                              static_cast<const float*>(attention.lse) + from, index < rows);
        device::copy_async<4>(shared.delta + kept + index,
                              static_cast<const float*>(attention.delta) + from, index < rows);
    }
}

// The same with rows of k and v. The kernel of grad_v alone has no use for v.
template <typename Traits, int kRows, typename First, typename Second>
WARPLOOM_DEVICE void fill_keys(First& first, Second& second, int kept, const BackwardTask& task,
                               const BackwardKernelParams& params, int key) {
    using T = typename Traits::Element;
    const AttentionBackwardParams& attention = params.attention;
    const int row = task.sequence.first_key + key;
    const int rows = task.sequence.keys - key;
    const HeadStrides& strides = attention.k_strides;
    const HeadStrides& value_strides = attention.v_strides;
    fill_rows<kRows, Traits::kThreads>(
        first, kept,
        MatrixRows<T>{static_cast<const T*>(attention.k) +
                          row_offset(strides, task.sequence.batch, row, task.kv_head),
                      strides.sequence, rows, attention.head_dim, params.copy_bytes.k});
    if constexpr (Traits::kOwnsQueries || Traits::kSumsFirst) {
        fill_rows<kRows, Traits::kThreads>(
            second, kept,
            MatrixRows<T>{static_cast<const T*>(attention.v) +
                              row_offset(value_strides, task.sequence.batch, row, task.kv_head),
                          value_strides.sequence, rows, attention.value_dim, params.copy_bytes.v});
    }
}

template <typename Traits>
WARPLOOM_DEVICE void fill_owned(typename Traits::SharedPlan& shared, const BackwardTask& task,
                                const BackwardKernelParams& params) {
    constexpr int kRows = Traits::kOwnedRows;
    if constexpr (Traits::kOwnsQueries) {
        fill_queries<Traits, kRows>(shared, shared.owned_first, shared.owned_second, 0, task,
                                    params, task.first_head, task.first_owned);
    } else {
        fill_keys<Traits, kRows>(shared.owned_first, shared.owned_second, 0, task, params,
                                 task.first_owned);
    }
}

// A tile of passing rows: number `index` of all heads' tiles.
struct PassingTile {
    int head;
    int first;  // Row, in the sequence.
    int kept;   // Row of its stage in shared memory.
};

template <typename Traits>
WARPLOOM_DEVICE PassingTile passing_tile(const BackwardTask& task, int index) {
    const int head = index / task.passing_tiles;
    return {task.first_head + head,
            task.first_passing + (index - head * task.passing_tiles) * Traits::kPassingRows,
            index % Traits::kStages * Traits::kPassingRows};
}

template <typename Traits>
WARPLOOM_DEVICE void fill_passing(typename Traits::SharedPlan& shared, const BackwardTask& task,
                                  const BackwardKernelParams& params, int index) {
    constexpr int kRows = Traits::kPassingRows;
    const PassingTile tile = passing_tile<Traits>(task, index);
    if constexpr (Traits::kOwnsQueries) {
        fill_keys<Traits, kRows>(shared.passing_first, shared.passing_second, tile.kept, task,
                                 params, tile.first);
    } else {
        fill_queries<Traits, kRows>(shared, shared.passing_first, shared.passing_second, tile.kept,
                                    task, params, tile.head, tile.first);
    }
}

// Where a block writes a gradient: row 0 is that of its first owned row.
template <typename T>
struct GradientRows {
    T* first;
    std::int64_t stride;
    int rows;
    int columns;
    int copy_bytes;
};

// Of grad_q or grad_k.
template <typename Traits>
WARPLOOM_DEVICE GradientRows<typename Traits::Element> first_gradient(
    const BackwardTask& task, const BackwardKernelParams& params) {
    using T = typename Traits::Element;
    const AttentionBackwardParams& attention = params.attention;
    if constexpr (Traits::kOwnsQueries) {
        const HeadStrides& strides = attention.grad_q_strides;
        return {static_cast<T*>(attention.grad_q) +
                    row_offset(strides, task.sequence.batch,
                               task.sequence.first_query + task.first_owned, task.first_head),
                strides.sequence, task.owned, attention.head_dim, params.copy_bytes.grad_q};
    } else {
        const HeadStrides& strides = attention.grad_k_strides;
        return {static_cast<T*>(attention.grad_k) +
                    row_offset(strides, task.sequence.batch,
                               task.sequence.first_key + task.first_owned, task.kv_head),
                strides.sequence, task.owned, attention.head_dim, params.copy_bytes.grad_k};
    }
}

// Of grad_v.
template <typename Traits>
WARPLOOM_DEVICE GradientRows<typename Traits::Element> value_gradient(
    const BackwardTask& task, const BackwardKernelParams& params) {
    using T = typename Traits::Element;
    const AttentionBackwardParams& attention = params.attention;
    const HeadStrides& strides = attention.grad_v_strides;
    return {static_cast<T*>(attention.grad_v) +
                row_offset(strides, task.sequence.batch, task.sequence.first_key + task.first_owned,
                           task.kv_head),
            strides.sequence, task.owned, attention.value_dim, params.copy_bytes.grad_v};
}

}  // namespace warploom::attention
