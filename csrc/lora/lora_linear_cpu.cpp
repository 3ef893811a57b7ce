// The update of a linear map beside PyTorch's large products: three products with a matrix of a few
// rows, in one of which the sum runs along the wide matrix's rows, in one down its columns, and in
// one over the rank. Tiles of a wide matrix are widened, and dropout drawn, on their way into a
// cache; sums stay in registers.
#include <algorithm>
#include <bit>
#include <type_traits>

#include "common/cpu_codes.h"
#include "common/cpu_loops.h"
#include "common/cpu_math.h"
#include "common/cpu_philox.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "lora/lora_linear.h"

namespace warploom::lora {
namespace WARPLOOM_CPU_ISA {
namespace {

using namespace ::warploom::WARPLOOM_CPU_ISA;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileVectors = 4;
#else
constexpr int kVectorBytes = 32;
constexpr int kTileVectors = 2;
#endif
// Rows that are taken together: their sums, kTileRows x kTileVectors, fill half the registers.
constexpr int kTileRows = 4;

template <typename W>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef float Type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
    typedef double Type __attribute__((vector_size(kVectorBytes)));
};
template <typename W>
using Vector = typename VectorOf<W>::Type;
template <typename W>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(W));

template <typename W>
inline Vector<W> load(const W* from) {
    Vector<W> vector;
    __builtin_memcpy(&vector, from, sizeof(vector));
    return vector;
}
template <typename W>
inline void store(W* to, Vector<W> vector) {
    __builtin_memcpy(to, &vector, sizeof(vector));
}

// A row of kCpuColumns values from column `first` on: those that dropout takes become 0, the others
// are divided by 1 - p.
template <typename W>
inline void drop(const Dropout& dropout, std::int64_t row, std::int64_t first, W* values) {
    if (dropout.seed == nullptr) {
        return;
    }
    const std::uint32_t threshold = dropout_threshold(dropout.p);
    const W factor = static_cast<W>(1.0 / (1.0 - dropout.p));
    std::uint32_t drawn[kCpuColumns];
    draw_philox<kCpuColumns / 4>(static_cast<std::uint64_t>(*dropout.seed),
                                 static_cast<std::uint32_t>(first / 4),
                                 static_cast<std::uint32_t>(row), 0, drawn);
#pragma omp simd
    for (int j = 0; j < kCpuColumns; ++j) {
        values[j] = drawn[j] < threshold ? W{0} : values[j] * factor;
    }
}

// A matrix of the tensors' type of which tiles are read.
template <typename T>
struct WideMatrix {
    const T* data;
    std::int64_t row_stride;
    std::int64_t columns;
    Dropout dropout;

    // Columns from the first on that can be read where they are.
    std::int64_t plain_columns() const {
        return std::is_same_v<T, Wide<T>> && dropout.seed == nullptr
                   ? columns / kCpuColumns * kCpuColumns
                   : 0;
    }

