// philox.h for CPU kernels: the numbers of neighbouring counters, in vectors. Included by
// <op>_cpu.cpp only (see cpu.h on namespaces).
#pragma once

#include <cstdint>

#include "cpu.h"

#if !defined(WARPLOOM_CPU_ISA)
#error "cpu_philox.h belongs to CPU units, which are compiled with WARPLOOM_CPU_ISA"
#endif

namespace warploom {
namespace WARPLOOM_CPU_ISA {

// numbers[4 i + j] = philox(key, counter0 + i, counter1, counter2, 0).values[j] for i below
// kCounters. All counters go through a round before the next one, each word in an array of its own:
// of philox() in a loop the compiler makes no vectors that are worth it.
template <int kCounters>
inline void draw_philox(std::uint64_t key, std::uint32_t counter0, std::uint32_t counter1,
                        std::uint32_t counter2, std::uint32_t* numbers) {
    std::uint32_t word0[kCounters];
    std::uint32_t word1[kCounters];
    std::uint32_t word2[kCounters];
    std::uint32_t word3[kCounters];
#pragma omp simd
    for (int i = 0; i < kCounters; ++i) {
        word0[i] = counter0 + static_cast<std::uint32_t>(i);
        word1[i] = counter1;
        word2[i] = counter2;
        word3[i] = 0;
    }
    auto key0 = static_cast<std::uint32_t>(key);
    auto key1 = static_cast<std::uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
#pragma omp simd
        for (int i = 0; i < kCounters; ++i) {
            const std::uint64_t product0 = std::uint64_t{0xD2511F53} * word0[i];
            const std::uint64_t product1 = std::uint64_t{0xCD9E8D57} * word2[i];
            word0[i] = static_cast<std::uint32_t>(product1 >> 32) ^ word1[i] ^ key0;
            word1[i] = static_cast<std::uint32_t>(product1);
            word2[i] = static_cast<std::uint32_t>(product0 >> 32) ^ word3[i] ^ key1;
            word3[i] = static_cast<std::uint32_t>(product0);
        }
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
#pragma omp simd
    for (int i = 0; i < kCounters; ++i) {
        numbers[4 * i] = word0[i];
        numbers[4 * i + 1] = word1[i];
        numbers[4 * i + 2] = word2[i];
        numbers[4 * i + 3] = word3[i];
    }
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom
