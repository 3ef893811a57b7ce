// Decoding on the CPU: bound by reading the cache, so every row of keys and of values crosses the
// memory bus once, for all heads and queries that read it, in the order in which it lies there.
//
// The keys of a sequence are cut into pieces of kPieceKeys, each a task with all its heads; how,
// does not depend on the batch, the number of splits asked for or the threads, and so a sequence
// has the same bits whatever else is computed. Then the pieces of every row are merged.
#include "attention/attention_decode.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "attention/decode_cpu.h"
#include "attention/scoring_cpu.h"
#include "attention/tile_cpu.h"
#include "common/cpu_float.h"
#include "common/cpu_math.h"
#include "common/parallel.h"

namespace warploom::attention {
namespace WARPLOOM_CPU_ISA {
namespace {

// So few that threads find work at small batches, so many that merging costs little. A multiple of
// kTileKeys.
constexpr std::int64_t kPieceKeys = 256;

// The keys of a sequence that some query sees, and its pieces among the tasks.
struct CachedSequence {
    std::int64_t length;
    KeyRange keys;
    std::int64_t first_piece;  // kPieceKeys first_piece is at most keys.begin
    std::int64_t pieces;
    std::int64_t first_task;
};

template <typename T>
class Decode {
    using W = Wide<T>;
    using Products = RowProducts<T>;
    using Query = typename Products::Query;

    static constexpr int kKeys = Products::kKeys;
    // How many keys ahead memory is asked for.
    static constexpr std::int64_t kAhead = 2 * kKeys;

  public:
    explicit Decode(const AttentionDecodeParams& params)
        : params_(params),
          group_(params.heads / params.kv_heads),
          group_rows_(group_ * params.query_length),
          rows_(params.kv_heads * group_rows_),
          depth_(padded<W>(params.head_dim)),
          columns_(padded<W>(params.value_dim)),
          sequences_(params.batch),
          queries_(params.batch * rows_ * depth_) {}

    void run() {
        const std::int64_t tasks = plan();
        Scratch<W> sums(tasks * rows_ * columns_);
        Scratch<Softmax<W>> states(tasks * rows_);
        sums_ = sums.data();
        states_ = states.data();
        parallel_for(params_.batch, 1, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t batch = begin; batch < end; ++batch) {
                load_queries(batch);
            }
        });
        share_tasks(tasks, [&](auto take) {
            Scratch<W> scores(rows_ * kTileKeys);
            for (std::int64_t task; take(task);) {
                run_piece(task, scores.data());
            }
        });
        parallel_for(params_.batch * rows_, 1, [&](std::int64_t begin, std::int64_t end) {
            Scratch<W> sum(columns_);
            for (std::int64_t row = begin; row < end; ++row) {
                merge_row(row / rows_, row % rows_, sum.data());
            }
        });
    }

  private:
    // Row r of a sequence: rows of one key/value head lie together.
    RowPlace place(std::int64_t batch, std::int64_t row) const {
        const std::int64_t head = row / group_rows_ * group_ + row % group_;
        const std::int64_t query = row % group_rows_ / group_;
        return {batch, head, batch * params_.heads + head, query,
                query + sequences_.data()[batch].length - params_.query_length};
    }

    static std::int64_t offset(const RowPlace& place, const HeadStrides& strides) {
        return place.batch * strides.batch + place.query * strides.sequence +
               place.head * strides.head;
    }

    // Finds each sequence's pieces; returns how many there are in all.
    std::int64_t plan() {
        std::int64_t tasks = 0;
        for (std::int64_t batch = 0; batch < params_.batch; ++batch) {
            CachedSequence& sequence = sequences_.data()[batch];
            const std::int64_t length =
                std::clamp<std::int64_t>(params_.cache_seqlens[batch], 0, params_.capacity);
            const Scoring& scoring = params_.scoring;
            const std::int64_t first = length - params_.query_length;
            const std::int64_t begin =
                std::clamp<std::int64_t>(seen_keys(scoring, first, length).begin, 0, length);
            const std::int64_t end =
                std::clamp<std::int64_t>(seen_keys(scoring, length - 1, length).end, begin, length);
            sequence.length = length;
            sequence.keys = {begin, end};
            sequence.first_piece = begin / kPieceKeys;
            sequence.pieces =
                begin < end ? ceil_divide(end, kPieceKeys) - sequence.first_piece : std::int64_t{0};
            sequence.first_task = tasks;
            tasks += sequence.pieces;
        }
        return tasks;
    }

    void load_queries(std::int64_t batch) {
        for (std::int64_t row = 0; row < rows_; ++row) {
            Query* to = queries_.data() + (batch * rows_ + row) * depth_;
            const T* from =
                static_cast<const T*>(params_.q) + offset(place(batch, row), params_.q_strides);
            std::fill_n(to, depth_, Query{0});
            for (std::int64_t i = 0; i < params_.head_dim; ++i) {
                to[Products::query_place(i)] = Products::query_element(from[i]);
            }
        }
    }

    // Rows [key, key + kKeys) of a cache, of its first head; the last one again where there are no
    // more of them.
    void find_rows(const void* cache, const HeadStrides& strides, std::int64_t batch,
                   std::int64_t key, std::int64_t end, const T** rows) const {
        for (int n = 0; n < kKeys; ++n) {
            const std::int64_t at = std::min(key + n, end - 1);
            std::int64_t block = batch;
            std::int64_t slot = at;
            if (params_.block_table != nullptr) {
                const auto page_size = static_cast<std::uint32_t>(params_.page_size);
                const std::uint32_t page = static_cast<std::uint32_t>(at) / page_size;
                slot = static_cast<std::uint32_t>(at) % page_size;
                block = params_.block_table[batch * params_.block_table_stride + page];
            }
            rows[n] =
                static_cast<const T*>(cache) + block * strides.batch + slot * strides.sequence;
        }
    }

