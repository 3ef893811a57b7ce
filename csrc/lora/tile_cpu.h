// Tiles for the update of a linear map on a CPU: vectors of the instruction set, dropout of a row
// of a tile, and sums of products that stay in registers. Included by <op>_cpu.cpp only (see
// common/cpu.h on namespaces).
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/cpu_loops.h"
#include "common/cpu_philox.h"
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

}  // namespace
}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::lora
