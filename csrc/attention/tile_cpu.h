// What the CPU's attention forward and backward share: tiles of rows in float32 (float64 for
// float64 tensors) in scratch memory, and the two products of tiles. Included by <op>_cpu.cpp only
// (see common/cpu.h on namespaces).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

#include "attention/attention.h"
#include "common/cpu_float.h"

namespace warploom::attention {
namespace WARPLOOM_CPU_ISA {

using namespace ::warploom::WARPLOOM_CPU_ISA;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#else
constexpr int kVectorBytes = 32;
#endif

template <typename W>
struct VectorType;
template <>
struct VectorType<float> {
    typedef float Type __attribute__((vector_size(kVectorBytes)));
    typedef std::int32_t Index __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorType<double> {
    typedef double Type __attribute__((vector_size(kVectorBytes)));
    typedef std::int64_t Index __attribute__((vector_size(kVectorBytes)));
};
template <typename W>
using Vector = typename VectorType<W>::Type;
template <typename W>
constexpr std::int64_t kLanes = kVectorBytes / static_cast<std::int64_t>(sizeof(W));

// Rows of queries and of keys in a tile: even, for the kernels below take keys in pairs.
constexpr std::int64_t kTile = 32;

// A tile's row in scratch memory: `columns` elements, and zeros up to two whole vectors.
template <typename W>
std::int64_t padded(std::int64_t columns) {
    return ceil_divide(columns, 2 * kLanes<W>) * 2 * kLanes<W>;
}

// Scratch memory of one thread, aligned for vectors, uninitialised.
template <typename W>
class Scratch {
  public:
    explicit Scratch(std::int64_t size)
        : data_(static_cast<W*>(::operator new(static_cast<std::size_t>(size) * sizeof(W),
                                               std::align_val_t{kVectorBytes}))) {}
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { ::operator delete(data_, std::align_val_t{kVectorBytes}); }

    // The next `size` elements, a multiple of two vectors.
    W* take(std::int64_t size) {
        W* taken = data_ + used_;
        used_ += size;
        return taken;
    }

  private:
    W* data_;
    std::int64_t used_ = 0;
};

// The rows that share one key/value head: row r is query r / group of head r % group.
struct GroupRows {
    std::int64_t group;
    std::int64_t first_head;
    std::int64_t batch;

