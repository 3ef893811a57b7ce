// Attention forward on the CPU: softmax without a score matrix, tile by tile of keys (online
// softmax: Milakov and Gimelshein 2018). All queries and heads that share a key/value head are rows
// of one tile, so that decoding reads each key and value once.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "attention/attention.h"
#include "attention/tile_cpu.h"
#include "common/cpu_float.h"
#include "common/cpu_math.h"
#include "common/parallel.h"

namespace warploom::attention {
namespace WARPLOOM_CPU_ISA {
namespace {

// A long run of keys is cut into pieces where there are fewer than kEnoughTasks tiles of rows; how,
// depends on the shape alone, so that the result does not depend on the number of threads.
constexpr std::int64_t kEnoughTasks = 64;
constexpr std::int64_t kLeastKeys = 512;

// One tile of rows over one piece of the keys: what is left to divide and to store.
template <typename W>
struct Softmax {
    W* maximum;  // [rows]
    W* total;    // [rows] sum of exp(score - maximum)
    W* sum;      // [rows, padded value_dim] sum of exp(score - maximum) * v
};

struct Shape {
    std::int64_t group;
    std::int64_t rows;  // of one key/value head
    std::int64_t row_tiles;
    std::int64_t pieces;      // of the keys
    std::int64_t piece_keys;  // a multiple of kTile
    std::int64_t tasks;
};

Shape shape_of(const AttentionParams& params) {
    Shape shape{};
    shape.group = params.heads / params.kv_heads;
    shape.rows = shape.group * params.query_length;
    shape.row_tiles = ceil_divide(shape.rows, kTile);
    const std::int64_t tiles = std::int64_t{params.batch} * params.kv_heads * shape.row_tiles;
    const std::int64_t wanted = ceil_divide(kEnoughTasks, std::max<std::int64_t>(tiles, 1));
    const std::int64_t pieces = std::clamp<std::int64_t>(params.key_length / kLeastKeys, 1, wanted);
    shape.piece_keys = ceil_divide(ceil_divide(params.key_length, pieces), kTile) * kTile;
    shape.pieces =
        shape.piece_keys > 0 ? ceil_divide(params.key_length, shape.piece_keys) : std::int64_t{1};
    shape.tasks = tiles * shape.pieces;
    return shape;
}

// Scores become exp(score - maximum); the sums so far are scaled to the new maximum.
template <typename W>
void absorb_scores(W* scores, std::int64_t seen, std::int64_t keys, W scale, W& maximum, W& total,
                   W* sum, std::int64_t columns) {
    W raised = maximum;
#pragma omp simd reduction(max : raised)
    for (std::int64_t j = 0; j < seen; ++j) {
        scores[j] *= scale;
        raised = scores[j] > raised ? scores[j] : raised;
    }
    // A row of minus infinities alone keeps its zeros.
    const W base = raised == -std::numeric_limits<W>::infinity() ? W{0} : raised;
    W added = 0;
#pragma omp simd reduction(+ : added)
    for (std::int64_t j = 0; j < seen; ++j) {
        scores[j] = exponential(scores[j] - base);
        added += scores[j];
    }
    std::fill(scores + seen, scores + keys, W{0});
    const W correction = exponential(maximum - base);
    total = total * correction + added;
    if (correction != W{1}) {
#pragma omp simd
        for (std::int64_t i = 0; i < columns; ++i) {
            sum[i] *= correction;
        }
    }
    maximum = raised;
}

// Rows [first_row, first_row + rows) against the keys [begin, end).
template <typename T>
void attend(const AttentionParams& params, const GroupRows& group, std::int64_t kv_head,
            std::int64_t first_row, std::int64_t rows, std::int64_t begin, std::int64_t end,
            Wide<T>* scratch, const Softmax<Wide<T>>& state) {
    using W = Wide<T>;
    const std::int64_t depth = padded<W>(params.head_dim);
    const std::int64_t columns = padded<W>(params.value_dim);
    W* queries = scratch;
    W* keys = queries + kTile * depth;
    W* values = keys + kTile * depth;
    W* scores = values + kTile * columns;
    for (std::int64_t m = 0; m < rows; ++m) {
        const std::int64_t offset = group.offset(first_row + m, params.q_strides);
        load_row(static_cast<const T*>(params.q) + offset, params.head_dim, queries + m * depth);
        state.maximum[m] = -std::numeric_limits<W>::infinity();
        state.total[m] = 0;
    }
    std::fill_n(state.sum, rows * columns, W{0});
    // Keys that query i sees: j < i + visible.
    const std::int64_t visible = std::int64_t{params.key_length} - params.query_length + 1;
    const std::int64_t last_query = group.query(first_row + rows - 1);
    const std::int64_t stop = params.causal ? std::min(end, last_query + visible) : end;
    const T* k = static_cast<const T*>(params.k) + group.batch * params.k_strides.batch +
                 kv_head * params.k_strides.head;
    const T* v = static_cast<const T*>(params.v) + group.batch * params.v_strides.batch +
                 kv_head * params.v_strides.head;
    for (std::int64_t key = begin; key < stop; key += kTile) {
        const std::int64_t count = std::min(kTile, stop - key);
        for (std::int64_t n = 0; n < count; ++n) {
            load_row(k + (key + n) * params.k_strides.sequence, params.head_dim, keys + n * depth);
            load_row(v + (key + n) * params.v_strides.sequence, params.value_dim,
                     values + n * columns);
        }
        if (count % 2 != 0) {
            std::fill_n(keys + count * depth, depth, W{0});
        }
        dots(queries, rows, keys, count, depth, scores);
        for (std::int64_t m = 0; m < rows; ++m) {
            const std::int64_t limit =
                params.causal ? group.query(first_row + m) + visible - key : count;
            absorb_scores(scores + m * kTile, std::clamp<std::int64_t>(limit, 0, count), count,
                          static_cast<W>(params.softmax_scale), state.maximum[m], state.total[m],
                          state.sum + m * columns, columns);
        }
        add_product(scores, kTile, std::int64_t{1}, rows, values, count, columns, state.sum);
    }
}

// Adds the pieces of a tile up into the first and stores it.
template <typename T>
void finish(const AttentionParams& params, const GroupRows& group, std::int64_t first_row,
            std::int64_t rows, const Softmax<Wide<T>>* pieces, std::int64_t count) {
    using W = Wide<T>;
    constexpr W kNothing = -std::numeric_limits<W>::infinity();
    const std::int64_t columns = padded<W>(params.value_dim);
    for (std::int64_t m = 0; m < rows; ++m) {
        W maximum = kNothing;
        for (std::int64_t piece = 0; piece < count; ++piece) {
            maximum = std::max(maximum, pieces[piece].maximum[m]);
        }
        const W base = maximum == kNothing ? W{0} : maximum;
        W total = 0;
        W* sum = pieces[0].sum + m * columns;
        for (std::int64_t piece = 0; piece < count; ++piece) {
            const W factor = exponential(pieces[piece].maximum[m] - base);
            total += pieces[piece].total[m] * factor;
            const W* from = pieces[piece].sum + m * columns;
#pragma omp simd
            for (std::int64_t i = 0; i < columns; ++i) {
                sum[i] = (piece == 0 ? W{0} : sum[i]) + from[i] * factor;
            }
        }
        const std::int64_t row = first_row + m;
        T* out = static_cast<T*>(params.out) + group.offset(row, params.out_strides);
        store_row(sum, total == W{0} ? W{0} : W{1} / total, params.value_dim, out);
        static_cast<W*>(
            params.lse)[(group.batch * params.heads + group.head(row)) * params.query_length +
                        group.query(row)] = total == W{0} ? kNothing : maximum + std::log(total);
    }
}

template <typename T>
void forward(const AttentionParams& params) {
    using W = Wide<T>;
    const Shape shape = shape_of(params);
    const std::int64_t depth = padded<W>(params.head_dim);
    const std::int64_t columns = padded<W>(params.value_dim);
    const std::int64_t state_size = kTile * (columns + 2);
    const std::int64_t tile_size = kTile * (2 * depth + columns + kTile);
    const bool in_pieces = shape.pieces > 1;
    Scratch<W> saved(in_pieces ? shape.tasks * state_size : 0);
    W* states = saved.take(0);
    const auto state_at = [&](W* memory) {
        return Softmax<W>{memory + kTile * columns, memory + kTile * (columns + 1), memory};
    };
    const auto group_of = [&](std::int64_t tile) {
        const std::int64_t head = tile / shape.row_tiles;
        return GroupRows{shape.group, head % params.kv_heads * shape.group, head / params.kv_heads};
    };
    const auto rows_of = [&](std::int64_t tile) {
        return std::min(kTile, shape.rows - tile % shape.row_tiles * kTile);
    };
    parallel_for(shape.tasks, 1, [&](std::int64_t first, std::int64_t last) {
        Scratch<W> scratch(tile_size + state_size);
        W* tiles = scratch.take(tile_size);
        W* own = scratch.take(state_size);
        for (std::int64_t task = first; task < last; ++task) {
            const std::int64_t tile = task / shape.pieces;
            const std::int64_t begin = task % shape.pieces * shape.piece_keys;
            const Softmax<W> state = state_at(in_pieces ? states + task * state_size : own);
            const std::int64_t first_row = tile % shape.row_tiles * kTile;
            attend<T>(params, group_of(tile), tile / shape.row_tiles % params.kv_heads, first_row,
                      rows_of(tile), begin,
                      std::min<std::int64_t>(begin + shape.piece_keys, params.key_length), tiles,
                      state);
            if (!in_pieces) {
                finish<T>(params, group_of(tile), first_row, rows_of(tile), &state, 1);
            }
        }
    });
    if (!in_pieces) {
        return;
    }
    parallel_for(shape.tasks / shape.pieces, 1, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t tile = first; tile < last; ++tile) {
            Softmax<W> pieces[kEnoughTasks];
            for (std::int64_t piece = 0; piece < shape.pieces; ++piece) {
                pieces[piece] = state_at(states + (tile * shape.pieces + piece) * state_size);
            }
            finish<T>(params, group_of(tile), tile % shape.row_tiles * kTile, rows_of(tile), pieces,
                      shape.pieces);
        }
    });
}

}  // namespace

void attention_forward_cpu(const AttentionParams& params) {
    visit_element_type(params.dtype, [&]<typename T>() { forward<T>(params); });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::attention
