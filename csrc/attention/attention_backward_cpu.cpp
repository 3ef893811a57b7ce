// Attention backward on the CPU: the scores are computed again, tile by tile. A task has a share of
// the keys of one key/value head, with all rows that read them; the rows' gradients, one sum a
// share, are added up afterwards. Shares and orders of sums depend on the shape alone.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "attention/attention_backward.h"
#include "attention/scoring_cpu.h"
#include "attention/sequences_cpu.h"
#include "attention/tile_cpu.h"
#include "common/cpu_float.h"
#include "common/cpu_math.h"
#include "common/parallel.h"

namespace warploom::attention {
namespace WARPLOOM_CPU_ISA {
namespace {

// Shares of a head's keys: where there are few heads, enough tasks for the threads. Each costs
// memory for the gradient of all queries.
constexpr std::int64_t kEnoughTasks = 32;
constexpr std::int64_t kMostShares = 4;

template <typename T>
class Backward {
    using W = Wide<T>;
    using Term = typename Terms<T>::Term;

    // Tiles of one thread.
    struct Workspace {
        Term* queries;          // [kTileRows, depth]
        Term* grads;            // [kTileRows, columns] of grad_out
        Term* keys;             // [kTileKeys, depth]
        Term* keys_t;           // [depth, kTileKeys]
        Term* values;           // [kTileKeys, columns]
        Term* values_t;         // [columns, kTileKeys]
        Term* weights;          // [kTileRows, kTileKeys] of scores, then of score_grads
        Term* stacked_weights;  // the same
        Term* stacked_rows;     // [kTileRows, depth or columns]
        W* key_grads;           // [kTileKeys, depth]
        W* value_grads;         // [kTileKeys, columns]
        W* scores;              // [kTileRows, kTileKeys], then what multiplies grad_out
        W* score_grads;         // [kTileRows, kTileKeys]
        W* slopes;              // [kTileKeys] of the soft-cap
        W* factors;             // [kTileKeys] of dropout

        Workspace(Scratch<Term>& terms, Scratch<W>& numbers, std::int64_t depth,
                  std::int64_t columns)
            : queries(terms.take(Terms<T>::count(kTileRows * depth))),
              grads(terms.take(Terms<T>::count(kTileRows * columns))),
              keys(terms.take(Terms<T>::count(kTileKeys * depth))),
              keys_t(terms.take(Terms<T>::count(kTileKeys * depth))),
              values(terms.take(Terms<T>::count(kTileKeys * columns))),
              values_t(terms.take(Terms<T>::count(kTileKeys * columns))),
              weights(terms.take(Terms<T>::count(kTileRows * kTileKeys))),
              stacked_weights(terms.take(Terms<T>::count(kTileRows * kTileKeys))),
              stacked_rows(terms.take(Terms<T>::count(kTileRows * std::max(depth, columns)))),
              key_grads(numbers.take(kTileKeys * depth)),
              value_grads(numbers.take(kTileKeys * columns)),
              scores(numbers.take(kTileRows * kTileKeys)),
              score_grads(numbers.take(kTileRows * kTileKeys)),
              slopes(numbers.take(kTileKeys)),
              factors(numbers.take(kTileKeys)) {}
    };

  public:
    explicit Backward(const AttentionBackwardParams& params)
        : params_(params),
          group_(params.heads / params.kv_heads),
          depth_(padded<W>(params.head_dim)),
          columns_(padded<W>(params.value_dim)),
          heads_(std::int64_t{params.sequences.batch} * params.kv_heads),
          first_rows_(params.sequences.batch) {}

