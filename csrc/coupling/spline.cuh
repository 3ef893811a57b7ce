// Rational-quadratic splines, a thread an element, float32 inside. The maths of one element in its
// bin, and of its gradients, is spline_point.h's; here are the bin and the softmax around it.
//
// A start or a size of a bin is a sum of the softmax p of the logits of its axis:
// start = least k + free sum_{j < k} p_j, size = least + free p_k. With upstream gradients g_start
// and g_size,
//
//   d/d logit_j = p_j (c_j - sum_i c_i p_i),  c_j = free g_start for j < k, free g_size for j = k
//
// and 0 for j > k, so that the mean needs p before and in the bin alone. Logits are read where they
// lie: neighbouring threads read neighbouring ones of [runs, num_logits, length], and of [runs,
// length, num_logits] the same cache lines one logit after the other. Of the derivatives a thread
// reads the two of its bin.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/index.cuh"
#include "spline.h"
#include "spline_point.h"

namespace warploom::coupling {

// kBins: how many, where the weights of all are kept in registers; 0: as many as there are, whose
// weights are computed again wherever they are needed.
template <typename Element_, int kBins_>
struct SplineTraits {
    using Element = Element_;
    static constexpr int kBins = kBins_;
    static constexpr int kThreads = 128;
};

// The softmax of the logits of one axis of an element.
template <typename Traits>
struct SplineAxis {
    using Element = typename Traits::Element;
    static constexpr bool kInRegisters = Traits::kBins > 0;

    const Element* logits;  // `stride` apart
    std::int64_t stride;
    int bins;
    float scale;
    float softness;
    float least;  // size of a bin
    float free;   // what the least sizes leave
    float greatest;
    float per_sum;
    float weights[kInRegisters ? Traits::kBins : 1];

    WARPLOOM_DEVICE void sum() {
        greatest = logit(0);
        WARPLOOM_UNROLL
        for (int k = 0; k < bins; ++k) {
            const float value = logit(k);
            greatest = value > greatest ? value : greatest;
            if constexpr (kInRegisters) {
                weights[k] = value;
            }
        }
        float total = 0.0f;
        WARPLOOM_UNROLL
        for (int k = 0; k < bins; ++k) {
            if constexpr (kInRegisters) {
                weights[k] = expf(weights[k] - greatest);
            }
            total += weight(k);
        }
        per_sum = 1.0f / total;
    }

    WARPLOOM_DEVICE float logit(int k) const {
        const float scaled = scale * device::to_float(logits[k * stride]);
        return softness > 0.0f ? scaled / (1.0f + softness * fabsf(scaled)) : scaled;
    }

    // d logit / d what is in memory
    WARPLOOM_DEVICE float logit_slope(int k) const {
        const float root = 1.0f - softness * fabsf(logit(k));
        return softness > 0.0f ? scale * root * root : scale;
    }

    WARPLOOM_DEVICE float weight(int k) const {
        if constexpr (kInRegisters) {
            return weights[k];
        } else {
            return expf(logit(k) - greatest);
        }
    }

    WARPLOOM_DEVICE float start(int k, float before) const {
        return least * static_cast<float>(k) + free * (before * per_sum);
    }

    WARPLOOM_DEVICE float size(float live) const { return least + free * (live * per_sum); }
};

// A derivative and d derivative / d what is in memory.
struct SplineDerivative {
    float value;
    float slope;
};

WARPLOOM_DEVICE SplineDerivative spline_derivative(const SplineOptions& options, float logit) {
    if (options.exponential) {
        const float softness = static_cast<float>(options.derivative_softness);
        const float per = 1.0f / (1.0f + softness * fabsf(logit));
        const float value = expf(logit * per);
        return {value, value * per * per};
    }
    const float z = expf(-fabsf(logit));
    const float positive = logit < 0.0f ? 0.0f : logit;
    return {static_cast<float>(options.min_derivative) + (positive + log1pf(z)),
            (logit < 0.0f ? z : 1.0f) / (1.0f + z)};
}

// Where D has the logit of a knot; -1 where it has none.
WARPLOOM_DEVICE int spline_knot_logit(Tails tails, int knot, int bins) {
    if (tails == Tails::linear) {
        return knot == 0 || knot == bins ? -1 : knot - 1;
    }
    return tails == Tails::circular && knot == bins ? 0 : knot;
}

// An element's spline, and its place in it.
template <typename Traits>
struct SplineElement {
    using Element = typename Traits::Element;

    SplineAxis<Traits> widths;
    SplineAxis<Traits> heights;
    float input;
    float position;  // of the input, in [0, 1]
    int live;        // the bin
    float before_w;  // the weights before it, and its own
    float live_w;
    float before_h;
    float live_h;
    int knots[2];  // of its derivatives in D
    SplineDerivative derivatives[2];
    SplineBin<float> bin;

