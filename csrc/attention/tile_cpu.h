// What the attention of CPUs is built from: vectors, scratch memory, tiles of rows in float32
// (float64 for float64 tensors), and their product. Included by <op>_cpu.cpp only (see common/cpu.h
// on namespaces).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

#include "attention/attention.h"
#include "common/cpu_float.h"
#include "common/parallel.h"

namespace warploom::attention {
namespace WARPLOOM_CPU_ISA {

using namespace ::warploom::WARPLOOM_CPU_ISA;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#else
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
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
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(W));

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

// Keys of a tile: a row of scores. Rows of scores always have this length.
constexpr std::int64_t kTileKeys = 64;

// `columns` elements, and zeros up to two whole vectors.
template <typename W>
std::int64_t padded(std::int64_t columns) {
    return ceil_divide(columns, 2 * kLanes<W>) * 2 * kLanes<W>;
}

// Scratch memory, aligned for vectors, uninitialised.
template <typename Element>
class Scratch {
  public:
    explicit Scratch(std::int64_t size)
        : data_(static_cast<Element*>(::operator new(
              static_cast<std::size_t>(size) * sizeof(Element), std::align_val_t{kVectorBytes}))) {}
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { ::operator delete(data_, std::align_val_t{kVectorBytes}); }

    Element* data() const { return data_; }

    // The next `size` elements; for vectors, a multiple of their lanes.
    Element* take(std::int64_t size) {
        Element* taken = data_ + used_;
        used_ += size;
        return taken;
    }

