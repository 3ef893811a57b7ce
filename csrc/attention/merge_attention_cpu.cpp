// Merging of two attentions on the CPU: bound by memory, one row of one head after the other.
#include "attention/merge_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/cpu_float.h"
#include "common/parallel.h"

namespace warploom::attention {
namespace WARPLOOM_CPU_ISA {
namespace {

using namespace ::warploom::WARPLOOM_CPU_ISA;

template <typename W>
struct Weights {
    W lse;
    W first;
    W second;
};

// A part whose lse is infinite, of either sign, has no keys.
template <typename W>
Weights<W> weigh(W lse1, W lse2) {
    constexpr W kInfinity = std::numeric_limits<W>::infinity();
    lse1 = lse1 == kInfinity ? -kInfinity : lse1;
    lse2 = lse2 == kInfinity ? -kInfinity : lse2;
    const W maximum = lse1 > lse2 ? lse1 : lse2;
    if (maximum == -kInfinity) {
        return {-kInfinity, W{0}, W{0}};
    }
    const W lse = maximum + std::log(std::exp(lse1 - maximum) + std::exp(lse2 - maximum));
    return {lse, std::exp(lse1 - lse), std::exp(lse2 - lse)};
}

// Calls body(element, statistic) for each row: where its elements and its log-sum-exp lie.
template <typename Params, typename Body>
void for_each_row(const Params& params, Body body) {
    constexpr std::int64_t kGrain = 16384;  // Elements that are worth waking a thread for.
    const std::int64_t rows = params.batch * params.length * params.heads;
    const std::int64_t grain =
        std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(1, params.dim));
    parallel_for(rows, grain, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) {
            const std::int64_t token = row / params.heads;
            const std::int64_t head = row % params.heads;
            const std::int64_t batch = token / params.length;
            body(row * params.dim,
                 (batch * params.heads + head) * params.length + token % params.length);
        }
    });
}

template <typename T>
void merge(const MergeParams& params) {
    using W = Wide<T>;
    for_each_row(params, [&](std::int64_t element, std::int64_t statistic) {
        const Weights<W> weights = weigh(static_cast<const W*>(params.lse1)[statistic],
                                         static_cast<const W*>(params.lse2)[statistic]);
        const T* first = static_cast<const T*>(params.out1) + element;
        const T* second = static_cast<const T*>(params.out2) + element;
        T* out = static_cast<T*>(params.out) + element;
#pragma omp simd
        for (std::int64_t i = 0; i < params.dim; ++i) {
            const W one = weights.first == W{0} ? W{0} : weights.first * widen(first[i]);
            const W two = weights.second == W{0} ? W{0} : weights.second * widen(second[i]);
            out[i] = narrow<T>(one + two);
        }
        static_cast<W*>(params.lse)[statistic] = weights.lse;
    });
}

template <typename T>
void merge_backward(const MergeBackwardParams& params) {
    using W = Wide<T>;
    for_each_row(params, [&](std::int64_t element, std::int64_t statistic) {
        const Weights<W> weights = weigh(static_cast<const W*>(params.lse1)[statistic],
                                         static_cast<const W*>(params.lse2)[statistic]);
        const T* grad = static_cast<const T*>(params.grad_out) + element;
        const T* first = static_cast<const T*>(params.out1) + element;
        const T* second = static_cast<const T*>(params.out2) + element;
        T* grad_first = static_cast<T*>(params.grad_out1) + element;
        T* grad_second = static_cast<T*>(params.grad_out2) + element;
        W difference = 0;  // grad_out . (out1 - out2)
#pragma omp simd reduction(+ : difference)
        for (std::int64_t i = 0; i < params.dim; ++i) {
            const W upstream = widen(grad[i]);
            const W one = weights.first == W{0} ? W{0} : widen(first[i]);
            const W two = weights.second == W{0} ? W{0} : widen(second[i]);
            difference += upstream * (one - two);
            grad_first[i] = narrow<T>(weights.first * upstream);
            grad_second[i] = narrow<T>(weights.second * upstream);
        }
        const W grad_lse =
            params.grad_lse == nullptr ? W{0} : static_cast<const W*>(params.grad_lse)[statistic];
        static_cast<W*>(params.grad_lse1)[statistic] =
            weights.first * (weights.second * difference + grad_lse);
        static_cast<W*>(params.grad_lse2)[statistic] =
            weights.second * (grad_lse - weights.first * difference);
    });
}

}  // namespace

void merge_attention_cpu(const MergeParams& params) {
    visit_element_type(params.dtype, [&]<typename T>() { merge<T>(params); });
}

void merge_attention_backward_cpu(const MergeBackwardParams& params) {
    visit_element_type(params.dtype, [&]<typename T>() { merge_backward<T>(params); });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::attention
