// Attention of few queries on a cache, after Flash-Decoding (Dao et al. 2023): the keys of a
// sequence are cut into parts that blocks work on by themselves. Bound by memory.
#pragma once

#include "attention/attention_decode_task.cuh"

namespace warploom::attention {

// The softmax of a lane's rows so far: the maxima of their scores (times log2(e)), and this lane's
// parts of the sums of exp2(score - maximum).
template <typename Traits>
struct DecodeSoftmax {
    float maximum[Traits::kLaneRows];
    float sum[Traits::kLaneRows];
    int query[Traits::kLaneRows];
    float slope[Traits::kLaneRows];  // Times log2(e); 0 without ALiBi.
};

template <typename Traits>
WARPLOOM_DEVICE DecodeSoftmax<Traits> decode_softmax(const AttentionDecodeParams& decode,
                                                     const DecodeTask& task) {
    DecodeSoftmax<Traits> softmax;
    WARPLOOM_UNROLL
    for (int i = 0; i < Traits::kLaneRows; ++i) {
        const DecodeRow row = decode_row<Traits>(decode, task, Traits::row(i));
        softmax.maximum[i] = -kInfinity;
        softmax.sum[i] = 0.0f;
        softmax.query[i] = row.query;
        softmax.slope[i] = 0.0f;
        if (decode.scoring.alibi_slopes != nullptr && Traits::row(i) < task.rows) {
            const std::int64_t place =
                static_cast<std::int64_t>(row.batch) * decode.heads + row.head;
            softmax.slope[i] =
                kLog2E * static_cast<const float*>(decode.scoring.alibi_slopes)[place];
        }
    }
    return softmax;
}

// Products become scores, and -inf where the row does not see the key.
template <typename Traits>
WARPLOOM_DEVICE void finish_scores(DecodeScores<Traits>& scores,
                                   const DecodeSoftmax<Traits>& softmax, const DecodeTask& task,
                                   const DecodeKernelParams& params, int tile_key) {
    const auto for_each = [&](const auto& visit) {
        WARPLOOM_UNROLL
        for (int i = 0; i < Traits::kLaneRows; ++i) {
            WARPLOOM_UNROLL
            for (int j = 0; j < Traits::kLaneKeys; ++j) {
                visit(scores.values[i][j], i, tile_key + Traits::key(j));
            }
        }
    };
    scale_products<typename Traits::Element>(for_each, params.scores);
    if (params.decode.scoring.alibi_slopes != nullptr) {
        const int diagonal = task.sequence.keys - task.sequence.queries;
        for_each([&](float& score, int i, int key) {
            score -=
                softmax.slope[i] * fabsf(static_cast<float>(key - softmax.query[i] - diagonal));
        });
    }
    hide_keys(
        [&](const auto& visit) {
            for_each([&](float& score, int i, int key) { visit(score, softmax.query[i], key); });
        },
        task.window);
}

// Turns scores into exp2(score - maximum). `factors`: for what was accumulated under the old
// maxima; returns whether one of the warp is not 1.
template <typename Traits>
WARPLOOM_DEVICE bool update_softmax(DecodeScores<Traits>& scores, DecodeSoftmax<Traits>& softmax,
                                    float (&factors)[Traits::kLaneRows]) {
    bool raised = false;
    WARPLOOM_UNROLL
    for (int i = 0; i < Traits::kLaneRows; ++i) {
        const float old = softmax.maximum[i];
        float maximum = old;
        WARPLOOM_UNROLL
        for (int j = 0; j < Traits::kLaneKeys; ++j) {
            maximum = fmaxf(maximum, scores.values[i][j]);
        }
        WARPLOOM_UNROLL
        for (int lane_mask = 1; lane_mask < Traits::kRowLanes; lane_mask *= 2) {
            maximum = fmaxf(maximum, device::shuffle_xor(maximum, lane_mask));
        }
        // 0 while every score is -inf, so that no -inf - -inf arises.
        const float shift = maximum == -kInfinity ? 0.0f : maximum;
        factors[i] = device::exp2_approximate(old - shift);
        raised = raised || maximum > old;
        softmax.maximum[i] = maximum;
        softmax.sum[i] *= factors[i];
        WARPLOOM_UNROLL
        for (int j = 0; j < Traits::kLaneKeys; ++j) {
            scores.values[i][j] = device::exp2_approximate(scores.values[i][j] - shift);
            softmax.sum[i] += scores.values[i][j];
        }
    }
    return device::any(raised);
}

// Adds up the lanes' sums and puts the warp's rows into shared memory, which no warp reads as
// stages any more.
template <typename Traits>
WARPLOOM_DEVICE void hand_over(typename Traits::Handover& handover,
                               const DecodeProducts<Traits>& products,
                               DecodeSoftmax<Traits>& softmax) {
    const int warp = device::warp_index();
    products.store(handover.outputs[warp]);
    WARPLOOM_UNROLL
    for (int i = 0; i < Traits::kLaneRows; ++i) {
        WARPLOOM_UNROLL
        for (int lane_mask = 1; lane_mask < Traits::kRowLanes; lane_mask *= 2) {
            softmax.sum[i] += device::shuffle_xor(softmax.sum[i], lane_mask);
        }
        if (device::lane_index() % Traits::kRowLanes == 0) {
            handover.maximum[warp][Traits::row(i)] = softmax.maximum[i];
            handover.sum[warp][Traits::row(i)] = softmax.sum[i];
        }
    }
}

// One chunk of a row of a part, and once a row its lse.
WARPLOOM_DEVICE void write_partial(const AttentionDecodeParams& decode, int split,
                                   const DecodeRow& row, int column, const Chunk<float>& values,
                                   float lse) {
    const std::int64_t first =
        static_cast<std::int64_t>(decode.batch) * decode.query_length * decode.heads * split;
    if (column == 0) {
        decode.partial_lse[first + row.lse_place(decode)] = lse;
    }
    float* out = decode.partial_out + (first + row.out_place(decode)) * decode.value_dim + column;
    write_chunk(out, values, decode.value_dim - column, decode.value_dim % 4 == 0 ? 16 : 4);
}

// The same of the op's own outputs.
template <typename T>
WARPLOOM_DEVICE void write_result(const DecodeKernelParams& params, const DecodeRow& row,
                                  int column, const Chunk<float>& values, float lse) {
    struct alignas(4 * sizeof(T)) Four {
        T elements[4];
    };
    const AttentionDecodeParams& decode = params.decode;
    const SinkEffect sink = add_sink(decode, row.head, lse);
    if (column == 0) {
        static_cast<float*>(decode.lse)[row.lse_place(decode)] = sink.lse;
    }
    Four four;
    WARPLOOM_UNROLL
    for (int index = 0; index < 4; ++index) {
        four.elements[index] = device::from_float<T>(values.elements[index] * sink.factor);
    }
    T* out = static_cast<T*>(decode.out) +
             row_offset(decode.out_strides, row.batch, row.query, row.head) + column;
    if (params.out_bytes == 16) {
        if (column < decode.value_dim) {
            device::store_vector(out, four);
        }
    } else {
        WARPLOOM_UNROLL
        for (int index = 0; index < 4; ++index) {
            if (column + index < decode.value_dim) {
                out[index] = four.elements[index];
            }
        }
    }
}

// Joins what the warps have, and writes the rows: of the op, or of this part of it.
template <typename Traits>
WARPLOOM_DEVICE void write_rows(const typename Traits::Handover& handover, const DecodeTask& task,
                                const DecodeKernelParams& params) {
    constexpr int kRowChunks = Traits::kColumns / Chunk<float>::kSize;
    const AttentionDecodeParams& decode = params.decode;
    for (int unit = static_cast<int>(threadIdx.x); unit < task.rows * kRowChunks;
         unit += Traits::kThreads) {
        const int place = unit / kRowChunks;
        const int column = unit % kRowChunks * Chunk<float>::kSize;
        float maximum = -kInfinity;
        WARPLOOM_UNROLL
        for (int warp = 0; warp < Traits::kWarps; ++warp) {
            maximum = fmaxf(maximum, handover.maximum[warp][place]);
        }
        const float shift = maximum == -kInfinity ? 0.0f : maximum;
        float sum = 0.0f;
        Chunk<float> values = {};
        WARPLOOM_UNROLL
        for (int warp = 0; warp < Traits::kWarps; ++warp) {
            const float factor = device::exp2_approximate(handover.maximum[warp][place] - shift);
            const auto output =
                device::load_vector<Chunk<float>>(&handover.outputs[warp][place][column]);
            sum = fmaf(factor, handover.sum[warp][place], sum);
            WARPLOOM_UNROLL
            for (int index = 0; index < Chunk<float>::kSize; ++index) {
                values.elements[index] =
                    fmaf(factor, output.elements[index], values.elements[index]);
            }
        }
        const float lse = sum == 0.0f ? -kInfinity : maximum * kLogE2 + logf(sum);
        const float normalizer = sum == 0.0f ? 0.0f : 1.0f / sum;
        WARPLOOM_UNROLL
        for (int index = 0; index < Chunk<float>::kSize; ++index) {
            values.elements[index] *= normalizer;
        }
        const DecodeRow row = decode_row<Traits>(decode, task, place);
        if (decode.num_splits > 1) {
            write_partial(decode, task.split, row, column, values, lse);
        } else {
            write_result<typename Traits::Element>(params, row, column, values, lse);
        }
    }
}

// grid [batch * num_splits * kv_heads * row_tiles], the row tile fastest: blocks with the same keys
// run at one time and share them in the L2 cache
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 1)
attention_decode_kernel(WARPLOOM_GRID_CONSTANT DecodeKernelParams params) {
    const AttentionDecodeParams& decode = params.decode;
    auto& shared = device::shared_memory<typename Traits::SharedPlan>();
    const DecodeTask task = decode_task<Traits>(params);
    if (decode.num_splits > 1 && task.empty()) {
        const int row = static_cast<int>(threadIdx.x);
        if (row < task.rows) {
            const std::int64_t rows =
                static_cast<std::int64_t>(decode.batch) * decode.query_length * decode.heads;
            decode.partial_lse[task.split * rows +
                               decode_row<Traits>(decode, task, row).lse_place(decode)] =
                -kInfinity;
        }
        return;
    }
    const int warp = device::warp_index();
    if (warp == 0) {
        copy_queries<Traits>(shared.queries, task, params);
    }
    device::copy_async_commit();

    // Block-table entries are loaded one tile before they are used.
    const int first_tile = task.origin + warp * Traits::kKeys;
    int next_tile = first_tile;
    std::int64_t offsets = cache_offsets<Traits>(decode, task, next_tile);
    const auto fill_next = [&](int stage) {
        if (next_tile < task.end_key) {
            const int kept = (warp * Traits::kStages + stage) * Traits::kKeys;
            const int first = task.first_key - next_tile;
            const int end = task.end_key - next_tile;
            copy_rows<Traits>(params.k_bytes, shared.stages.keys, kept, decode.k_cache,
                              decode.head_dim, offsets, 0, first, end);
            copy_rows<Traits>(params.v_bytes, shared.stages.values, kept, decode.v_cache,
                              decode.value_dim, offsets, Traits::kKeys, first, end);
        }
        device::copy_async_commit();
        next_tile += Traits::kStep;
        offsets = cache_offsets<Traits>(decode, task, next_tile);
    };
    WARPLOOM_NO_UNROLL
    for (int stage = 0; stage < Traits::kStages - 1; ++stage) {
        fill_next(stage);
    }
    device::copy_async_wait<Traits::kStages - 1>();
    device::sync_threads();
    DecodeProducts<Traits> products;
    products.load_queries(shared.queries);
    DecodeSoftmax<Traits> softmax = decode_softmax<Traits>(decode, task);

    int stage = 0;
    WARPLOOM_NO_UNROLL
    for (int tile = first_tile; tile < task.end_key; tile += Traits::kStep) {
        // After the barrier the warp sees this tile, and reads the one before it no more.
        device::copy_async_wait<Traits::kStages - 2>();
        device::sync_warp();
        fill_next((stage + Traits::kStages - 1) % Traits::kStages);
        const int kept = (warp * Traits::kStages + stage) * Traits::kKeys;
        DecodeScores<Traits> scores;
        products.multiply_keys(scores, shared.queries, shared.stages.keys, kept);
        finish_scores<Traits>(scores, softmax, task, params, tile);
        float factors[Traits::kLaneRows];
        const bool raised = update_softmax<Traits>(scores, softmax, factors);
        products.multiply_values(scores, factors, raised, shared.stages.values, kept);
        stage = (stage + 1) % Traits::kStages;
    }
    device::copy_async_wait<0>();
    device::sync_threads();
    hand_over<Traits>(shared.handover, products, softmax);
    device::sync_threads();
    write_rows<Traits>(shared.handover, task, params);
}

}  // namespace warploom::attention
