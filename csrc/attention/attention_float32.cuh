// Attention forward for float32 in float32: products by fused multiply-adds of the ordinary cores.
// Tensor cores would round the operands to TF32.
#pragma once

#include "attention/attention_block.cuh"

namespace warploom::attention {

// A thread has 4 query rows and shares them with kRowLanes - 1 neighbours: of a key tile it scores
// every kRowLanes-th key, of the output it keeps every kRowLanes-th chunk of 4 columns.
//   columns   queries x keys  shared memory
//   64        64 x 32         48 KiB
//   128       64 x 32         96 KiB
//   192, 128  64 x 16         88 KiB
//   256       32 x 16         96 KiB         16 lanes a row: 8 would need 128 accumulators
// kWithTerms: as in ForwardTraits.
template <int kHeadDimension, int kValueDimension, bool kWithTerms>
struct Float32Traits {
    static_assert(kHeadDimension % 64 == 0 && kValueDimension % 64 == 0 && kHeadDimension <= 256 &&
                      kValueDimension <= 256,
                  "Float32Traits: 64, 128, 192 or 256 columns");
    using Element = float;
    static constexpr int kHeadDim = kHeadDimension;
    static constexpr int kValueDim = kValueDimension;
    static constexpr bool kScored = kWithTerms;
    static constexpr int kThreads = 128;
    static constexpr int kStages = 2;  // One is computed on while the other one is filled.
    static constexpr int kRowLanes = kValueDim == 256 ? 16 : 8;
    static constexpr int kThreadRows = 4;

    static constexpr int kWarpRowGroups = device::kWarpSize / kRowLanes;
    static constexpr int kWarpQueries = kWarpRowGroups * kThreadRows;
    static constexpr int kQueries = kThreads / kRowLanes * kThreadRows;
    static constexpr int kKeys = kHeadDim > 128 ? 16 : 32;
    static constexpr int kThreadKeys = kKeys / kRowLanes;
    static constexpr int kHeadChunks = kHeadDim / Chunk<float>::kSize;
    static constexpr int kThreadChunks = kValueDim / Chunk<float>::kSize / kRowLanes;

