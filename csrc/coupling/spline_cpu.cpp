// Rational-quadratic splines on the CPU: a block of elements at a time, each lane of a vector one
// of them (spline_block_cpu.h). Logits of one kind are neighbours there, as they are in memory
// where neighbouring elements are (float32 and float64 are then read and written in place), else
// through a transpose.
#include "coupling/spline.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/cpu_float.h"
#include "common/cpu_loops.h"
#include "common/parallel.h"
#include "coupling/spline_block_cpu.h"

namespace warploom::coupling {
namespace WARPLOOM_CPU_ISA {
namespace {

using namespace ::warploom::WARPLOOM_CPU_ISA;

// Elements that are worth waking a thread for.
constexpr std::int64_t kGrain = 1024;

// Whether the spline is not the identity there.
template <typename W>
inline bool is_inside(const Numbers<W>& numbers, W input) {
    return (input >= numbers.input_low) & (input <= numbers.input_high);
}

template <typename T, typename W>
void evaluate(const Numbers<W>& numbers, const Block<W>& block, std::int64_t count, T* y,
              W* log_det) {
    const bool inverse = numbers.inverse;
    const bool everywhere = numbers.tails == Tails::none;
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
        const SplineBin<W> bin = bin_of(numbers, block, i);
        const SplinePoint<W> point = spline_point(bin, block.position[i], inverse);
        const W position = spline_output(bin, point, inverse);
        const W logarithm_of_slope = logarithm(spline_slope(bin, point));
        const bool is_spline = everywhere | is_inside(numbers, block.input[i]);
        const W out = numbers.output_low + numbers.output_range * position;
        y[i] = narrow<T>(is_spline ? out : block.input[i]);
        log_det[i] = is_spline ? (inverse ? -logarithm_of_slope : logarithm_of_slope) : W{0};
    }
}

// Gradients of the logits of one axis: its starts are sums of the softmax p, so that the bin's
// start has d start / d logit_j = p_j ([j < bin] - start), and its size p_j ([j = bin] - size).
template <typename W>
void write_axis(const Numbers<W>& numbers, const Axis<W>& axis, const W* bins, const W* is_spline,
                const W* of_start, const W* of_size, std::int64_t count, int first,
                const Table<W>& grads) {
    W mean[kBlock];
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
        mean[i] = (of_start[i] * axis.before[i] + of_size[i] * axis.live[i]) * axis.per_sum[i];
    }
    for (int k = 0; k < numbers.bins; ++k) {
        const W* const weights = axis.weights[k];
        W* const row = grads.row(first + k);
        const W index = static_cast<W>(k);
#pragma omp simd
        for (std::int64_t i = 0; i < count; ++i) {
            const W behind = index == bins[i] ? of_size[i] : W{0};
            const W upstream = index < bins[i] ? of_start[i] : behind;
            const W probability = weights[i] * axis.per_sum[i] * numbers.logit_scale;
            row[i] = is_spline[i] != W{0} ? probability * (upstream - mean[i]) : W{0};
        }
    }
}

// grad_y and grad_log_det may be null.
template <typename T, typename W>
void differentiate(const Numbers<W>& numbers, const Block<W>& block, const T* grad_y,
                   const W* grad_log_det, std::int64_t count, T* grad_x, const Table<W>& grads) {
    W is_spline[kBlock];
    W of_x0[kBlock], of_w[kBlock], of_y0[kBlock], of_h[kBlock], of_d0[kBlock], of_d1[kBlock];
    W upstream[kBlock], upstream_log_det[kBlock];
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
        upstream[i] = grad_y == nullptr ? W{0} : static_cast<W>(widen(grad_y[i]));
        upstream_log_det[i] = grad_log_det == nullptr ? W{0} : grad_log_det[i];
    }
    const bool inverse = numbers.inverse;
    const bool everywhere = numbers.tails == Tails::none;
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
        const SplineBin<W> bin = bin_of(numbers, block, i);
        const SplinePoint<W> point = spline_point(bin, block.position[i], inverse);
        const SplineGradients<W> gradients = spline_gradients(
            bin, point, upstream[i] * numbers.output_range, upstream_log_det[i], inverse);
        const bool inside = is_inside(numbers, block.input[i]);
        const W beyond = everywhere ? W{0} : upstream[i];
        grad_x[i] = narrow<T>(inside ? gradients.position / numbers.input_range : beyond);
        is_spline[i] = everywhere | inside ? W{1} : W{0};
        of_x0[i] = gradients.x0 * numbers.free_width;
        of_w[i] = gradients.w * numbers.free_width;
        of_y0[i] = gradients.y0 * numbers.free_height;
        of_h[i] = gradients.h * numbers.free_height;
        of_d0[i] = is_spline[i] != W{0} ? gradients.d0 * block.slope0[i] : W{0};
        of_d1[i] = is_spline[i] != W{0} ? gradients.d1 * block.slope1[i] : W{0};
    }
    const int bins = numbers.bins;
    write_axis(numbers, block.widths, block.bin, is_spline, of_x0, of_w, count, 0, grads);
    write_axis(numbers, block.heights, block.bin, is_spline, of_y0, of_h, count, bins, grads);
    const int first_knot = numbers.tails == Tails::linear ? 1 : 0;
    for (int index = 2 * bins; index < numbers.num_logits; ++index) {
        W* const row = grads.row(index);
        const W knot = static_cast<W>(index - 2 * bins + first_knot);
        const W wrapped = numbers.tails == Tails::circular && knot == W{0} ? W(bins) : knot;
#pragma omp simd
        for (std::int64_t i = 0; i < count; ++i) {
            const W below = block.bin[i] == knot ? of_d0[i] : W{0};
            row[i] = below + (block.bin[i] + W{1} == wrapped ? of_d1[i] : W{0});
        }
    }
}

