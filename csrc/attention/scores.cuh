// What makes scores of the products of queries and keys, shared by the kernels: where a sequence
// lies, which keys a query sees, the terms of a score, dropout.
//
// Scores are in units of log2(e): exp(s) is then exp2 of what the kernels hold.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "attention/attention.h"
#include "common/philox.h"
#include "device/device.cuh"

namespace warploom::attention {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kLog2E = 1.44269504088896341f;
inline constexpr float kLogE2 = 0.693147180559945309f;

// Sequences are shorter than this, so that sums of two indices stay below 2^31.
inline constexpr int kMaxLength = 1 << 30;

// One entry of the batch. The tensors' rows first_query and first_key are its query 0 and key 0.
struct Sequence {
    int batch;
    int first_query;
    int first_key;
    int queries;
    int keys;
};

WARPLOOM_DEVICE Sequence sequence_of(const Sequences& sequences, int batch) {
    if (sequences.cu_seqlens_q == nullptr) {
        return {batch, 0, 0, sequences.query_length, sequences.key_length};
    }
    const int first_query = sequences.cu_seqlens_q[batch];
    const int first_key = sequences.cu_seqlens_k[batch];
    return {batch, first_query, first_key, sequences.cu_seqlens_q[batch + 1] - first_query,
            sequences.cu_seqlens_k[batch + 1] - first_key};
}

// Query i sees key j if i + first <= j < i + end and j < keys. No limit is +-kMaxLength.
struct KeyWindow {
    int first;
    int end;
    int keys;

