// What the kernels of absorbed backward share: parameters, the part of the problem that a block
// has, its shared memory and how that is filled.
//
// All heads read one row of kv for a key, so the rows of one batch entry are a matrix of queries
// [query_length * heads, d_latent + d_rope], the head fastest, and one of keys. A block owns rows
// of one side and walks over tiles of the other, which pass by. The first tensor of a side makes
// the scores, the second one the gradients of the probabilities:
//   gradient   owned rows     passing rows
//   grad_q     q, grad_out    kv, kv          the second kv: its first d_latent columns
//   grad_kv    kv, kv         q, grad_out
// So one block sums a gradient in one order: no atomics, the same bits in every run. Where keys are
// few and queries many, several blocks share the keys of one and have a part of the queries each.
#pragma once

#include "attention/attention_tile.cuh"
#include "mla/mla_absorbed_backward.h"

namespace warploom::mla {

using attention::kInfinity;
using attention::kLog2E;

struct BackwardKernelParams {
    MlaAbsorbedBackwardParams mla;
    float softmax_scale;
    int rows;   // query_length * heads.
    int tiles;  // Owned tiles of one batch entry.
    struct {    // As attention::copy_bytes.
        int q;
        int kv;
        int grad_out;
    } copy_bytes;
};

// Sizes that all dtypes have in common. Numbers of columns are known at run time; they are
// multiples of 16.
struct BackwardSizes {
    static constexpr int kMaxLatent = 512;
    static constexpr int kMaxRope = 256;
    static constexpr int kMaxColumns = kMaxLatent + kMaxRope;
    static constexpr int kWarps = 8;
    static constexpr int kThreads = kWarps * device::kWarpSize;
    // Warp w sums the columns [16 g, 16 g + 16) of the gradient, g = w, w + kWarps, ...
    static constexpr int kGroups = kMaxColumns / 16 / kWarps;
};

// One block's part of the problem. Rows count from the beginning of their batch entry.
struct BackwardTask {
    int batch;
    int part;  // Of the queries, where the block owns keys.
    int keys;  // Rows of kv that count.
    int first_owned;
    int first_tile;  // Passing tiles that may meet the owned rows.
    int end_tile;
};

// The query of row r sees the keys before end_key(r), all in front of `keys`.
WARPLOOM_DEVICE int end_key(const MlaAbsorbedBackwardParams& mla, int keys, int row) {
    const int end = row / mla.heads + keys - mla.query_length + 1;
    return mla.causal && end < keys ? end : keys;
}

// The place of row r in lse, grad_lse and delta.
WARPLOOM_DEVICE std::int64_t statistics_offset(const MlaAbsorbedBackwardParams& mla, int batch,
                                               int row) {
    const int query = row / mla.heads;
    const int head = row - query * mla.heads;
    return (static_cast<std::int64_t>(batch) * mla.heads + head) * mla.query_length + query;
}

// Blocks are numbered with the owned tile fastest, so that those that run at one time share the
// passing rows in the L2 cache. Under a causal mask the last queries and the first keys have most
// to do and start first.
template <typename Traits>
WARPLOOM_DEVICE BackwardTask backward_task(const BackwardKernelParams& params) {
    constexpr int kPassing = Traits::kPassingRows;
    const MlaAbsorbedBackwardParams& mla = params.mla;
    const int block = static_cast<int>(blockIdx.x);
    const int parts = Traits::kOwnsQueries ? 1 : mla.query_parts;
    const int batch_part = block / params.tiles;
    const int tile = block - batch_part * params.tiles;
    BackwardTask task = {};
    task.batch = batch_part / parts;
    task.part = batch_part - task.batch * parts;
    task.keys = mla.kv_seqlens[task.batch];
    if constexpr (Traits::kOwnsQueries) {
        task.first_owned = (mla.causal ? params.tiles - 1 - tile : tile) * Traits::kOwnedRows;
        const int end_row = task.first_owned + Traits::kOwnedRows;
        const int last_row = (end_row < params.rows ? end_row : params.rows) - 1;
        const int end = end_key(mla, task.keys, last_row);
        task.end_tile = end > 0 ? (end - 1) / kPassing + 1 : 0;
    } else {
        task.first_owned = tile * Traits::kOwnedRows;
        if (task.first_owned < task.keys) {
            const int query = task.first_owned - task.keys + mla.query_length;
            const int first = mla.causal && query > 0 ? query * mla.heads / kPassing : 0;
            const int end = (params.rows + kPassing - 1) / kPassing;
            const int part_tiles = (end - first + parts - 1) / parts;
            task.first_tile = first + task.part * part_tiles;
            const int part_end = task.first_tile + part_tiles;
            task.end_tile = part_end < end ? part_end : end;
        }
    }
    return task;
}

// Rows of a tensor in global memory, of which `rows` and `columns` exist: row r is
// [r / inner, r % inner]. What lies behind them is never read.
template <typename T>
struct SourceRows {
    const T* first;
    std::int64_t outer_stride;
    std::int64_t inner_stride;
    int inner;
    int rows;
    int columns;
    int copy_bytes;

