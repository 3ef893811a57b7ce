// Absorbed latent attention on the CPU. A tile of the cache crosses the memory bus once for a block
// of rows: as the keys of all their heads and queries and, still in a core's cache, as the values.
//
// A task is a block of rows with a piece of the keys. Blocks and pieces depend on the shape of one
// sequence alone, not on the batch, the number of splits asked for or the threads, and so a
// sequence has the same bits whatever else is computed. Then the pieces of every row are merged.
#include "mla/mla_decode.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "attention/decode_cpu.h"
#include "attention/scoring_cpu.h"
#include "attention/sequences_cpu.h"
#include "attention/tile_cpu.h"
#include "common/cpu_float.h"
#include "common/parallel.h"
#include "mla/cache_cpu.h"
#include "mla/rows_cpu.h"

namespace warploom::mla {
namespace WARPLOOM_CPU_ISA {
namespace {

// Rows of a block: with their sums, and a tile of keys, they fit the second level of cache.
constexpr std::int64_t kBlockRows = 64;

// Columns of the sums that are added to together. A multiple of a step (decode_cpu.h).
constexpr std::int64_t kColumns = 256;

// So few keys that threads find work at small batches, so many that merging costs little; more
// where there are many rows, so that the sums of all pieces take less memory than the cache.
// Multiples of kTileKeys.
constexpr std::int64_t kLeastPieceKeys = 256;
constexpr std::int64_t kPieceKeysOfRow = 4;

// Element is what the rows of a cache are made of: T, or Wide<T> where they are expanded, tile by
// tile.
template <typename T, typename Element>
class Decode {
    using W = Wide<T>;
    using Products = RowProducts<Element>;
    using Query = typename Products::Query;

    static constexpr int kKeys = Products::kKeys;
    // How many keys ahead memory is asked for.
    static constexpr std::int64_t kAhead = 2 * kKeys;

    // Of one thread.
    struct Workspace {
        const Scratch<Query> queries;        // [block_rows, depth], in the order of query_place
        const Scratch<W> scores;             // [block_rows, kTileKeys]
        const Scratch<Element> expanded;     // [kTileKeys, depth] of a compressed cache
        const Element* keys[2 * kTileKeys];  // rows of a tile and of the next one
    };

  public:
    explicit Decode(const MlaDecodeParams& params)
        : params_(params),
          rows_(params.cache.cache_seqlens, params.cache.capacity, params.query_length,
                params.heads, params.softmax_scale, params.causal),
          block_rows_(std::min(kBlockRows, rows_.count())),
          blocks_(ceil_divide(rows_.count(), kBlockRows)),
          piece_keys_(
              std::max(kLeastPieceKeys,
                       ceil_divide(kPieceKeysOfRow * rows_.count(), kTileKeys) * kTileKeys)),
          depth_(padded<W>(params.d_latent + params.d_rope)),
          columns_(padded<W>(params.d_latent)),
          first_tasks_(params.batch * blocks_) {}

    void run() {
        std::int64_t tasks = 0;
        for (std::int64_t block = 0; block < params_.batch * blocks_; ++block) {
            first_tasks_.data()[block] = tasks;
            tasks += pieces(block);
        }
        const Scratch<W> sums(tasks * block_rows_ * columns_);
        const Scratch<Softmax<W>> states(tasks * block_rows_);
        sums_ = sums.data();
        states_ = states.data();
        share_tasks(tasks, [&](auto take) {
            const bool dense = params_.cache.format == CacheFormat::dense;
            Workspace work{Scratch<Query>(block_rows_ * depth_),
                           Scratch<W>(block_rows_ * kTileKeys),
                           Scratch<Element>(dense ? 0 : kTileKeys * depth_),
                           {}};
            for (std::int64_t task; take(task);) {
                run_task(task, work);
            }
        });
        const std::int64_t count = rows_.count();
        parallel_for(params_.batch * count, 1, [&](std::int64_t begin, std::int64_t end) {
            const Scratch<W> sum(columns_);
            for (std::int64_t row = begin; row < end; ++row) {
                merge_row(row / count, row % count, sum.data());
            }
        });
    }

  private:
    // Blocks are counted through all sequences.
    std::int64_t keys_end(std::int64_t block) const {
        const std::int64_t row_end = (block % blocks_ + 1) * kBlockRows;
        return rows_.keys_end(block / blocks_, std::min(row_end, rows_.count()) - 1);
    }

    std::int64_t pieces(std::int64_t block) const {
        return ceil_divide(keys_end(block), piece_keys_);
    }

    void run_task(std::int64_t task, Workspace& work) const {
        const std::int64_t block = last_at_most(first_tasks_.data(), params_.batch * blocks_, task);
        const std::int64_t batch = block / blocks_;
        const std::int64_t first = block % blocks_ * kBlockRows;
        const std::int64_t rows = std::min(kBlockRows, rows_.count() - first);
        const std::int64_t begin = (task - first_tasks_.data()[block]) * piece_keys_;
        const std::int64_t end = std::min(begin + piece_keys_, keys_end(block));
        W* sums = sums_ + task * block_rows_ * columns_;
        Softmax<W>* states = states_ + task * block_rows_;
        std::fill_n(sums, rows * columns_, W{0});
        std::fill_n(states, rows, Softmax<W>{kNothing<W>, W{0}});
        for (std::int64_t row = 0; row < rows; ++row) {
            load_query(rows_.place(batch, first + row), work.queries.data() + row * depth_);
        }
        for (std::int64_t key = begin; key < end; key += kTileKeys) {
            const std::int64_t keys = std::min(kTileKeys, end - key);
            if (params_.cache.format == CacheFormat::dense) {
                find_keys(batch, key, end, work);
            } else {
                expand_keys(batch, key, end, work);
            }
            multiply_keys(keys, rows, work);
            for (std::int64_t row = 0; row < rows; ++row) {
                W* scores = work.scores.data() + row * kTileKeys;
                make_scores<T>(rows_.scoring(), rows_.place(batch, first + row), end, key, scores,
                               nullptr);
                states[row].absorb(scores, sums + row * columns_, columns_);
            }
            multiply_values(keys, rows, work, sums);
        }
    }

