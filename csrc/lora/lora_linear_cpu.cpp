// The update of a linear map beside PyTorch's large products: three products with a matrix of a few
// rows, in one of which the sum runs along the wide matrix's rows, in one down its columns, and in
// one over the rank. Tiles of a wide matrix are widened, and dropout drawn, on their way into a
// cache; sums stay in registers.
#include <algorithm>

#include "common/cpu_math.h"
#include "common/parallel.h"
#include "lora/tile_cpu.h"

namespace warploom::lora {
namespace WARPLOOM_CPU_ISA {
namespace {

// Ranks whose sums lie in a cache at the same time.
constexpr int kRankBlock = 64;
// Tiles of rows that read a block of the factor, kCachedRanks x kCachedColumns, from the first
// cache.
constexpr int kGroupTiles = 8;
constexpr int kCachedRanks = 16;
constexpr std::int64_t kCachedColumns = 512;

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

// sums[i][r] += the products of a tile of rows with `ranks` rows of the factor, `columns` long.
template <typename W>
inline void accumulate_tile(Vector<W>* sums, const W* x, std::int64_t x_stride, const W* factor,
                            std::int64_t factor_stride, int ranks, std::int64_t columns) {
    constexpr int kRanks = 4;
    int r = 0;
    for (; r + kRanks <= ranks; r += kRanks) {
        accumulate_dots<kRanks>(sums + r, x, x_stride, factor + r * factor_stride, factor_stride,
                                columns);
    }
    for (; r < ranks; ++r) {
        accumulate_dots<1>(sums + r, x, x_stride, factor + r * factor_stride, factor_stride,
                           columns);
    }
}

// The same for all tiles of a group, in the columns that can be read where they are.
template <typename W>
inline void accumulate_group(Vector<W>* sums, int tiles, const W* x, std::int64_t x_stride,
                             const W* factor, std::int64_t factor_stride, int ranks,
                             std::int64_t columns) {
    for (std::int64_t first = 0; first < columns; first += kCachedColumns) {
        const std::int64_t count = std::min(kCachedColumns, columns - first);
        for (int r = 0; r < ranks; r += kCachedRanks) {
            for (int tile = 0; tile < tiles; ++tile) {
                accumulate_tile(sums + tile * kTileRows * kRankBlock + r,
                                x + tile * kTileRows * x_stride + first, x_stride,
                                factor + r * factor_stride + first, factor_stride,
                                std::min(kCachedRanks, ranks - r), count);
            }
        }
    }
}

// narrow [rows, rank] = scaling wide factor^T
template <typename T>
void multiply_along_rows(const WideMatrix<T>& wide, const void* factor_data, void* narrow_data,
                         double scaling, std::int64_t rows, int rank) {
    using W = Wide<T>;
    constexpr std::int64_t kGroupRows = kGroupTiles * kTileRows;
    const auto* factor = static_cast<const W*>(factor_data);
    T* narrowed = static_cast<T*>(narrow_data);
    const std::int64_t stride = cpu_factor_stride(wide.columns);
    const std::int64_t plain = wide.plain_columns();
    parallel_for(ceil_divide(rows, kGroupRows), 1, [&](std::int64_t begin, std::int64_t end) {
        alignas(kVectorBytes) W staged[kTileRows * kCpuColumns] = {};
        for (std::int64_t group = begin * kGroupRows; group < end * kGroupRows;
             group += kGroupRows) {
            const std::int64_t group_rows = std::min(kGroupRows, rows - group);
            const int whole_tiles = static_cast<int>(group_rows / kTileRows);
            for (int first_rank = 0; first_rank < rank; first_rank += kRankBlock) {
                const int ranks = std::min(kRankBlock, rank - first_rank);
                const W* from = factor + first_rank * stride;
                Vector<W> sums[kGroupRows * kRankBlock];
                for (std::int64_t i = 0; i < ceil_divide(group_rows, kTileRows) * kTileRows; ++i) {
                    std::fill_n(sums + i * kRankBlock, ranks, Vector<W>{});
                }
                accumulate_group(sums, whole_tiles,
                                 reinterpret_cast<const W*>(wide.data + group * wide.row_stride),
                                 wide.row_stride, from, stride, ranks, plain);
                for (std::int64_t row = 0; row < group_rows; row += kTileRows) {
                    const std::int64_t tile_rows =
                        std::min<std::int64_t>(kTileRows, group_rows - row);
                    for (std::int64_t first = tile_rows == kTileRows ? plain : 0;
                         first < wide.columns; first += kCpuColumns) {
                        for (std::int64_t i = 0; i < tile_rows; ++i) {
                            wide.stage(group + row + i, first, staged + i * kCpuColumns);
                        }
                        accumulate_tile(sums + row * kRankBlock, staged, kCpuColumns, from + first,
                                        stride, ranks, kCpuColumns);
                    }
                }
                for (std::int64_t i = 0; i < group_rows; ++i) {
                    T* to = narrowed + (group + i) * rank + first_rank;
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
    constexpr std::int64_t kTiles = 8;  // that a tile of the factor is read from a cache for
    const auto* narrowed = static_cast<const W*>(narrow_data);
    const auto* factor = static_cast<const W*>(factor_data);
    const std::int64_t stride = cpu_factor_stride(epilogue.columns);
    parallel_for(ceil_divide(rows, kRows), 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t first = begin; first < end; first += kTiles) {
            const std::int64_t last = std::min(first + kTiles, end);
            for (std::int64_t column = 0; column < epilogue.columns; column += kCpuColumns) {
                for (std::int64_t row = first * kRows; row < last * kRows; row += kRows) {
                    const int tile_rows =
                        static_cast<int>(std::min<std::int64_t>(kRows, rows - row));
                    alignas(kVectorBytes) W sums[kRows * kCpuColumns] = {};
                    accumulate(sums, tile_rows, narrowed + row * narrow_stride, narrow_stride, 1,
                               factor + column, stride, rank);
                    for (int i = 0; i < tile_rows; ++i) {
                        epilogue.finish(row + i, column, sums + i * kCpuColumns);
                    }
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

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::lora