    WARPLOOM_DEVICE const T* row(int index) const {
        const int outer = index / inner;
        return first + outer * outer_stride + (index - outer * inner) * inner_stride;
    }
};

template <typename T>
WARPLOOM_DEVICE SourceRows<T> rows_of_q(const BackwardKernelParams& params, int batch) {
    const MlaAbsorbedBackwardParams& mla = params.mla;
    return {static_cast<const T*>(mla.q) + batch * mla.q_batch_stride,
            mla.q_sequence_stride,
            mla.q_head_stride,
            mla.heads,
            params.rows,
            mla.d_latent + mla.d_rope,
            params.copy_bytes.q};
}

template <typename T>
WARPLOOM_DEVICE SourceRows<T> rows_of_grad_out(const BackwardKernelParams& params, int batch) {
    const MlaAbsorbedBackwardParams& mla = params.mla;
    return {static_cast<const T*>(mla.grad_out) + batch * mla.grad_out_batch_stride,
            mla.grad_out_sequence_stride,
            mla.grad_out_head_stride,
            mla.heads,
            params.rows,
            mla.d_latent,
            params.copy_bytes.grad_out};
}

template <typename T>
WARPLOOM_DEVICE SourceRows<T> rows_of_kv(const BackwardKernelParams& params,
                                         const BackwardTask& task) {
    const MlaAbsorbedBackwardParams& mla = params.mla;
    return {static_cast<const T*>(mla.kv) + task.batch * mla.kv_batch_stride,
            mla.kv_row_stride,
            0,
            1,
            task.keys,
            mla.d_latent + mla.d_rope,
            params.copy_bytes.kv};
}

// What a block's owned rows are taken from; `second`: for the gradients of the probabilities.
template <typename Traits>
WARPLOOM_DEVICE SourceRows<typename Traits::Element> owned_source(
    const BackwardTask& task, const BackwardKernelParams& params, bool second) {
    using T = typename Traits::Element;
    if constexpr (Traits::kOwnsQueries) {
        return second ? rows_of_grad_out<T>(params, task.batch) : rows_of_q<T>(params, task.batch);
    } else {
        SourceRows<T> source = rows_of_kv<T>(params, task);
        source.columns = second ? params.mla.d_latent : source.columns;
        return source;
    }
}

// Rows in shared memory. 16 more bytes than columns: the same 16 bytes of 8 consecutive rows lie in
// 8 different groups of 4 banks.
template <typename T, int kRows, int kColumns>
struct alignas(16) TileRows {
    static constexpr int kStride = kColumns + Chunk<T>::kSize;
    T elements[kRows][kStride];

    WARPLOOM_DEVICE const T* row(int index) const { return elements[index]; }
};

// Of both sides: the rows that make the scores, and those that make the gradients of the
// probabilities.
template <typename T, int kRows>
struct QueryTile {
    using First = TileRows<T, kRows, BackwardSizes::kMaxColumns>;
    using Second = TileRows<T, kRows, BackwardSizes::kMaxLatent>;
    First q;
    Second grad_out;

    WARPLOOM_DEVICE const T* first(int row) const { return q.row(row); }
    WARPLOOM_DEVICE const T* second(int row) const { return grad_out.row(row); }
};

template <typename T, int kRows>
struct KeyTile {
    using First = TileRows<T, kRows, BackwardSizes::kMaxColumns>;
    using Second = First;
    First kv;