    std::int64_t query(std::int64_t row) const { return row / group; }
    std::int64_t head(std::int64_t row) const { return first_head + row % group; }
    std::int64_t offset(std::int64_t row, const HeadStrides& strides) const {
        return batch * strides.batch + query(row) * strides.sequence + head(row) * strides.head;
    }
};

template <typename T>
void load_row(const T* from, std::int64_t columns, Wide<T>* to) {
#pragma omp simd
    for (std::int64_t i = 0; i < columns; ++i) {
        to[i] = widen(from[i]);
    }
    for (std::int64_t i = columns; i < padded<Wide<T>>(columns); ++i) {
        to[i] = 0;
    }
}

template <typename T>
void store_row(const Wide<T>* from, Wide<T> factor, std::int64_t columns, T* to) {
#pragma omp simd
    for (std::int64_t i = 0; i < columns; ++i) {
        to[i] = narrow<T>(from[i] * factor);
    }
}

// Adds to each lane the one `kDistance` away. The indices must be constants to become one
// instruction.
template <typename W, int kDistance, int... kLane>
Vector<W> add_distant_lanes(Vector<W> vector, std::integer_sequence<int, kLane...>) {
    const typename VectorType<W>::Index other = {(kLane ^ kDistance)...};
    return vector + __builtin_shuffle(vector, other);
}

template <typename W, int kDistance = static_cast<int>(kLanes<W> / 2)>
W sum_of_lanes(Vector<W> vector) {
    if constexpr (kDistance == 0) {
        return vector[0];
    } else {
        constexpr auto kAllLanes = std::make_integer_sequence<int, static_cast<int>(kLanes<W>)>();
        return sum_of_lanes<W, kDistance / 2>(add_distant_lanes<W, kDistance>(vector, kAllLanes));
    }
}

template <int kRows, typename W>
void dots_of_rows(const W* a, std::int64_t a_stride, const W* b, std::int64_t b_stride,
                  std::int64_t b_rows, std::int64_t depth, W* out) {
    for (std::int64_t n = 0; n < b_rows; n += 2) {
        const W* b_row = b + n * b_stride;
        Vector<W> sums[kRows][2] = {};
        for (std::int64_t i = 0; i < depth; i += kLanes<W>) {
            const Vector<W> first = *reinterpret_cast<const Vector<W>*>(b_row + i);
            const Vector<W> second = *reinterpret_cast<const Vector<W>*>(b_row + b_stride + i);
            for (int m = 0; m < kRows; ++m) {
                const Vector<W> value = *reinterpret_cast<const Vector<W>*>(a + m * a_stride + i);
                sums[m][0] += value * first;
                sums[m][1] += value * second;
            }
        }
        for (int m = 0; m < kRows; ++m) {
            out[m * kTile + n] = sum_of_lanes<W>(sums[m][0]);
            out[m * kTile + n + 1] = sum_of_lanes<W>(sums[m][1]);
        }
    }
}

// out[m, n] = sum over i of a[m, i] b[n, i] for tiles in scratch memory; `out` has rows of kTile.
// `depth` is padded; an odd b_rows reads, and writes for, one row more.
template <typename W>
void dots(const W* a, std::int64_t a_rows, const W* b, std::int64_t b_rows, std::int64_t depth,
          W* out) {
    std::int64_t m = 0;
    for (; m + 4 <= a_rows; m += 4) {
        dots_of_rows<4>(a + m * depth, depth, b, depth, b_rows, depth, out + m * kTile);
    }
    for (; m < a_rows; ++m) {
        dots_of_rows<1>(a + m * depth, depth, b, depth, b_rows, depth, out + m * kTile);
    }
}

template <int kRows, typename W>
void add_product_of_rows(const W* a, std::int64_t a_row_stride, std::int64_t a_depth_stride,
                         const W* b, std::int64_t depth, std::int64_t columns, W* out) {
    for (std::int64_t n = 0; n < columns; n += 2 * kLanes<W>) {
        Vector<W> sums[kRows][2] = {};
        for (std::int64_t i = 0; i < depth; ++i) {
            const auto* row = reinterpret_cast<const Vector<W>*>(b + i * columns + n);
            const Vector<W> first = row[0];
            const Vector<W> second = row[1];
            for (int m = 0; m < kRows; ++m) {
                const W value = a[m * a_row_stride + i * a_depth_stride];
                sums[m][0] += value * first;
                sums[m][1] += value * second;
            }
        }
        for (int m = 0; m < kRows; ++m) {
            auto* row = reinterpret_cast<Vector<W>*>(out + m * columns + n);
            row[0] += sums[m][0];
            row[1] += sums[m][1];
        }
    }
}

// out[m, n] += sum over i of a(m, i) b[i, n]; `columns` is padded. The strides of a allow for its
// transpose. The tile's sum is added as a whole, so that rounding errors grow with the number of
// tiles and not of keys.
template <typename W>
void add_product(const W* a, std::int64_t a_row_stride, std::int64_t a_depth_stride,
                 std::int64_t rows, const W* b, std::int64_t depth, std::int64_t columns, W* out) {
    std::int64_t m = 0;
    for (; m + 4 <= rows; m += 4) {
        add_product_of_rows<4>(a + m * a_row_stride, a_row_stride, a_depth_stride, b, depth,
                               columns, out + m * columns);
    }
    for (; m < rows; ++m) {
        add_product_of_rows<1>(a + m * a_row_stride, a_row_stride, a_depth_stride, b, depth,
                               columns, out + m * columns);
    }
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::attention