// Through logits a / (1 + c |a|) = v, whose slope is (1 - c |v|)^2.
template <typename W>
void differentiate_softness(const Numbers<W>& numbers, const Table<W>& logits, std::int64_t count,
                            const Table<W>& grads) {
    for (int index = 0; index < numbers.num_logits; ++index) {
        const W softness =
            index < 2 * numbers.bins ? numbers.size_softness : numbers.derivative_softness;
        const W* const values = logits.row(index);
        W* const row = grads.row(index);
#pragma omp simd
        for (std::int64_t i = 0; i < count; ++i) {
            const W root = W{1} - softness * std::fabs(values[i]);
            row[i] = row[i] == W{0} ? W{0} : row[i] * root * root;
        }
    }
}

template <typename T, typename W>
constexpr bool kIsWide = false;
template <typename W>
constexpr bool kIsWide<W, W> = true;

// The logits of a block in rows of W: in memory where they are so already, else in `staged`.
template <typename T, typename W>
Table<W> load_logits(const SplineLayout& layout, const Numbers<W>& numbers, const T* from,
                     std::int64_t count, W* staged) {
    if constexpr (kIsWide<T, W>) {
        if (layout.element_stride == 1 && !numbers.is_soft()) {
            return {const_cast<W*>(from), layout.logit_stride};
        }
    }
    const Table<W> table{staged, kBlock};
    for (int index = 0; index < layout.num_logits; ++index) {
        const T* const values = from + index * layout.logit_stride;
        W* const row = table.row(index);
        if (layout.element_stride == 1) {
#pragma omp simd
            for (std::int64_t i = 0; i < count; ++i) {
                row[i] = widen(values[i]);
            }
        } else {
            for (std::int64_t i = 0; i < count; ++i) {
                row[i] = widen(values[i * layout.element_stride]);
            }
        }
        if (numbers.is_soft()) {
            const bool is_size = index < 2 * numbers.bins;
            const W scale = is_size ? numbers.logit_scale : W{1};
            const W softness = is_size ? numbers.size_softness : numbers.derivative_softness;
#pragma omp simd
            for (std::int64_t i = 0; i < count; ++i) {
                const W scaled = row[i] * scale;
                row[i] = scaled / (W{1} + softness * std::fabs(scaled));
            }
        }
    }
    return table;
}

template <typename T, typename W>
void store_logits(const SplineLayout& layout, const Table<W>& table, std::int64_t count, T* to) {
    for (int index = 0; index < layout.num_logits; ++index) {
        const W* const row = table.row(index);
        T* const values = to + index * layout.logit_stride;
        if (layout.element_stride == 1) {
#pragma omp simd
            for (std::int64_t i = 0; i < count; ++i) {
                values[i] = narrow<T>(row[i]);
            }
        } else {
            for (std::int64_t i = 0; i < count; ++i) {
                values[i * layout.element_stride] = narrow<T>(row[i]);
            }
        }
    }
}

// Where a block's elements begin: in x, in log_det, in the logits; and how many there are.
struct Place {
    std::int64_t element;
    std::int64_t log_det;
    std::int64_t logits;
    std::int64_t count;
};

