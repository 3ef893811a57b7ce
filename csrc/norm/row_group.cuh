// What the normalisation kernels share: how the threads of a block are dealt out to rows, sums over
// one row, and the sum of the parameters' partial gradients.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "common/dispatch.h"
#include "common/launch.h"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace warploom::norm {

// A block works on kRows rows at a time, kThreadsPerRow threads each. Thread t of a row owns the
// vectors t, t + kThreadsPerRow, ... of kVector columns; the first kItems of them stay in
// registers, so a row of at most kHeldColumns is read from global memory once.
template <typename Element_, int kVector_, int kThreads_, int kThreadsPerRow_, int kItems_>
struct RowTraits {
    using Element = Element_;
    static constexpr int kVector = kVector_;
    static constexpr int kThreads = kThreads_;
    static constexpr int kThreadsPerRow = kThreadsPerRow_;
    static constexpr int kItems = kItems_;
    static constexpr int kRows = kThreads / kThreadsPerRow;
    // 64 registers a thread: 32 warps on a multiprocessor keep enough loads under way.
    static constexpr int kBlocksPerMultiprocessor = 1024 / kThreads;
    static constexpr int kHeldVectors = kThreadsPerRow * kItems;
    static constexpr int kHeldColumns = kHeldVectors * kVector;
    // Launchers give wider rows to the largest groups alone.
    static constexpr bool kMayExceedHeld = kThreadsPerRow >= 512;
    static_assert(kRows == 1 || !kMayExceedHeld, "RowTraits: a wide row has a block for itself");
    static_assert(kThreadsPerRow % device::kWarpSize == 0, "RowTraits: a row has full warps");
    static_assert(kThreads % kThreadsPerRow == 0, "RowTraits: a block has full rows");

    using Vector = Packed<Element, kVector>;
};

// This thread's row within the block, and its place within the row.
template <typename Traits>
WARPLOOM_DEVICE int row_in_block() {
    return static_cast<int>(threadIdx.x) / Traits::kThreadsPerRow;
}
template <typename Traits>
WARPLOOM_DEVICE int thread_in_row() {
    return static_cast<int>(threadIdx.x) % Traits::kThreadsPerRow;
}

// Shared memory of row_reduce_sum: a member of the kernel's plan.
template <typename Traits, int kValues>
struct RowReducePlan {
    float partial[kValues][Traits::kThreads / device::kWarpSize];  // (value, warp of the block)
};

// Where a thread's columns of a wide row begin that do not stay in registers, and the step to the
// next ones.
template <typename Traits>
WARPLOOM_DEVICE int first_unheld_column(int columns) {
    return Traits::kMayExceedHeld
               ? (thread_in_row<Traits>() + Traits::kHeldVectors) * Traits::kVector
               : columns;
}
template <typename Traits>
inline constexpr int kColumnStep = Traits::kThreadsPerRow * Traits::kVector;

// This thread's held vector `item` begins here.
template <typename Traits>
WARPLOOM_DEVICE int held_column(int item) {
    return (thread_in_row<Traits>() + item * Traits::kThreadsPerRow) * Traits::kVector;
}

// A row's held vectors, zeros from column `end` on.
template <typename Traits>
WARPLOOM_DEVICE void load_held(const typename Traits::Element* row, int end,
                               typename Traits::Vector (&held)[Traits::kItems]) {
    WARPLOOM_UNROLL
    for (int item = 0; item < Traits::kItems; ++item) {
        const int column = held_column<Traits>(item);
        held[item] = column < end ? load_packed<Traits::kVector>(row + column)
                                  : zero_packed<typename Traits::Element, Traits::kVector>();
    }
}

// Every thread of a row gets the row's kValues sums. All threads of the block take part. When it
// returns, `plan` is free for the next use.
template <typename Traits, int kValues>
WARPLOOM_DEVICE void row_reduce_sum(float (&values)[kValues],
                                    RowReducePlan<Traits, kValues>& plan) {
    constexpr int kWarps = Traits::kThreadsPerRow / device::kWarpSize;
    WARPLOOM_UNROLL
    for (int index = 0; index < kValues; ++index) {
        values[index] = warp_reduce_sum(values[index]);
    }
    if constexpr (kWarps > 1) {
        if (device::lane_index() == 0) {
            WARPLOOM_UNROLL
            for (int index = 0; index < kValues; ++index) {
                plan.partial[index][device::warp_index()] = values[index];
            }
        }
        device::sync_threads();
        const int first_warp = row_in_block<Traits>() * kWarps;
        WARPLOOM_UNROLL
        for (int index = 0; index < kValues; ++index) {
            values[index] = plan.partial[index][first_warp];
            WARPLOOM_UNROLL
            for (int warp = 1; warp < kWarps; ++warp) {
                values[index] += plan.partial[index][first_warp + warp];
            }
        }
        device::sync_threads();
    }
}

template <typename Traits>
WARPLOOM_DEVICE float row_reduce_sum(float value, RowReducePlan<Traits, 1>& plan) {
    float values[1] = {value};
    row_reduce_sum<Traits, 1>(values, plan);
    return values[0];
}

template <typename T, int kCount>
WARPLOOM_DEVICE float sum_of_squares(const Packed<T, kCount>& packed) {
    float values[kCount];
    unpack(packed, values);
    float sum = 0.0f;
    WARPLOOM_UNROLL
    for (int index = 0; index < kCount; ++index) {
        sum += values[index] * values[index];
    }
    return sum;
}

// A parameter's values [column, column + kVector) as floats; it is float32 or of the rows' type.
template <typename Traits>
WARPLOOM_DEVICE void load_parameter(const void* parameter, DType dtype, int column,
                                    float (&values)[Traits::kVector]) {
    if (dtype == DType::float32) {
        load_floats(static_cast<const float*>(parameter) + column, values);
    } else {
        load_floats(static_cast<const typename Traits::Element*>(parameter) + column, values);
    }
}

// Writes `sums`, this thread's share of a worker's sum over rows, to `partial` [columns] in global
// memory: the columns that stay in registers, from all kRows rows of the block in their order.
// `shared` holds kRows * kHeldColumns floats. All threads of the block take part.
template <typename Traits>
WARPLOOM_DEVICE void store_partial(const float (&sums)[Traits::kItems][Traits::kVector],
                                   float* partial, int columns, float* shared) {
    if constexpr (Traits::kRows == 1) {
        WARPLOOM_UNROLL
        for (int item = 0; item < Traits::kItems; ++item) {
            const int column = held_column<Traits>(item);
            if (column < columns) {
                store_floats(partial + column, sums[item]);
            }
        }
    } else {
        float* own = shared + row_in_block<Traits>() * Traits::kHeldColumns;
        WARPLOOM_UNROLL
        for (int item = 0; item < Traits::kItems; ++item) {
            store_floats(own + held_column<Traits>(item), sums[item]);
        }
        device::sync_threads();
        for (int column = static_cast<int>(threadIdx.x); column < columns;
             column += Traits::kThreads) {
            float sum = shared[column];
            WARPLOOM_UNROLL
            for (int row = 1; row < Traits::kRows; ++row) {
                sum += shared[row * Traits::kHeldColumns + column];
            }
            partial[column] = sum;
        }
        device::sync_threads();
    }
}

// The types of rows that have kernels.
template <typename Visit>
void dispatch_element(DType dtype, Visit&& visit) {
    dispatch_dtype<TypeCase<DType::float32, float>, TypeCase<DType::float16, device::half>,
                   TypeCase<DType::bfloat16, device::bfloat16>>(dtype, visit);
}