    void load_query(const RowPlace& at, Query* to) const {
        const T* from = static_cast<const T*>(params_.q) + at.batch * params_.q_batch_stride +
                        at.query * params_.q_sequence_stride + at.head * params_.q_head_stride;
        std::fill_n(to, depth_, Query{});
        for (std::int64_t i = 0; i < params_.d_latent + params_.d_rope; ++i) {
            if constexpr (std::is_same_v<T, Element>) {
                to[Products::query_place(i)] = Products::query_element(from[i]);
            } else {
                to[i] = widen(from[i]);
            }
        }
    }

    // Beyond the last row, where there may be anything, the last one again.
    void find_keys(std::int64_t batch, std::int64_t key, std::int64_t end, Workspace& work) const {
        for (std::int64_t n = 0; n < 2 * kTileKeys; ++n) {
            work.keys[n] = static_cast<const Element*>(params_.kv_cache) +
                           place_of(params_.cache, batch, std::min(key + n, end - 1)).offset;
        }
    }

    // The same for a compressed cache, of whose next tile there is nothing yet.
    void expand_keys(std::int64_t batch, std::int64_t key, std::int64_t end,
                     Workspace& work) const {
        const std::int64_t count = std::min(kTileKeys, end - key);
        for (std::int64_t n = 0; n < kTileKeys; ++n) {
            work.keys[n] = work.expanded.data() + std::min(n, count - 1) * depth_;
            work.keys[n + kTileKeys] = work.keys[n];
        }
        if constexpr (std::is_same_v<W, Element>) {
            visit_code(params_.cache.format, [&]<typename Code>() {
                for (std::int64_t n = 0; n < count; ++n) {
                    expand_row<Code>(static_cast<const std::uint8_t*>(params_.kv_cache) +
                                         place_of(params_.cache, batch, key + n).offset,
                                     params_.d_latent, params_.d_rope,
                                     work.expanded.data() + n * depth_);
                }
            });
        }
    }

    void multiply_keys(std::int64_t keys, std::int64_t rows, const Workspace& work) const {
        for (std::int64_t key = 0; key < keys; key += kKeys) {
            for_rows(rows, [&]<int kQueries>(std::int64_t row) {
                Products::template query_products<kQueries>(
                    work.queries.data() + row * depth_, depth_, work.keys + key,
                    work.keys + key + kAhead, 0, params_.d_latent + params_.d_rope,
                    work.scores.data() + row * kTileKeys + key, kTileKeys);
            });
        }
    }

    // A few columns at a time, whose sums stay in the first level of cache.
    void multiply_values(std::int64_t keys, std::int64_t rows, const Workspace& work,
                         W* sums) const {
        for (std::int64_t column = 0; column < params_.d_latent; column += kColumns) {
            const std::int64_t columns = std::min(kColumns, params_.d_latent - column);
            for (std::int64_t key = 0; key < keys; key += kKeys) {
                for_rows(rows, [&]<int kQueries>(std::int64_t row) {
                    Products::template add_values<kQueries>(
                        work.scores.data() + row * kTileKeys + key, kTileKeys, work.keys + key,
                        work.keys + key + kTileKeys, column, columns,
                        sums + row * columns_ + column, columns_);
                });
            }
        }
    }

    void merge_row(std::int64_t batch, std::int64_t row, W* sum) const {
        const std::int64_t block = batch * blocks_ + row / kBlockRows;
        const std::int64_t first = first_tasks_.data()[block] * block_rows_ + row % kBlockRows;
        const RowPlace at = rows_.place(batch, row);
        Softmax<W> all = Softmax<W>::start(rows_.scoring(), at.head);
        all.merge(states_ + first, block_rows_, sums_ + first * columns_, block_rows_ * columns_,
                  pieces(block), columns_, sum);
        const W factor = all.total == W{0} ? W{0} : W{1} / all.total;
        T* out = static_cast<T*>(params_.out) + (batch * rows_.count() + row) * params_.d_latent;
        for (std::int64_t i = 0; i < params_.d_latent; ++i) {
            out[i] = narrow<T>(sum[Products::sum_place(i)] * factor);
        }
        static_cast<W*>(params_.lse)[rows_.statistic(at)] = all.log_sum();
    }

    const MlaDecodeParams& params_;
    const Rows rows_;
    const std::int64_t block_rows_;
    const std::int64_t blocks_;  // of a sequence
    const std::int64_t piece_keys_;
    const std::int64_t depth_;
    const std::int64_t columns_;
    const Scratch<std::int64_t> first_tasks_;  // [batch * blocks] of each block
    W* sums_ = nullptr;             // [tasks, block_rows, columns], in the order of sum_place
    Softmax<W>* states_ = nullptr;  // [tasks, block_rows]
};

}  // namespace

void mla_decode_cpu(const MlaDecodeParams& params) {
    visit_element_type(params.dtype, [&]<typename T>() {
        if (params.cache.format == CacheFormat::dense) {
            Decode<T, T>(params).run();
        } else {
            Decode<T, Wide<T>>(params).run();
        }
    });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::mla
