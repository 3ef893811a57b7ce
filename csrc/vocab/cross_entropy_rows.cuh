// Cross-entropy of rows of logits, which are replaced by their gradients. Bound by memory: a row is
// read twice, the second time from the L2 cache, and written once. Arithmetic in float32.
//
//   z = logits, or softcap tanh(logits / softcap)     lse = log sum_j exp(z_j)
//   loss = lse - (1 - smoothing) z_target - smoothing mean_j z_j + z_loss lse^2
//   gradient_j = scale z'_j (exp(z_j - lse) (1 + 2 z_loss lse) - smoothing / columns
//                            - (1 - smoothing) [j is the target])
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "cross_entropy_rows.h"

namespace warploom::vocab {

// A block takes a row in steps of kThreads * kItems vectors: a thread's loads of a step are all
// under way at once, and the sums so far are scaled once a step.
template <typename Element_, int kVector_>
struct CrossEntropyTraits {
    using Element = Element_;
    static constexpr int kVector = kVector_;
    static constexpr int kThreads = 512;
    static constexpr int kItems = kVector == 1 ? 4 : 8 / kVector;  // 8 numbers of a lane at a time
    static constexpr int kWarps = kThreads / device::kWarpSize;
    static constexpr int kStep = kThreads * kItems * kVector;  // columns
};

// Sums of a part of a row: exponentials = sum_j exp(z_j - maximum).
struct CrossEntropySums {
    float maximum;
    float exponentials;
    float logits;
};

template <typename Traits>
struct CrossEntropyPlan {
    CrossEntropySums sums[Traits::kWarps];
};

inline constexpr float kNoLogit = -std::numeric_limits<float>::infinity();

// exp(z - maximum) for z up to the maximum, where that may be -infinity.
WARPLOOM_DEVICE float scaled_exponential(float z, float maximum) {
    constexpr float kLog2E = 1.4426950408889634f;
    return device::exp2_approximate((z - (maximum == kNoLogit ? 0.0f : maximum)) * kLog2E);
}

// A soft-cap of 0 is none: one branch of the whole grid, not of a thread.
WARPLOOM_DEVICE float cap(float value, float softcap) {
    return softcap > 0.0f ? softcap * tanhf(value / softcap) : value;
}

// The column of this thread's vector `item` of the step that begins at `first`.
template <typename Traits>
WARPLOOM_DEVICE std::int64_t item_column(std::int64_t first, int item) {
    return first + (item * Traits::kThreads + static_cast<int>(threadIdx.x)) * Traits::kVector;
}

// Adds this thread's share of a step to its sums.
template <typename Traits>
WARPLOOM_DEVICE void add_step(const typename Traits::Element* logits, std::int64_t first,
                              std::int64_t columns, float softcap, CrossEntropySums& sums) {
    constexpr int kVector = Traits::kVector;
    float z[Traits::kItems][kVector];
    float maximum = sums.maximum;
    WARPLOOM_UNROLL
    for (int item = 0; item < Traits::kItems; ++item) {
        const std::int64_t column = item_column<Traits>(first, item);
        if (column < columns) {
            load_floats(logits + column, z[item]);
        }
    }
    WARPLOOM_UNROLL
    for (int item = 0; item < Traits::kItems; ++item) {
        const bool exists = item_column<Traits>(first, item) < columns;
        WARPLOOM_UNROLL
        for (int index = 0; index < kVector; ++index) {
            float& value = z[item][index];
            value = exists ? cap(value, softcap) : kNoLogit;
            maximum = fmaxf(maximum, value);
            sums.logits += exists ? value : 0.0f;
        }
    }
    sums.exponentials *= scaled_exponential(sums.maximum, maximum);
    sums.maximum = maximum;
    WARPLOOM_UNROLL
    for (int item = 0; item < Traits::kItems; ++item) {
        WARPLOOM_UNROLL
        for (int index = 0; index < kVector; ++index) {
            sums.exponentials += scaled_exponential(z[item][index], maximum);
        }
    }
}

// Every thread of the block gets the sums of all. When it returns, `plan` is free for the next use.
template <typename Traits>
WARPLOOM_DEVICE CrossEntropySums block_reduce(const CrossEntropySums& sums,
                                              CrossEntropyPlan<Traits>& plan) {
    const float warp_maximum = warp_reduce_max(sums.maximum);
    const float exponentials =
        warp_reduce_sum(sums.exponentials * scaled_exponential(sums.maximum, warp_maximum));
    const float logits = warp_reduce_sum(sums.logits);
    if (device::lane_index() == 0) {
        plan.sums[device::warp_index()] = {warp_maximum, exponentials, logits};
    }
    device::sync_threads();
    CrossEntropySums total{plan.sums[0].maximum, 0.0f, 0.0f};
    WARPLOOM_UNROLL
    for (int warp = 1; warp < Traits::kWarps; ++warp) {
        total.maximum = fmaxf(total.maximum, plan.sums[warp].maximum);
    }
    WARPLOOM_UNROLL
    for (int warp = 0; warp < Traits::kWarps; ++warp) {
        const CrossEntropySums& part = plan.sums[warp];
        total.exponentials += part.exponentials * scaled_exponential(part.maximum, total.maximum);
        total.logits += part.logits;
    }
    device::sync_threads();
    return total;
}

// Replaces a row's vectors by what gradient(column, logit) returns.
template <typename Traits, typename Gradient>
WARPLOOM_DEVICE void replace_row(typename Traits::Element* logits, std::int64_t columns,
                                 const Gradient& gradient) {
    constexpr int kVector = Traits::kVector;
    WARPLOOM_NO_UNROLL
    for (std::int64_t first = 0; first < columns; first += Traits::kStep) {
        float values[Traits::kItems][kVector];
        WARPLOOM_UNROLL
        for (int item = 0; item < Traits::kItems; ++item) {
            const std::int64_t column = item_column<Traits>(first, item);
            if (column < columns) {
                load_floats(logits + column, values[item]);
            }
        }
        WARPLOOM_UNROLL
        for (int item = 0; item < Traits::kItems; ++item) {
            const std::int64_t column = item_column<Traits>(first, item);
            if (column < columns) {
                WARPLOOM_UNROLL
                for (int index = 0; index < kVector; ++index) {
                    values[item][index] = gradient(column + index, values[item][index]);
                }
                store_packed(logits + column, pack_floats<typename Traits::Element>(values[item]));
            }
        }
    }
}

// grid [rows], rows beyond by a stride of the grid
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 1)
cross_entropy_rows_kernel(WARPLOOM_GRID_CONSTANT CrossEntropyRowsParams params) {
    using T = typename Traits::Element;
    auto& plan = device::shared_memory<CrossEntropyPlan<Traits>>();
    const std::int64_t columns = params.columns;
    const float softcap = static_cast<float>(params.softcap);
    const float smoothing = static_cast<float>(params.label_smoothing);
    const float z_loss = static_cast<float>(params.z_loss);
    const float share = 1.0f / static_cast<float>(columns);

    WARPLOOM_NO_UNROLL
    for (std::int64_t row = blockIdx.x; row < params.rows; row += gridDim.x) {
        T* logits = static_cast<T*>(params.logits) + row * columns;
        float* loss = static_cast<float*>(params.loss) + row;
        const std::int64_t target = params.targets[row];
        if (target == params.ignore_index) {
            if (params.gradients) {
                replace_row<Traits>(logits, columns, [](std::int64_t, float) { return 0.0f; });
            }
            if (threadIdx.x == 0) {
                *loss = 0.0f;
            }
            continue;
        }
        // Read before the barriers of the reduction, behind which gradients are written.
        const float at_target = target >= 0 && target < columns
                                    ? cap(device::to_float(logits[target]), softcap)
                                    : std::numeric_limits<float>::quiet_NaN();
        CrossEntropySums sums{kNoLogit, 0.0f, 0.0f};
        WARPLOOM_NO_UNROLL
        for (std::int64_t first = 0; first < columns; first += Traits::kStep) {
            add_step<Traits>(logits, first, columns, softcap, sums);
        }
        sums = block_reduce<Traits>(sums, plan);
        // Differences to the maximum keep the digits that those to the log-sum-exp would lose.
        const float log_sum = logf(sums.exponentials);
        const float lse = sums.maximum + log_sum;
        if (threadIdx.x == 0) {
            const float smoothed =
                smoothing > 0.0f ? smoothing * (sums.maximum - sums.logits * share) : 0.0f;
            *loss = log_sum + (1.0f - smoothing) * (sums.maximum - at_target) + smoothed +
                    z_loss * lse * lse;
        }
        if (params.gradients) {
            const float scale = params.row_scale == nullptr
                                    ? 1.0f
                                    : static_cast<const float*>(params.row_scale)[row];
            const float weight = 1.0f + 2.0f * z_loss * lse;
            replace_row<Traits>(logits, columns, [&](std::int64_t column, float logit) {
                const float z = cap(logit, softcap);
                const float one = column == target ? 1.0f - smoothing : 0.0f;
                const float slope = softcap > 0.0f ? 1.0f - (z / softcap) * (z / softcap) : 1.0f;
                const float gradient = scaled_exponential(z - sums.maximum, log_sum) * weight -
                                       smoothing * share - one;
                return gradient * slope * scale;
            });
        }
    }
}

}  // namespace warploom::vocab