    struct SharedPlan {
        Tile<float, kQueries, kHeadDim> queries;
        Tile<float, kStages * kKeys, kHeadDim> keys;  // Stage after stage.
        Tile<float, kStages * kKeys, kValueDim> values;
        BlockTask task;  // In registers it would displace accumulators.
    };
    static_assert(sizeof(SharedPlan) <= 99 * 1024, "Float32Traits: the plan exceeds 99 KiB");
};

// A thread's row i is row i * kWarpRowGroups + lane / kRowLanes of its warp, its key j is key
// j * kRowLanes + lane % kRowLanes of the tile, and its chunk c is chunk c * kRowLanes + lane %
// kRowLanes of the output row.
template <typename Traits>
struct ThreadScores {
    float values[Traits::kThreadRows][Traits::kThreadKeys];
};
template <typename Traits>
struct ThreadOutput {
    Chunk<float> values[Traits::kThreadRows][Traits::kThreadChunks];
    SoftmaxRow rows[Traits::kThreadRows];
};

template <typename Traits>
WARPLOOM_DEVICE int query_row(int i) {
    return device::warp_index() * Traits::kWarpQueries + i * Traits::kWarpRowGroups +
           device::lane_index() / Traits::kRowLanes;
}

// scores = query key^T, for the keys in rows [kept, kept + kKeys) of their tile. Sums of sums lose
// less to rounding than one long sum.
template <typename Traits>
WARPLOOM_DEVICE void multiply_keys(ThreadScores<Traits>& scores,
                                   const typename Traits::SharedPlan& shared, int kept) {
    constexpr int kPartChunks = 4;
    const int first_key = kept + device::lane_index() % Traits::kRowLanes;
    scores = {};
    for (int first_chunk = 0; first_chunk < Traits::kHeadChunks; first_chunk += kPartChunks) {
        ThreadScores<Traits> part = {};
        WARPLOOM_UNROLL
        for (int chunk = first_chunk; chunk < first_chunk + kPartChunks; ++chunk) {
            Chunk<float> keys[Traits::kThreadKeys];
            WARPLOOM_UNROLL
            for (int j = 0; j < Traits::kThreadKeys; ++j) {
                keys[j] = shared.keys.load(j * Traits::kRowLanes + first_key, chunk);
            }
            WARPLOOM_UNROLL
            for (int i = 0; i < Traits::kThreadRows; ++i) {
                const Chunk<float> query = shared.queries.load(query_row<Traits>(i), chunk);
                WARPLOOM_UNROLL
                for (int j = 0; j < Traits::kThreadKeys; ++j) {
                    WARPLOOM_UNROLL
                    for (int element = 0; element < Chunk<float>::kSize; ++element) {
                        part.values[i][j] = fmaf(query.elements[element], keys[j].elements[element],
                                                 part.values[i][j]);
                    }
                }
            }
        }
        WARPLOOM_UNROLL
        for (int i = 0; i < Traits::kThreadRows; ++i) {
            WARPLOOM_UNROLL
            for (int j = 0; j < Traits::kThreadKeys; ++j) {
                scores.values[i][j] += part.values[i][j];
            }
        }
    }
}

// Calls visit(score, query, key) for each score of this thread. `first_key`: of the tile.
template <typename Traits, typename Visit>
WARPLOOM_DEVICE void for_each_score(ThreadScores<Traits>& scores, const BlockTask& task,
                                    int first_key, const Visit& visit) {
    const int lane_key = first_key + device::lane_index() % Traits::kRowLanes;
    WARPLOOM_UNROLL
    for (int i = 0; i < Traits::kThreadRows; ++i) {
        WARPLOOM_UNROLL
        for (int j = 0; j < Traits::kThreadKeys; ++j) {
            visit(scores.values[i][j], task.first_query + query_row<Traits>(i),
                  lane_key + j * Traits::kRowLanes);
        }
    }
}

// Turns products into scores: those of hidden keys become -inf. `first_query`: of the warp.
template <typename Traits>
WARPLOOM_DEVICE void finish_scores(ThreadScores<Traits>& scores, const BlockTask& task,
                                   const ForwardKernelParams& params, int first_query,
                                   int first_key) {
    const auto for_each = [&](const auto& visit) {
        for_each_score<Traits>(scores, task, first_key, visit);
    };
    if constexpr (Traits::kScored) {
        scale_products<float>(for_each, params.constants);
        add_score_terms<float>(for_each, params.attention.scoring, task.sequence,
                               params.attention.heads, task.head);
    }
    const int last_query = first_query + Traits::kWarpQueries - 1;
    if (task.window.first_key(last_query) > first_key ||
        task.window.end_key(first_query) < first_key + Traits::kKeys) {
        hide_keys(for_each, task.window);
    }
}

// Dropout: some probabilities become 0, after they were summed up.
template <typename Traits>
WARPLOOM_DEVICE void drop_probabilities(ThreadScores<Traits>& probabilities, const BlockTask& task,
                                        const ForwardKernelParams& params, int first_key) {
    for_each_score<Traits>(
        probabilities, task, first_key, [&](float& probability, int query, int key) {
            if (is_dropped(params.attention.scoring, params.constants, task.sequence,
                           params.attention.heads, task.head, query, key)) {
                probability = 0.0f;
            }
        });
}

// Turns scores into exp2(score_scale * score - maximum). `factors`: by thread row, for the output
// accumulated so far.
template <typename Traits>
WARPLOOM_DEVICE void update_softmax(ThreadScores<Traits>& scores, ThreadOutput<Traits>& output,
                                    float (&factors)[Traits::kThreadRows], float score_scale) {
    WARPLOOM_UNROLL
    for (int i = 0; i < Traits::kThreadRows; ++i) {
        float maximum = -kInfinity;
        WARPLOOM_UNROLL
        for (int j = 0; j < Traits::kThreadKeys; ++j) {
            maximum = fmaxf(maximum, scores.values[i][j]);
        }
        WARPLOOM_UNROLL
        for (int lane_mask = 1; lane_mask < Traits::kRowLanes; lane_mask *= 2) {
            maximum = fmaxf(maximum, device::shuffle_xor(maximum, lane_mask));
        }
        SoftmaxRow& row = output.rows[i];
        factors[i] = raise_maximum(row, maximum * score_scale);
        const float shift = softmax_shift(row);
        WARPLOOM_UNROLL
        for (int j = 0; j < Traits::kThreadKeys; ++j) {
            float& value = scores.values[i][j];
            value = device::exp2_approximate(value * score_scale - shift);
            row.sum += value;
        }
    }
}

// output = output * factors + probabilities value, for the values in rows [kept, kept + kKeys) of
// their tile. The lanes of a row hand each other its probabilities.
template <typename Traits>
WARPLOOM_DEVICE void multiply_values(ThreadOutput<Traits>& output,
                                     const float (&factors)[Traits::kThreadRows],
                                     const ThreadScores<Traits>& probabilities,
                                     const typename Traits::SharedPlan& shared, int kept) {
    const int lane = device::lane_index();
    const int own = lane % Traits::kRowLanes;
    Chunk<float> part[Traits::kThreadRows][Traits::kThreadChunks] = {};
    WARPLOOM_UNROLL
    for (int j = 0; j < Traits::kThreadKeys; ++j) {
        for (int source = 0; source < Traits::kRowLanes; ++source) {
            float probability[Traits::kThreadRows];
            WARPLOOM_UNROLL
            for (int i = 0; i < Traits::kThreadRows; ++i) {
                probability[i] = device::shuffle(probabilities.values[i][j], lane - own + source);
            }
            WARPLOOM_UNROLL
            for (int c = 0; c < Traits::kThreadChunks; ++c) {
                const Chunk<float> value = shared.values.load(kept + j * Traits::kRowLanes + source,
                                                              c * Traits::kRowLanes + own);
                WARPLOOM_UNROLL
                for (int i = 0; i < Traits::kThreadRows; ++i) {
                    WARPLOOM_UNROLL
                    for (int element = 0; element < Chunk<float>::kSize; ++element) {
                        float& sum = part[i][c].elements[element];
                        sum = fmaf(probability[i], value.elements[element], sum);
                    }
                }
            }
        }
    }
    WARPLOOM_UNROLL
    for (int i = 0; i < Traits::kThreadRows; ++i) {
        WARPLOOM_UNROLL
        for (int c = 0; c < Traits::kThreadChunks; ++c) {
            WARPLOOM_UNROLL
            for (int element = 0; element < Chunk<float>::kSize; ++element) {
                float& sum = output.values[i][c].elements[element];
                sum = fmaf(sum, factors[i], part[i][c].elements[element]);
            }
        }
    }
}

template <typename Traits>
WARPLOOM_DEVICE void write_output(ThreadOutput<Traits>& output, const BlockTask& task,
                                  const ForwardKernelParams& params) {
    const BlockResult<float> result = block_result<float>(params.attention, task);
    const int own = device::lane_index() % Traits::kRowLanes;
    WARPLOOM_UNROLL
    for (int i = 0; i < Traits::kThreadRows; ++i) {
        SoftmaxRow& row = output.rows[i];
        WARPLOOM_UNROLL
        for (int lane_mask = 1; lane_mask < Traits::kRowLanes; lane_mask *= 2) {
            row.sum += device::shuffle_xor(row.sum, lane_mask);
        }
        const float sink_factor = add_sink(row, params.attention.scoring, task.head);
        const int index = query_row<Traits>(i);
        if (index < task.queries) {
            if (own == 0) {
                result.lse[index] = log_sum_exp(row);
            }
            const float factor = sink_factor * normalizer(row) * params.constants.keep_factor;
            WARPLOOM_UNROLL
            for (int c = 0; c < Traits::kThreadChunks; ++c) {
                Chunk<float>& chunk = output.values[i][c];
                WARPLOOM_UNROLL
                for (int element = 0; element < Chunk<float>::kSize; ++element) {
                    chunk.elements[element] *= factor;
                }
                const int column = (c * Traits::kRowLanes + own) * Chunk<float>::kSize;
                write_chunk(result.out + index * result.stride + column, chunk,
                            params.attention.value_dim - column, params.copy_bytes.out);
            }
        }
    }
}

// grid shape: [batch * heads * ceil(query_length / kQueries)], the query tile fastest
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 1)
attention_forward_float32_kernel(WARPLOOM_GRID_CONSTANT ForwardKernelParams params) {
    auto& shared = device::shared_memory<typename Traits::SharedPlan>();
    if (threadIdx.x == 0) {
        shared.task = block_task<Traits>(params);
    }
    device::sync_threads();
    const BlockTask& task = shared.task;
    if (task.queries <= 0) {
        return;  // All threads: the tile lies behind the end of a packed sequence.
    }

    fill_queries<Traits>(shared, task, params);
    if (task.first_tile < task.end_tile) {
        fill_keys_values<Traits>(shared, task, params, task.first_tile);
    }
    device::copy_async_commit();

    ThreadOutput<Traits> output = {};
    for (int index = task.first_tile; index < task.end_tile; ++index) {
        // After the barrier all see this tile, and none reads the one before it any more.
        device::copy_async_wait<0>();
        device::sync_threads();
        if (index + 1 < task.end_tile) {
            fill_keys_values<Traits>(shared, task, params, index + 1);
        }
        device::copy_async_commit();

        const int kept = index % Traits::kStages * Traits::kKeys;
        const int first_key = index * Traits::kKeys;
        const int first_query = task.first_query + device::warp_index() * Traits::kWarpQueries;
        const int last_query = first_query + Traits::kWarpQueries - 1;
        if (first_key < task.window.end_key(last_query) &&
            first_key + Traits::kKeys > task.window.first_key(first_query)) {
            ThreadScores<Traits> scores;
            multiply_keys<Traits>(scores, shared, kept);
            finish_scores<Traits>(scores, task, params, first_query, first_key);
            float factors[Traits::kThreadRows];
            update_softmax<Traits>(scores, output, factors, params.score_scale);
            if (Traits::kScored && params.attention.scoring.dropout_seed != nullptr) {
                drop_probabilities<Traits>(scores, task, params, first_key);
            }
            multiply_values<Traits>(output, factors, scores, shared, kept);
        }
    }
    device::copy_async_wait<0>();
    write_output<Traits>(output, task, params);
}

}  // namespace warploom::attention