    // kCpuColumns columns of a row from `first` on, widened and dropped; zeros beyond the last.
    void stage(std::int64_t row, std::int64_t first, Wide<T>* to) const {
        const T* from = data + row * row_stride + first;
        const std::int64_t count = std::min<std::int64_t>(kCpuColumns, columns - first);
#pragma omp simd
        for (std::int64_t j = 0; j < count; ++j) {
            to[j] = widen(from[j]);
        }
        std::fill(to + count, to + kCpuColumns, Wide<T>{0});
        drop(dropout, row, first, to);
    }
};

// sums[i][j] += sum over k of left(i, k) right[k][j] for kRows rows i and kCpuColumns columns j;
// left(i, k) lies at left[i * row_step + k * step].
template <int kRows, typename W>
inline void accumulate_rows(W* sums, const W* left, std::int64_t row_step, std::int64_t step,
                            const W* right, std::int64_t right_stride, int depth) {
    constexpr int kColumns = kTileVectors * kLanes<W>;
    for (int column = 0; column < kCpuColumns; column += kColumns) {
        Vector<W> tile[kRows][kTileVectors];
        for (int i = 0; i < kRows; ++i) {
            for (int v = 0; v < kTileVectors; ++v) {
                tile[i][v] = load(sums + i * kCpuColumns + column + v * kLanes<W>);
            }
        }
        for (int k = 0; k < depth; ++k) {
            Vector<W> factors[kTileVectors];
            for (int v = 0; v < kTileVectors; ++v) {
                factors[v] = load(right + k * right_stride + column + v * kLanes<W>);
            }
            for (int i = 0; i < kRows; ++i) {
                const W value = left[i * row_step + k * step];
                for (int v = 0; v < kTileVectors; ++v) {
                    tile[i][v] += value * factors[v];
                }
            }
        }
        for (int i = 0; i < kRows; ++i) {
            for (int v = 0; v < kTileVectors; ++v) {
                store(sums + i * kCpuColumns + column + v * kLanes<W>, tile[i][v]);
            }
        }
    }
}

template <typename W>
inline void accumulate(W* sums, int rows, const W* left, std::int64_t row_step, std::int64_t step,
                       const W* right, std::int64_t right_stride, int depth) {
    int i = 0;
    for (; i + kTileRows <= rows; i += kTileRows) {
        accumulate_rows<kTileRows>(sums + i * kCpuColumns, left + i * row_step, row_step, step,
                                   right, right_stride, depth);
    }
    for (; i < rows; ++i) {
        accumulate_rows<1>(sums + i * kCpuColumns, left + i * row_step, row_step, step, right,
                           right_stride, depth);
    }
}

// Ranks whose sums lie in a cache at the same time.
constexpr int kRankBlock = 64;

// sums[i][r] += the lanes' products of kTileRows rows of x with kRanks rows of the factor.
template <int kRanks, typename W>
inline void accumulate_dots(Vector<W>* sums, const W* x, std::int64_t x_stride, const W* factor,
                            std::int64_t factor_stride, std::int64_t columns) {
    Vector<W> tile[kTileRows][kRanks];
    for (int i = 0; i < kTileRows; ++i) {
        for (int r = 0; r < kRanks; ++r) {
            tile[i][r] = sums[i * kRankBlock + r];
        }
    }
    for (std::int64_t j = 0; j < columns; j += kLanes<W>) {
        Vector<W> factors[kRanks];
        for (int r = 0; r < kRanks; ++r) {
            factors[r] = load(factor + r * factor_stride + j);
        }
        for (int i = 0; i < kTileRows; ++i) {
            const Vector<W> values = load(x + i * x_stride + j);
            for (int r = 0; r < kRanks; ++r) {
                tile[i][r] += values * factors[r];
            }
        }
    }
    for (int i = 0; i < kTileRows; ++i) {
        for (int r = 0; r < kRanks; ++r) {
            sums[i * kRankBlock + r] = tile[i][r];
        }
    }
}

template <typename W>
inline W sum_of_lanes(const Vector<W>& vector) {
    W sum = 0;
    for (int lane = 0; lane < kLanes<W>; ++lane) {
        sum += vector[lane];
    }
    return sum;
}

// narrow [rows, rank] = scaling wide factor^T
template <typename T>
void multiply_along_rows(const WideMatrix<T>& wide, const void* factor_data, void* narrow_data,
                         double scaling, std::int64_t rows, int rank) {
    using W = Wide<T>;
    constexpr int kRanks = 4;
    constexpr std::int64_t kPlainColumns = 512;
    const auto* factor = static_cast<const W*>(factor_data);
    T* narrowed = static_cast<T*>(narrow_data);
    const std::int64_t stride = cpu_factor_stride(wide.columns);
    parallel_for(ceil_divide(rows, kTileRows), 2, [&](std::int64_t begin, std::int64_t end) {
        alignas(kVectorBytes) W staged[kTileRows * kCpuColumns] = {};
        for (std::int64_t row = begin * kTileRows; row < end * kTileRows; row += kTileRows) {
            const std::int64_t tile_rows = std::min<std::int64_t>(kTileRows, rows - row);
            for (int first_rank = 0; first_rank < rank; first_rank += kRankBlock) {
                const int ranks = std::min(kRankBlock, rank - first_rank);
                Vector<W> sums[kTileRows * kRankBlock] = {};
                const auto multiply = [&](const W* x, std::int64_t x_stride, std::int64_t first,
                                          std::int64_t count) {
                    const W* from = factor + first_rank * stride + first;
                    int r = 0;
                    for (; r + kRanks <= ranks; r += kRanks) {
                        accumulate_dots<kRanks>(sums + r, x, x_stride, from + r * stride, stride,
                                                count);
                    }
                    for (; r < ranks; ++r) {
                        accumulate_dots<1>(sums + r, x, x_stride, from + r * stride, stride, count);
                    }
                };
                const std::int64_t plain = tile_rows == kTileRows ? wide.plain_columns() : 0;
                for (std::int64_t first = 0; first < plain; first += kPlainColumns) {
                    multiply(reinterpret_cast<const W*>(wide.data + row * wide.row_stride + first),
                             wide.row_stride, first, std::min(kPlainColumns, plain - first));
                }
                for (std::int64_t first = plain; first < wide.columns; first += kCpuColumns) {
                    for (std::int64_t i = 0; i < tile_rows; ++i) {
                        wide.stage(row + i, first, staged + i * kCpuColumns);
                    }
                    multiply(staged, kCpuColumns, first, kCpuColumns);
                }
                for (std::int64_t i = 0; i < tile_rows; ++i) {
                    T* to = narrowed + (row + i) * rank + first_rank;
                    for (int r = 0; r < ranks; ++r) {
                        to[r] = narrow<T>(static_cast<W>(scaling) *
                                          sum_of_lanes<W>(sums[i * kRankBlock + r]));
                    }
                }
            }
        }
    });
}

// What becomes of a row of a tile of sums on its way to memory.
template <typename T>
struct Epilogue {
    using W = Wide<T>;

