// The bins of a block of elements of a rational-quadratic spline, each lane of a vector one of
// them. Every step is a loop over the elements of the block, whose state lies in the first level of
// cache. Included by spline_cpu.cpp only (see common/cpu.h on namespaces).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "common/cpu_math.h"
#include "coupling/spline.h"
#include "coupling/spline_point.h"

namespace warploom::coupling {
namespace WARPLOOM_CPU_ISA {

using namespace ::warploom::WARPLOOM_CPU_ISA;

// Elements of a block.
constexpr std::int64_t kBlock = 128;

// log(1 + z) = 2 artanh(z / (2 + z)) for z in [0, 1], to the last place.
inline double log_one_plus(double z) {
    return std::log1p(z);
}
inline float log_one_plus(float z) {
    const float r = z / (2.0f + z);
    const float square = r * r;
    float sum = 2.0f / 15.0f;
    sum = fused_multiply_add(sum, square, 2.0f / 13.0f);
    sum = fused_multiply_add(sum, square, 2.0f / 11.0f);
    sum = fused_multiply_add(sum, square, 2.0f / 9.0f);
    sum = fused_multiply_add(sum, square, 2.0f / 7.0f);
    sum = fused_multiply_add(sum, square, 2.0f / 5.0f);
    sum = fused_multiply_add(sum, square, 2.0f / 3.0f);
    sum = fused_multiply_add(sum, square, 2.0f);
    return sum * r;
}

// log(x) of positive normal numbers: n log 2 + 2 artanh((m - 1) / (m + 1)), x = m 2^n, m in
// [sqrt(1/2), sqrt(2)]. A NaN stays.
inline double logarithm(double x) {
    return std::log(x);
}
inline float logarithm(float x) {
    constexpr std::uint32_t kSqrtHalf = 0x3f3504f3u;
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(x) - kSqrtHalf;
    const float n = static_cast<float>(static_cast<std::int32_t>(bits) >> 23);
    const float m = std::bit_cast<float>((bits & 0x7fffffu) + kSqrtHalf);
    const float r = (m - 1.0f) / (m + 1.0f);
    const float square = r * r;
    float sum = 2.0f / 9.0f;
    sum = fused_multiply_add(sum, square, 2.0f / 7.0f);
    sum = fused_multiply_add(sum, square, 2.0f / 5.0f);
    sum = fused_multiply_add(sum, square, 2.0f / 3.0f);
    const float fraction = fused_multiply_add(sum * square, r, 2.0f * r);
    return x == x ? fused_multiply_add(n, 0.69314718056f, fraction) : x;
}

// The options in the precision of the arithmetic, and of how many bins.
template <typename W>
struct Numbers {
    explicit Numbers(const SplineLayout& layout, const SplineOptions& options)
        : input_low(static_cast<W>(options.input_low)),
          input_high(static_cast<W>(options.input_high)),
          output_low(static_cast<W>(options.output_low)),
          output_range(static_cast<W>(options.output_high - options.output_low)),
          input_range(static_cast<W>(options.input_high - options.input_low)),
          ratio(static_cast<W>(options.ratio)),
          min_width(static_cast<W>(options.min_width)),
          min_height(static_cast<W>(options.min_height)),
          free_width(static_cast<W>(1 - options.min_width * layout.num_bins)),
          free_height(static_cast<W>(1 - options.min_height * layout.num_bins)),
          min_derivative(static_cast<W>(options.min_derivative)),
          boundary_logit(static_cast<W>(options.boundary_logit)),
          logit_scale(static_cast<W>(options.logit_scale)),
          size_softness(static_cast<W>(options.size_softness)),
          derivative_softness(static_cast<W>(options.derivative_softness)),
          bins(layout.num_bins),
          num_logits(layout.num_logits),
          tails(options.tails),
          exponential(options.exponential),
          inverse(options.inverse) {}

    // Logits are read as they are, or after a / (1 + softness |a|).
    bool is_soft() const { return size_softness != W{0}; }

    W input_low, input_high, output_low, output_range, input_range, ratio;
    W min_width, min_height, free_width, free_height, min_derivative, boundary_logit;
    W logit_scale, size_softness, derivative_softness;
    int bins, num_logits;
    Tails tails;
    bool exponential, inverse;
};

// Numbers [num_logits, count] of a block, rows `stride` apart.
template <typename W>
struct Table {
    W* values;
    std::int64_t stride;

    W* row(int index) const { return values + index * stride; }
};

// One axis of a block's splines: the softmax of its logits.
template <typename W>
struct Axis {
    W weights[kMostBins][kBlock];  // exp(logit - the greatest one)
    W per_sum[kBlock];             // 1 / their sum
    W before[kBlock];              // of the bin: the weights before it
    W live[kBlock];                // and its own
};

// What is known of the elements of a block.
template <typename W>
struct Block {
    Axis<W> widths;
    Axis<W> heights;
    W input[kBlock];
    W position[kBlock];  // of the input, in [0, 1]
    W bin[kBlock];
    W logit0[kBlock];  // of the derivatives at the knots of the bin
    W logit1[kBlock];
    W d0[kBlock];
    W d1[kBlock];
    W slope0[kBlock];  // d d0 / d logit0
    W slope1[kBlock];
};

template <typename W>
void weigh(const Table<W>& logits, int first, int bins, W scale, std::int64_t count,
           Axis<W>& axis) {
    W greatest[kBlock];
    W sums[kBlock];
    const W* const initial = logits.row(first);
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
        greatest[i] = initial[i];
        sums[i] = W{0};
    }
    for (int k = 1; k < bins; ++k) {
        const W* const row = logits.row(first + k);
#pragma omp simd
        for (std::int64_t i = 0; i < count; ++i) {
            greatest[i] = row[i] > greatest[i] ? row[i] : greatest[i];
        }
    }
    for (int k = 0; k < bins; ++k) {
        const W* const row = logits.row(first + k);
        W* const weights = axis.weights[k];
#pragma omp simd
        for (std::int64_t i = 0; i < count; ++i) {
            weights[i] = exponential_of_negative(scale * (row[i] - greatest[i]));
            sums[i] += weights[i];
        }
    }
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
        axis.per_sum[i] = W{1} / sums[i];
    }
}

