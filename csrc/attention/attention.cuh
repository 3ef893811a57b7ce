// Attention forward for float16 and bfloat16 on tensor cores (mma.sync, from sm_80), after
// FlashAttention-2 (Dao 2023): the scores of a query tile stay in registers, keys and values come
// tile by tile, and the softmax is corrected as the maximum grows.
#pragma once

#include "attention/attention_block.cuh"

namespace warploom::attention {

// Tile sizes for queries and keys of up to kHeadDim columns and values of up to kValueDim; fewer
// are filled up with zeros. Each plan fits the 99 KiB that a block may have on sm_86, sm_89 and
// sm_120.
//   columns   queries x keys  shared memory  why
//   64        128 x 64        48 KiB         32 queries a warp: each key fragment feeds two
//                                            products; 2 blocks even in the 100 KiB of an sm_86
//   128       128 x 32        64 KiB         the same reuse; 64 keys would take 96 KiB and leave an
//                                            sm_80 one block of 4 warps instead of two
//   192, 128  128 x 32        88 KiB         the same reuse (latent attention's prefill)
//   256       64 x 32         96 KiB         16 queries a warp: 32 would need 256 accumulators
// kWithTerms: the scores are made by scores.cuh, not products that the softmax scales.
template <typename T, int kHeadDimension, int kValueDimension, bool kWithTerms>
struct ForwardTraits {
    static_assert(kHeadDimension % 64 == 0 && kValueDimension % 64 == 0 &&
                      kValueDimension <= kHeadDimension && kHeadDimension <= 256,
                  "ForwardTraits: 64, 128, 192 or 256 columns, of the values no more");
    using Element = T;
    static constexpr int kHeadDim = kHeadDimension;
    static constexpr int kValueDim = kValueDimension;
    static constexpr bool kScored = kWithTerms;
    static constexpr int kWarps = 4;
    static constexpr int kThreads = kWarps * device::kWarpSize;
    static constexpr int kQueries = kValueDim == 256 ? 64 : 128;
    static constexpr int kKeys = kHeadDim == 64 ? 64 : 32;
    static constexpr int kStages = 2;  // One is computed on while the other one is filled.

    static constexpr int kWarpQueries = kQueries / kWarps;
    static constexpr int kQueryFragments = kWarpQueries / 16;  // mma_m16n8k16: 16 rows,
    static constexpr int kKeyFragments = kKeys / 8;            // 8 columns,
    static constexpr int kHeadSteps = kHeadDim / 16;           // 16 terms of the sum.
    static constexpr int kValueFragments = kValueDim / 8;
    static_assert(kKeyFragments % 2 == 0, "ForwardTraits: key fragments are loaded in pairs");

    // Query fragments stay in registers where they are few, else each key tile loads them again.
    static constexpr bool kHoldsQuery = !kScored && kQueryFragments * kHeadSteps * 4 <= 32;
    static constexpr int kHeldSteps = kHoldsQuery ? kHeadSteps : 1;

