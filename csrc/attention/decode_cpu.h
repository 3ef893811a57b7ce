// The products of a few queries with rows of a cache, straight from memory: every row of keys or
// values is widened in registers, once for kRows queries. Included by <op>_cpu.cpp only (see
// common/cpu.h on namespaces).
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "attention/tile_cpu.h"

namespace warploom::attention {
namespace WARPLOOM_CPU_ISA {

// Queries that share what is read of a cache.
constexpr int kRows = 4;

// Elements that are widened at once, to two vectors.
template <typename T>
constexpr std::int64_t kStep = 2 * kLanes<Wide<T>>;

// The place of element i in two widened vectors. Of bfloat16 the elements at even places make the
// first vector, since they take a shift only, and those at odd places a mask only.
template <typename T>
constexpr std::int64_t widened_place(std::int64_t i) {
    return i;
}
template <>
constexpr std::int64_t widened_place<BFloat16>(std::int64_t i) {
    const std::int64_t within = i % kStep<BFloat16>;
    return i - within + within % 2 * kLanes<float> + within / 2;
}

template <typename W>
struct VectorPair {
    Vector<W> first;
    Vector<W> second;
};

template <typename T>
inline VectorPair<T> widen_step(const T* from) {
    return {load_vector(from), load_vector(from + kLanes<T>)};
}
inline VectorPair<float> widen_step(const BFloat16* from) {
    typedef std::uint32_t Words __attribute__((vector_size(kVectorBytes)));
    Words words;
    __builtin_memcpy(&words, from, sizeof(words));
    const Words first = words << 16;
    const Words second = words & 0xffff0000u;
    return {std::bit_cast<Vector<float>>(first), std::bit_cast<Vector<float>>(second)};
}
inline Vector<float> widen_vector(const Half* from) {
#if defined(__AVX512F__)
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_maskz_cvtph_ps(0xffff, bits);  // GCC 12 warns of the unmasked one.
#elif defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    Vector<float> wide;
    for (int i = 0; i < kLanes<float>; ++i) {
        wide[i] = widen(from[i]);
    }
    return wide;
#endif
}
inline VectorPair<float> widen_step(const Half* from) {
    return {widen_vector(from), widen_vector(from + kLanes<float>)};
}

// The last, incomplete step of a row: what follows the row is not read.
template <typename T>
inline VectorPair<Wide<T>> widen_rest(const T* from, std::int64_t count) {
    T whole[kStep<T>] = {};
    for (std::int64_t i = 0; i < count; ++i) {
        whole[i] = from[i];
    }
    return widen_step(whole);
}

// Calls body(i, widen) for every step of a row, where widen(row) gives its elements from i on.
template <typename T, typename Body>
inline void for_each_step(std::int64_t columns, Body body) {
    std::int64_t i = 0;
    for (; i + kStep<T> <= columns; i += kStep<T>) {
        body(i, [i](const T* row) { return widen_step(row + i); });
    }
    if (i < columns) {
        body(i, [i, columns](const T* row) { return widen_rest(row + i, columns - i); });
    }
}

// Asks for the memory of kCount rows that are needed soon; reads nothing.
template <int kCount, typename T>
inline void prefetch_rows(const T* const* rows, std::int64_t offset, std::int64_t i) {
    for (int n = 0; n < kCount; ++n) {
        const char* at = reinterpret_cast<const char*>(rows[n] + offset + i);
        for (std::size_t byte = 0; byte < kStep<T> * sizeof(T); byte += 64) {
            __builtin_prefetch(at + byte, 0, 2);
        }
    }
}

// out[m * out_stride + n] = the sum of the lanes of sums[m * kColumns + n].
template <int kRows, int kColumns, typename W>
inline void store_sums(Vector<W>* sums, W* out, std::int64_t out_stride) {
    W products[kRows * kColumns];
    sums_of_lanes<kRows * kColumns, W>(sums, products);
    for (int m = 0; m < kRows; ++m) {
        for (int n = 0; n < kColumns; ++n) {
            out[m * out_stride + n] = products[m * kColumns + n];
        }
    }
}

// The products of up to kRows queries with kKeys rows of a cache: here of elements that are widened
// in registers, once for all these queries.
template <typename T>
struct RowProducts {
    using W = Wide<T>;