    WARPLOOM_DEVICE SplineElement(const SplineLayout& layout, const SplineOptions& options,
                                  float input_, const Element* logits)
        : input(input_) {
        const int bins = Traits::kBins > 0 ? Traits::kBins : layout.num_bins;
        const float low = static_cast<float>(options.input_low);
        const float high = static_cast<float>(options.input_high);
        const float raised = input < low ? low : input;
        position = ((raised > high ? high : raised) - low) /
                   static_cast<float>(options.input_high - options.input_low);
        prepare(widths, logits, layout, options, bins, options.min_width);
        prepare(heights, logits + bins * layout.logit_stride, layout, options, bins,
                options.min_height);
        find(options.inverse);
        WARPLOOM_UNROLL
        for (int side = 0; side < 2; ++side) {
            const int knot = spline_knot_logit(options.tails, live + side, bins);
            knots[side] = knot;
            derivatives[side] = spline_derivative(
                options, knot < 0
                             ? static_cast<float>(options.boundary_logit)
                             : device::to_float(logits[(2 * bins + knot) * layout.logit_stride]));
        }
        bin.x0 = widths.start(live, before_w);
        bin.w = widths.size(live_w);
        bin.y0 = heights.start(live, before_h);
        bin.h = heights.size(live_h);
        bin.s = static_cast<float>(options.ratio) * bin.h / bin.w;
        bin.d0 = derivatives[0].value;
        bin.d1 = derivatives[1].value;
    }

    // Whether the spline is not the identity there.
    WARPLOOM_DEVICE bool is_inside(const SplineOptions& options) const {
        return input >= static_cast<float>(options.input_low) &&
               input <= static_cast<float>(options.input_high);
    }

  private:
    WARPLOOM_DEVICE static void prepare(SplineAxis<Traits>& axis, const Element* logits,
                                        const SplineLayout& layout, const SplineOptions& options,
                                        int bins, double least) {
        axis.logits = logits;
        axis.stride = layout.logit_stride;
        axis.bins = bins;
        axis.scale = static_cast<float>(options.logit_scale);
        axis.softness = static_cast<float>(options.size_softness);
        axis.least = static_cast<float>(least);
        axis.free = static_cast<float>(1 - least * bins);
        axis.sum();
    }

    // The last knot that is not beyond the position.
    WARPLOOM_DEVICE void find(bool inverse) {
        float sum_w = 0.0f;
        float sum_h = 0.0f;
        WARPLOOM_UNROLL
        for (int k = 0; k < widths.bins; ++k) {
            const float width = widths.weight(k);
            const float height = heights.weight(k);
            const float knot = inverse ? heights.start(k, sum_h) : widths.start(k, sum_w);
            if (k == 0 || position >= knot) {
                live = k;
                before_w = sum_w;
                live_w = width;
                before_h = sum_h;
                live_h = height;
            }
            sum_w += width;
            sum_h += height;
        }
    }
};

// Where transformed element `index` lies, and the number of a copied one, both in x.
struct SplineOffsets {
    std::int64_t element;
    std::int64_t logits;
};

WARPLOOM_DEVICE SplineOffsets spline_offsets(const SplineLayout& layout, std::int64_t index) {
    const Division in_run = divide(index, layout.length);
    const Division in_sample = divide(in_run.quotient, layout.runs_per_sample);
    return {in_sample.quotient * layout.sample_stride + layout.first +
                in_sample.remainder * layout.length + in_run.remainder,
            in_run.quotient * layout.length * layout.num_logits +
                in_run.remainder * layout.element_stride};
}

WARPLOOM_DEVICE std::int64_t spline_copied(const SplineLayout& layout, std::int64_t index) {
    const std::int64_t transformed = layout.runs_per_sample * layout.length;
    const Division place = divide(index, layout.sample_stride - transformed);
    return place.quotient * layout.sample_stride + place.remainder +
           (place.remainder < layout.first ? 0 : transformed);
}

// grid [ceil(samples sample_stride / kThreads)], elements beyond by a stride of the grid: first the
// transformed ones, then those that are copied
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 4)
spline_kernel(WARPLOOM_GRID_CONSTANT SplineParams params) {
    using T = typename Traits::Element;
    const SplineLayout& layout = params.layout;
    const SplineOptions& options = params.options;
    const T* x = static_cast<const T*>(params.x);
    T* y = static_cast<T*>(params.y);
    const std::int64_t transformed = layout.runs * layout.length;
    const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * Traits::kThreads;
    WARPLOOM_NO_UNROLL
    for (std::int64_t index =
             static_cast<std::int64_t>(blockIdx.x) * Traits::kThreads + threadIdx.x;
         index < layout.samples * layout.sample_stride; index += stride) {
        if (index >= transformed) {
            const std::int64_t copied = spline_copied(layout, index - transformed);
            y[copied] = x[copied];
            continue;
        }
        const SplineOffsets offsets = spline_offsets(layout, index);
        const SplineElement<Traits> element(layout, options, device::to_float(x[offsets.element]),
                                            static_cast<const T*>(params.logits) + offsets.logits);
        float value = element.input;
        float log_det = 0.0f;
        if (options.tails == Tails::none || element.is_inside(options)) {
            const SplinePoint<float> point =
                spline_point(element.bin, element.position, options.inverse);
            value = static_cast<float>(options.output_low) +
                    static_cast<float>(options.output_high - options.output_low) *
                        spline_output(element.bin, point, options.inverse);
            log_det = logf(spline_slope(element.bin, point));
            log_det = options.inverse ? -log_det : log_det;
        }
        y[offsets.element] = device::from_float<T>(value);
        static_cast<float*>(params.log_det)[index] = log_det;
    }
}

