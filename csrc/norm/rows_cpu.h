// What the CPU kernels of this family share: how much a thread takes and, for the gradients of
// parameters, sums over rows. Included by <op>_cpu.cpp only (see common/cpu.h on namespaces).
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cpu_float.h"
#include "common/parallel.h"

namespace warploom::norm {
namespace WARPLOOM_CPU_ISA {

using namespace ::warploom::WARPLOOM_CPU_ISA;

// Elements that are worth waking a thread for.
constexpr std::int64_t kGrain = 16384;

inline std::int64_t grain_of(std::int64_t elements_per_item) {
    return std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(1, elements_per_item));
}

// How many sums the rows are dealt out to, never more than the `available` ones of the workspace.
// Fixed by the shape, whatever the number of threads: the same bits on every run.
inline std::int64_t partials_of(std::int64_t rows, std::int64_t available) {
    constexpr std::int64_t kRowsPerPartial = 16;
    constexpr std::int64_t kMaxPartials = 64;
    return std::clamp<std::int64_t>(rows / kRowsPerPartial, 1,
                                    std::min<std::int64_t>(available, kMaxPartials));
}

// Calls body(partial, first row, row after the last) for each partial sum.
template <typename Body>
void for_each_partial(std::int64_t rows, std::int64_t partials, Body body) {
    parallel_for(partials, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t partial = begin; partial < end; ++partial) {
            body(partial, partial * rows / partials, (partial + 1) * rows / partials);
        }
    });
}

// total[i] = sum over p of sums[p, i], in the order of p. Overwrites the first row of `sums`.
template <typename WeightT, typename W>
void add_partials(W* sums, std::int64_t partials, std::int64_t columns, WeightT* total) {
    parallel_for(columns, grain_of(partials), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t partial = 1; partial < partials; ++partial) {
            const W* from = sums + partial * columns;
#pragma omp simd
            for (std::int64_t i = begin; i < end; ++i) {
                sums[i] += from[i];
            }
        }
        for (std::int64_t i = begin; i < end; ++i) {
            total[i] = narrow<WeightT>(static_cast<Wide<WeightT>>(sums[i]));
        }
    });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::norm
