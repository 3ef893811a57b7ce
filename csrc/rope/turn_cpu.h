// The rotation of one head on CPUs. Included by <op>_cpu.cpp only (see common/cpu.h on namespaces).
#pragma once

#include <cstdint>

#include "common/cpu_float.h"

namespace warploom::rope {
namespace WARPLOOM_CPU_ISA {

using namespace ::warploom::WARPLOOM_CPU_ISA;

// One head of one token: its first `pairs` pairs are turned, the rest is copied. `direction` is 1,
// or -1 to turn the other way.
template <bool kInterleaved, typename T>
void turn(const T* __restrict x, const Wide<T>* __restrict cos, const Wide<T>* __restrict sin,
          Wide<T> direction, std::int64_t pairs, std::int64_t head_dim, T* __restrict out) {
    using W = Wide<T>;
    const std::int64_t step = kInterleaved ? 2 : 1;
    const std::int64_t partner = kInterleaved ? 1 : pairs;
#pragma omp simd
    for (std::int64_t i = 0; i < pairs; ++i) {
        const W first = widen(x[i * step]);
        const W second = widen(x[i * step + partner]);
        const W sine = direction * sin[i];
        out[i * step] = narrow<T>(first * cos[i] - second * sine);
        out[i * step + partner] = narrow<T>(second * cos[i] + first * sine);
    }
    for (std::int64_t i = 2 * pairs; i < head_dim; ++i) {
        out[i] = x[i];
    }
}

template <typename T>
void turn(bool interleaved, const T* x, const Wide<T>* cos, const Wide<T>* sin, Wide<T> direction,
          std::int64_t pairs, std::int64_t head_dim, T* out) {
    (interleaved ? turn<true, T> : turn<false, T>)(x, cos, sin, direction, pairs, head_dim, out);
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::rope
