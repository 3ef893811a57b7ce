// Attention backward on the CPU: the scores are computed again, tile by tile. One thread owns a
// key/value head with all queries that read it, in a fixed order: no atomics, the same bits each
// run.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "attention/attention_backward.h"
#include "attention/tile_cpu.h"
#include "common/cpu_float.h"
#include "common/cpu_math.h"
#include "common/parallel.h"

namespace warploom::attention {
namespace WARPLOOM_CPU_ISA {
namespace {

// Elements of scratch memory: the tiles of one thread, and what it keeps for all rows of a head.
template <typename W>
struct Workspace {
    W* queries;        // [kTile, padded head_dim]
    W* keys;           // [kTile, padded head_dim]
    W* key_grads;      // [kTile, padded head_dim]
    W* grads;          // [kTile, padded value_dim] of grad_out
    W* values;         // [kTile, padded value_dim]
    W* value_grads;    // [kTile, padded value_dim]
    W* probabilities;  // [kTile, kTile]
    W* score_grads;    // [kTile, kTile]
    W* query_grads;    // [rows, padded head_dim]
    W* deltas;         // [rows] sum of grad_out * out, less grad_lse

    static std::int64_t size(std::int64_t rows, std::int64_t depth, std::int64_t columns) {
        return 3 * kTile * (depth + columns) + 2 * kTile * kTile + rows * depth + padded<W>(rows);
    }

    Workspace(Scratch<W>& scratch, std::int64_t rows, std::int64_t depth, std::int64_t columns)
        : queries(scratch.take(kTile * depth)),
          keys(scratch.take(kTile * depth)),
          key_grads(scratch.take(kTile * depth)),
          grads(scratch.take(kTile * columns)),
          values(scratch.take(kTile * columns)),
          value_grads(scratch.take(kTile * columns)),
          probabilities(scratch.take(kTile * kTile)),
          score_grads(scratch.take(kTile * kTile)),
          query_grads(scratch.take(rows * depth)),
          deltas(scratch.take(padded<W>(rows))) {}
};

// Scores become probabilities, and their gradients' dot products the gradients of the scores.
template <typename W>
void differentiate_row(W* probabilities, W* score_grads, std::int64_t seen, std::int64_t keys,
                       W scale, W lse, W delta) {
    if (lse == -std::numeric_limits<W>::infinity()) {
        seen = 0;
    }
#pragma omp simd
    for (std::int64_t j = 0; j < seen; ++j) {
        probabilities[j] = exponential(probabilities[j] * scale - lse);
        score_grads[j] = scale * probabilities[j] * (score_grads[j] - delta);
    }
    std::fill(probabilities + seen, probabilities + keys, W{0});
    std::fill(score_grads + seen, score_grads + keys, W{0});
}

template <typename T>
class HeadBackward {
    using W = Wide<T>;

  public:
    HeadBackward(const AttentionBackwardParams& params, std::int64_t task, Workspace<W>& work)
        : params_(params),
          work_(work),
          kv_head_(task % params.kv_heads),
          group_{params.heads / params.kv_heads, kv_head_ * (params.heads / params.kv_heads),
                 task / params.kv_heads},
          rows_(group_.group * params.query_length),
          depth_(padded<W>(params.head_dim)),
          columns_(padded<W>(params.value_dim)),
          visible_(params.key_length - params.query_length + 1) {}

    void run() {
        compute_deltas();
        std::fill_n(work_.query_grads, rows_ * depth_, W{0});
        for (std::int64_t key = 0; key < params_.key_length; key += kTile) {
            run_keys(key, std::min(kTile, params_.key_length - key));
        }
        for (std::int64_t row = 0; row < rows_; ++row) {
            store_row(work_.query_grads + row * depth_, W{1}, params_.head_dim,
                      static_cast<T*>(params_.grad_q) + group_.offset(row, params_.grad_q_strides));
        }
    }

  private:
    W statistic(const void* tensor, std::int64_t row) const {
        return static_cast<const W*>(
            tensor)[(group_.batch * params_.heads + group_.head(row)) * params_.query_length +
                    group_.query(row)];
    }

    void compute_deltas() {
        for (std::int64_t row = 0; row < rows_; ++row) {
            const T* grad = static_cast<const T*>(params_.grad_out) +
                            group_.offset(row, params_.grad_out_strides);
            const T* out =
                static_cast<const T*>(params_.out) + group_.offset(row, params_.out_strides);
            W delta = 0;
#pragma omp simd reduction(+ : delta)
            for (std::int64_t i = 0; i < params_.value_dim; ++i) {
                delta += widen(grad[i]) * widen(out[i]);
            }
            work_.deltas[row] =
                params_.grad_lse == nullptr ? delta : delta - statistic(params_.grad_lse, row);
        }
    }

