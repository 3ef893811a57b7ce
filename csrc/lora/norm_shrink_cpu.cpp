// RMSNorm and gated activations that emit the rank-r product of their rows, on the CPU: a block of
// rows is made, and multiplied while it is in the second level of cache.
#include "lora/norm_shrink.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "activation/activate_cpu.h"
#include "common/cpu_float.h"
#include "common/cpu_loops.h"
#include "common/parallel.h"
#include "norm/rows_cpu.h"

namespace warploom::lora {
namespace WARPLOOM_CPU_ISA {
namespace {

using namespace ::warploom::WARPLOOM_CPU_ISA;
using norm::WARPLOOM_CPU_ISA::grain_of;

// kTileRows x kTileVectors vectors of sums stay in registers, beside one row of lora_a's.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 8;
#else
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 4;
#endif
constexpr int kTileVectors = 3;
constexpr std::int64_t kAhead = 16;  // Rows of lora_a^T from the one in use to the one asked for.

template <typename W>
struct VectorOf {
    typedef W Type __attribute__((vector_size(kVectorBytes)));
};
template <typename W>
using Vector = typename VectorOf<W>::Type;
template <typename W>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(W));
static_assert(kShrinkRankMultiple % kLanes<float> == 0, "a row of lora_a has full vectors");

template <typename W>
inline Vector<W> load_vector(const W* from) {
    Vector<W> vector;
    __builtin_memcpy(&vector, from, sizeof(vector));
    return vector;
}
template <typename W>
inline void store_vector(W* to, Vector<W> vector) {
    __builtin_memcpy(to, &vector, sizeof(vector));
}

constexpr std::int64_t kBlockRows = 16;
// Columns of a chunk: their products are summed apart from the other chunks', which keeps the
// rounding error of long sums small.
constexpr std::int64_t kChunk = 256;
// Ranks of one pass over a block.
constexpr std::int64_t kPassRanks = 256;

// A chunk of a block of out, widened. Rows are not a power of two apart, so that they do not share
// places in the cache.
template <typename W>
using ChunkRows = W[kBlockRows][kChunk + 64 / sizeof(W)];
template <typename W>
using Sums = W[kBlockRows][kPassRanks];

// sums[row + m][rank + n] += rows[row + m] a[:, n] for kRows rows and kVectors vectors of ranks.
// a [count, ...], rows `stride` apart, begins at `rank`.
template <int kRows, int kVectors, typename W>
inline void multiply_tile(const ChunkRows<W>& rows, std::int64_t row, const W* a,
                          std::int64_t stride, std::int64_t count, Sums<W>& sums,
                          std::int64_t rank) {
    // Unrolled before the compiler assigns registers, so that the sums stay there.
    Vector<W> tile[kRows][kVectors] = {};
    for (std::int64_t k = 0; k < count; ++k) {
        Vector<W> factors[kVectors];
#pragma GCC unroll 8
        for (int n = 0; n < kVectors; ++n) {
            // lora_a may come from the third level of cache.
            __builtin_prefetch(a + (k + kAhead) * stride + n * kLanes<W>);
            factors[n] = load_vector(a + k * stride + n * kLanes<W>);
        }
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
            for (int n = 0; n < kVectors; ++n) {
                tile[m][n] += rows[row + m][k] * factors[n];
            }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
        for (int n = 0; n < kVectors; ++n) {
            W* const to = sums[row + m] + rank + n * kLanes<W>;
            store_vector(to, load_vector(to) + tile[m][n]);
        }
    }
}

// All rows from `row` on by kVectors vectors of ranks.
template <int kVectors, int kRows = kTileRows, typename W>
inline void multiply_ranks(const ChunkRows<W>& rows, std::int64_t row_count, const W* a,
                           std::int64_t stride, std::int64_t count, Sums<W>& sums,
                           std::int64_t rank, std::int64_t row = 0) {
    for (; row + kRows <= row_count; row += kRows) {
        multiply_tile<kRows, kVectors, W>(rows, row, a, stride, count, sums, rank);
    }
    if constexpr (kRows > 1) {
        multiply_ranks<kVectors, kRows / 2, W>(rows, row_count, a, stride, count, sums, rank, row);
    }
}

// sums += rows a for `ranks` ranks, a multiple of kShrinkRankMultiple.
template <typename W>
inline void multiply_chunk(const ChunkRows<W>& rows, std::int64_t row_count, const W* a,
                           std::int64_t stride, std::int64_t count, Sums<W>& sums,
                           std::int64_t ranks) {
    constexpr std::int64_t kTileRanks = kTileVectors * kLanes<W>;
    std::int64_t rank = 0;
    for (; rank + kTileRanks <= ranks; rank += kTileRanks) {
        multiply_ranks<kTileVectors, kTileRows, W>(rows, row_count, a + rank, stride, count, sums,
                                                   rank);
    }
    for (; rank < ranks; rank += kLanes<W>) {
        multiply_ranks<1, kTileRows, W>(rows, row_count, a + rank, stride, count, sums, rank);
    }
}

// The product of a call: shrunk [rows, rank] = out [rows, columns] lora_a^T.
template <typename T>
struct Product {
    const T* lora_a;
    T* out;
    T* shrunk;
    Wide<T>* turned;  // [columns, padded_rank]: lora_a^T, widened; behind the ranks lie zeros
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t rank;
    std::int64_t padded_rank;

