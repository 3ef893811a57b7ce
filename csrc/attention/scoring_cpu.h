// What makes scores of the products of queries and keys, and sums of scores, on CPUs: one row of
// kTileKeys scores at a time. Included by <op>_cpu.cpp only (see common/cpu.h on namespaces).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "attention/tile_cpu.h"
#include "common/cpu_math.h"
#include "common/cpu_philox.h"
#include "common/philox.h"

namespace warploom::attention {
namespace WARPLOOM_CPU_ISA {

template <typename W>
constexpr W kNothing = -std::numeric_limits<W>::infinity();

// Keys [begin, end).
struct KeyRange {
    std::int64_t begin;
    std::int64_t end;
};

// The keys that the window shows to a query with key `diagonal` at distance 0.
inline KeyRange seen_keys(const Scoring& scoring, std::int64_t diagonal, std::int64_t keys) {
    KeyRange range{0, keys};
    if (scoring.window_left >= 0) {
        range.begin = std::max(range.begin, diagonal - scoring.window_left);
    }
    if (scoring.window_right >= 0) {
        range.end = std::min(range.end, diagonal + scoring.window_right + 1);
    }
    return range;
}

// One query row: which it is, and the key at distance 0 from it.
struct RowPlace {
    std::int64_t batch;
    std::int64_t head;
    std::int64_t batch_head;  // batch * heads + head
    std::int64_t query;
    std::int64_t diagonal;
};

// Products with the keys from `first` on become scores; minus infinity where the window or the
// padding hides a key, or where there is none. `slopes` gets the derivative of the soft-cap (null:
// not asked for, or no soft-cap). Returns the seen part of the row.
template <typename T>
KeyRange make_scores(const Scoring& scoring, const RowPlace& place, std::int64_t keys,
                     std::int64_t first, Wide<T>* row, Wide<T>* slopes) {
    using W = Wide<T>;
    const KeyRange seen = seen_keys(scoring, place.diagonal, keys);
    const std::int64_t begin = std::clamp<std::int64_t>(seen.begin - first, 0, kTileKeys);
    const std::int64_t end = std::clamp<std::int64_t>(seen.end - first, begin, kTileKeys);
    const W scale = static_cast<W>(scoring.softmax_scale);
#pragma omp simd
    for (std::int64_t j = 0; j < kTileKeys; ++j) {
        row[j] *= scale;
    }
    if (!scoring.plain()) {
        if (scoring.softcap > 0.0) {
            const W cap = static_cast<W>(scoring.softcap);
#pragma omp simd
            for (std::int64_t j = 0; j < kTileKeys; ++j) {
                row[j] = hyperbolic_tangent(row[j] / cap);
            }
            if (slopes != nullptr) {
#pragma omp simd
                for (std::int64_t j = 0; j < kTileKeys; ++j) {
                    slopes[j] = W{1} - row[j] * row[j];
                }
            }
#pragma omp simd
            for (std::int64_t j = 0; j < kTileKeys; ++j) {
                row[j] *= cap;
            }
        }
        if (scoring.bias != nullptr) {
            const std::int64_t* strides = scoring.bias_strides;
            const T* bias = static_cast<const T*>(scoring.bias) + place.batch * strides[0] +
                            place.head * strides[1] + place.query * strides[2] + first * strides[3];
            if (strides[3] == 1) {
#pragma omp simd
                for (std::int64_t j = begin; j < end; ++j) {
                    row[j] += widen(bias[j]);
                }
            } else {
                for (std::int64_t j = begin; j < end; ++j) {
                    row[j] += widen(bias[j * strides[3]]);
                }
            }
        }
        if (scoring.alibi_slopes != nullptr) {
            const W slope = static_cast<const W*>(scoring.alibi_slopes)[place.batch_head];
            const W start = static_cast<W>(first - place.diagonal);
#pragma omp simd
            for (int j = 0; j < kTileKeys; ++j) {
                row[j] -= slope * std::fabs(start + static_cast<W>(j));
            }
        }
        if (scoring.key_padding_mask != nullptr) {
            const bool* hidden = scoring.key_padding_mask + place.batch * keys + first;
            for (std::int64_t j = begin; j < end; ++j) {
                row[j] = hidden[j] ? kNothing<W> : row[j];
            }
        }
    }
    std::fill(row, row + begin, kNothing<W>);
    std::fill(row + end, row + kTileKeys, kNothing<W>);
    return {begin, end};
}

// factors[j] is 1 where dropout keeps the probability of key first + j, else 0. `first` is a
// multiple of 4.
template <typename W>
void draw_dropout(const Scoring& scoring, const RowPlace& place, std::int64_t first, W* factors) {
    const std::uint32_t threshold = dropout_threshold(scoring.dropout_p);
    std::uint32_t numbers[kTileKeys];
    draw_philox<kTileKeys / 4>(static_cast<std::uint64_t>(*scoring.dropout_seed),
                               static_cast<std::uint32_t>(first / 4),
                               static_cast<std::uint32_t>(place.query),
                               static_cast<std::uint32_t>(place.batch_head), numbers);
#pragma omp simd
    for (int j = 0; j < kTileKeys; ++j) {
        factors[j] = numbers[j] < threshold ? W{0} : W{1};
    }
}

// Of one row, over the keys so far: with the maximum m of the scores, the sum of exp(score - m) and
// the sum of exp(score - m) v. A sink is a key whose v is 0.
template <typename W>
struct Softmax {
    W maximum;
    W total;