// The last knot that is not beyond the position, and what lies there.
template <typename W>
void find_bins(const Numbers<W>& numbers, const Table<W>& logits, std::int64_t count,
               Block<W>& block) {
    W boundary[kBlock];
    W sum_w[kBlock];
    W sum_h[kBlock];
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
        boundary[i] = numbers.boundary_logit;
        sum_w[i] = W{0};
        sum_h[i] = W{0};
    }
    const int bins = numbers.bins;
    const auto knot_logits = [&](int knot) -> const W* {
        switch (numbers.tails) {
            case Tails::linear:
                return knot == 0 || knot == bins ? boundary : logits.row(2 * bins + knot - 1);
            case Tails::circular:
                return logits.row(2 * bins + knot % bins);
            default:
                return logits.row(2 * bins + knot);
        }
    };
    const W* const sought = numbers.inverse ? sum_h : sum_w;
    const W* const per_sum = numbers.inverse ? block.heights.per_sum : block.widths.per_sum;
    const W least = numbers.inverse ? numbers.min_height : numbers.min_width;
    const W free = numbers.inverse ? numbers.free_height : numbers.free_width;
    for (int k = 0; k < bins; ++k) {
        const W* const widths = block.widths.weights[k];
        const W* const heights = block.heights.weights[k];
        const W* const logits0 = knot_logits(k);
        const W* const logits1 = knot_logits(k + 1);
        const bool is_first = k == 0;
        const W index = static_cast<W>(k);
#pragma omp simd
        for (std::int64_t i = 0; i < count; ++i) {
            const W knot = least * index + free * (sought[i] * per_sum[i]);
            const bool reached = is_first | (block.position[i] >= knot);
            block.bin[i] = reached ? index : block.bin[i];
            block.widths.before[i] = reached ? sum_w[i] : block.widths.before[i];
            block.widths.live[i] = reached ? widths[i] : block.widths.live[i];
            block.heights.before[i] = reached ? sum_h[i] : block.heights.before[i];
            block.heights.live[i] = reached ? heights[i] : block.heights.live[i];
            block.logit0[i] = reached ? logits0[i] : block.logit0[i];
            block.logit1[i] = reached ? logits1[i] : block.logit1[i];
            sum_w[i] += widths[i];
            sum_h[i] += heights[i];
        }
    }
}

template <typename W>
void find_derivatives(const Numbers<W>& numbers, const W* logits, std::int64_t count,
                      W* derivatives, W* slopes) {
    if (numbers.exponential) {
#pragma omp simd
        for (std::int64_t i = 0; i < count; ++i) {
            derivatives[i] = slopes[i] = exponential(logits[i]);
        }
        return;
    }
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
        const W z = decay(logits[i]);
        const W positive = logits[i] < W{0} ? W{0} : logits[i];
        derivatives[i] = numbers.min_derivative + (positive + log_one_plus(z));
        slopes[i] = (logits[i] < W{0} ? z : W{1}) / (W{1} + z);
    }
}

// All of `block` from its input and logits.
template <typename W>
void prepare(const Numbers<W>& numbers, const Table<W>& logits, std::int64_t count,
             Block<W>& block) {
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
        const W raised = block.input[i] < numbers.input_low ? numbers.input_low : block.input[i];
        const W clipped = raised > numbers.input_high ? numbers.input_high : raised;
        block.position[i] = (clipped - numbers.input_low) / numbers.input_range;
    }
    // Soft logits were scaled before they were limited.
    const W scale = numbers.is_soft() ? W{1} : numbers.logit_scale;
    weigh(logits, 0, numbers.bins, scale, count, block.widths);
    weigh(logits, numbers.bins, numbers.bins, scale, count, block.heights);
    find_bins(numbers, logits, count, block);
    find_derivatives(numbers, block.logit0, count, block.d0, block.slope0);
    find_derivatives(numbers, block.logit1, count, block.d1, block.slope1);
}

template <typename W>
inline SplineBin<W> bin_of(const Numbers<W>& numbers, const Block<W>& block, std::int64_t i) {
    const Axis<W>& widths = block.widths;
    const Axis<W>& heights = block.heights;
    SplineBin<W> bin;
    bin.x0 = numbers.min_width * block.bin[i] +
             numbers.free_width * (widths.before[i] * widths.per_sum[i]);
    bin.w = numbers.min_width + numbers.free_width * (widths.live[i] * widths.per_sum[i]);
    bin.y0 = numbers.min_height * block.bin[i] +
             numbers.free_height * (heights.before[i] * heights.per_sum[i]);
    bin.h = numbers.min_height + numbers.free_height * (heights.live[i] * heights.per_sum[i]);
    bin.s = numbers.ratio * bin.h / bin.w;
    bin.d0 = block.d0[i];
    bin.d1 = block.d1[i];
    return bin;
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::coupling
