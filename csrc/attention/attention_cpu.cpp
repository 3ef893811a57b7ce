// Attention forward on the CPU: softmax without a score matrix, tile by tile of keys (online
// softmax: Milakov and Gimelshein 2018). A task is a tile of rows: queries of all heads that read
// one key/value head.
#include <algorithm>
#include <cstdint>

#include "attention/attention.h"
#include "attention/attention_decode.h"
#include "attention/scoring_cpu.h"
#include "attention/sequences_cpu.h"
#include "attention/tile_cpu.h"
#include "common/cpu_float.h"

namespace warploom::attention {
namespace WARPLOOM_CPU_ISA {
namespace {

template <typename T>
class Forward {
    using W = Wide<T>;
    using Term = typename Terms<T>::Term;

    // Tiles of one thread.
    struct Workspace {
        Term* queries;     // [kTileRows, depth]
        Term* keys;        // [kTileKeys, depth]
        Term* transposed;  // [depth, kTileKeys] of keys
        Term* values;      // [kTileKeys, columns]
        Term* stacked;     // [kTileKeys, columns] of values
        Term* weights;     // [kTileRows, kTileKeys] of scores
        W* scores;         // [kTileRows, kTileKeys], then exp(score - maximum)
        W* sums;           // [kTileRows, columns] of exp(score - maximum) v
        W* factors;        // [kTileKeys] of dropout
        Softmax<W> states[kTileRows];

        Workspace(Scratch<Term>& terms, Scratch<W>& numbers, std::int64_t depth,
                  std::int64_t columns)
            : queries(terms.take(Terms<T>::count(kTileRows * depth))),
              keys(terms.take(Terms<T>::count(kTileKeys * depth))),
              transposed(terms.take(Terms<T>::count(kTileKeys * depth))),
              values(terms.take(Terms<T>::count(kTileKeys * columns))),
              stacked(terms.take(Terms<T>::count(kTileKeys * columns))),
              weights(terms.take(Terms<T>::count(kTileRows * kTileKeys))),
              scores(numbers.take(kTileRows * kTileKeys)),
              sums(numbers.take(kTileRows * columns)),
              factors(numbers.take(kTileKeys)) {}
    };

  public:
    explicit Forward(const AttentionParams& params)
        : params_(params),
          group_(params.heads / params.kv_heads),
          depth_(padded<W>(params.head_dim)),
          columns_(padded<W>(params.value_dim)),
          first_tasks_(params.sequences.batch) {}

    void run() {
        std::int64_t tasks = 0;
        for (std::int64_t batch = 0; batch < params_.sequences.batch; ++batch) {
            first_tasks_.data()[batch] = tasks;
            tasks += params_.kv_heads * row_tiles(sequence_of(params_.sequences, batch));
        }
        share_tasks(tasks, [&](auto take) {
            Scratch<Term> terms(Terms<T>::count(kTileRows * (depth_ + kTileKeys) +
                                                kTileKeys * (2 * depth_ + 2 * columns_)));
            Scratch<W> numbers(kTileRows * (columns_ + kTileKeys) + kTileKeys);
            Workspace work(terms, numbers, depth_, columns_);
            for (std::int64_t task; take(task);) {
                run_task(task, work);
            }
        });
    }

  private:
    std::int64_t row_tiles(const Sequence& sequence) const {
        return ceil_divide(sequence.queries * group_, kTileRows);
    }

    void run_task(std::int64_t task, Workspace& work) const {
        const std::int64_t batch = last_at_most(first_tasks_.data(), params_.sequences.batch, task);
        const Sequence sequence = sequence_of(params_.sequences, batch);
        const std::int64_t tile = task - first_tasks_.data()[batch];
        const std::int64_t first = tile % row_tiles(sequence) * kTileRows;
        run_tile(sequence, tile / row_tiles(sequence), first,
                 std::min(first + kTileRows, sequence.queries * group_), work);
    }

    RowPlace place(const Sequence& sequence, std::int64_t kv_head, std::int64_t row) const {
        const std::int64_t head = kv_head * group_ + row % group_;
        return {sequence.batch, head, sequence.batch * params_.heads + head, row / group_,
                row / group_ + sequence.diagonal()};
    }

    // Rows [first, end) of a key/value head.
    void run_tile(const Sequence& sequence, std::int64_t kv_head, std::int64_t first,
                  std::int64_t end, Workspace& work) const {
        const Scoring& scoring = params_.scoring;
        Tiles<T>::load_queries(params_.q, params_.q_strides, params_.head_dim, sequence,
                               kv_head * group_, group_, first, end - first, work.queries);
        std::fill_n(work.sums, (end - first) * columns_, W{0});
        for (std::int64_t row = first; row < end; ++row) {
            work.states[row - first] = Softmax<W>::start(scoring, kv_head * group_ + row % group_);
        }
        const std::int64_t diagonal = sequence.diagonal();
        const std::int64_t from =
            std::max<std::int64_t>(
                0, seen_keys(scoring, first / group_ + diagonal, sequence.keys).begin) /
            kTileKeys * kTileKeys;
        const std::int64_t to =
            seen_keys(scoring, (end - 1) / group_ + diagonal, sequence.keys).end;
        for (std::int64_t key = from; key < to; key += kTileKeys) {
            const KeyRange keys{key, std::min(key + kTileKeys, to)};
            const KeyRange seeing = sequence.queries_that_see(scoring, keys);
            run_keys(sequence, kv_head, keys, std::max(first, seeing.begin * group_),
                     std::min(end, seeing.end * group_), first, work);
        }
        for (std::int64_t row = first; row < end; ++row) {
            finish_row(sequence, place(sequence, kv_head, row), work.states[row - first],
                       work.sums + (row - first) * columns_);
        }
    }