    T* out;                 // [rows, columns]
    T* unscaled;            // as out, or null
    const W* column_scale;  // [columns] or null
    const T* bias;          // [columns] or null
    std::int64_t columns;
    Dropout dropout;
    W scaling;
    bool accumulates;  // onto what `out` holds

    void finish(std::int64_t row, std::int64_t first, W* sums) const {
        const std::int64_t count = std::min<std::int64_t>(kCpuColumns, columns - first);
        T* to = out + row * columns + first;
        drop(dropout, row, first, sums);
        if (accumulates) {
#pragma omp simd
            for (std::int64_t j = 0; j < count; ++j) {
                sums[j] = fused_multiply_add(scaling, sums[j], widen(to[j]));
            }
        }
        if (column_scale != nullptr) {
            T* kept = unscaled + row * columns + first;
#pragma omp simd
            for (std::int64_t j = 0; j < count; ++j) {
                kept[j] = narrow<T>(sums[j]);
                sums[j] *= column_scale[first + j];
            }
        }
        if (bias != nullptr) {
#pragma omp simd
            for (std::int64_t j = 0; j < count; ++j) {
                sums[j] += widen(bias[first + j]);
            }
        }
#pragma omp simd
        for (std::int64_t j = 0; j < count; ++j) {
            to[j] = narrow<T>(sums[j]);
        }
    }
};

// narrow [rows, rank] times factor [rank, columns], through the epilogue
template <typename T>
void expand(const Epilogue<T>& epilogue, const void* narrow_data, std::int64_t narrow_stride,
            const void* factor_data, std::int64_t rows, int rank) {
    using W = Wide<T>;
    constexpr int kRows = 2 * kTileRows;
    const auto* narrowed = static_cast<const W*>(narrow_data);
    const auto* factor = static_cast<const W*>(factor_data);
    const std::int64_t stride = cpu_factor_stride(epilogue.columns);
    parallel_for(ceil_divide(rows, kRows), 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin * kRows; row < end * kRows; row += kRows) {
            const int tile_rows = static_cast<int>(std::min<std::int64_t>(kRows, rows - row));
            for (std::int64_t column = 0; column < epilogue.columns; column += kCpuColumns) {
                alignas(kVectorBytes) W sums[kRows * kCpuColumns] = {};
                accumulate(sums, tile_rows, narrowed + row * narrow_stride, narrow_stride, 1,
                           factor + column, stride, rank);
                for (int i = 0; i < tile_rows; ++i) {
                    epilogue.finish(row + i, column, sums + i * kCpuColumns);
                }
            }
        }
    });
}

