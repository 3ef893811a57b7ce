// Squeezing on the CPU: every element is read once and written once, whole lines at a time.
#include "coupling/squeeze.h"

#include <algorithm>
#include <cstdint>

#include "common/parallel.h"

namespace warploom::coupling {
namespace WARPLOOM_CPU_ISA {
namespace {

// Elements that are worth waking a thread for.
constexpr std::int64_t kGrain = 32768;

template <bool to_lines, typename T>
inline void move(T* line, T* packed) {
    if constexpr (to_lines) {
        *line = *packed;
    } else {
        *packed = *line;
    }
}

// One matrix. kWays is the number of its lines, or 0 where only `params` knows it.
template <int kWays, bool to_lines, typename T>
inline void turn(const SqueezeParams& params, T* __restrict lines, T* __restrict packed) {
    const std::int64_t length = params.length;
    const auto start_of = [&params](std::int64_t way) {
        return way / params.factor * params.block_row + way % params.factor * params.block_column;
    };
    if constexpr (kWays == 0) {
        for (std::int64_t way = 0; way < params.ways; ++way) {
            T* const line = lines + start_of(way);
            for (std::int64_t i = 0; i < length; ++i) {
                move<to_lines>(line + i, packed + i * params.ways + way);
            }
        }
    } else {
        std::int64_t starts[kWays];
        for (int way = 0; way < kWays; ++way) {
            starts[way] = start_of(way);
        }
#pragma omp simd
        for (std::int64_t i = 0; i < length; ++i) {
            for (int way = 0; way < kWays; ++way) {
                move<to_lines>(lines + starts[way] + i, packed + i * kWays + way);
            }
        }
    }
}

template <int kWays, bool to_lines, typename T>
void squeeze_matrices_of(const SqueezeParams& params) {
    const std::int64_t* sizes = params.sizes;
    const std::int64_t rows = sizes[0] * sizes[1] * sizes[2];
    const std::int64_t elements = sizes[3] * params.length * params.ways;
    T* const lines = static_cast<T*>(to_lines ? params.to : const_cast<void*>(params.from));
    T* const packed = static_cast<T*>(to_lines ? const_cast<void*>(params.from) : params.to);
    const auto start_of = [sizes](const std::int64_t (&strides)[4], std::int64_t row) {
        return row / (sizes[2] * sizes[1]) * strides[0] + row / sizes[2] % sizes[1] * strides[1] +
               row % sizes[2] * strides[2];
    };
    parallel_for(rows, std::max<std::int64_t>(1, kGrain / elements),
                 [&](std::int64_t begin, std::int64_t end) {
                     for (std::int64_t row = begin; row < end; ++row) {
                         T* const row_lines = lines + start_of(params.lines.strides, row);
                         T* const row_packed = packed + start_of(params.packed.strides, row);
                         for (std::int64_t inner = 0; inner < sizes[3]; ++inner) {
                             turn<kWays, to_lines>(params,
                                                   row_lines + inner * params.lines.strides[3],
                                                   row_packed + inner * params.packed.strides[3]);
                         }
                     }
                 });
}

template <bool to_lines, typename T>
void squeeze_ways(const SqueezeParams& params) {
    switch (params.ways) {
        case 1:
            return squeeze_matrices_of<1, to_lines, T>(params);
        case 2:
            return squeeze_matrices_of<2, to_lines, T>(params);
        case 4:
            return squeeze_matrices_of<4, to_lines, T>(params);
        default:
            return squeeze_matrices_of<0, to_lines, T>(params);
    }
}

}  // namespace

void squeeze_cpu(const SqueezeParams& params) {
    const auto run = [&params]<typename T>(T) {
        params.to_lines ? squeeze_ways<true, T>(params) : squeeze_ways<false, T>(params);
    };
    switch (element_size(params.dtype)) {
        case 2:
            return run(std::uint16_t{});
        case 4:
            return run(std::uint32_t{});
        default:
            return run(std::uint64_t{});
    }
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::coupling