    // Rows [begin, end) of the tile that starts with `first` against a tile of keys.
    void run_keys(const Sequence& sequence, std::int64_t kv_head, const KeyRange& keys,
                  std::int64_t begin, std::int64_t end, std::int64_t first, Workspace& work) const {
        if (begin >= end) {
            return;
        }
        Tiles<T>::load_keys(params_.k, params_.k_strides, params_.head_dim, params_.sequences,
                            sequence, kv_head, keys, work.keys, work.transposed);
        Tiles<T>::load_keys(params_.v, params_.v_strides, params_.value_dim, params_.sequences,
                            sequence, kv_head, keys, work.values, nullptr);
        W* scores = work.scores;
        const std::int64_t depth = Terms<T>::count(depth_);
        product<false>(work.queries + (begin - first) * depth, depth, std::int64_t{1}, end - begin,
                       work.transposed, Terms<T>::count(params_.head_dim), kTileKeys, scores);
        for (std::int64_t row = begin; row < end; ++row) {
            W* row_scores = scores + (row - begin) * kTileKeys;
            const RowPlace at = place(sequence, kv_head, row);
            make_scores<T>(params_.scoring, at, sequence.keys, keys.begin, row_scores, nullptr);
            work.states[row - first].absorb(row_scores, work.sums + (row - first) * columns_,
                                            columns_);
            if (params_.scoring.dropout_seed != nullptr) {
                draw_dropout(params_.scoring, at, keys.begin, work.factors);
#pragma omp simd
                for (std::int64_t j = 0; j < kTileKeys; ++j) {
                    row_scores[j] *= work.factors[j];
                }
            }
        }
        product<true>(Terms<T>::load_scores(scores, end - begin, work.weights),
                      Terms<T>::count(kTileKeys), std::int64_t{1}, end - begin,
                      Terms<T>::stack_rows(work.values, kTileKeys, columns_, work.stacked),
                      Terms<T>::count(keys.end - keys.begin), columns_,
                      work.sums + (begin - first) * columns_);
    }

    void finish_row(const Sequence& sequence, const RowPlace& at, const Softmax<W>& state,
                    const W* sum) const {
        const W kept = static_cast<W>(1.0 - params_.scoring.dropout_p);
        const W factor = state.total == W{0} ? W{0} : W{1} / (state.total * kept);
        store_row(sum, factor, params_.value_dim,
                  static_cast<T*>(params_.out) +
                      sequence.query_offset(at.query, at.head, params_.out_strides));
        static_cast<W*>(
            params_.lse)[at.batch * params_.lse_batch_stride + at.head * params_.lse_head_stride +
                         sequence.first_query + at.query] = state.log_sum();
    }

    const AttentionParams& params_;
    const std::int64_t group_;
    const std::int64_t depth_;
    const std::int64_t columns_;
    const Scratch<std::int64_t> first_tasks_;  // [batch] of each sequence
};

// Few queries on many keys are bound by reading them: decoding, of caches that are full.
void decode(const AttentionParams& params) {
    const Sequences& sequences = params.sequences;
    Scratch<std::int32_t> lengths(sequences.batch);
    std::fill_n(lengths.data(), sequences.batch, sequences.key_length);
    AttentionDecodeParams decode{};
    decode.q = params.q;
    decode.k_cache = params.k;
    decode.v_cache = params.v;
    decode.out = params.out;
    decode.lse = params.lse;
    decode.cache_seqlens = lengths.data();
    decode.q_strides = params.q_strides;
    decode.k_strides = params.k_strides;
    decode.v_strides = params.v_strides;
    decode.out_strides = params.out_strides;
    decode.scoring = params.scoring;
    decode.page_size = sequences.key_length;
    decode.batch = sequences.batch;
    decode.query_length = sequences.query_length;
    decode.capacity = sequences.key_length;
    decode.heads = params.heads;
    decode.kv_heads = params.kv_heads;
    decode.head_dim = params.head_dim;
    decode.value_dim = params.value_dim;
    decode.num_splits = 1;
    decode.dtype = params.dtype;
    WARPLOOM_CPU_ISA::attention_decode_cpu(decode);
}

bool is_decoding(const AttentionParams& params) {
    constexpr int kDecodingQueries = 8;
    const Scoring& scoring = params.scoring;
    return params.sequences.cu_seqlens_q == nullptr &&
           params.sequences.query_length <= kDecodingQueries &&
           params.sequences.key_length > kTileKeys && scoring.bias == nullptr &&
           scoring.key_padding_mask == nullptr && scoring.dropout_seed == nullptr;
}

}  // namespace

void attention_forward_cpu(const AttentionParams& params) {
    if (is_decoding(params)) {
        decode(params);
        return;
    }
    visit_element_type(params.dtype, [&]<typename T>() { Forward<T>(params).run(); });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::attention