    // The address of one key's row in k, v or a gradient of theirs.
    template <typename Element>
    Element* key_row(Element* tensor, std::int64_t key, const HeadStrides& strides) const {
        return tensor + group_.batch * strides.batch + key * strides.sequence +
               kv_head_ * strides.head;
    }

    // The keys [key, key + count) against all rows that see one of them.
    void run_keys(std::int64_t key, std::int64_t count) {
        for (std::int64_t n = 0; n < count; ++n) {
            load_row(key_row(static_cast<const T*>(params_.k), key + n, params_.k_strides),
                     params_.head_dim, work_.keys + n * depth_);
            load_row(key_row(static_cast<const T*>(params_.v), key + n, params_.v_strides),
                     params_.value_dim, work_.values + n * columns_);
        }
        if (count % 2 != 0) {
            std::fill_n(work_.keys + count * depth_, depth_, W{0});
            std::fill_n(work_.values + count * columns_, columns_, W{0});
        }
        std::fill_n(work_.key_grads, kTile * depth_, W{0});
        std::fill_n(work_.value_grads, kTile * columns_, W{0});
        // Query i sees j < i + visible: the first that sees `key` is i = key - visible + 1.
        const std::int64_t first_query =
            params_.causal ? std::max<std::int64_t>(0, key - visible_ + 1) : 0;
        for (std::int64_t row = first_query * group_.group; row < rows_; row += kTile) {
            run_tile(row, std::min(kTile, rows_ - row), key, count);
        }
        for (std::int64_t n = 0; n < count; ++n) {
            store_row(work_.key_grads + n * depth_, W{1}, params_.head_dim,
                      key_row(static_cast<T*>(params_.grad_k), key + n, params_.grad_k_strides));
            store_row(work_.value_grads + n * columns_, W{1}, params_.value_dim,
                      key_row(static_cast<T*>(params_.grad_v), key + n, params_.grad_v_strides));
        }
    }

    void run_tile(std::int64_t first_row, std::int64_t rows, std::int64_t key, std::int64_t count) {
        for (std::int64_t m = 0; m < rows; ++m) {
            load_row(
                static_cast<const T*>(params_.q) + group_.offset(first_row + m, params_.q_strides),
                params_.head_dim, work_.queries + m * depth_);
            load_row(static_cast<const T*>(params_.grad_out) +
                         group_.offset(first_row + m, params_.grad_out_strides),
                     params_.value_dim, work_.grads + m * columns_);
        }
        dots(work_.queries, rows, work_.keys, count, depth_, work_.probabilities);
        dots(work_.grads, rows, work_.values, count, columns_, work_.score_grads);
        for (std::int64_t m = 0; m < rows; ++m) {
            const std::int64_t row = first_row + m;
            const std::int64_t limit = params_.causal ? group_.query(row) + visible_ - key : count;
            differentiate_row(work_.probabilities + m * kTile, work_.score_grads + m * kTile,
                              std::clamp<std::int64_t>(limit, 0, count), count,
                              static_cast<W>(params_.softmax_scale), statistic(params_.lse, row),
                              work_.deltas[row]);
        }
        // The strides of the transposes: row n of P^T is column n of P.
        constexpr std::int64_t kOne = 1;
        add_product(work_.probabilities, kOne, kTile, count, work_.grads, rows, columns_,
                    work_.value_grads);
        add_product(work_.score_grads, kOne, kTile, count, work_.queries, rows, depth_,
                    work_.key_grads);
        add_product(work_.score_grads, kTile, kOne, rows, work_.keys, count, depth_,
                    work_.query_grads + first_row * depth_);
    }

    const AttentionBackwardParams& params_;
    Workspace<W>& work_;
    const std::int64_t kv_head_;
    const GroupRows group_;
    const std::int64_t rows_;
    const std::int64_t depth_;
    const std::int64_t columns_;
    const std::int64_t visible_;
};

template <typename T>
void backward(const AttentionBackwardParams& params) {
    using W = Wide<T>;
    const std::int64_t rows = params.heads / params.kv_heads * params.query_length;
    const std::int64_t depth = padded<W>(params.head_dim);
    const std::int64_t columns = padded<W>(params.value_dim);
    parallel_for(params.batch * params.kv_heads, 1, [&](std::int64_t first, std::int64_t last) {
        Scratch<W> scratch(Workspace<W>::size(rows, depth, columns));
        Workspace<W> work(scratch, rows, depth, columns);
        for (std::int64_t task = first; task < last; ++task) {
            HeadBackward<T>(params, task, work).run();
        }
    });
}

}  // namespace

void attention_backward_cpu(const AttentionBackwardParams& params) {
    visit_element_type(params.dtype, [&]<typename T>() { backward<T>(params); });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::attention
