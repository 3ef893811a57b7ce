// Rows of a latent cache on CPUs: where they lie, and numbers of one byte. Included by <op>_cpu.cpp
// only (see common/cpu.h on namespaces).
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "common/cpu_codes.h"
#include "common/cpu_float.h"
#include "mla/mla_decode.h"

namespace warploom::mla {
namespace WARPLOOM_CPU_ISA {

using namespace ::warploom::WARPLOOM_CPU_ISA;

// Where row `position` of a sequence lies: offset is in elements from the start of the cache.
struct CachePlace {
    std::int64_t block;
    std::int64_t offset;
};

inline CachePlace place_of(const CacheLayout& cache, std::int64_t batch, std::int64_t position) {
    std::int64_t block = batch;
    std::int64_t slot = position;
    if (cache.block_table != nullptr) {
        const auto page_size = static_cast<std::uint32_t>(cache.page_size);
        const std::uint32_t page = static_cast<std::uint32_t>(position) / page_size;
        slot = static_cast<std::uint32_t>(position) % page_size;
        block = cache.block_table[batch * cache.block_table_stride + page];
    }
    return {block, block * cache.batch_stride + slot * cache.row_stride};
}

// Calls visit.template operator()<Code>() with the code of a compressed cache.
template <typename Visit>
void visit_code(CacheFormat format, Visit&& visit) {
    if (format == CacheFormat::int8) {
        visit.template operator()<Int8>();
    } else {
        visit.template operator()<Float8>();
    }
}

// Calls body(group, first, count) for the groups of `size` numbers: those of a latent share a
// scale.
template <typename Body>
void for_each_group(std::int64_t size, Body body) {
    for (std::int64_t first = 0; first < size; first += kScaleGroup) {
        body(first / kScaleGroup, first, std::min<std::int64_t>(kScaleGroup, size - first));
    }
}

// Neither the scales nor the key of a compressed row have to lie at a multiple of their size.
constexpr std::int64_t kScaleBytes = sizeof(float);
constexpr std::int64_t kRopeBytes = sizeof(BFloat16);

constexpr std::int64_t rope_offset(std::int64_t d_latent) {
    return d_latent + scale_count(static_cast<int>(d_latent)) * kScaleBytes;
}

// A compressed row as d_latent + d_rope numbers.
template <typename Code, typename W>
void expand_row(const std::uint8_t* row, std::int64_t d_latent, std::int64_t d_rope, W* to) {
    const std::uint8_t* scales = row + d_latent;
    for_each_group(d_latent, [=](std::int64_t group, std::int64_t first, std::int64_t count) {
        float scale;
        __builtin_memcpy(&scale, scales + group * kScaleBytes, kScaleBytes);
#pragma omp simd
        for (std::int64_t i = 0; i < count; ++i) {
            to[first + i] = static_cast<W>(Code::decode(row[first + i]) * scale);
        }
    });
    for_each_group(d_rope, [=](std::int64_t, std::int64_t first, std::int64_t count) {
        BFloat16 elements[kScaleGroup];
        __builtin_memcpy(elements, row + rope_offset(d_latent) + first * kRopeBytes,
                         static_cast<std::size_t>(count * kRopeBytes));
#pragma omp simd
        for (std::int64_t i = 0; i < count; ++i) {
            to[d_latent + first + i] = static_cast<W>(widen(elements[i]));
        }
    });
}

// The reverse: the latent counts in float32, the key in bfloat16.
template <typename Code, typename T>
void compress_row(const Wide<T>* latent, const T* rope, std::int64_t d_latent, std::int64_t d_rope,
                  std::uint8_t* row) {
    std::uint8_t* scales = row + d_latent;
    for_each_group(d_latent, [=](std::int64_t group, std::int64_t first, std::int64_t count) {
        float largest = 0.0f;
        for (std::int64_t i = first; i < first + count; ++i) {
            const float magnitude = std::fabs(static_cast<float>(latent[i]));
            // A NaN stays: nothing is less than it or equal to it.
            largest = magnitude <= largest || largest != largest ? largest : magnitude;
        }
        const float scale = largest == 0.0f ? 1.0f : largest / Code::kLargest;
        __builtin_memcpy(scales + group * kScaleBytes, &scale, kScaleBytes);
#pragma omp simd
        for (std::int64_t i = first; i < first + count; ++i) {
            row[i] = Code::encode(static_cast<float>(latent[i]) / scale);
        }
    });
    for (std::int64_t i = 0; i < d_rope; ++i) {
        const auto element = narrow<BFloat16>(static_cast<float>(widen(rope[i])));
        __builtin_memcpy(row + rope_offset(d_latent) + i * kRopeBytes, &element, kRopeBytes);
    }
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::mla
