// Cross-entropy of rows of logits on the CPU: a row, or a block of its columns, is read for its
// maximum or log-sum-exp, and read again for its gradients while it is still in the cache.
#include "vocab/cross_entropy_block_cpu.h"
#include "vocab/cross_entropy_rows.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/cpu_float.h"
#include "common/cpu_loops.h"
#include "common/cpu_math.h"
#include "common/parallel.h"

namespace warploom::vocab {
namespace WARPLOOM_CPU_ISA {
namespace {

using namespace ::warploom::WARPLOOM_CPU_ISA;

// Columns that are taken at a time, as wide numbers in the first level of cache.
constexpr std::int64_t kBlock = 512;
constexpr std::int64_t kLanes = 64;

// A soft-cap of 0 is none.
template <bool kCapped, typename W>
inline W cap(W value, W softcap) {
    if constexpr (kCapped) {
        return softcap * hyperbolic_tangent(value / softcap);
    } else {
        return value;
    }
}

// d capped / d value
template <bool kCapped, typename W>
inline W cap_slope(W capped, W softcap) {
    if constexpr (kCapped) {
        return W{1} - (capped / softcap) * (capped / softcap);
    } else {
        return W{1};
    }
}

template <typename W>
inline W greatest(const W* values, std::int64_t count) {
    W lanes[kLanes];
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
        lanes[lane] = -std::numeric_limits<W>::infinity();
    }
    std::int64_t first = 0;
    for (; first + kLanes <= count; first += kLanes) {
#pragma omp simd
        for (std::int64_t lane = 0; lane < kLanes; ++lane) {
            const W value = values[first + lane];
            lanes[lane] = value > lanes[lane] ? value : lanes[lane];
        }
    }
    W found = lanes[0];
    for (std::int64_t lane = 1; lane < kLanes; ++lane) {
        found = lanes[lane] > found ? lanes[lane] : found;
    }
    for (; first < count; ++first) {
        found = values[first] > found ? values[first] : found;
    }
    return found;
}

// exp(value - maximum) for values up to the maximum, where that may be -infinity.
template <typename W>
inline W scaled_exponential(W value, W maximum) {
    constexpr W kNone = -std::numeric_limits<W>::infinity();
    return exponential_of_negative(value - (maximum == kNone ? W{0} : maximum));
}

// A row's log-sum-exp is maximum + log_sum: differences to the maximum keep the digits that those
// to a sum of both would lose. And the sum of its logits.
template <typename W>
struct RowSums {
    W maximum;
    W log_sum;
    W logits;
};

// Online: the sum is scaled down whenever a block of columns raises the maximum.
template <typename T, bool kCapped, typename W = Wide<T>>
RowSums<W> sum_row(const T* logits, std::int64_t columns, W softcap) {
    W maximum = -std::numeric_limits<W>::infinity();
    W exponentials = 0;
    W sum = 0;
    for (std::int64_t first = 0; first < columns; first += kBlock) {
        const std::int64_t count = columns - first < kBlock ? columns - first : kBlock;
        W values[kBlock];
        for_each_element<T>(
            count, [softcap](W value) { return cap<kCapped>(value, softcap); },
            [&values](std::int64_t i, auto... results) { store<W>(values + i, results...); },
            logits + first);
        const W block_maximum = greatest(values, count);
        if (block_maximum > maximum) {
            exponentials *= scaled_exponential(maximum, block_maximum);
            maximum = block_maximum;
        }
        exponentials += sum_elements<W>(
            count, [maximum](W value) { return scaled_exponential(value, maximum); }, values);
        sum += sum_elements<W>(count, [](W value) { return value; }, values);
    }
    return {maximum, std::log(exponentials), sum};
}

// Replaces a row's logits by scale d loss / d logits, but for what the target adds to its own.
template <typename T, bool kCapped, typename W = Wide<T>>
void write_gradients(T* logits, std::int64_t columns, const RowSums<W>& sums, W softcap, W weight,
                     W smoothing, W scale) {
    for_each_element<T>(
        columns,
        [=, maximum = sums.maximum, log_sum = sums.log_sum](W value) {
            const W capped = cap<kCapped>(value, softcap);
            const W probability = exponential_of_negative((capped - maximum) - log_sum);
            const W gradient = probability * weight - smoothing;
            return gradient * cap_slope<kCapped>(capped, softcap) * scale;
        },
        [logits](std::int64_t i, auto... results) { store<T>(logits + i, results...); }, logits);
}

template <typename T, bool kCapped>
void row(const CrossEntropyRowsParams& params, std::int64_t index) {
    using W = Wide<T>;
    const std::int64_t columns = params.columns;
    T* logits = static_cast<T*>(params.logits) + index * columns;
    W* loss = static_cast<W*>(params.loss) + index;
    const std::int64_t target = params.targets[index];
    if (target == params.ignore_index) {
        *loss = 0;
        for (std::int64_t i = 0; params.gradients && i < columns; ++i) {
            logits[i] = narrow<T>(W{0});
        }
        return;
    }
    const W softcap = static_cast<W>(params.softcap);
    const W smoothing = static_cast<W>(params.label_smoothing);
    const W z_loss = static_cast<W>(params.z_loss);
    const RowSums<W> sums = sum_row<T, kCapped>(logits, columns, softcap);
    const W at_target = cap<kCapped>(widen(logits[target]), softcap);
    const W lse = sums.maximum + sums.log_sum;
    *loss = sums.log_sum + (W{1} - smoothing) * (sums.maximum - at_target) + z_loss * lse * lse;
    if (smoothing != 0) {
        *loss += smoothing * (sums.maximum - sums.logits / static_cast<W>(columns));
    }
    if (params.gradients) {
        const W scale =
            params.row_scale == nullptr ? W{1} : static_cast<const W*>(params.row_scale)[index];
        const W weight = W{1} + W{2} * z_loss * lse;
        const W spread = smoothing / static_cast<W>(columns);
        write_gradients<T, kCapped>(logits, columns, sums, softcap, weight, spread, scale);
        const W probability = exponential_of_negative((at_target - sums.maximum) - sums.log_sum);
        const W gradient = probability * weight - spread - (W{1} - smoothing);
        logits[target] = narrow<T>(gradient * cap_slope<kCapped>(at_target, softcap) * scale);
    }
}

// A row of the state: what the columns so far amount to.
template <typename W>
struct BlockState {
    W maximum;
    W exponentials;  // sum of exp(logit - maximum)
    W logits;        // their sum
    W at_target;
};

// The maximum of a row before the cap, which keeps the order.
template <typename T, typename W = Wide<T>>
W greatest_of_row(const T* logits, std::int64_t columns) {
    W maximum = -std::numeric_limits<W>::infinity();
    for (std::int64_t first = 0; first < columns; first += kBlock) {
        const std::int64_t count = columns - first < kBlock ? columns - first : kBlock;
        W values[kBlock];
        for_each_element<T>(
            count, [](W value) { return value; },
            [&values](std::int64_t i, auto... results) { store<W>(values + i, results...); },
            logits + first);
        const W found = greatest(values, count);
        maximum = found > maximum ? found : maximum;
    }
    return maximum;
}

template <typename T, bool kCapped>
void block_row(const CrossEntropyBlockParams& params, std::int64_t index) {
    using W = Wide<T>;
    const std::int64_t columns = params.columns;
    T* logits = static_cast<T*>(params.logits) + index * columns;
    W* factor = static_cast<W*>(params.factor) + index;
    const std::int64_t target = params.targets[index];
    if (target == params.ignore_index) {
        *factor = 1;
        for (std::int64_t i = 0; params.gradients && i < columns; ++i) {
            logits[i] = narrow<T>(W{0});
        }
        return;
    }
    auto& state = static_cast<BlockState<W>*>(params.state)[index];
    const W softcap = static_cast<W>(params.softcap);
    const bool has_target = target >= params.first && target < params.first + columns;
    if (has_target) {
        state.at_target = cap<kCapped>(widen(logits[target - params.first]), softcap);
    }
    const W block_maximum = cap<kCapped>(greatest_of_row(logits, columns), softcap);
    const W maximum = block_maximum > state.maximum ? block_maximum : state.maximum;
    *factor = scaled_exponential(state.maximum, maximum);
    W exponentials = state.exponentials * *factor;
    W sum = state.logits;
    for (std::int64_t first = 0; first < columns; first += kBlock) {
        const std::int64_t count = columns - first < kBlock ? columns - first : kBlock;
        W values[kBlock];
        W terms[kBlock];
        T* part = logits + first;
        for_each_element<T>(
            count, [softcap](W value) { return cap<kCapped>(value, softcap); },
            [&values](std::int64_t i, auto... results) { store<W>(values + i, results...); }, part);
        for_each_element<W>(
            count, [maximum](W value) { return scaled_exponential(value, maximum); },
            [&terms](std::int64_t i, W term) { terms[i] = term; }, values);
        sum += sum_elements<W>(count, [](W value) { return value; }, values);
        exponentials += sum_elements<W>(count, [](W term) { return term; }, terms);
        if (params.gradients) {
#pragma omp simd
            for (std::int64_t i = 0; i < count; ++i) {
                part[i] = narrow<T>(terms[i] * cap_slope<kCapped>(values[i], softcap));
            }
        }
    }
    if (params.gradients && has_target) {
        logits[target - params.first] = narrow<T>(W{0});
    }
    state.maximum = maximum;
    state.exponentials = exponentials;
    state.logits = sum;
}

// Calls body(capped, index) for every row, on threads.
template <typename Body>
void for_each_row(std::int64_t rows, double softcap, Body body) {
    parallel_for(rows, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t index = begin; index < end; ++index) {
            if (softcap != 0) {
                body(std::true_type{}, index);
            } else {
                body(std::false_type{}, index);
            }
        }
    });
}

}  // namespace

void cross_entropy_rows_cpu(const CrossEntropyRowsParams& params) {
    visit_element_type(params.dtype, [&]<typename T>() {
        for_each_row(params.rows, params.softcap,
                     [&](auto capped, std::int64_t index) { row<T, capped.value>(params, index); });
    });
}

void cross_entropy_block_cpu(const CrossEntropyBlockParams& params) {
    visit_element_type(params.dtype, [&]<typename T>() {
        for_each_row(params.rows, params.softcap, [&](auto capped, std::int64_t index) {
            block_row<T, capped.value>(params, index);
        });
    });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::vocab