// out [rank, columns] = scaling narrow^T wide, or its transpose. A task has columns to itself and
// goes down all rows.
template <typename T>
void multiply_down_rows(const WideMatrix<T>& wide, const LoraAdapterGradParams& params) {
    using W = Wide<T>;
    constexpr int kRows = 32;
    const auto* narrowed = static_cast<const W*>(params.narrow);
    W* out = static_cast<W*>(params.out);
    const std::int64_t rank_step = params.transposed ? wide.columns : 1;
    const std::int64_t column_step = params.transposed ? 1 : params.rank;
    const std::int64_t tiles = ceil_divide(wide.columns, kCpuColumns);
    parallel_for(tiles, 1, [&](std::int64_t begin, std::int64_t end) {
        alignas(kVectorBytes) W staged[kRows * kCpuColumns];
        for (std::int64_t first = begin * kCpuColumns; first < end * kCpuColumns;
             first += kCpuColumns) {
            const std::int64_t count = std::min<std::int64_t>(kCpuColumns, wide.columns - first);
            for (int first_rank = 0; first_rank < params.rank; first_rank += kRankBlock) {
                const int ranks = std::min(kRankBlock, params.rank - first_rank);
                alignas(kVectorBytes) W sums[kRankBlock * kCpuColumns] = {};
                for (std::int64_t row = 0; row < params.rows; row += kRows) {
                    const int depth =
                        static_cast<int>(std::min<std::int64_t>(kRows, params.rows - row));
                    for (int i = 0; i < depth; ++i) {
                        wide.stage(row + i, first, staged + i * kCpuColumns);
                        prefetch(wide.data + (row + i + kRows) * wide.row_stride + first, count);
                    }
                    accumulate(sums, ranks, narrowed + row * params.narrow_row_stride + first_rank,
                               1, params.narrow_row_stride, staged, kCpuColumns, depth);
                }
                for (int r = 0; r < ranks; ++r) {
                    W* to = out + (first_rank + r) * rank_step + first * column_step;
                    for (std::int64_t j = 0; j < count; ++j) {
                        to[j * column_step] =
                            static_cast<W>(params.scaling) * sums[r * kCpuColumns + j];
                    }
                }
            }
        }
    });
}