    void run() {
        for (std::int64_t batch = 0; batch < params_.sequences.batch; ++batch) {
            first_rows_.data()[batch] = rows_;
            rows_ += params_.heads * sequence_of(params_.sequences, batch).queries;
        }
        shares_ = std::clamp<std::int64_t>(kEnoughTasks / std::max<std::int64_t>(1, heads_), 1,
                                           kMostShares);
        Scratch<W> deltas(rows_);
        Scratch<W> query_grads(shares_ * rows_ * depth_);
        Scratch<W> distance_grads(shares_ * rows_);
        deltas_ = deltas.data();
        query_grads_ = query_grads.data();
        distance_grads_ = distance_grads.data();
        for_each_row([&](const Sequence& sequence, const RowPlace& at, std::int64_t row) {
            start_row(sequence, at, row);
        });
        share_tasks(heads_ * shares_, [&](auto take) {
            Scratch<Term> terms(Terms<T>::count(
                kTileRows * (depth_ + columns_ + 2 * kTileKeys + std::max(depth_, columns_)) +
                kTileKeys * (2 * depth_ + 2 * columns_)));
            Scratch<W> numbers(2 * kTileRows * kTileKeys + kTileKeys * (depth_ + columns_ + 2));
            const Workspace work(terms, numbers, depth_, columns_);
            for (std::int64_t task; take(task);) {
                run_share(task / shares_, task % shares_, work);
            }
        });
        for_each_row([&](const Sequence& sequence, const RowPlace& at, std::int64_t row) {
            finish_row(sequence, at, row);
        });
    }

  private:
    RowPlace place(const Sequence& sequence, std::int64_t kv_head, std::int64_t row) const {
        const std::int64_t head = kv_head * group_ + row % group_;
        return {sequence.batch, head, sequence.batch * params_.heads + head, row / group_,
                row / group_ + sequence.diagonal()};
    }

    // Calls body(sequence, place, row) for all rows, which are counted through all key/value heads
    // and sequences.
    template <typename Body>
    void for_each_row(Body body) const {
        constexpr std::int64_t kGrain = 64;
        parallel_for(rows_, kGrain, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t row = begin; row < end; ++row) {
                const std::int64_t batch =
                    last_at_most(first_rows_.data(), params_.sequences.batch, row);
                const Sequence sequence = sequence_of(params_.sequences, batch);
                const std::int64_t head_rows = sequence.queries * group_;
                const std::int64_t within = row - first_rows_.data()[batch];
                body(sequence, place(sequence, within / head_rows, within % head_rows), row);
            }
        });
    }

    std::int64_t statistic(const Sequence& sequence, const RowPlace& at) const {
        return at.batch * params_.lse_batch_stride + at.head * params_.lse_head_stride +
               sequence.first_query + at.query;
    }

    void start_row(const Sequence& sequence, const RowPlace& at, std::int64_t row) const {
        const T* grad = static_cast<const T*>(params_.grad_out) +
                        sequence.query_offset(at.query, at.head, params_.grad_out_strides);
        const T* out = static_cast<const T*>(params_.out) +
                       sequence.query_offset(at.query, at.head, params_.out_strides);
        W delta = 0;
#pragma omp simd reduction(+ : delta)
        for (std::int64_t i = 0; i < params_.value_dim; ++i) {
            delta += widen(grad[i]) * widen(out[i]);
        }
        if (params_.grad_lse != nullptr) {
            delta -= static_cast<const W*>(params_.grad_lse)[statistic(sequence, at)];
        }
        deltas_[row] = delta;
        for (std::int64_t share = 0; share < shares_; ++share) {
            std::fill_n(query_grads_ + (share * rows_ + row) * depth_, depth_, W{0});
            distance_grads_[share * rows_ + row] = 0;
        }
        if (params_.grad_bias != nullptr) {
            std::fill_n(grad_bias_row(sequence, at), sequence.keys, T{});
        }
    }

    void finish_row(const Sequence& sequence, const RowPlace& at, std::int64_t row) const {
        W* sum = query_grads_ + row * depth_;
        W distance = distance_grads_[row];
        for (std::int64_t share = 1; share < shares_; ++share) {
            const W* added = sum + share * rows_ * depth_;
#pragma omp simd
            for (std::int64_t i = 0; i < depth_; ++i) {
                sum[i] += added[i];
            }
            distance += distance_grads_[share * rows_ + row];
        }
        store_row(sum, W{1}, params_.head_dim,
                  static_cast<T*>(params_.grad_q) +
                      sequence.query_offset(at.query, at.head, params_.grad_q_strides));
        if (params_.grad_distance != nullptr) {
            static_cast<W*>(params_.grad_distance)[statistic(sequence, at)] = distance;
        }
    }

