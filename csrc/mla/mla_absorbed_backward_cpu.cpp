// The gradient of absorbed latent attention on the CPU. Scores are computed again, tile by tile. A
// task is a share of a sequence's rows: every block of rows has its gradient to itself, and the
// cache's gradient, which all of them add to, is one sum a share, added up afterwards. It is small:
// a cache has one row where there are as many rows as heads. Shares and orders of sums depend on
// the shape alone.
#include "mla/mla_absorbed_backward.h"

#include <algorithm>
#include <cstdint>

#include "attention/scoring_cpu.h"
#include "attention/tile_cpu.h"
#include "common/cpu_float.h"
#include "common/cpu_math.h"
#include "common/parallel.h"
#include "mla/rows_cpu.h"

namespace warploom::mla {
namespace WARPLOOM_CPU_ISA {
namespace {

// Rows of a block: its tiles fit the second level of cache.
constexpr std::int64_t kBlockRows = 64;

// Shares of a sequence's rows: where there are few sequences, enough tasks for the threads. Each
// costs memory for the gradient of all keys.
constexpr std::int64_t kEnoughTasks = 32;
constexpr std::int64_t kMostShares = 16;

template <typename T>
class Backward {
    using W = Wide<T>;
    using Term = typename Terms<T>::Term;

    // Tiles of one thread. Rows of all but scores have `depth`; gradients of out are 0 behind
    // d_latent.
    struct Workspace {
        Term* queries;          // [kBlockRows, depth]
        Term* grads;            // [kBlockRows, depth] of grad_out
        Term* keys;             // [kTileKeys, depth]
        Term* keys_t;           // [depth, kTileKeys]
        Term* weights;          // [kBlockRows, kTileKeys] of scores, then of score_grads
        Term* stacked_weights;  // the same
        Term* stacked_rows;     // [kBlockRows or kTileKeys, depth]
        W* query_grads;         // [kBlockRows, depth]
        W* scores;              // [kBlockRows, kTileKeys], then the probabilities
        W* score_grads;         // [kBlockRows, kTileKeys]
        W* deltas;              // [kBlockRows] sum of grad_out * out, less grad_lse

        Workspace(Scratch<Term>& terms, Scratch<W>& numbers, std::int64_t depth)
            : queries(terms.take(Terms<T>::count(kBlockRows * depth))),
              grads(terms.take(Terms<T>::count(kBlockRows * depth))),
              keys(terms.take(Terms<T>::count(kTileKeys * depth))),
              keys_t(terms.take(Terms<T>::count(kTileKeys * depth))),
              weights(terms.take(Terms<T>::count(kBlockRows * kTileKeys))),
              stacked_weights(terms.take(Terms<T>::count(kBlockRows * kTileKeys))),
              stacked_rows(terms.take(Terms<T>::count(std::max(kBlockRows, kTileKeys) * depth))),
              query_grads(numbers.take(kBlockRows * depth)),
              scores(numbers.take(kBlockRows * kTileKeys)),
              score_grads(numbers.take(kBlockRows * kTileKeys)),
              deltas(numbers.take(kBlockRows)) {}
    };

  public:
    explicit Backward(const MlaAbsorbedBackwardParams& params)
        : params_(params),
          width_(params.d_latent + params.d_rope),
          depth_(padded<W>(width_)),
          rows_(params.kv_seqlens, params.kv_length, params.query_length, params.heads,
                params.softmax_scale, params.causal),
          blocks_(ceil_divide(rows_.count(), kBlockRows)),
          shares_(std::clamp<std::int64_t>(
              std::min(kEnoughTasks / std::max(1, params.batch), blocks_), 1, kMostShares)),
          key_grads_(params.batch * shares_ * params.kv_length * depth_) {}