template <typename T>
void scale_backward(const LoraScaleBackwardParams& params) {
    using W = Wide<T>;
    const auto* column_scale = static_cast<const W*>(params.column_scale);
    W* partials = static_cast<W*>(params.workspace);
    const std::int64_t columns = params.columns;
    const std::int64_t parts = lora_scale_partials(params.rows);
    const std::int64_t part_rows = ceil_divide(params.rows, parts);
    parallel_for(parts, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t part = begin; part < end; ++part) {
            W* sums = partials + part * columns;
            std::fill(sums, sums + columns, W{0});
            const std::int64_t last = std::min<std::int64_t>(params.rows, (part + 1) * part_rows);
            for (std::int64_t row = part * part_rows; row < last; ++row) {
                const T* grad_out =
                    static_cast<const T*>(params.grad_out) + row * params.grad_row_stride;
                const T* unscaled = static_cast<const T*>(params.unscaled) + row * columns;
                T* grad = static_cast<T*>(params.grad) + row * columns;
#pragma omp simd
                for (std::int64_t j = 0; j < columns; ++j) {
                    const W value = widen(grad_out[j]);
                    sums[j] = fused_multiply_add(value, widen(unscaled[j]), sums[j]);
                    grad[j] = narrow<T>(value * column_scale[j]);
                }
            }
        }
    });
    if (params.grad_column_scale == nullptr) {
        return;
    }
    W* total = static_cast<W*>(params.grad_column_scale);
    std::fill(total, total + columns, W{0});
    for (std::int64_t part = 0; part < parts; ++part) {
#pragma omp simd
        for (std::int64_t j = 0; j < columns; ++j) {
            total[j] += partials[part * columns + j];
        }
    }
}

// What codes at column `first` (even) of a row and the next ones stand for, without their scale.
struct Nf4 {
    typedef std::uint64_t Bytes __attribute__((vector_size(kVectorBytes)));
    typedef std::uint32_t Places __attribute__((vector_size(kVectorBytes)));
    static constexpr int kCodes = kLanes<float>;

    // The numbers of kCodes codes, in registers: a table of 16 fits in one vector or two. A lane of
    // 64 bits takes a byte, and each half of it one of the byte's codes.
    static Vector<float> decode_vector(const std::uint8_t* codes) {
        std::uint64_t word = 0;
        __builtin_memcpy(&word, codes, kCodes / 2);
        Bytes bytes;
        for (int lane = 0; lane < kCodes / 2; ++lane) {
            bytes[lane] = 8 * lane;
        }
        bytes = word >> bytes;
        const auto places = std::bit_cast<Places>((bytes >> 4 & 15) | (bytes & 15) << 32);
        if constexpr (kCodes == 16) {
            return __builtin_shuffle(load(kNf4), places);
        } else {
            return __builtin_shuffle(load(kNf4), load(kNf4 + kCodes), places);
        }
    }

    static void decode(const std::uint8_t* row, std::int64_t first, std::int64_t count, float* to) {
        const std::uint8_t* codes = row + first / 2;
        std::int64_t j = 0;
        for (; j + kCodes <= count; j += kCodes) {
            store(to + j, decode_vector(codes + j / 2));
        }
        for (; j < count; ++j) {
            to[j] = kNf4[codes[j / 2] >> (j % 2 == 0 ? 4 : 0) & 15];
        }
    }
};
template <typename Code>
struct Bytes {
    static void decode(const std::uint8_t* row, std::int64_t first, std::int64_t count, float* to) {
#pragma omp simd
        for (std::int64_t j = 0; j < count; ++j) {
            to[j] = Code::decode(row[first + j]);
        }
    }
};

// Calls visit.template operator()<Code>() with the code of a quantised weight.
template <typename Visit>
void visit_code(WeightFormat format, Visit&& visit) {
    switch (format) {
        case WeightFormat::nf4:
            visit.template operator()<Nf4>();
            break;
        case WeightFormat::int8:
            visit.template operator()<Bytes<Int8>>();
            break;
        default:
            visit.template operator()<Bytes<Float8>>();
    }
}