    WARPLOOM_DEVICE const T* first(int row) const { return kv.row(row); }
    WARPLOOM_DEVICE const T* second(int row) const { return kv.row(row); }
};

template <int kRows>
struct QueryStatistics {
    float lse[kRows];
    float delta[kRows];
    float grad_lse[kRows];
    int end_key[kRows];
};

// Matrices of owned and passing rows lie as [passing / 8][owned][passing % 8]: neighbouring lanes
// of the fragments of a product, and the rows of a matrix load, meet different banks.
template <typename Traits>
struct BackwardPlan {
    using T = typename Traits::Element;
    static constexpr int kElements = Traits::kOwnedRows * Traits::kPassingRows;

    typename Traits::PassingTile passing[Traits::kStages];
    typename Traits::OwnedTile owned;
    QueryStatistics<Traits::kQueries> statistics[Traits::kOwnsQueries ? 1 : Traits::kStages];
    // Products of the first tensors, then of the second ones, each in kDepthParts parts.
    alignas(16) float products[2][Traits::kDepthParts][kElements];
    alignas(16) T probabilities[kElements];
    alignas(16) T score_grads[kElements];
};

// Starts filling a tile with rows from `first_row` on, by all threads of the block; zeros where the
// source has no rows: they add nothing to any sum. Complete after the caller's commit, the wait for
// it and a barrier.
template <typename T, int kRows, int kColumns>
WARPLOOM_DEVICE void fill_rows(TileRows<T, kRows, kColumns>& tile, const SourceRows<T>& source,
                               int first_row) {
    for (int row = device::warp_index(); row < kRows; row += BackwardSizes::kWarps) {
        const bool exists = first_row + row < source.rows;
        const T* from = source.row(exists ? first_row + row : 0);
        T* to = tile.elements[row];
        if (source.copy_bytes == 16) {
            for (int column = device::lane_index() * Chunk<T>::kSize; column < source.columns;
                 column += device::kWarpSize * Chunk<T>::kSize) {
                device::copy_async<16>(to + column, from + column, exists);
            }
        } else {
            for (int column = device::lane_index(); column < source.columns;
                 column += device::kWarpSize) {
                to[column] = exists ? from[column] : device::from_float<T>(0.0f);
            }
        }
    }
}

template <typename T, int kRows>
WARPLOOM_DEVICE void fill_tile(QueryTile<T, kRows>& tile, const BackwardTask& task,
                               const BackwardKernelParams& params, int first_row) {
    fill_rows(tile.q, rows_of_q<T>(params, task.batch), first_row);
    fill_rows(tile.grad_out, rows_of_grad_out<T>(params, task.batch), first_row);
}

template <typename T, int kRows>
WARPLOOM_DEVICE void fill_tile(KeyTile<T, kRows>& tile, const BackwardTask& task,
                               const BackwardKernelParams& params, int first_row) {
    fill_rows(tile.kv, rows_of_kv<T>(params, task), first_row);
}

// The same for the numbers of the queries. One that does not exist sees no key.
template <int kRows>
WARPLOOM_DEVICE void fill_statistics(QueryStatistics<kRows>& statistics, const BackwardTask& task,
                                     const BackwardKernelParams& params, int first_row) {
    const MlaAbsorbedBackwardParams& mla = params.mla;
    const int index = static_cast<int>(threadIdx.x);
    if (index < kRows) {
        const int row = first_row + index;
        const bool exists = row < params.rows;
        const std::int64_t place = statistics_offset(mla, task.batch, row);
        const auto copy = [&](float* to, const void* from, bool valid) {
            device::copy_async<4>(to + index, static_cast<const float*>(from) + place, valid);
        };
        copy(statistics.lse, mla.lse, exists);
        copy(statistics.delta, mla.delta, exists);
        copy(statistics.grad_lse, mla.grad_lse, exists && mla.grad_lse != nullptr);
        statistics.end_key[index] = exists ? end_key(mla, task.keys, row) : 0;
    }
}

template <typename Traits>
WARPLOOM_DEVICE void fill_passing(typename Traits::SharedPlan& shared, const BackwardTask& task,
                                  const BackwardKernelParams& params, int tile) {
    const int stage = tile % Traits::kStages;
    const int first_row = tile * Traits::kPassingRows;
    fill_tile(shared.passing[stage], task, params, first_row);
    if constexpr (!Traits::kOwnsQueries) {
        fill_statistics(shared.statistics[stage], task, params, first_row);
    }
}

}  // namespace warploom::mla