    // kRows x kKeys sums stay in registers, beside two vectors of every key.
    static constexpr int kKeys = kRegisters / 8;

    // What a query is made of, and the places of its element i and of a row of sums' column i.
    using Query = W;
    static constexpr std::int64_t query_place(std::int64_t i) { return widened_place<T>(i); }
    static constexpr std::int64_t sum_place(std::int64_t i) { return widened_place<T>(i); }
    static Query query_element(T element) { return widen(element); }

    // out[m * out_stride + n] = the product of query m and row n + offset of keys.
    template <int kQueries>
    static void query_products(const Query* queries, std::int64_t query_stride,
                               const T* const* keys, const T* const* next_keys, std::int64_t offset,
                               std::int64_t columns, W* out, std::int64_t out_stride) {
        Vector<W> sums[kQueries * kKeys] = {};
        for_each_step<T>(columns, [&](std::int64_t i, auto widen) __attribute__((always_inline)) {
            VectorPair<W> pairs[kKeys];
            for (int n = 0; n < kKeys; ++n) {
                pairs[n] = widen(keys[n] + offset);
            }
            prefetch_rows<kKeys>(next_keys, offset, i);
            for (int m = 0; m < kQueries; ++m) {
                const W* query = queries + m * query_stride + i;
                const Vector<W> first = load_vector(query);
                const Vector<W> second = load_vector(query + kLanes<W>);
                for (int n = 0; n < kKeys; ++n) {
                    sums[m * kKeys + n] += first * pairs[n].first;
                    sums[m * kKeys + n] += second * pairs[n].second;
                }
            }
        });
        store_sums<kQueries, kKeys, W>(sums, out, out_stride);
    }

    // sums[m] += the sum over n of weights[m * weight_stride + n] times row n + offset of values.
    template <int kQueries>
    static void add_values(const W* weights, std::int64_t weight_stride, const T* const* values,
                           const T* const* next_values, std::int64_t offset, std::int64_t columns,
                           W* sums, std::int64_t sum_stride) {
        Vector<W> factors[kQueries][kKeys];
        for (int m = 0; m < kQueries; ++m) {
            for (int n = 0; n < kKeys; ++n) {
                factors[m][n] = weights[m * weight_stride + n] - Vector<W>{};
            }
        }
        for_each_step<T>(columns, [&](std::int64_t i, auto widen) __attribute__((always_inline)) {
            VectorPair<W> pairs[kKeys];
            for (int n = 0; n < kKeys; ++n) {
                pairs[n] = widen(values[n] + offset);
            }
            prefetch_rows<kKeys>(next_values, offset, i);
            for (int m = 0; m < kQueries; ++m) {
                W* sum = sums + m * sum_stride + i;
                Vector<W> first = load_vector(sum);
                Vector<W> second = load_vector(sum + kLanes<W>);
                for (int n = 0; n < kKeys; ++n) {
                    first += factors[m][n] * pairs[n].first;
                    second += factors[m][n] * pairs[n].second;
                }
                store_vector(sum, first);
                store_vector(sum + kLanes<W>, second);
            }
        });
    }
};

#if defined(__AVX512BF16__)
// Of bfloat16 as they are: weights are rounded, as on a GPU.
template <>
struct RowProducts<BFloat16> {
    static constexpr int kKeys = 8;

    using Query = BFloat16;
    static constexpr std::int64_t query_place(std::int64_t i) { return i; }
    // Unpacking two rows pairs the first, and then the second, 4 of every 8 elements.
    static constexpr std::int64_t sum_place(std::int64_t i) {
        const std::int64_t within = i % kStep<BFloat16>;
        return i - within + within % 8 / 4 * kLanes<float> + within / 8 * 4 + within % 4;
    }
    static Query query_element(BFloat16 element) { return element; }