// Writes the gradients of the logits of one axis.
template <typename Traits>
WARPLOOM_DEVICE void write_axis_gradients(const SplineAxis<Traits>& axis, int live, float before,
                                          float live_weight, float of_start, float of_size,
                                          typename Traits::Element* grads) {
    const float g_start = axis.free * of_start;
    const float g_size = axis.free * of_size;
    const float mean = (g_start * before + g_size * live_weight) * axis.per_sum;
    WARPLOOM_UNROLL
    for (int k = 0; k < axis.bins; ++k) {
        const float upstream = k < live ? g_start : k == live ? g_size : 0.0f;
        const float gradient = axis.weight(k) * axis.per_sum * (upstream - mean);
        grads[k * axis.stride] =
            device::from_float<typename Traits::Element>(gradient * axis.logit_slope(k));
    }
}

// grid as of spline_kernel
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 4)
spline_backward_kernel(WARPLOOM_GRID_CONSTANT SplineBackwardParams params) {
    using T = typename Traits::Element;
    const SplineLayout& layout = params.layout;
    const SplineOptions& options = params.options;
    const T* x = static_cast<const T*>(params.x);
    const T* grad_y = static_cast<const T*>(params.grad_y);
    const float* grad_log_det = static_cast<const float*>(params.grad_log_det);
    T* grad_x = static_cast<T*>(params.grad_x);
    const T zero = device::from_float<T>(0.0f);
    const std::int64_t transformed = layout.runs * layout.length;
    const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * Traits::kThreads;
    WARPLOOM_NO_UNROLL
    for (std::int64_t index =
             static_cast<std::int64_t>(blockIdx.x) * Traits::kThreads + threadIdx.x;
         index < layout.samples * layout.sample_stride; index += stride) {
        if (index >= transformed) {
            const std::int64_t copied = spline_copied(layout, index - transformed);
            grad_x[copied] = grad_y == nullptr ? zero : grad_y[copied];
            continue;
        }
        const SplineOffsets offsets = spline_offsets(layout, index);
        const SplineElement<Traits> element(layout, options, device::to_float(x[offsets.element]),
                                            static_cast<const T*>(params.logits) + offsets.logits);
        T* grads = static_cast<T*>(params.grad_logits) + offsets.logits;
        const float upstream = grad_y == nullptr ? 0.0f : device::to_float(grad_y[offsets.element]);
        const bool inside = element.is_inside(options);
        if (options.tails != Tails::none && !inside) {
            grad_x[offsets.element] = device::from_float<T>(upstream);
            for (int k = 0; k < layout.num_logits; ++k) {
                grads[k * layout.logit_stride] = zero;
            }
            continue;
        }
        const SplinePoint<float> point =
            spline_point(element.bin, element.position, options.inverse);
        const SplineGradients<float> gradients = spline_gradients(
            element.bin, point,
            upstream * static_cast<float>(options.output_high - options.output_low),
            grad_log_det == nullptr ? 0.0f : grad_log_det[index], options.inverse);
        const float range = static_cast<float>(options.input_high - options.input_low);
        grad_x[offsets.element] = device::from_float<T>(inside ? gradients.position / range : 0.0f);
        const int bins = element.widths.bins;
        write_axis_gradients(element.widths, element.live, element.before_w, element.live_w,
                             gradients.x0, gradients.w, grads);
        write_axis_gradients(element.heights, element.live, element.before_h, element.live_h,
                             gradients.y0, gradients.h, grads + bins * layout.logit_stride);
        for (int k = 2 * bins; k < layout.num_logits; ++k) {
            float gradient = k - 2 * bins == element.knots[0]
                                 ? gradients.d0 * element.derivatives[0].slope
                                 : 0.0f;
            gradient += k - 2 * bins == element.knots[1]
                            ? gradients.d1 * element.derivatives[1].slope
                            : 0.0f;
            grads[k * layout.logit_stride] = device::from_float<T>(gradient);
        }
    }
}

}  // namespace warploom::coupling