    T* grad_bias_row(const Sequence& sequence, const RowPlace& at) const {
        return static_cast<T*>(params_.grad_bias) +
               (at.batch_head * sequence.queries + at.query) * sequence.keys;
    }

    // Every shares_-th tile of a head's keys: later keys are seen by fewer queries, if causal.
    void run_share(std::int64_t head, std::int64_t share, const Workspace& work) const {
        const Sequence sequence = sequence_of(params_.sequences, head / params_.kv_heads);
        const std::int64_t kv_head = head % params_.kv_heads;
        for (std::int64_t key = share * kTileKeys; key < sequence.keys;
             key += shares_ * kTileKeys) {
            const KeyRange keys{key, std::min(key + kTileKeys, sequence.keys)};
            Tiles<T>::load_keys(params_.k, params_.k_strides, params_.head_dim, params_.sequences,
                                sequence, kv_head, keys, work.keys, work.keys_t);
            Tiles<T>::load_keys(params_.v, params_.v_strides, params_.value_dim, params_.sequences,
                                sequence, kv_head, keys, work.values, work.values_t);
            std::fill_n(work.key_grads, kTileKeys * depth_, W{0});
            std::fill_n(work.value_grads, kTileKeys * columns_, W{0});
            const KeyRange seeing = sequence.queries_that_see(params_.scoring, keys);
            for (std::int64_t row = seeing.begin * group_; row < seeing.end * group_;
                 row += kTileRows) {
                run_tile(sequence, kv_head, keys, row,
                         std::min(kTileRows, seeing.end * group_ - row), share, work);
            }
            for (std::int64_t n = 0; n < keys.end - keys.begin; ++n) {
                const auto at = [&](const HeadStrides& strides) {
                    return sequence.key_offset(params_.sequences, key + n, kv_head, strides);
                };
                store_row(work.key_grads + n * depth_, W{1}, params_.head_dim,
                          static_cast<T*>(params_.grad_k) + at(params_.grad_k_strides));
                store_row(work.value_grads + n * columns_, W{1}, params_.value_dim,
                          static_cast<T*>(params_.grad_v) + at(params_.grad_v_strides));
            }
        }
    }

    // Rows [first, first + count) of a head against a tile of keys.
    void run_tile(const Sequence& sequence, std::int64_t kv_head, const KeyRange& keys,
                  std::int64_t first, std::int64_t count, std::int64_t share,
                  const Workspace& work) const {
        constexpr std::int64_t kOne = 1;
        const std::int64_t key_count = keys.end - keys.begin;
        const std::int64_t first_row =
            first_rows_.data()[sequence.batch] + kv_head * group_ * sequence.queries + first;
        Tiles<T>::load_queries(params_.q, params_.q_strides, params_.head_dim, sequence,
                               kv_head * group_, group_, first, count, work.queries);
        Tiles<T>::load_queries(params_.grad_out, params_.grad_out_strides, params_.value_dim,
                               sequence, kv_head * group_, group_, first, count, work.grads);
        product<false>(work.queries, Terms<T>::count(depth_), kOne, count, work.keys_t,
                       Terms<T>::count(params_.head_dim), kTileKeys, work.scores);
        product<false>(work.grads, Terms<T>::count(columns_), kOne, count, work.values_t,
                       Terms<T>::count(params_.value_dim), kTileKeys, work.score_grads);
        for (std::int64_t m = 0; m < count; ++m) {
            const std::int64_t row = first_row + m;
            differentiate_row(sequence, place(sequence, kv_head, first + m), keys, deltas_[row],
                              work.scores + m * kTileKeys, work.score_grads + m * kTileKeys,
                              distance_grads_[share * rows_ + row], work);
        }
        // The strides of the transpose: row n of P^T is column n of P.
        const auto add_to_keys = [&](const Term* weights, const Term* rows, std::int64_t columns,
                                     W* sums) {
            product<true>(Terms<T>::stack_rows(weights, count, kTileKeys, work.stacked_weights),
                          kOne, kTileKeys, key_count,
                          Terms<T>::stack_rows(rows, count, columns, work.stacked_rows),
                          Terms<T>::count(count), columns, sums);
        };
        add_to_keys(Terms<T>::load_scores(work.scores, count, work.weights), work.grads, columns_,
                    work.value_grads);
        const Term* weights = Terms<T>::load_scores(work.score_grads, count, work.weights);
        add_to_keys(weights, work.queries, depth_, work.key_grads);
        product<true>(weights, Terms<T>::count(kTileKeys), kOne, count,
                      Terms<T>::stack_rows(work.keys, kTileKeys, depth_, work.stacked_rows),
                      Terms<T>::count(key_count), depth_,
                      query_grads_ + (share * rows_ + first_row) * depth_);
    }

