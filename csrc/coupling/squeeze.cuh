// Squeezing on GPUs; squeeze.h says what its matrices are.
//
// A thread takes kVector neighbours of every line of a matrix, which are ways vectors of the packed
// side too, and turns them in registers; or one element of every line, where lines do not consist
// of vectors or their number is known to the launch alone.
#pragma once

#include <cstdint>

#include "common/index.cuh"
#include "common/vec.cuh"
#include "coupling/squeeze.h"

namespace warploom::coupling {

template <typename Element_, int kVector_, int kWays_>
struct SqueezeTraits {
    using Element = Element_;
    static constexpr int kVector = kVector_;
    static constexpr int kWays = kWays_;  // 0: params.ways, with kVector 1
    static constexpr int kThreads = 256;
    using Vector = Packed<Element, kVector>;
};

struct SqueezePlace {
    std::int64_t packed;
    std::int64_t lines;
    std::int64_t first;  // element of the lines
};

template <int kVector>
WARPLOOM_DEVICE SqueezePlace squeeze_place(const SqueezeParams& params, std::int64_t item) {
    const Division place = divide(item, params.length / kVector);
    SqueezePlace found{0, 0, place.remainder * kVector};
    std::int64_t matrix = place.quotient;
    WARPLOOM_UNROLL
    for (int dim = 3; dim > 0; --dim) {
        const Division index = divide(matrix, params.sizes[dim]);
        found.packed += index.remainder * params.packed.strides[dim];
        found.lines += index.remainder * params.lines.strides[dim];
        matrix = index.quotient;
    }
    found.packed += matrix * params.packed.strides[0];
    found.lines += matrix * params.lines.strides[0];
    return found;
}

WARPLOOM_DEVICE std::int64_t line_start(const SqueezeParams& params, int way) {
    const int factor = static_cast<int>(params.factor);
    return way / factor * params.block_row + way % factor * params.block_column;
}

// Where vector `way` of a matrix begins, on the side of the lines or on the packed one.
template <typename Traits, bool of_lines>
WARPLOOM_DEVICE std::int64_t vector_start(const SqueezeParams& params, int way) {
    return of_lines ? line_start(params, way) : way * Traits::kVector;
}

// Element `index` of line `way` is element index * kWays + way of the packed vectors.
template <typename Traits, bool to_lines>
WARPLOOM_DEVICE void turn(const SqueezeParams& params, const typename Traits::Element* from,
                          typename Traits::Element* to) {
    constexpr int kVector = Traits::kVector;
    constexpr int kWays = Traits::kWays;
    typename Traits::Vector loaded[kWays];
    WARPLOOM_UNROLL
    for (int way = 0; way < kWays; ++way) {
        loaded[way] = load_packed<kVector>(from + vector_start<Traits, !to_lines>(params, way));
    }
    WARPLOOM_UNROLL
    for (int way = 0; way < kWays; ++way) {
        typename Traits::Vector turned;
        WARPLOOM_UNROLL
        for (int index = 0; index < kVector; ++index) {
            const int element = to_lines ? index * kWays + way : way * kVector + index;
            turned.values[index] = to_lines ? loaded[element / kVector].values[element % kVector]
                                            : loaded[element % kWays].values[element / kWays];
        }
        store_packed(to + vector_start<Traits, to_lines>(params, way), turned);
    }
}

// grid [ceil(matrices * length / (kThreads kVector))], the neighbours of a line side by side
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 4)
squeeze_kernel(WARPLOOM_GRID_CONSTANT SqueezeParams params) {
    using T = typename Traits::Element;
    const std::int64_t items = params.sizes[0] * params.sizes[1] * params.sizes[2] *
                               params.sizes[3] * (params.length / Traits::kVector);
    const std::int64_t item =
        static_cast<std::int64_t>(blockIdx.x) * Traits::kThreads + threadIdx.x;
    if (item >= items) {
        return;
    }
    const SqueezePlace place = squeeze_place<Traits::kVector>(params, item);
    const std::int64_t packed = place.packed + place.first * params.ways;
    const std::int64_t lines = place.lines + place.first;
    const T* from = static_cast<const T*>(params.from) + (params.to_lines ? packed : lines);
    T* to = static_cast<T*>(params.to) + (params.to_lines ? lines : packed);
    if constexpr (Traits::kWays > 0) {
        if (params.to_lines) {
            turn<Traits, true>(params, from, to);
        } else {
            turn<Traits, false>(params, from, to);
        }
    } else {
        WARPLOOM_NO_UNROLL
        for (int way = 0; way < params.ways; ++way) {
            const std::int64_t start = line_start(params, way);
            to[params.to_lines ? start : way] = from[params.to_lines ? way : start];
        }
    }
}

}  // namespace warploom::coupling