// Calls visit.template operator()<Traits>() for the smallest group of threads that holds a row with
// kColumnsPerThread columns each, in blocks of kThreads threads if a row does not need more; rows
// too wide for these go to the traits Widest.
template <typename T, int kColumnsPerThread, int kThreads, typename Widest, typename Visit>
void dispatch_rows(bool vectors, std::int64_t columns, Visit&& visit) {
    constexpr int kVector = kVectorElements<T>;
    constexpr int kItems = kColumnsPerThread / kVector;
    if (!vectors) {
        visit.template operator()<RowTraits<T, 1, 512, 512, 4>>();
    } else if (columns <= 32 * kColumnsPerThread) {
        visit.template operator()<RowTraits<T, kVector, kThreads, 32, kItems>>();
    } else if (columns <= 128 * kColumnsPerThread) {
        visit.template operator()<RowTraits<T, kVector, kThreads, 128, kItems>>();
    } else if (columns <= 256 * kColumnsPerThread) {
        visit.template operator()<RowTraits<T, kVector, std::max(kThreads, 256), 256, kItems>>();
    } else {
        visit.template operator()<Widest>();
    }
}

// Sums over workers: the outputs[o] [columns] of dtype are the sums of workspace [o, partials,
// columns] over its middle dimension.
struct PartialSumParams {
    const float* workspace;  // [outputs, partials, columns]
    void* outputs[2];        // each [columns]
    std::int64_t partials;
    std::int64_t columns;
};

inline constexpr int kPartialSumThreads = 256;

struct PartialSumPlan {
    float sums[kPartialSumThreads / device::kWarpSize][device::kWarpSize];  // (slice, column)
};

// grid [ceil(columns / 32), outputs]. Warp w adds up the partials w, w + warps, ... of 32 columns;
// then warp 0 adds up the warps.
template <typename Weight>
WARPLOOM_KERNEL(kPartialSumThreads, 1)
partial_sum_kernel(WARPLOOM_GRID_CONSTANT PartialSumParams params) {
    constexpr int kWarps = kPartialSumThreads / device::kWarpSize;
    PartialSumPlan& plan = device::shared_memory<PartialSumPlan>();
    const int lane = device::lane_index();
    const int warp = device::warp_index();
    const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * device::kWarpSize + lane;
    float sum = 0.0f;
    if (column < params.columns) {
        const float* values =
            params.workspace + blockIdx.y * params.partials * params.columns + column;
        for (std::int64_t partial = warp; partial < params.partials; partial += kWarps) {
            sum += values[partial * params.columns];
        }
    }
    plan.sums[warp][lane] = sum;
    device::sync_threads();
    if (warp == 0 && column < params.columns) {
        sum = plan.sums[0][lane];
        WARPLOOM_UNROLL
        for (int other = 1; other < kWarps; ++other) {
            sum += plan.sums[other][lane];
        }
        static_cast<Weight*>(params.outputs[blockIdx.y])[column] = device::from_float<Weight>(sum);
    }
}

inline void launch_partial_sum(const PartialSumParams& params, int outputs, DType dtype,
                               Stream stream) {
    const device::LaunchShape shape{
        .grid = dim3(static_cast<unsigned>(ceil_divide(params.columns, device::kWarpSize)),
                     static_cast<unsigned>(outputs)),
        .threads = kPartialSumThreads,
        .shared_bytes = sizeof(PartialSumPlan)};
    dispatch_element(dtype, [&]<typename Weight>() {
        device::launch(&partial_sum_kernel<Weight>, shape, stream, params);
    });
}

// Blocks for `rows` rows, Traits::kRows each: more rows than that are reached by a stride.
template <typename Traits>
dim3 grid_of_rows(std::int64_t rows) {
    return dim3(static_cast<unsigned>(std::min<std::int64_t>(
        ceil_divide(rows, Traits::kRows), std::numeric_limits<std::int32_t>::max())));
}

// Column indices are 32-bit in the kernels, with room for one step past the end.
inline void check_columns(const char* op, std::int64_t columns) {
    constexpr std::int64_t kMost = std::int64_t{1} << 30;
    if (columns > kMost) {
        throw std::runtime_error(std::string(op) + ": x: expected at most " +
                                 std::to_string(kMost) + " columns, got " +
                                 std::to_string(columns));
    }
}

}  // namespace warploom::norm
