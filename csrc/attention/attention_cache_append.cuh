// Writes new keys, rotated where there are tables, and values to the places of a cache that follow
// each sequence's rows. Every element is read once and written once.
#pragma once

#include "attention/attention_decode.h"
#include "common/index.cuh"
#include "common/vec.cuh"
#include "rope/rotary.cuh"

namespace warploom::attention {

// A thread takes one piece of a head: kVector pairs of a key that turn (two vectors), or kVector
// elements of a key or a value that are copied (one).
template <typename Element, int kVector>
using AppendTraits = rope::RotaryTraits<Element, kVector>;

struct AppendWork {
    CacheAppendParams params;
    int turning_pieces;  // of one key head, before its copied ones
    int key_pieces;      // of one key head
    int pieces;          // of one head, of key and value
    std::int64_t items;  // threads that have work
};

template <typename Traits>
AppendWork append_work(const CacheAppendParams& params) {
    AppendWork work{.params = params};
    work.turning_pieces = params.rotary_dim / 2 / Traits::kVector;
    work.key_pieces = work.turning_pieces + (params.head_dim - params.rotary_dim) / Traits::kVector;
    work.pieces = work.key_pieces + params.value_dim / Traits::kVector;
    work.items = static_cast<std::int64_t>(params.batch) * params.count * params.kv_heads *
                 static_cast<std::int64_t>(work.pieces);
    return work;
}

// Where a row of a cache lies: a sequence of it, or a block, and the row of that. A negative block
// has no rows.
struct CacheRow {
    std::int64_t block;
    std::int64_t slot;
};

WARPLOOM_DEVICE CacheRow cache_row(const CacheAppendParams& params, std::int64_t batch,
                                   std::int64_t position) {
    if (position >= params.capacity) {
        return {-1, 0};
    }
    if (params.block_table == nullptr) {
        return {batch, position};
    }
    const Division place = divide(position, params.page_size);
    return {params.block_table[batch * params.block_table_stride + place.quotient],
            place.remainder};
}

// Turns kVector pairs of a key, whose first number is `pair`, on the way to the cache.
template <typename Traits>
WARPLOOM_DEVICE void append_turned(const CacheAppendParams& params,
                                   const typename Traits::Element* key,
                                   typename Traits::Element* cached, int pair,
                                   std::int64_t position) {
    constexpr int kVector = Traits::kVector;
    const int half = params.rotary_dim / 2;
    const std::int64_t row = position < params.table_rows ? position : params.table_rows - 1;
    float cos[kVector];
    float sin[kVector];
    load_floats(static_cast<const float*>(params.cos) + row * half + pair, cos);
    load_floats(static_cast<const float*>(params.sin) + row * half + pair, sin);
    const int first_channel = params.interleaved ? 2 * pair : pair;
    const int second_channel = params.interleaved ? 2 * pair + kVector : pair + half;
    auto first = load_packed<kVector>(key + first_channel);
    auto second = load_packed<kVector>(key + second_channel);
    rope::turn<Traits>(first, second, cos, sin, params.interleaved);
    store_packed(cached + first_channel, first);
    store_packed(cached + second_channel, second);
}

// grid [ceil(items / kThreads)], items beyond by a stride of the grid; the pieces of a head
// fastest, then heads, tokens, sequences
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 8)
attention_cache_append_kernel(WARPLOOM_GRID_CONSTANT AppendWork work) {
    using T = typename Traits::Element;
    constexpr int kVector = Traits::kVector;
    const CacheAppendParams& params = work.params;

    WARPLOOM_NO_UNROLL
    for (std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * Traits::kThreads + threadIdx.x;
         item < work.items; item += static_cast<std::int64_t>(gridDim.x) * Traits::kThreads) {
        const Division by_piece = divide(item, work.pieces);
        const Division by_head = divide(by_piece.quotient, params.kv_heads);
        const Division by_token = divide(by_head.quotient, params.count);
        const int piece = static_cast<int>(by_piece.remainder);
        const std::int64_t head = by_head.remainder;
        const std::int64_t token = by_token.remainder;
        const std::int64_t batch = by_token.quotient;
        const std::int64_t position = params.cache_seqlens[batch] + token;
        const CacheRow row = cache_row(params, batch, position);
        if (row.block < 0) {
            continue;
        }
        const auto source = [&](const void* tensor, const HeadStrides& strides) {
            return static_cast<const T*>(tensor) + batch * strides.batch +
                   token * strides.sequence + head * strides.head;
        };
        const auto destination = [&](void* cache, const HeadStrides& strides) {
            return static_cast<T*>(cache) + row.block * strides.batch +
                   row.slot * strides.sequence + head * strides.head;
        };
        if (piece < work.key_pieces) {
            const T* key = source(params.k, params.k_strides);
            T* cached = destination(params.k_cache, params.k_cache_strides);
            if (piece < work.turning_pieces) {
                append_turned<Traits>(params, key, cached, piece * kVector, position);
            } else {
                const int channel = params.rotary_dim + (piece - work.turning_pieces) * kVector;
                store_packed(cached + channel, load_packed<kVector>(key + channel));
            }
        } else {
            const int channel = (piece - work.key_pieces) * kVector;
            store_packed(destination(params.v_cache, params.v_cache_strides) + channel,
                         load_packed<kVector>(source(params.v, params.v_strides) + channel));
        }
    }
}

}  // namespace warploom::attention
