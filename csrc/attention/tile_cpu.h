// What the attention of CPUs is built from: vectors, scratch memory, tiles of rows, and their
// product in float32 (float64 for float64 tensors). Included by <op>_cpu.cpp only (see common/cpu.h
// on namespaces).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

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
#if defined(__AVX512BF16__)
// Two neighbours in one word, the first in its lower half.
struct BFloat16Pair {
    std::uint32_t bits;
};
template <>
struct VectorType<BFloat16Pair> {
    typedef std::uint32_t Type __attribute__((vector_size(kVectorBytes)));
    typedef std::int32_t Index __attribute__((vector_size(kVectorBytes)));
};
#endif
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

// What products of rows of type T read: terms, of elements that are neighbours along the summed
// dimension. Here an element is a term, widened, and a tile of rows is an operand on either side.
template <typename T>
struct Terms {
    using W = Wide<T>;
    using Term = W;

    // Terms of so many elements.
    static std::int64_t count(std::int64_t elements) { return elements; }

    // Row `from` of a tensor in `to`, zeros up to padded(columns).
    static void load_row(const T* from, std::int64_t columns, Term* to) {
#pragma omp simd
        for (std::int64_t i = 0; i < columns; ++i) {
            to[i] = widen(from[i]);
        }
        for (std::int64_t i = columns; i < padded<W>(columns); ++i) {
            to[i] = 0;
        }
    }

    // Rows of scores as a tile of rows: `from`, or a copy in `to`.
    static const Term* load_scores(const W* from, std::int64_t, Term*) { return from; }

    // A tile of rows for a sum over its rows: `from`, or a copy in `to`.
    static const Term* stack_rows(const Term* from, std::int64_t, std::int64_t, Term*) {
        return from;
    }
};

#if defined(__AVX512BF16__)
// Marks the elements of a vector when `left` are left; the others are zeros, and not read.
inline __mmask32 bfloat16_mask(std::int64_t left) {
    return left < 2 * kLanes<BFloat16Pair> ? (1u << left) - 1u : ~0u;
}

// Multiplies 32 elements with 32 others and adds the products, by twos, to 16 sums. Takes subnormal
// numbers as 0, and so are its results.
inline Vector<float> add_products(Vector<float> sums, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sums, std::bit_cast<__m512bh>(a), std::bit_cast<__m512bh>(b));
}

// Of bfloat16 a term is two elements as they are. Scores are rounded, as on a GPU, and rows to sum
// up are copied two by two: [ceil(rows / 2), columns] terms.
template <>
struct Terms<BFloat16> {
    using Term = BFloat16Pair;

    static std::int64_t count(std::int64_t elements) { return ceil_divide(elements, 2); }

    static void load_row(const BFloat16* from, std::int64_t columns, Term* to) {
        for (std::int64_t i = 0; i < count(columns); i += kLanes<Term>) {
            const __mmask32 mask = bfloat16_mask(columns - 2 * i);
            _mm512_store_si512(to + i, _mm512_maskz_loadu_epi16(mask, from + 2 * i));
        }
    }

    static const Term* load_scores(const float* from, std::int64_t rows, Term* to) {
        for (std::int64_t i = 0; i < rows * count(kTileKeys); i += kLanes<Term>) {
            const float* scores = from + 2 * i;
            const auto rounded =
                _mm512_cvtne2ps_pbh(load_vector(scores + kLanes<float>), load_vector(scores));
            _mm512_store_si512(to + i, std::bit_cast<__m512i>(rounded));
        }
        return to;
    }

    static const Term* stack_rows(const Term* from, std::int64_t rows, std::int64_t columns,
                                  Term* to) {
        const std::int64_t stride = count(columns);
        for (std::int64_t n = 0; n < rows; n += 2) {
            const Term* first = from + n * stride;
            // Nothing, zeros, is the second of a last row.
            const std::uint32_t kept = n + 1 < rows ? ~0u : 0u;
            const Term* second = kept ? first + stride : first;
            Term* pairs = to + n / 2 * columns;
#pragma omp simd
            for (std::int64_t i = 0; i < stride; ++i) {
                const std::uint32_t a = first[i].bits;
                const std::uint32_t b = second[i].bits & kept;
                pairs[2 * i].bits = (a & 0xffffu) | (b << 16);
                pairs[2 * i + 1].bits = (a >> 16) | (b & 0xffff0000u);
            }
        }
        return to;
    }
};
#endif

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

// to[i, n] = from[n, i] for kTileKeys rows n of `columns` (whole vectors) elements; rows of `to`
// have kTileKeys.
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
// grow with kTerms and with the number of sums. Those of bfloat16 are small beside its own.
template <typename Term>
constexpr std::int64_t kTerms = 16;
#if defined(__AVX512BF16__)
template <>
constexpr std::int64_t kTerms<BFloat16Pair> = 64;
#endif

// sums + term * terms, lane by lane.
template <typename W>
inline Vector<W> add_terms(Vector<W> sums, W term, Vector<W> terms) {
    return sums + term * terms;
}
#if defined(__AVX512BF16__)
inline Vector<float> add_terms(Vector<float> sums, BFloat16Pair term, Vector<BFloat16Pair> terms) {
    return add_products(sums, _mm512_set1_epi32(static_cast<int>(term.bits)),
                        std::bit_cast<__m512i>(terms));
}
#endif

// Not inlined: all addresses of its inner loop stay in registers.
template <bool kAdd, int kRows, typename Term, typename W>
__attribute__((noinline)) void product_of_rows(const Term* a, std::int64_t a_row_stride,
                                               std::int64_t a_depth_stride, const Term* b,
                                               std::int64_t depth, std::int64_t columns, W* out,
                                               std::int64_t n) {
    for (std::int64_t begin = 0; begin < depth; begin += kTerms<Term>) {
        Vector<W> sums[kRows][2] = {};
        const std::int64_t end = std::min(begin + kTerms<Term>, depth);
        for (std::int64_t i = begin; i < end; ++i) {
            const Vector<Term> first = load_vector(b + i * columns + n);
            const Vector<Term> second = load_vector(b + i * columns + n + kLanes<W>);
            for (int m = 0; m < kRows; ++m) {
                const Term term = a[m * a_row_stride + i * a_depth_stride];
                sums[m][0] = add_terms(sums[m][0], term, first);
                sums[m][1] = add_terms(sums[m][1], term, second);
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

// out[m, n] = (kAdd: itself plus) the sum over `depth` terms i of a(m, i) b[i, n]; `columns`, of b
// and of out, is padded. The strides of a allow for its transpose. With kAdd the tile's sum is
// added as a whole, so that rounding errors grow with the number of tiles and not of keys.
template <bool kAdd, typename Term, typename W>
void product(const Term* a, std::int64_t a_row_stride, std::int64_t a_depth_stride,
             std::int64_t rows, const Term* b, std::int64_t depth, std::int64_t columns, W* out) {
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