    static Softmax start(const Scoring& scoring, std::int64_t head) {
        if (scoring.sinks == nullptr) {
            return {kNothing<W>, W{0}};
        }
        return {static_cast<const W*>(scoring.sinks)[head], W{1}};
    }

    // A row of scores becomes exp(score - maximum), and `sum` follows the new maximum.
    void absorb(W* row, W* sum, std::int64_t columns) {
        W raised = maximum;
#pragma omp simd reduction(max : raised)
        for (std::int64_t j = 0; j < kTileKeys; ++j) {
            raised = row[j] > raised ? row[j] : raised;
        }
        // A row of minus infinities alone keeps its zeros.
        const W base = raised == kNothing<W> ? W{0} : raised;
        W added = 0;
#pragma omp simd reduction(+ : added)
        for (std::int64_t j = 0; j < kTileKeys; ++j) {
            row[j] = exponential_of_negative(row[j] - base);
            added += row[j];
        }
        if (raised != maximum) {
            const W correction = exponential_of_negative(maximum - base);
            total *= correction;
#pragma omp simd
            for (std::int64_t i = 0; i < columns; ++i) {
                sum[i] *= correction;
            }
            maximum = raised;
        }
        total += added;
    }

    // Adds pieces of the row's keys to what has no sum yet, a sink or nothing: piece p has
    // states[p * state_stride] and the sum in sums[p * sum_stride]. `sum` gets that of all.
    void merge(const Softmax* states, std::int64_t state_stride, const W* sums,
               std::int64_t sum_stride, std::int64_t pieces, std::int64_t columns, W* sum) {
        const W own = maximum;
        for (std::int64_t piece = 0; piece < pieces; ++piece) {
            maximum = std::max(maximum, states[piece * state_stride].maximum);
        }
        const W base = maximum == kNothing<W> ? W{0} : maximum;
        total *= exponential(own - base);
        std::fill_n(sum, columns, W{0});
        for (std::int64_t piece = 0; piece < pieces; ++piece) {
            const Softmax& state = states[piece * state_stride];
            const W factor = exponential(state.maximum - base);
            const W* from = sums + piece * sum_stride;
            total += state.total * factor;
#pragma omp simd
            for (std::int64_t i = 0; i < columns; ++i) {
                sum[i] += from[i] * factor;
            }
        }
    }

    W log_sum() const { return total == W{0} ? kNothing<W> : maximum + std::log(total); }
};

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::attention
