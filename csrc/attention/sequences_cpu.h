// Where the rows of a sequence lie, dense, packed or in pages, for the attention of CPUs. Included
// by <op>_cpu.cpp only (see common/cpu.h on namespaces).
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/attention.h"
#include "attention/scoring_cpu.h"

namespace warploom::attention {
namespace WARPLOOM_CPU_ISA {

// Query rows of a tile. The rows of a key/value head are the queries of all heads that read it: row
// r is query r / group of its head r % group.
constexpr std::int64_t kTileRows = 128;

// One sequence: how long it is, and where its rows begin in packed tensors.
struct Sequence {
    std::int64_t batch;
    std::int64_t first_query;
    std::int64_t first_key;
    std::int64_t queries;
    std::int64_t keys;

    // The key at distance 0 from query 0.
    std::int64_t diagonal() const { return keys - queries; }

    std::int64_t query_offset(std::int64_t query, std::int64_t head,
                              const HeadStrides& strides) const {
        return batch * strides.batch + (first_query + query) * strides.sequence +
               head * strides.head;
    }

    std::int64_t key_offset(const Sequences& sequences, std::int64_t key, std::int64_t head,
                            const HeadStrides& strides) const {
        std::int64_t block = batch;
        std::int64_t slot = first_key + key;
        if (sequences.block_table != nullptr) {
            block =
                sequences
                    .block_table[batch * sequences.block_table_stride + key / sequences.page_size];
            slot = key % sequences.page_size;
        }
        return block * strides.batch + slot * strides.sequence + head * strides.head;
    }

    // The queries that the window shows one of the keys.
    KeyRange queries_that_see(const Scoring& scoring, const KeyRange& seen) const {
        std::int64_t begin = 0;
        std::int64_t end = queries;
        if (scoring.window_right >= 0) {
            begin = std::max(begin, seen.begin - scoring.window_right - diagonal());
        }
        if (scoring.window_left >= 0) {
            end = std::min(end, seen.end + scoring.window_left - diagonal());
        }
        return {begin, std::max(begin, end)};
    }
};

inline Sequence sequence_of(const Sequences& sequences, std::int64_t batch) {
    if (sequences.cu_seqlens_q == nullptr) {
        return {batch, 0, 0, sequences.query_length, sequences.key_length};
    }
    const std::int64_t query = sequences.cu_seqlens_q[batch];
    const std::int64_t key = sequences.cu_seqlens_k[batch];
    return {batch, query, key, sequences.cu_seqlens_q[batch + 1] - query,
            sequences.cu_seqlens_k[batch + 1] - key};
}

// The last of `count` ascending numbers that is at most `value`; the first one is.
template <typename Number>
std::int64_t last_at_most(const Number* numbers, std::int64_t count, std::int64_t value) {
    std::int64_t begin = 0;
    for (std::int64_t end = count; end - begin > 1;) {
        const std::int64_t middle = (begin + end) / 2;
        (numbers[middle] <= value ? begin : end) = middle;
    }
    return begin;
}

// Tiles of up to kTileRows rows, kTileKeys keys and their scores in scratch memory.
template <typename T>
struct Tiles {
    using Term = typename Terms<T>::Term;

    // Terms of a row.
    static std::int64_t stride(std::int64_t columns) {
        return Terms<T>::count(padded<Wide<T>>(columns));
    }

    // The keys of `range`, row by row, in `rows`, and with `transposed` [head_dim, kTileKeys]
    // there.
    static void load_keys(const void* tensor, const HeadStrides& strides, std::int64_t columns,
                          const Sequences& sequences, const Sequence& sequence, std::int64_t head,
                          const KeyRange& range, Term* rows, Term* transposed) {
        for (std::int64_t key = range.begin; key < range.end; ++key) {
            Terms<T>::load_row(
                static_cast<const T*>(tensor) + sequence.key_offset(sequences, key, head, strides),
                columns, rows + (key - range.begin) * stride(columns));
        }
        // What the transpose of an incomplete tile has in its last columns goes nowhere, but must
        // not be slow to compute with.
        const std::int64_t missing = kTileKeys - (range.end - range.begin);
        std::fill_n(rows + (kTileKeys - missing) * stride(columns), missing * stride(columns),
                    Term{});
        if (transposed != nullptr) {
            transpose(rows, stride(columns), transposed);
        }
    }

    static void load_queries(const void* tensor, const HeadStrides& strides, std::int64_t columns,
                             const Sequence& sequence, std::int64_t first_head, std::int64_t group,
                             std::int64_t first_row, std::int64_t count, Term* rows) {
        for (std::int64_t row = first_row; row < first_row + count; ++row) {
            Terms<T>::load_row(
                static_cast<const T*>(tensor) +
                    sequence.query_offset(row / group, first_head + row % group, strides),
                columns, rows + (row - first_row) * stride(columns));
        }
    }
};

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::attention