template <typename Body>
void for_each_block(const SplineLayout& layout, Body body) {
    const std::int64_t blocks_per_run = ceil_divide(layout.length, kBlock);
    const std::int64_t grain = std::max<std::int64_t>(
        1, kGrain / std::max<std::int64_t>(1, std::min(kBlock, layout.length)));
    parallel_for(layout.runs * blocks_per_run, grain, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t block = begin; block < end; ++block) {
            const std::int64_t run = block / blocks_per_run;
            const std::int64_t first = block % blocks_per_run * kBlock;
            const std::int64_t sample = run / layout.runs_per_sample;
            const std::int64_t element = sample * layout.sample_stride + layout.first +
                                         run % layout.runs_per_sample * layout.length + first;
            const std::int64_t logits =
                run * layout.length * layout.num_logits + first * layout.element_stride;
            body(Place{element, run * layout.length + first, logits,
                       std::min(kBlock, layout.length - first)});
        }
    });
}

// The elements of each sample that are not transformed; zeros where there is nothing to copy.
template <typename T>
void copy_others(const SplineLayout& layout, const T* from, T* to) {
    const std::int64_t behind = layout.first + layout.runs_per_sample * layout.length;
    if (layout.first == 0 && behind == layout.sample_stride) {
        return;
    }
    const auto copy = [from, to](std::int64_t first, std::int64_t count) {
        const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
        if (from == nullptr) {
            __builtin_memset(static_cast<void*>(to + first), 0, bytes);
        } else {
            __builtin_memcpy(static_cast<void*>(to + first), from + first, bytes);
        }
    };
    parallel_for(layout.samples, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t sample = begin; sample < end; ++sample) {
            const std::int64_t first = sample * layout.sample_stride;
            copy(first, layout.first);
            copy(first + behind, layout.sample_stride - behind);
        }
    });
}

template <typename T>
void forward(const SplineParams& params) {
    using W = Wide<T>;
    const SplineLayout& layout = params.layout;
    const Numbers<W> numbers(layout, params.options);
    const T* const x = static_cast<const T*>(params.x);
    T* const y = static_cast<T*>(params.y);
    copy_others(layout, x, y);
    for_each_block(layout, [&](const Place& place) {
        alignas(64) W staged[kMostLogits * kBlock];
        Block<W> block;
        const Table<W> logits =
            load_logits(layout, numbers, static_cast<const T*>(params.logits) + place.logits,
                        place.count, staged);
#pragma omp simd
        for (std::int64_t i = 0; i < place.count; ++i) {
            block.input[i] = widen(x[place.element + i]);
        }
        prepare(numbers, logits, place.count, block);
        evaluate(numbers, block, place.count, y + place.element,
                 static_cast<W*>(params.log_det) + place.log_det);
    });
}

template <typename T>
void backward(const SplineBackwardParams& params) {
    using W = Wide<T>;
    const SplineLayout& layout = params.layout;
    const Numbers<W> numbers(layout, params.options);
    const T* const x = static_cast<const T*>(params.x);
    const T* const grad_y = static_cast<const T*>(params.grad_y);
    const W* const grad_log_det = static_cast<const W*>(params.grad_log_det);
    T* const grad_x = static_cast<T*>(params.grad_x);
    copy_others(layout, grad_y, grad_x);
    for_each_block(layout, [&](const Place& place) {
        alignas(64) W staged[kMostLogits * kBlock];
        alignas(64) W staged_grads[kMostLogits * kBlock];
        Block<W> block;
        const Table<W> logits =
            load_logits(layout, numbers, static_cast<const T*>(params.logits) + place.logits,
                        place.count, staged);
#pragma omp simd
        for (std::int64_t i = 0; i < place.count; ++i) {
            block.input[i] = widen(x[place.element + i]);
        }
        prepare(numbers, logits, place.count, block);
        T* const grad_logits = static_cast<T*>(params.grad_logits) + place.logits;
        Table<W> grads{staged_grads, kBlock};
        bool in_place = false;
        if constexpr (kIsWide<T, W>) {
            in_place = layout.element_stride == 1;
            grads = in_place ? Table<W>{grad_logits, layout.logit_stride} : grads;
        }
        differentiate(numbers, block, grad_y == nullptr ? nullptr : grad_y + place.element,
                      grad_log_det == nullptr ? nullptr : grad_log_det + place.log_det, place.count,
                      grad_x + place.element, grads);
        if (numbers.is_soft()) {
            differentiate_softness(numbers, logits, place.count, grads);
        }
        if (!in_place) {
            store_logits(layout, grads, place.count, grad_logits);
        }
    });
}

}  // namespace

void spline_cpu(const SplineParams& params) {
    visit_element_type(params.dtype, [&]<typename T>() { forward<T>(params); });
}

void spline_backward_cpu(const SplineBackwardParams& params) {
    visit_element_type(params.dtype, [&]<typename T>() { backward<T>(params); });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::coupling