    void run() {
        share_tasks(params_.batch * shares_, [&](auto take) {
            Scratch<Term> terms(Terms<T>::count(2 * kBlockRows * (depth_ + kTileKeys) +
                                                2 * kTileKeys * depth_ +
                                                std::max(kBlockRows, kTileKeys) * depth_));
            Scratch<W> numbers(kBlockRows * (depth_ + 2 * kTileKeys + 1));
            const Workspace work(terms, numbers, depth_);
            for (std::int64_t task; take(task);) {
                run_share(task, work);
            }
        });
        constexpr std::int64_t kGrain = 16;
        parallel_for(std::int64_t{params_.batch} * params_.kv_length, kGrain,
                     [&](std::int64_t begin, std::int64_t end) {
                         for (std::int64_t key = begin; key < end; ++key) {
                             finish_key(key / params_.kv_length, key % params_.kv_length);
                         }
                     });
    }

  private:
    W* key_grads(std::int64_t batch, std::int64_t share, std::int64_t key) const {
        return key_grads_.data() + ((batch * shares_ + share) * params_.kv_length + key) * depth_;
    }

    // Every shares_-th block: later rows see more keys, if causal.
    void run_share(std::int64_t task, const Workspace& work) const {
        const std::int64_t batch = task / shares_;
        const std::int64_t share = task % shares_;
        std::fill_n(key_grads(batch, share, 0), rows_.length(batch) * depth_, W{0});
        for (std::int64_t block = share; block < blocks_; block += shares_) {
            const std::int64_t first = block * kBlockRows;
            const std::int64_t count = std::min(kBlockRows, rows_.count() - first);
            for (std::int64_t m = 0; m < count; ++m) {
                load_row_of_block(rows_.place(batch, first + m), m, work);
            }
            std::fill_n(work.query_grads, count * depth_, W{0});
            const std::int64_t end = rows_.keys_end(batch, first + count - 1);
            for (std::int64_t key = 0; key < end; key += kTileKeys) {
                const KeyRange tile{key, std::min(key + kTileKeys, end)};
                load_keys(batch, tile, work);
                run_tile(batch, tile, first, count, key_grads(batch, share, key), work);
            }
            for (std::int64_t m = 0; m < count; ++m) {
                store_row(
                    work.query_grads + m * depth_, W{1}, width_,
                    static_cast<T*>(params_.grad_q) + (batch * rows_.count() + first + m) * width_);
            }
        }
    }

    void load_row_of_block(const RowPlace& at, std::int64_t m, const Workspace& work) const {
        const std::int64_t d_latent = params_.d_latent;
        const T* out = static_cast<const T*>(params_.out) +
                       (at.batch * rows_.count() + at.query * params_.heads + at.head) * d_latent;
        const T* grad =
            static_cast<const T*>(params_.grad_out) + at.batch * params_.grad_out_batch_stride +
            at.query * params_.grad_out_sequence_stride + at.head * params_.grad_out_head_stride;
        const T* query = static_cast<const T*>(params_.q) + at.batch * params_.q_batch_stride +
                         at.query * params_.q_sequence_stride + at.head * params_.q_head_stride;
        const std::int64_t depth = Terms<T>::count(depth_);
        Terms<T>::load_row(query, width_, work.queries + m * depth);
        std::fill_n(work.grads + m * depth, depth, Term{});
        Terms<T>::load_row(grad, d_latent, work.grads + m * depth);
        // Added up as product does in float32: where one key is seen, out is its value, and the
        // difference of the two is 0 as it should be.
        W delta = 0;
        for (std::int64_t begin = 0; begin < d_latent; begin += kTerms<W>) {
            W sum = 0;
            for (std::int64_t i = begin; i < std::min(begin + kTerms<W>, d_latent); ++i) {
                sum += widen(grad[i]) * widen(out[i]);
            }
            delta += sum;
        }
        if (params_.grad_lse != nullptr) {
            delta -= static_cast<const W*>(params_.grad_lse)[rows_.statistic(at)];
        }
        work.deltas[m] = delta;
    }

    // Zeros behind the last key: what is computed with them goes nowhere, but must not be slow to
    // compute with.
    void load_keys(std::int64_t batch, const KeyRange& tile, const Workspace& work) const {
        const std::int64_t count = tile.end - tile.begin;
        const std::int64_t depth = Terms<T>::count(depth_);
        for (std::int64_t n = 0; n < count; ++n) {
            Terms<T>::load_row(static_cast<const T*>(params_.kv) + batch * params_.kv_batch_stride +
                                   (tile.begin + n) * params_.kv_row_stride,
                               width_, work.keys + n * depth);
        }
        std::fill_n(work.keys + count * depth, (kTileKeys - count) * depth, Term{});
        transpose(work.keys, depth, work.keys_t);
    }