    template <typename Params>
    explicit Product(const Params& params)
        : lora_a(static_cast<const T*>(params.lora_a)),
          out(static_cast<T*>(params.out)),
          shrunk(static_cast<T*>(params.shrunk)),
          turned(static_cast<Wide<T>*>(params.workspace)),
          rows(params.rows),
          columns(params.columns),
          rank(params.rank),
          padded_rank(ceil_divide(rank, kShrinkRankMultiple) * kShrinkRankMultiple) {}

    void turn() const {
        // Columns at a time: rows a power of two apart share places in the cache.
        constexpr std::int64_t kColumns = 16;
        const std::int64_t tasks = ceil_divide(columns, kColumns);
        parallel_for(tasks, grain_of(kColumns * rank), [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t task = begin; task < end; ++task) {
                const std::int64_t first = task * kColumns;
                const std::int64_t last = std::min(first + kColumns, columns);
                for (std::int64_t r = 0; r < padded_rank; ++r) {
                    for (std::int64_t k = first; k < last; ++k) {
                        turned[k * padded_rank + r] =
                            r < rank ? widen(lora_a[r * columns + k]) : Wide<T>{0};
                    }
                }
            }
        });
    }

    // shrunk's rows [row, row + count), count at most kBlockRows, of out's.
    void multiply_block(std::int64_t row, std::int64_t count) const {
        using W = Wide<T>;
        for (std::int64_t first = 0; first < rank; first += kPassRanks) {
            const std::int64_t ranks = std::min(kPassRanks, padded_rank - first);
            alignas(64) Sums<W> sums = {};
            for (std::int64_t k = 0; k < columns; k += kChunk) {
                const std::int64_t terms = std::min(kChunk, columns - k);
                alignas(64) ChunkRows<W> rows;
                for (std::int64_t m = 0; m < count; ++m) {
                    const T* const from = out + (row + m) * columns + k;
#pragma omp simd
                    for (std::int64_t i = 0; i < terms; ++i) {
                        rows[m][i] = widen(from[i]);
                    }
                }
                multiply_chunk<W>(rows, count, turned + k * padded_rank + first, padded_rank, terms,
                                  sums, ranks);
            }
            const std::int64_t used = std::min(ranks, rank - first);
            for (std::int64_t m = 0; m < count; ++m) {
                for (std::int64_t r = 0; r < used; ++r) {
                    shrunk[(row + m) * rank + first + r] = narrow<T>(sums[m][r]);
                }
            }
        }
    }
};

// For all rows: make(row), which writes that row of out, and the product.
template <typename T, typename Make>
void shrink_few(const Product<T>& product, const Make& make) {
    using W = Wide<T>;
    const std::int64_t columns = product.columns;
    parallel_for(product.rows, grain_of(columns), [&](std::int64_t first, std::int64_t end) {
        for (std::int64_t row = first; row < end; ++row) {
            make(row);
        }
    });
    const std::int64_t products = product.rows * product.rank;
    parallel_for(products, grain_of(columns), [&](std::int64_t first, std::int64_t end) {
        for (std::int64_t i = first; i < end; ++i) {
            product.shrunk[i] = narrow<T>(sum_elements<T>(
                columns, [](W value, W factor) { return value * factor; },
                product.out + i / product.rank * columns,
                product.lora_a + i % product.rank * columns));
        }
    });
}

template <typename T, typename Make>
void shrink_blocks(const Product<T>& product, const Make& make) {
    product.turn();
    const std::int64_t blocks = ceil_divide(product.rows, kBlockRows);
    parallel_for(blocks, grain_of(kBlockRows * product.columns),
                 [&](std::int64_t first, std::int64_t end) {
                     for (std::int64_t block = first; block < end; ++block) {
                         const std::int64_t row = block * kBlockRows;
                         const std::int64_t count = std::min(kBlockRows, product.rows - row);
                         for (std::int64_t m = 0; m < count; ++m) {
                             make(row + m);
                         }
                         product.multiply_block(row, count);
                     }
                 });
}

template <typename T, typename Make>
void shrink_rows(const Product<T>& product, const Make& make) {
    if (product.rows < kFewShrinkRows) {
        shrink_few(product, make);
    } else {
        shrink_blocks(product, make);
    }
}

template <typename T, typename WeightT>
void rms_norm_rows(const RmsNormShrinkParams& params) {
    using W = Wide<T>;
    const Product<T> product(params);
    const std::int64_t columns = params.columns;
    const auto* weight = static_cast<const WeightT*>(params.weight);
    shrink_rows(product, [&](std::int64_t row) {
        const T* x = static_cast<const T*>(params.x) + row * params.x_row_stride;
        if (params.residual != nullptr) {
            T* const sum = static_cast<T*>(params.sum) + row * columns;
            for_each_element<T>(
                columns, [](W value, W added) { return value + added; },
                [sum](std::int64_t i, auto... results) { store<T>(sum + i, results...); }, x,
                static_cast<const T*>(params.residual) + row * params.residual_row_stride);
            x = sum;
        }
        const W squares = sum_elements<T>(columns, [](W value) { return value * value; }, x);
        const W rstd =
            W{1} / std::sqrt(squares / static_cast<W>(columns) + static_cast<W>(params.eps));
        static_cast<W*>(params.rstd)[row] = rstd;
        for_each_element<T>(
            columns, [rstd](W value, W scale) { return value * rstd * scale; },
            [out = product.out + row * columns](std::int64_t i, auto... results) {
                store<T>(out + i, results...);
            },
            x, weight);
    });
}

template <typename T, typename Act>
void gated_rows(const GatedShrinkParams& params) {
    using W = Wide<T>;
    const Product<T> product(params);
    shrink_rows(product, [&](std::int64_t row) {
        for_each_element<T>(
            params.columns, [](W gate, W up) { return Act::template value<T>(gate) * up; },
            [out = product.out + row * params.columns](std::int64_t i, auto... results) {
                store<T>(out + i, results...);
            },
            static_cast<const T*>(params.gate) + row * params.gate_row_stride,
            static_cast<const T*>(params.up) + row * params.up_row_stride);
    });
}

}  // namespace

void rms_norm_shrink_cpu(const RmsNormShrinkParams& params) {
    visit_element_types(params.dtype, params.weight_dtype,
                        [&]<typename T, typename WeightT>() { rms_norm_rows<T, WeightT>(params); });
}

void gated_shrink_cpu(const GatedShrinkParams& params) {
    visit_element_type(params.dtype, [&]<typename T>() {
        activation::WARPLOOM_CPU_ISA::visit_activation(
            params.activation, [&]<typename Act>() { gated_rows<T, Act>(params); });
    });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::lora