    // Products become what multiplies grad_out in grad_v, and products of gradients the gradients
    // of the products.
    void differentiate_row(const Sequence& sequence, const RowPlace& at, const KeyRange& keys,
                           W delta, W* scores, W* score_grads, W& distance,
                           const Workspace& work) const {
        const Scoring& scoring = params_.scoring;
        const KeyRange seen =
            make_scores<T>(scoring, at, sequence.keys, keys.begin, scores, work.slopes);
        const W lse = static_cast<const W*>(params_.lse)[statistic(sequence, at)];
        // All of a row that sees nothing is minus infinity.
        const W base = lse == kNothing<W> ? W{0} : lse;
        if (scoring.dropout_seed != nullptr) {
            const W kept = W{1} / static_cast<W>(1.0 - scoring.dropout_p);
            draw_dropout(scoring, at, keys.begin, work.factors);
#pragma omp simd
            for (std::int64_t j = 0; j < kTileKeys; ++j) {
                const W factor = kept * work.factors[j];
                const W probability = exponential(scores[j] - base);
                scores[j] = factor * probability;
                score_grads[j] = probability * (factor * score_grads[j] - delta);
            }
        } else {
#pragma omp simd
            for (std::int64_t j = 0; j < kTileKeys; ++j) {
                scores[j] = exponential(scores[j] - base);
                score_grads[j] = scores[j] * (score_grads[j] - delta);
            }
        }
        if (params_.grad_bias != nullptr) {
            T* to = grad_bias_row(sequence, at) + keys.begin;
#pragma omp simd
            for (std::int64_t j = seen.begin; j < seen.end; ++j) {
                to[j] = narrow<T>(score_grads[j]);
            }
        }
        if (params_.grad_distance != nullptr) {
            const std::int64_t start = keys.begin - at.diagonal;
            for (std::int64_t j = seen.begin; j < seen.end; ++j) {
                distance -= std::fabs(static_cast<W>(start + j)) * score_grads[j];
            }
        }
        const W scale = static_cast<W>(scoring.softmax_scale);
        const bool capped = scoring.softcap > 0.0;
#pragma omp simd
        for (std::int64_t j = 0; j < kTileKeys; ++j) {
            score_grads[j] *= capped ? scale * work.slopes[j] : scale;
        }
    }

    const AttentionBackwardParams& params_;
    const std::int64_t group_;
    const std::int64_t depth_;
    const std::int64_t columns_;
    const std::int64_t heads_;                // key/value heads of all sequences
    const Scratch<std::int64_t> first_rows_;  // [batch] of each sequence
    std::int64_t rows_ = 0;
    std::int64_t shares_ = 1;
    W* deltas_ = nullptr;          // [rows] sum of grad_out * out, less grad_lse
    W* query_grads_ = nullptr;     // [shares, rows, depth]
    W* distance_grads_ = nullptr;  // [shares, rows]
};

}  // namespace

void attention_backward_cpu(const AttentionBackwardParams& params) {
    visit_element_type(params.dtype, [&]<typename T>() { Backward<T>(params).run(); });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::attention