    // Rows [first, first + count) of a sequence against a tile of keys, whose gradients are added
    // to `key_grads`.
    void run_tile(std::int64_t batch, const KeyRange& tile, std::int64_t first, std::int64_t count,
                  W* key_grads, const Workspace& work) const {
        constexpr std::int64_t kOne = 1;
        const std::int64_t key_count = tile.end - tile.begin;
        const std::int64_t depth = Terms<T>::count(depth_);
        product<false>(work.queries, depth, kOne, count, work.keys_t, Terms<T>::count(width_),
                       kTileKeys, work.scores);
        product<false>(work.grads, depth, kOne, count, work.keys_t,
                       Terms<T>::count(params_.d_latent), kTileKeys, work.score_grads);
        for (std::int64_t m = 0; m < count; ++m) {
            differentiate_row(rows_.place(batch, first + m), tile, work.deltas[m],
                              work.scores + m * kTileKeys, work.score_grads + m * kTileKeys);
        }
        // The strides of the transpose: row n of P^T is column n of P.
        const auto add_to_keys = [&](const Term* weights, const Term* rows) {
            product<true>(Terms<T>::stack_rows(weights, count, kTileKeys, work.stacked_weights),
                          kOne, kTileKeys, key_count,
                          Terms<T>::stack_rows(rows, count, depth_, work.stacked_rows),
                          Terms<T>::count(count), depth_, key_grads);
        };
        add_to_keys(Terms<T>::load_scores(work.scores, count, work.weights), work.grads);
        const Term* weights = Terms<T>::load_scores(work.score_grads, count, work.weights);
        add_to_keys(weights, work.queries);
        product<true>(weights, Terms<T>::count(kTileKeys), kOne, count,
                      Terms<T>::stack_rows(work.keys, kTileKeys, depth_, work.stacked_rows),
                      Terms<T>::count(key_count), depth_, work.query_grads);
    }

    // Products become probabilities, and products of gradients the gradients of the products.
    void differentiate_row(const RowPlace& at, const KeyRange& tile, W delta, W* scores,
                           W* score_grads) const {
        make_scores<T>(rows_.scoring(), at, tile.end, tile.begin, scores, nullptr);
        const W lse = static_cast<const W*>(params_.lse)[rows_.statistic(at)];
        // All of a row that sees nothing is minus infinity.
        const W base = lse == kNothing<W> ? W{0} : lse;
        const W scale = static_cast<W>(params_.softmax_scale);
#pragma omp simd
        for (std::int64_t j = 0; j < kTileKeys; ++j) {
            scores[j] = exponential(scores[j] - base);
            score_grads[j] = scale * scores[j] * (score_grads[j] - delta);
        }
    }

    void finish_key(std::int64_t batch, std::int64_t key) const {
        T* to = static_cast<T*>(params_.grad_kv) + (batch * params_.kv_length + key) * width_;
        if (key >= rows_.length(batch)) {
            std::fill_n(to, width_, T{});
            return;
        }
        W* sum = key_grads(batch, 0, key);
        for (std::int64_t share = 1; share < shares_; ++share) {
            const W* from = key_grads(batch, share, key);
#pragma omp simd
            for (std::int64_t i = 0; i < width_; ++i) {
                sum[i] += from[i];
            }
        }
        store_row(sum, W{1}, width_, to);
    }

    const MlaAbsorbedBackwardParams& params_;
    const std::int64_t width_;
    const std::int64_t depth_;
    const Rows rows_;
    const std::int64_t blocks_;  // of a sequence
    const std::int64_t shares_;
    const Scratch<W> key_grads_;  // [batch, shares, kv_length, depth]
};

}  // namespace

void mla_absorbed_backward_cpu(const MlaAbsorbedBackwardParams& params) {
    visit_element_type(params.dtype, [&]<typename T>() { Backward<T>(params).run(); });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::mla