    template <int kQueries>
    static void query_products(const Query* queries, std::int64_t query_stride,
                               const BFloat16* const* keys, const BFloat16* const* next_keys,
                               std::int64_t offset, std::int64_t columns, float* out,
                               std::int64_t out_stride) {
        // kRows x kBlock sums stay in registers, beside a vector of every key.
        constexpr int kBlock = 4;
        for (int first = 0; first < kKeys; first += kBlock) {
            Vector<float> sums[kQueries * kBlock] = {};
            for (std::int64_t i = 0; i < columns; i += kStep<BFloat16>) {
                const __mmask32 mask = bfloat16_mask(columns - i);
                __m512i rows[kBlock];
                for (int n = 0; n < kBlock; ++n) {
                    rows[n] = _mm512_maskz_loadu_epi16(mask, keys[first + n] + offset + i);
                }
                prefetch_rows<kBlock>(next_keys + first, offset, i);
                for (int m = 0; m < kQueries; ++m) {
                    const __m512i query = _mm512_loadu_si512(queries + m * query_stride + i);
                    for (int n = 0; n < kBlock; ++n) {
                        Vector<float>& sum = sums[m * kBlock + n];
                        sum = add_products(sum, query, rows[n]);
                    }
                }
            }
            store_sums<kQueries, kBlock, float>(sums, out + first, out_stride);
        }
    }

    template <int kQueries>
    static void add_values(const float* weights, std::int64_t weight_stride,
                           const BFloat16* const* values, const BFloat16* const* next_values,
                           std::int64_t offset, std::int64_t columns, float* sums,
                           std::int64_t sum_stride) {
        constexpr int kPairs = kKeys / 2;
        __m512i factors[kQueries][kPairs];
        for (int m = 0; m < kQueries; ++m) {
            const auto rounded = std::bit_cast<__m128i>(
                _mm256_cvtneps_pbh(_mm256_loadu_ps(weights + m * weight_stride)));
            std::int32_t pairs[kPairs];
            __builtin_memcpy(pairs, &rounded, sizeof(pairs));
            for (int n = 0; n < kPairs; ++n) {
                factors[m][n] = _mm512_set1_epi32(pairs[n]);
            }
        }
        for (std::int64_t i = 0; i < columns; i += kStep<BFloat16>) {
            const __mmask32 mask = bfloat16_mask(columns - i);
            __m512i first[kPairs];
            __m512i second[kPairs];
            for (int n = 0; n < kPairs; ++n) {
                const __m512i even = _mm512_maskz_loadu_epi16(mask, values[2 * n] + offset + i);
                const __m512i odd = _mm512_maskz_loadu_epi16(mask, values[2 * n + 1] + offset + i);
                first[n] = _mm512_unpacklo_epi16(even, odd);
                second[n] = _mm512_unpackhi_epi16(even, odd);
            }
            prefetch_rows<kKeys>(next_values, offset, i);
            for (int m = 0; m < kQueries; ++m) {
                float* sum = sums + m * sum_stride + i;
                Vector<float> low = load_vector(sum);
                Vector<float> high = load_vector(sum + kLanes<float>);
                for (int n = 0; n < kPairs; ++n) {
                    low = add_products(low, factors[m][n], first[n]);
                    high = add_products(high, factors[m][n], second[n]);
                }
                store_vector(sum, low);
                store_vector(sum + kLanes<float>, high);
            }
        }
    }
};
#endif

// Calls body.template operator()<kQueries>(row) for `rows` rows, kRows and then 1 at a time.
template <typename Body>
inline void for_rows(std::int64_t rows, Body body) {
    std::int64_t row = 0;
    for (; row + kRows <= rows; row += kRows) {
        body.template operator()<kRows>(row);
    }
    for (; row < rows; ++row) {
        body.template operator()<1>(row);
    }
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::attention
