// What happens to each score between the products of a backward kernel, for all dtypes: it becomes
// a probability, then the gradient of the score.
//
// Traits name the scores that a lane holds by one index below kElements, and give its place in the
// warp's kWarpRows x kScoreRows scores: row(index), column(index).
#pragma once

#include "attention/attention_backward_block.cuh"

namespace warploom::attention {

// How much of some keys some queries see.
enum class Sight { none, some, all };

// The rows of this warp and kScoreRows passing rows, as queries and keys.
struct ScoreTile {
    int owned;  // First row of the warp, in the block's tile.
    int kept;   // First passing row, in shared memory.
    int query;  // First query, in the sequence.
    int key;    // First key, in the sequence.
    int head;   // Of the queries.
    Sight seen;
};

// The passing rows from `part` on of tile number `index`.
template <typename Traits>
WARPLOOM_DEVICE ScoreTile score_tile(const BackwardTask& task, int index, int part) {
    constexpr int kQueries = Traits::kOwnsQueries ? Traits::kWarpRows : Traits::kScoreRows;
    constexpr int kKeys = Traits::kOwnsQueries ? Traits::kScoreRows : Traits::kWarpRows;
    const PassingTile passing = passing_tile<Traits>(task, index);
    const int owned = device::warp_index() * Traits::kWarpRows;
    const int owned_row = task.first_owned + owned;
    const int passing_row = passing.first + part;

    ScoreTile tile = {owned,     passing.kept + part, passing_row,
                      owned_row, passing.head,        Sight::some};
    if constexpr (Traits::kOwnsQueries) {
        tile.query = owned_row;
        tile.key = passing_row;
    }
    const KeyWindow& window = task.window;
    const int last_query = tile.query + kQueries - 1;
    if (tile.key + kKeys <= window.first_key(tile.query) ||
        tile.key >= window.end_key(last_query)) {
        tile.seen = Sight::none;
    } else if (tile.key >= window.first_key(last_query) &&
               tile.key + kKeys <= window.end_key(tile.query)) {
        tile.seen = Sight::all;
    }
    return tile;
}

template <typename Traits>
WARPLOOM_DEVICE int query_of(const ScoreTile& tile, int index) {
    return tile.query + (Traits::kOwnsQueries ? Traits::row(index) : Traits::column(index));
}

template <typename Traits>
WARPLOOM_DEVICE int key_of(const ScoreTile& tile, int index) {
    return tile.key + (Traits::kOwnsQueries ? Traits::column(index) : Traits::row(index));
}

// The place of the query's lse and delta in shared memory.
template <typename Traits>
WARPLOOM_DEVICE int statistics_of(const ScoreTile& tile, int index) {
    return Traits::kOwnsQueries ? tile.owned + Traits::row(index)
                                : tile.kept + Traits::column(index);
}

// What else a lane knows of its scores. Kernels without features hold none of it.
template <typename Traits>
struct ScoreFeatures {
    float slopes[Traits::kElements];  // Of the soft-cap: 1 - tanh^2.
    std::uint32_t kept;               // Bit `index`: dropout leaves the probability.
    static_assert(Traits::kElements <= 32, "ScoreFeatures: one bit for each score");
};

// Draws which probabilities stay.
template <typename Traits>
WARPLOOM_DEVICE std::uint32_t draw_kept(const BackwardTask& task,
                                        const BackwardKernelParams& params, const ScoreTile& tile) {
    std::uint32_t kept = 0;
    WARPLOOM_NO_UNROLL
    for (int index = 0; index < Traits::kElements; ++index) {
        const bool dropped = is_dropped(params.attention.scoring, params.constants, task.sequence,
                                        params.attention.heads, tile.head,
                                        query_of<Traits>(tile, index), key_of<Traits>(tile, index));
        kept |= static_cast<std::uint32_t>(!dropped) << index;
    }
    return kept;
}

// Turns products of queries and keys into scores, in units of log2(e).
template <typename Traits>
WARPLOOM_DEVICE void make_scores(typename Traits::Scores& scores, ScoreFeatures<Traits>& features,
                                 const BackwardTask& task, const BackwardKernelParams& params,
                                 const ScoreTile& tile) {
    using T = typename Traits::Element;
    const Scoring& scoring = params.attention.scoring;
    const float cap = params.constants.soft_cap;
    const auto for_each = [&](auto&& visit) {
        WARPLOOM_UNROLL
        for (int index = 0; index < Traits::kElements; ++index) {
            visit(scores.at(index), query_of<Traits>(tile, index), key_of<Traits>(tile, index));
        }
    };
    scale_products<T>(for_each, params.constants);
    WARPLOOM_UNROLL
    for (int index = 0; index < Traits::kElements; ++index) {
        const float tangent = cap == 0.0f ? 0.0f : scores.at(index) / cap;
        features.slopes[index] = 1.0f - tangent * tangent;
    }
    add_score_terms<T>(for_each, scoring, task.sequence, params.attention.heads, tile.head);
    if (tile.seen != Sight::all) {
        hide_keys(for_each, task.window);
    }
    features.kept = scoring.dropout_seed == nullptr ? ~0u : draw_kept<Traits>(task, params, tile);
}

// Turns products of queries and keys into probabilities. Those of a hidden key are 0, those of a
// query that sees no key (lse -inf) too.
template <typename Traits>
WARPLOOM_DEVICE void make_probabilities(typename Traits::Scores& scores,
                                        ScoreFeatures<Traits>& features,
                                        const typename Traits::SharedPlan& shared,
                                        const BackwardTask& task,
                                        const BackwardKernelParams& params, const ScoreTile& tile) {
    if constexpr (Traits::kFeatures) {
        make_scores<Traits>(scores, features, task, params, tile);
    }
    WARPLOOM_UNROLL
    for (int index = 0; index < Traits::kElements; ++index) {
        float& score = scores.at(index);
        float lse = shared.lse[statistics_of<Traits>(tile, index)];
        lse = lse == -kInfinity ? kInfinity : lse;
        // One rounding of the difference; without features the scale is part of it.
        score = Traits::kFeatures ? fmaf(-lse, kLog2E, score)
                                  : fmaf(score, params.constants.scale, -lse * kLog2E);
        score = device::exp2_approximate(score);
    }
    if (Traits::kFeatures || tile.seen == Sight::some) {
        WARPLOOM_UNROLL
        for (int index = 0; index < Traits::kElements; ++index) {
            const int query = query_of<Traits>(tile, index);
            const int key = key_of<Traits>(tile, index);
            // Queries that do not exist have zeros for rows, but terms of the score have no bound.
            const bool exists = !Traits::kFeatures || query < task.sequence.queries;
            if (key < task.window.first_key(query) || key >= task.window.end_key(query) ||
                !exists) {
                scores.at(index) = 0.0f;
            }
        }
    }
}

// The probabilities after dropout.
template <typename Traits>
WARPLOOM_DEVICE typename Traits::Scores drop(const typename Traits::Scores& probabilities,
                                             const ScoreFeatures<Traits>& features, float factor) {
    typename Traits::Scores dropped;
    WARPLOOM_UNROLL
    for (int index = 0; index < Traits::kElements; ++index) {
        const bool stays = (features.kept >> index & 1) != 0;
        dropped.at(index) = stays ? probabilities.at(index) * factor : 0.0f;
    }
    return dropped;
}

// What a lane has of the sums of grad_distance, by Traits::lane_row(index).
template <typename Traits>
struct DistanceSums {
    float values[Traits::kLaneRows];
};

// Writes the gradients of biased scores, and adds them up by distance.
template <typename Traits>
WARPLOOM_DEVICE void write_bias_gradients(const typename Traits::Scores& gradients,
                                          DistanceSums<Traits>& distances, const BackwardTask& task,
                                          const AttentionBackwardParams& attention,
                                          const ScoreTile& tile) {
    using T = typename Traits::Element;
    const Sequence& sequence = task.sequence;
    if (attention.grad_bias != nullptr) {
        const std::int64_t head =
            static_cast<std::int64_t>(sequence.batch) * attention.heads + tile.head;
        T* rows = static_cast<T*>(attention.grad_bias) + head * sequence.queries * sequence.keys;
        WARPLOOM_UNROLL
        for (int index = 0; index < Traits::kElements; ++index) {
            const int query = query_of<Traits>(tile, index);
            const int key = key_of<Traits>(tile, index);
            if (query < sequence.queries && key < sequence.keys) {
                rows[static_cast<std::int64_t>(query) * sequence.keys + key] =
                    device::from_float<T>(gradients.at(index));
            }
        }
    }
    if (attention.grad_distance != nullptr) {
        const int diagonal = sequence.keys - sequence.queries;
        WARPLOOM_UNROLL
        for (int index = 0; index < Traits::kElements; ++index) {
            const int distance =
                key_of<Traits>(tile, index) - query_of<Traits>(tile, index) - diagonal;
            distances.values[Traits::lane_row(index)] -=
                fabsf(static_cast<float>(distance)) * gradients.at(index);
        }
    }
}

// Turns probabilities into the gradients of scores. `grads`: those of the probabilities after
// dropout.
template <typename Traits>
WARPLOOM_DEVICE void differentiate(typename Traits::Scores& scores, typename Traits::Scores& grads,
                                   const ScoreFeatures<Traits>& features,
                                   DistanceSums<Traits>& distances,
                                   const typename Traits::SharedPlan& shared,
                                   const BackwardTask& task, const BackwardKernelParams& params,
                                   const ScoreTile& tile) {
    if constexpr (Traits::kFeatures) {
        grads = drop<Traits>(grads, features, params.constants.keep_factor);
    }
    WARPLOOM_UNROLL
    for (int index = 0; index < Traits::kElements; ++index) {
        scores.at(index) *= grads.at(index) - shared.delta[statistics_of<Traits>(tile, index)];
    }
    if constexpr (Traits::kFeatures) {
        if constexpr (Traits::kOwnsQueries) {
            write_bias_gradients<Traits>(scores, distances, task, params.attention, tile);
        }
        WARPLOOM_UNROLL
        for (int index = 0; index < Traits::kElements; ++index) {
            scores.at(index) *= features.slopes[index];
        }
    }
}

// Adds up what the lanes of a row have, and writes it.
template <typename Traits>
WARPLOOM_DEVICE void write_distances(DistanceSums<Traits>& distances, const BackwardTask& task,
                                     const AttentionBackwardParams& attention) {
    float* sums = static_cast<float*>(attention.grad_distance) +
                  statistics_offset(attention, task.sequence.batch, task.first_head,
                                    task.sequence.first_query + task.first_owned);
    WARPLOOM_UNROLL
    for (int row = 0; row < Traits::kLaneRows; ++row) {
        float& sum = distances.values[row];
        WARPLOOM_UNROLL
        for (int lane_mask = 1; lane_mask < Traits::kRowLanes; lane_mask *= 2) {
            sum += device::shuffle_xor(sum, lane_mask);
        }
        const int owned = device::warp_index() * Traits::kWarpRows + Traits::row_of_lane_row(row);
        if (device::lane_index() % Traits::kRowLanes == 0 && owned < task.owned) {
            sums[owned] = sum;
        }
    }
}

}  // namespace warploom::attention