    WARPLOOM_DEVICE int first_key(int query) const { return query + first > 0 ? query + first : 0; }
    WARPLOOM_DEVICE int end_key(int query) const { return query + end < keys ? query + end : keys; }
};

WARPLOOM_DEVICE KeyWindow window_of(const Scoring& scoring, const Sequence& sequence) {
    const int diagonal = sequence.keys - sequence.queries;  // The key at query 0.
    KeyWindow window = {-kMaxLength, kMaxLength, sequence.keys};
    if (scoring.window_left >= 0 && diagonal - scoring.window_left > window.first) {
        window.first = diagonal - scoring.window_left;
    }
    if (scoring.window_right >= 0 && diagonal + scoring.window_right < window.end) {
        window.end = diagonal + scoring.window_right + 1;
    }
    return window;
}

// The numbers of a Scoring as the kernels use them, made by the host.
struct ScoreConstants {
    float scale;     // Of the products: softmax_scale log2(e), with a soft-cap softmax_scale / cap.
    float soft_cap;  // softcap log2(e); 0: none.
    float keep_factor;         // Of the probabilities that dropout leaves: 1 / (1 - dropout_p).
    std::uint32_t drop_below;  // Smaller random numbers drop a probability.
};

inline ScoreConstants score_constants(const Scoring& scoring) {
    constexpr double kLog2OfE = 1.44269504088896341;
    const double cap = scoring.softcap;
    return {
        .scale = static_cast<float>(scoring.softmax_scale * (cap > 0.0 ? 1.0 / cap : kLog2OfE)),
        .soft_cap = static_cast<float>(cap * kLog2OfE),
        .keep_factor = static_cast<float>(1.0 / (1.0 - scoring.dropout_p)),
        .drop_below = dropout_threshold(scoring.dropout_p),
    };
}

// tanh for the soft-cap of tensors of T. For 16-bit types to 2^-22 of 1, which is enough for them;
// tanh_approximate's 2^-11 is not.
template <typename T>
WARPLOOM_DEVICE float soft_cap_tanh(float value) {
    if constexpr (std::is_same_v<T, float>) {
        return tanhf(value);
    } else {
        const float power = device::exp2_approximate(2.0f * kLog2E * value);
        return 1.0f - 2.0f * device::reciprocal_approximate(power + 1.0f);
    }
}

// The functions below go over the scores that a thread holds: for_each(visit) calls
// visit(score, query, key), `score` by reference, for each of them. Queries and keys count from the
// beginning of the sequence; those that it does not have may be among them.

// Products q k^T become scores without bias.
template <typename T, typename ForEach>
WARPLOOM_DEVICE void scale_products(const ForEach& for_each, const ScoreConstants& constants) {
    if (constants.soft_cap == 0.0f) {
        for_each([&](float& score, int, int) { score *= constants.scale; });
    } else {
        for_each([&](float& score, int, int) {
            score = constants.soft_cap * soft_cap_tanh<T>(score * constants.scale);
        });
    }
}

// Adds what depends on query and key alone, for tensors of T: the bias, ALiBi's distances, and -inf
// for padding. A hidden key of the window may have any bias: hide_keys comes later.
template <typename T, typename ForEach>
WARPLOOM_DEVICE void add_score_terms(const ForEach& for_each, const Scoring& scoring,
                                     const Sequence& sequence, int heads, int head) {
    if (scoring.bias != nullptr) {
        const T* bias = static_cast<const T*>(scoring.bias) +
                        sequence.batch * scoring.bias_strides[0] + head * scoring.bias_strides[1];
        for_each([&](float& score, int query, int key) {
            if (query < sequence.queries && key < sequence.keys) {
                score += kLog2E *
                         device::to_float(
                             bias[query * scoring.bias_strides[2] + key * scoring.bias_strides[3]]);
            }
        });
    }
    if (scoring.alibi_slopes != nullptr) {
        const std::int64_t row = static_cast<std::int64_t>(sequence.batch) * heads + head;
        const float slope = kLog2E * static_cast<const float*>(scoring.alibi_slopes)[row];
        const int diagonal = sequence.keys - sequence.queries;
        for_each([&](float& score, int query, int key) {
            score -= slope * fabsf(static_cast<float>(key - query - diagonal));
        });
    }
    if (scoring.key_padding_mask != nullptr) {
        const bool* hidden =
            scoring.key_padding_mask + static_cast<std::int64_t>(sequence.batch) * sequence.keys;
        for_each([&](float& score, int, int key) {
            if (key < sequence.keys && hidden[key]) {
                score = -kInfinity;
            }
        });
    }
}

// The scores of keys outside the window, or behind the last one, become -inf.
template <typename ForEach>
WARPLOOM_DEVICE void hide_keys(const ForEach& for_each, const KeyWindow& window) {
    for_each([&](float& score, int query, int key) {
        if (key < window.first_key(query) || key >= window.end_key(query)) {
            score = -kInfinity;
        }
    });
}

// The random numbers of the keys 4 quad to 4 quad + 3 of a query: one below constants.drop_below
// drops the probability.
WARPLOOM_DEVICE PhiloxNumbers dropout_numbers(const Scoring& scoring, const Sequence& sequence,
                                              int heads, int head, int query, int quad) {
    return philox(static_cast<std::uint64_t>(*scoring.dropout_seed),
                  static_cast<std::uint32_t>(quad), static_cast<std::uint32_t>(query),
                  static_cast<std::uint32_t>(sequence.batch * heads + head), 0);
}

// Whether dropout drops the probability of one key.
WARPLOOM_DEVICE bool is_dropped(const Scoring& scoring, const ScoreConstants& constants,
                                const Sequence& sequence, int heads, int head, int query, int key) {
    const PhiloxNumbers numbers = dropout_numbers(scoring, sequence, heads, head, query, key / 4);
    // Not numbers.values[key % 4]: an array with a variable index does not stay in registers.
    const std::uint32_t low = key % 2 == 0 ? numbers.values[0] : numbers.values[1];
    const std::uint32_t high = key % 2 == 0 ? numbers.values[2] : numbers.values[3];
    return (key % 4 < 2 ? low : high) < constants.drop_below;
}

}  // namespace warploom::attention