    void run_piece(std::int64_t task, W* scores) {
        std::int64_t batch = 0;
        while (task >= sequences_.data()[batch].first_task + sequences_.data()[batch].pieces) {
            ++batch;
        }
        const CachedSequence& sequence = sequences_.data()[batch];
        const std::int64_t piece = (sequence.first_piece + task - sequence.first_task) * kPieceKeys;
        const std::int64_t end = std::min(piece + kPieceKeys, sequence.keys.end);
        W* sums = sums_ + task * rows_ * columns_;
        Softmax<W>* states = states_ + task * rows_;
        std::fill_n(sums, rows_ * columns_, W{0});
        std::fill_n(states, rows_, Softmax<W>{kNothing<W>, W{0}});
        for (std::int64_t key = std::max(piece, sequence.keys.begin); key < end; key += kTileKeys) {
            const KeyRange tile{key, std::min(key + kTileKeys, end)};
            multiply_keys(batch, tile, scores);
            for (std::int64_t row = 0; row < rows_; ++row) {
                W* row_scores = scores + row * kTileKeys;
                make_scores<T>(params_.scoring, place(batch, row), tile.end, key, row_scores,
                               nullptr);
                states[row].absorb(row_scores, sums + row * columns_, columns_);
            }
            multiply_values(batch, tile, end, scores, sums);
        }
    }

    void multiply_keys(std::int64_t batch, KeyRange tile, W* scores) const {
        const Query* queries = queries_.data() + batch * rows_ * depth_;
        const T* rows[kKeys];
        const T* next[kKeys];
        for (std::int64_t key = tile.begin; key < tile.end; key += kKeys) {
            const std::int64_t ahead = key + kAhead;
            find_rows(params_.k_cache, params_.k_strides, batch, key, tile.end, rows);
            if (ahead < tile.end) {
                find_rows(params_.k_cache, params_.k_strides, batch, ahead, tile.end, next);
            } else {
                find_rows(params_.v_cache, params_.v_strides, batch, tile.begin + ahead - tile.end,
                          tile.end, next);
            }
            for (std::int64_t head = 0; head < params_.kv_heads; ++head) {
                const std::int64_t first = head * group_rows_;
                for_rows(group_rows_, [&]<int kQueries>(std::int64_t row) {
                    Products::template query_products<kQueries>(
                        queries + (first + row) * depth_, depth_, rows, next,
                        head * params_.k_strides.head, params_.head_dim,
                        scores + (first + row) * kTileKeys + key - tile.begin, kTileKeys);
                });
            }
        }
    }

    void multiply_values(std::int64_t batch, KeyRange tile, std::int64_t end, const W* scores,
                         W* sums) const {
        const T* rows[kKeys];
        const T* next[kKeys];
        for (std::int64_t key = tile.begin; key < tile.end; key += kKeys) {
            const std::int64_t ahead = key + kAhead;
            find_rows(params_.v_cache, params_.v_strides, batch, key, tile.end, rows);
            if (ahead < tile.end || tile.end == end) {
                find_rows(params_.v_cache, params_.v_strides, batch, ahead, tile.end, next);
            } else {
                find_rows(params_.k_cache, params_.k_strides, batch, ahead, end, next);
            }
            for (std::int64_t head = 0; head < params_.kv_heads; ++head) {
                const std::int64_t first = head * group_rows_;
                for_rows(group_rows_, [&]<int kQueries>(std::int64_t row) {
                    Products::template add_values<kQueries>(
                        scores + (first + row) * kTileKeys + key - tile.begin, kTileKeys, rows,
                        next, head * params_.v_strides.head, params_.value_dim,
                        sums + (first + row) * columns_, columns_);
                });
            }
        }
    }

    void merge_row(std::int64_t batch, std::int64_t row, W* sum) const {
        const CachedSequence& sequence = sequences_.data()[batch];
        const RowPlace at = place(batch, row);
        const Softmax<W>* states = states_ + sequence.first_task * rows_ + row;
        const W* sums = sums_ + (sequence.first_task * rows_ + row) * columns_;
        Softmax<W> all = Softmax<W>::start(params_.scoring, at.head);
        all.merge(states, rows_, sums, rows_ * columns_, sequence.pieces, columns_, sum);
        const W factor = all.total == W{0} ? W{0} : W{1} / all.total;
        T* out = static_cast<T*>(params_.out) + offset(at, params_.out_strides);
        for (std::int64_t i = 0; i < params_.value_dim; ++i) {
            out[i] = narrow<T>(sum[Products::sum_place(i)] * factor);
        }
        static_cast<W*>(params_.lse)[at.batch_head * params_.query_length + at.query] =
            all.log_sum();
    }

    const AttentionDecodeParams& params_;
    const std::int64_t group_;       // query heads of a key/value head
    const std::int64_t group_rows_;  // rows of a key/value head
    const std::int64_t rows_;        // of a sequence
    const std::int64_t depth_;
    const std::int64_t columns_;
    const Scratch<CachedSequence> sequences_;
    const Scratch<Query> queries_;  // [batch, rows, depth], in the order of query_place
    W* sums_ = nullptr;             // [tasks, rows, columns], in the order of sum_place
    Softmax<W>* states_ = nullptr;  // [tasks, rows]
};

}  // namespace

void attention_decode_cpu(const AttentionDecodeParams& params) {
    visit_element_type(params.dtype, [&]<typename T>() { Decode<T>(params).run(); });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::attention