// T: what elements are rounded to, Out: what they are stored as.
template <typename Code, typename T, typename Out>
void dequantize(const DequantizeParams& params) {
    const std::int64_t row_bytes =
        params.weight.format == WeightFormat::nf4 ? params.in_features / 2 : params.in_features;
    const std::int64_t block = params.weight.scale_block;
    const std::int64_t blocks = params.in_features / block;
    const std::int64_t last = params.first_column + params.columns;
    parallel_for(params.rows, 8, [&](std::int64_t begin, std::int64_t end) {
        alignas(kVectorBytes) float values[kCpuColumns];
        for (std::int64_t i = begin; i < end; ++i) {
            const std::int64_t row = params.first_row + i;
            const auto* codes =
                static_cast<const std::uint8_t*>(params.weight.values) + row * row_bytes;
            const float* scales = params.weight.scale + row * blocks;
            Out* to = static_cast<Out*>(params.out) + i * params.columns - params.first_column;
            for (std::int64_t first = params.first_column; first < last;) {
                const std::int64_t count = std::min<std::int64_t>(
                    {(first / block + 1) * block - first, last - first, kCpuColumns});
                Code::decode(codes, first, count, values);
                const float scale = scales[first / block];
#pragma omp simd
                for (std::int64_t j = 0; j < count; ++j) {
                    to[first + j] =
                        narrow<Out>(widen(narrow<T>(static_cast<Wide<T>>(values[j] * scale))));
                }
                first += count;
            }
        }
    });
}

}  // namespace

void lora_shrink_cpu(const LoraShrinkParams& params) {
    visit_element_type(params.dtype, [&]<typename T>() {
        const WideMatrix<T> x{static_cast<const T*>(params.x), params.x_row_stride,
                              params.in_features, params.dropout};
        multiply_along_rows(x, params.lora_a, params.shrunk, 1.0, params.rows, params.rank);
    });
}

void lora_grad_shrunk_cpu(const LoraGradShrunkParams& params) {
    visit_element_type(params.dtype, [&]<typename T>() {
        const WideMatrix<T> grad{
            static_cast<const T*>(params.grad), params.grad_row_stride, params.out_features, {}};
        multiply_along_rows(grad, params.lora_b, params.grad_shrunk, params.scaling, params.rows,
                            params.rank);
    });
}

void lora_linear_cpu(const LoraLinearParams& params) {
    if (params.rank == 0 && params.column_scale == nullptr && params.bias == nullptr) {
        return;
    }
    visit_element_type(params.dtype, [&]<typename T>() {
        using W = Wide<T>;
        const Epilogue<T> epilogue{static_cast<T*>(params.out),
                                   static_cast<T*>(params.unscaled),
                                   static_cast<const W*>(params.column_scale),
                                   static_cast<const T*>(params.bias),
                                   params.out_features,
                                   {},
                                   static_cast<W>(params.scaling),
                                   true};
        expand(epilogue, params.shrunk, params.shrunk_row_stride, params.lora_b, params.rows,
               params.rank);
    });
}

void lora_grad_x_cpu(const LoraGradXParams& params) {
    const bool accumulates = params.grad != nullptr;
    if (params.rank == 0 && accumulates) {
        return;
    }
    visit_element_type(params.dtype, [&]<typename T>() {
        const Epilogue<T> epilogue{static_cast<T*>(params.grad_x),
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   params.in_features,
                                   params.dropout,
                                   Wide<T>{1},
                                   accumulates};
        expand(epilogue, params.grad_shrunk, params.grad_shrunk_row_stride, params.lora_a,
               params.rows, params.rank);
    });
}

void lora_adapter_grad_cpu(const LoraAdapterGradParams& params) {
    visit_element_type(params.dtype, [&]<typename T>() {
        const WideMatrix<T> wide{static_cast<const T*>(params.wide), params.wide_row_stride,
                                 params.columns, params.dropout};
        multiply_down_rows(wide, params);
    });
}

void lora_scale_backward_cpu(const LoraScaleBackwardParams& params) {
    visit_element_type(params.dtype, [&]<typename T>() { scale_backward<T>(params); });
}

void dequantize_cpu(const DequantizeParams& params) {
    visit_code(params.weight.format, [&]<typename Code>() {
        visit_element_type(params.dtype, [&]<typename T>() {
            if (params.out_dtype == DType::float32) {
                dequantize<Code, T, float>(params);
            } else {
                dequantize<Code, T, T>(params);
            }
        });
    });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::lora