  private:
    Element* data_;
    std::int64_t used_ = 0;
};

// Calls body(take) on several threads; take(task) is true while there is another task of `count`,
// and says which. Which thread has which task changes nothing.
template <typename Body>
void share_tasks(std::int64_t count, Body body) {
    std::int64_t next = 0;
    const auto take = [&](std::int64_t& task) {
        task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        return task < count;
    };
    const std::int64_t threads = std::min<std::int64_t>(count, thread_count());
    parallel_for(threads, 1, [&](std::int64_t, std::int64_t) { body(take); });
}

// Row `from` of a tensor in `to`, zeros up to padded(columns).
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

// Lane l of the result: `a` where bit kDistance of l is 0, else `b`, each added to its lane
// l ^ kDistance. The indices must be constants to become one instruction.
template <int kDistance, typename W, int... kLane>
inline Vector<W> merge_lanes(Vector<W> a, Vector<W> b, std::integer_sequence<int, kLane...>) {
    using Index = typename VectorType<W>::Index;
    constexpr int kB = kLanes<W>;
    const Index own = {(kLane & kDistance ? kB + kLane : kLane)...};
    const Index other = {(kLane & kDistance ? kB + kLane - kDistance : kLane + kDistance)...};
    return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
}

// out[i] = the sum of the lanes of vectors[i], for a power of two of vectors, which are
// overwritten.
template <int kCount, typename W, int kDistance = kLanes<W> / 2, int kLeft = kCount>
inline void sums_of_lanes(Vector<W>* vectors, W* out) {
    constexpr auto kAllLanes = std::make_integer_sequence<int, kLanes<W>>();
    if constexpr (kCount > kLanes<W>) {
        sums_of_lanes<kCount / 2>(vectors, out);
        sums_of_lanes<kCount / 2>(vectors + kCount / 2, out + kCount / 2);
    } else if constexpr (kDistance == 0) {
        constexpr int kStep = kLanes<W> / kCount;
        for (int i = 0; i < kCount; ++i) {
            out[i] = vectors[0][i * kStep];
        }
    } else {
        constexpr int kHalf = kLeft > 1 ? kLeft / 2 : 1;
        for (int i = 0; i < kHalf; ++i) {
            vectors[i] =
                merge_lanes<kDistance, W>(vectors[i], vectors[i + kLeft - kHalf], kAllLanes);
        }
        sums_of_lanes<kCount, W, kDistance / 2, kHalf>(vectors, out);
    }
}

// One step of a transpose: rows r and r + kDistance exchange the blocks of kDistance lanes that lie
// off the diagonal.
template <int kDistance, typename W, int... kLane>
inline void exchange_blocks(Vector<W>* rows, std::integer_sequence<int, kLane...>) {
    using Index = typename VectorType<W>::Index;
    constexpr int kB = kLanes<W>;
    const Index upper = {(kLane & kDistance ? kB + kLane - kDistance : kLane)...};
    const Index lower = {(kLane & kDistance ? kB + kLane : kLane + kDistance)...};
    for (int r = 0; r < kB; ++r) {
        if ((r & kDistance) == 0) {
            const Vector<W> a = rows[r];
            const Vector<W> b = rows[r + kDistance];
            rows[r] = __builtin_shuffle(a, b, upper);
            rows[r + kDistance] = __builtin_shuffle(a, b, lower);
        }
    }
}

template <typename W, int kDistance = kLanes<W> / 2>
inline void transpose_block(Vector<W>* rows) {
    if constexpr (kDistance > 0) {
        exchange_blocks<kDistance, W>(rows, std::make_integer_sequence<int, kLanes<W>>());
        transpose_block<W, kDistance / 2>(rows);
    }
}

// to[i, n] = from[n, i] for kTileKeys rows n of `columns` (padded) elements; rows of `to` have
// kTileKeys.
template <typename W>
void transpose(const W* from, std::int64_t columns, W* to) {
    constexpr int kBlock = kLanes<W>;
    for (std::int64_t n = 0; n < kTileKeys; n += kBlock) {
        for (std::int64_t i = 0; i < columns; i += kBlock) {
            Vector<W> rows[kBlock];
            for (int r = 0; r < kBlock; ++r) {
                rows[r] = load_vector(from + (n + r) * columns + i);
            }
            transpose_block<W>(rows);
            for (int r = 0; r < kBlock; ++r) {
                store_vector(to + (i + r) * kTileKeys + n, rows[r]);
            }
        }
    }
}

// Terms that are added up one after the other; such sums are added up then, so that rounding errors
// grow with kTerms and with the number of sums.
constexpr std::int64_t kTerms = 16;

template <bool kAdd, int kRows, typename W>
inline void product_of_rows(const W* a, std::int64_t a_row_stride, std::int64_t a_depth_stride,
                            const W* b, std::int64_t depth, std::int64_t columns, W* out,
                            std::int64_t n) {
    for (std::int64_t begin = 0; begin < depth; begin += kTerms) {
        Vector<W> sums[kRows][2] = {};
        const std::int64_t end = std::min(begin + kTerms, depth);
        for (std::int64_t i = begin; i < end; ++i) {
            const Vector<W> first = load_vector(b + i * columns + n);
            const Vector<W> second = load_vector(b + i * columns + n + kLanes<W>);
            for (int m = 0; m < kRows; ++m) {
                const W value = a[m * a_row_stride + i * a_depth_stride];
                sums[m][0] += value * first;
                sums[m][1] += value * second;
            }
        }
        for (int m = 0; m < kRows; ++m) {
            W* row = out + m * columns + n;
            if (kAdd || begin > 0) {
                sums[m][0] += load_vector(row);
                sums[m][1] += load_vector(row + kLanes<W>);
            }
            store_vector(row, sums[m][0]);
            store_vector(row + kLanes<W>, sums[m][1]);
        }
    }
}

// out[m, n] = (kAdd: itself plus) the sum over i of a(m, i) b[i, n]; `columns`, of b and of out, is
// padded. The strides of a allow for its transpose. With kAdd the tile's sum is added as a whole,
// so that rounding errors grow with the number of tiles and not of keys.
template <bool kAdd, typename W>
void product(const W* a, std::int64_t a_row_stride, std::int64_t a_depth_stride, std::int64_t rows,
             const W* b, std::int64_t depth, std::int64_t columns, W* out) {
    // kRows x 2 sums, and the two vectors of b and one of a, in registers.
    constexpr int kRows = kRegisters / 4;
    for (std::int64_t n = 0; n < columns; n += 2 * kLanes<W>) {
        std::int64_t m = 0;
        for (; m + kRows <= rows; m += kRows) {
            product_of_rows<kAdd, kRows>(a + m * a_row_stride, a_row_stride, a_depth_stride, b,
                                         depth, columns, out + m * columns, n);
        }
        for (; m < rows; ++m) {
            product_of_rows<kAdd, 1>(a + m * a_row_stride, a_row_stride, a_depth_stride, b, depth,
                                     columns, out + m * columns, n);
        }
    }
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::attention