    struct SharedPlan {
        Tile<T, kQueries, kHeadDim> queries;  // At the end each warp puts its output in its rows.
        Tile<T, kStages * kKeys, kHeadDim> keys;  // Stage after stage.
        Tile<T, kStages * kKeys, kValueDim> values;
        BlockTask task;  // In registers it would displace accumulators.
    };
    static_assert(sizeof(SharedPlan) <= 99 * 1024, "ForwardTraits: the plan exceeds 99 KiB");
};

// What one lane holds of its warp's rows. With g = lane / 4, t = lane % 4, fragment m covers the
// rows 16 m + g (elements 0, 1; half 0) and 16 m + g + 8 (elements 2, 3; half 1), and of fragment n
// the columns 8 n + 2 t and 8 n + 2 t + 1.
template <typename Traits>
struct WarpScores {
    float values[Traits::kQueryFragments][Traits::kKeyFragments][4];
};
template <typename Traits>
struct WarpOutput {
    float values[Traits::kQueryFragments][Traits::kValueFragments][4];
    SoftmaxRow rows[Traits::kQueryFragments][2];
};
template <typename Traits>
struct WarpQuery {
    std::uint32_t fragments[Traits::kQueryFragments][Traits::kHeldSteps][4];
};

// Loads the query fragments of one step: rows of the warp, columns 16 step to 16 step + 15.
template <typename Traits>
WARPLOOM_DEVICE void load_query(WarpQuery<Traits>& query, const typename Traits::SharedPlan& shared,
                                int step, int place) {
    const auto& tile = shared.queries;
    const int lane = device::lane_index();
    const int offset =
        tile.offset(device::warp_index() * Traits::kWarpQueries + lane % 16, lane / 16);
    WARPLOOM_UNROLL
    for (int m = 0; m < Traits::kQueryFragments; ++m) {
        device::load_matrix_x4(
            query.fragments[m][place],
            tile.bytes + tile.advance(offset, step * 2) + m * 16 * tile.kRowBytes);
    }
}

// scores = query key^T, for the keys in rows [kept, kept + kKeys) of their tile.
template <typename Traits>
WARPLOOM_DEVICE void multiply_keys(WarpScores<Traits>& scores, WarpQuery<Traits>& query,
                                   const typename Traits::SharedPlan& shared, int kept) {
    using T = typename Traits::Element;
    const auto& tile = shared.keys;
    const int lane = device::lane_index();
    const int offset = tile.offset(kept + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    scores = {};
    WARPLOOM_UNROLL
    for (int step = 0; step < Traits::kHeadSteps; ++step) {
        const int place = Traits::kHoldsQuery ? step : 0;
        if constexpr (!Traits::kHoldsQuery) {
            load_query<Traits>(query, shared, step, place);
        }
        WARPLOOM_UNROLL
        for (int n = 0; n < Traits::kKeyFragments; n += 2) {
            std::uint32_t pair[4];
            device::load_matrix_x4(
                pair, tile.bytes + tile.advance(offset, step * 2) + n * 8 * tile.kRowBytes);
            const std::uint32_t left[2] = {pair[0], pair[1]};
            const std::uint32_t right[2] = {pair[2], pair[3]};
            WARPLOOM_UNROLL
            for (int m = 0; m < Traits::kQueryFragments; ++m) {
                device::mma_m16n8k16<T>(scores.values[m][n], query.fragments[m][place], left);
                device::mma_m16n8k16<T>(scores.values[m][n + 1], query.fragments[m][place], right);
            }
        }
    }
}

// Calls visit(score, query, key) for each score of this lane. `first_query`: of the warp;
// `first_key`: of the tile.
template <typename Traits, typename Visit>
WARPLOOM_DEVICE void for_each_score(WarpScores<Traits>& scores, int first_query, int first_key,
                                    const Visit& visit) {
    const int lane_query = first_query + device::lane_index() / 4;
    const int lane_key = first_key + device::lane_index() % 4 * 2;
    WARPLOOM_UNROLL
    for (int m = 0; m < Traits::kQueryFragments; ++m) {
        WARPLOOM_UNROLL
        for (int half = 0; half < 2; ++half) {
            WARPLOOM_UNROLL
            for (int n = 0; n < Traits::kKeyFragments; ++n) {
                WARPLOOM_UNROLL
                for (int element = 0; element < 2; ++element) {
                    visit(scores.values[m][n][half * 2 + element], lane_query + m * 16 + half * 8,
                          lane_key + n * 8 + element);
                }
            }
        }
    }
}

// Turns products into scores: those of hidden keys become -inf.
template <typename Traits>
WARPLOOM_DEVICE void finish_scores(WarpScores<Traits>& scores, const BlockTask& task,
                                   const ForwardKernelParams& params, int first_query,
                                   int first_key) {
    const auto for_each = [&](const auto& visit) {
        for_each_score<Traits>(scores, first_query, first_key, visit);
    };
    if constexpr (Traits::kScored) {
        using T = typename Traits::Element;
        scale_products<T>(for_each, params.constants);
        add_score_terms<T>(for_each, params.attention.scoring, task.sequence,
                           params.attention.heads, task.head);
    }
    const int last_query = first_query + Traits::kWarpQueries - 1;
    if (task.window.first_key(last_query) > first_key ||
        task.window.end_key(first_query) < first_key + Traits::kKeys) {
        hide_keys(for_each, task.window);
    }
}

// Turns scores into exp2(score_scale * score - maximum) and corrects what was accumulated.
template <typename Traits>
WARPLOOM_DEVICE void update_softmax(WarpScores<Traits>& scores, WarpOutput<Traits>& output,
                                    float score_scale) {
    float factors[Traits::kQueryFragments][2];
    bool raised = false;
    WARPLOOM_UNROLL
    for (int m = 0; m < Traits::kQueryFragments; ++m) {
        WARPLOOM_UNROLL
        for (int half = 0; half < 2; ++half) {
            float maximum = -kInfinity;
            WARPLOOM_UNROLL
            for (int n = 0; n < Traits::kKeyFragments; ++n) {
                maximum = fmaxf(maximum, scores.values[m][n][half * 2]);
                maximum = fmaxf(maximum, scores.values[m][n][half * 2 + 1]);
            }
            maximum = fmaxf(maximum, device::shuffle_xor(maximum, 1));
            maximum = fmaxf(maximum, device::shuffle_xor(maximum, 2)) * score_scale;
            SoftmaxRow& row = output.rows[m][half];
            raised = raised || maximum > row.maximum;
            factors[m][half] = raise_maximum(row, maximum);
            const float shift = softmax_shift(row);
            WARPLOOM_UNROLL
            for (int n = 0; n < Traits::kKeyFragments; ++n) {
                WARPLOOM_UNROLL
                for (int element = 0; element < 2; ++element) {
                    float& value = scores.values[m][n][half * 2 + element];
                    value = device::exp2_approximate(value * score_scale - shift);
                    row.sum += value;
                }
            }
        }
    }
    // The maximum rises ever more rarely. Without a rise a factor is 1, or the row still empty.
    if (device::any(raised)) {
        WARPLOOM_UNROLL
        for (int m = 0; m < Traits::kQueryFragments; ++m) {
            WARPLOOM_UNROLL
            for (int n = 0; n < Traits::kValueFragments; ++n) {
                WARPLOOM_UNROLL
                for (int element = 0; element < 4; ++element) {
                    output.values[m][n][element] *= factors[m][element / 2];
                }
            }
        }
    }
}

// Dropout: some probabilities become 0, after they were summed up. Four neighbouring keys share a
// draw, and of those a lane has two, for rows g and g + 8. So lanes 2 u and 2 u + 1 draw for one of
// the two rows each and hand over the half that the other one needs.
template <typename Traits>
WARPLOOM_DEVICE void drop_probabilities(WarpScores<Traits>& probabilities, const BlockTask& task,
                                        const ForwardKernelParams& params, int first_query,
                                        int first_key) {
    const int lane = device::lane_index();
    const bool odd = lane % 2 == 1;
    const int lane_query = first_query + lane / 4 + (odd ? 8 : 0);
    const int lane_quad = first_key / 4 + lane % 4 / 2;
    WARPLOOM_UNROLL
    for (int m = 0; m < Traits::kQueryFragments; ++m) {
        WARPLOOM_UNROLL
        for (int n = 0; n < Traits::kKeyFragments; ++n) {
            const PhiloxNumbers numbers =
                dropout_numbers(params.attention.scoring, task.sequence, params.attention.heads,
                                task.head, lane_query + m * 16, lane_quad + n * 2);
            WARPLOOM_UNROLL
            for (int element = 0; element < 2; ++element) {
                const std::uint32_t low = numbers.values[element];
                const std::uint32_t high = numbers.values[2 + element];
                const std::uint32_t own = odd ? high : low;
                const std::uint32_t other = device::shuffle_xor(odd ? low : high, 1);
                float (&values)[4] = probabilities.values[m][n];
                if ((odd ? other : own) < params.constants.drop_below) {
                    values[element] = 0.0f;
                }
                if ((odd ? own : other) < params.constants.drop_below) {
                    values[2 + element] = 0.0f;
                }
            }
        }
    }
}

// output += probabilities value, for the values in rows [kept, kept + kKeys) of their tile. Two
// score fragments, rounded to the tensors' dtype, are one left operand: the layouts agree.
template <typename Traits>
WARPLOOM_DEVICE void multiply_values(WarpOutput<Traits>& output,
                                     const WarpScores<Traits>& probabilities,
                                     const typename Traits::SharedPlan& shared, int kept) {
    using T = typename Traits::Element;
    const auto& tile = shared.values;
    const int lane = device::lane_index();
    const int offset = tile.offset(kept + lane % 16, lane / 16);
    WARPLOOM_UNROLL
    for (int step = 0; step < Traits::kKeys / 16; ++step) {
        std::uint32_t rounded[Traits::kQueryFragments][4];
        WARPLOOM_UNROLL
        for (int m = 0; m < Traits::kQueryFragments; ++m) {
            WARPLOOM_UNROLL
            for (int part = 0; part < 4; ++part) {
                const float (&pair)[4] = probabilities.values[m][2 * step + part / 2];
                rounded[m][part] = device::pack<T>(pair[part % 2 * 2], pair[part % 2 * 2 + 1]);
            }
        }
        WARPLOOM_UNROLL
        for (int n = 0; n < Traits::kValueFragments; n += 2) {
            std::uint32_t pair[4];
            device::load_matrix_x4_transposed(
                pair, tile.bytes + tile.advance(offset, n) + step * 16 * tile.kRowBytes);
            const std::uint32_t left[2] = {pair[0], pair[1]};
            const std::uint32_t right[2] = {pair[2], pair[3]};
            WARPLOOM_UNROLL
            for (int m = 0; m < Traits::kQueryFragments; ++m) {
                device::mma_m16n8k16<T>(output.values[m][n], rounded[m], left);
                device::mma_m16n8k16<T>(output.values[m][n + 1], rounded[m], right);
            }
        }
    }
}

// Writes lse, and the output by way of the warp's own rows of the query tile, so that a warp stores
// whole rows.
template <typename Traits>
WARPLOOM_DEVICE void write_output(WarpOutput<Traits>& output, typename Traits::SharedPlan& shared,
                                  const BlockTask& task, const ForwardKernelParams& params) {
    using T = typename Traits::Element;
    auto& tile = shared.queries;
    const BlockResult<T> result = block_result<T>(params.attention, task);
    const int lane = device::lane_index();
    const int first_row = device::warp_index() * Traits::kWarpQueries;
    WARPLOOM_UNROLL
    for (int m = 0; m < Traits::kQueryFragments; ++m) {
        WARPLOOM_UNROLL
        for (int half = 0; half < 2; ++half) {
            SoftmaxRow& row = output.rows[m][half];
            row.sum += device::shuffle_xor(row.sum, 1);
            row.sum += device::shuffle_xor(row.sum, 2);
            const float sink_factor = add_sink(row, params.attention.scoring, task.head);
            const int index = first_row + m * 16 + half * 8 + lane / 4;
            if (lane % 4 == 0 && index < task.queries) {
                result.lse[index] = log_sum_exp(row);
            }
            const float factor = sink_factor * normalizer(row) * params.constants.keep_factor;
            WARPLOOM_UNROLL
            for (int n = 0; n < Traits::kValueFragments; ++n) {
                const float (&values)[4] = output.values[m][n];
                device::store_vector(
                    tile.bytes + tile.offset(index, n) + lane % 4 * 4,
                    device::pack<T>(values[half * 2] * factor, values[half * 2 + 1] * factor));
            }
        }
    }
    device::sync_warp();
    constexpr int kRowChunks = Traits::kValueDim / Chunk<T>::kSize;
    for (int unit = lane; unit < Traits::kWarpQueries * kRowChunks; unit += device::kWarpSize) {
        const int row = first_row + unit / kRowChunks;
        const int column = unit % kRowChunks * Chunk<T>::kSize;
        if (row < task.queries) {
            write_chunk(result.out + row * result.stride + column,
                        tile.load(row, unit % kRowChunks), params.attention.value_dim - column,
                        params.copy_bytes.out);
        }
    }
}

// grid shape: [batch * heads * ceil(query_length / kQueries)], the query tile fastest
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 1)
attention_forward_kernel(WARPLOOM_GRID_CONSTANT ForwardKernelParams params) {
    auto& shared = device::shared_memory<typename Traits::SharedPlan>();
    if (threadIdx.x == 0) {
        shared.task = block_task<Traits>(params);
    }
    device::sync_threads();
    const BlockTask& task = shared.task;
    if (task.queries <= 0) {
        return;  // All threads: the tile lies behind the end of a packed sequence.
    }
    const int first_query = task.first_query + device::warp_index() * Traits::kWarpQueries;
    const int last_query = first_query + Traits::kWarpQueries - 1;

    fill_queries<Traits>(shared, task, params);
    device::copy_async_commit();
    if (task.first_tile < task.end_tile) {
        fill_keys_values<Traits>(shared, task, params, task.first_tile);
    }
    device::copy_async_commit();

    WarpOutput<Traits> output = {};
    WarpQuery<Traits> query;
    device::copy_async_wait<1>();
    device::sync_threads();
    if constexpr (Traits::kHoldsQuery) {
        WARPLOOM_UNROLL
        for (int step = 0; step < Traits::kHeadSteps; ++step) {
            load_query<Traits>(query, shared, step, step);
        }
    }

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
        if (first_key < task.window.end_key(last_query) &&
            first_key + Traits::kKeys > task.window.first_key(first_query)) {
            WarpScores<Traits> scores;
            multiply_keys<Traits>(scores, query, shared, kept);
            finish_scores<Traits>(scores, task, params, first_query, first_key);
            update_softmax<Traits>(scores, output, params.score_scale);
            if (Traits::kScored && params.attention.scoring.dropout_seed != nullptr) {
                drop_probabilities<Traits>(scores, task, params, first_query, first_key);
            }
            multiply_values<Traits>(output, scores, shared, kept);
        }
    }
    device::copy_async_wait<0>();
    device::sync_warp();
    write_output<Traits>(output, shared, task, params);
}

}  // namespace warploom::attention
