// Rational-quadratic splines: what their kernels are given.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dispatch.h"
#include "common/launch.h"

namespace warploom::coupling {

enum class Tails : int { none, linear, circular };

inline constexpr int kMostBins = 64;
inline constexpr int kMostLogits = 3 * kMostBins + 1;

// Where the elements lie. The transformed ones are runs of `length` neighbours, runs_per_sample
// runs one behind the other in each sample, whose other elements are copied. Run r has log_dets
// from r length and logits from r length num_logits on.
struct SplineLayout {
    std::int64_t samples;
    std::int64_t sample_stride;  // elements of a sample
    std::int64_t first;          // of a sample's elements, the first transformed one
    std::int64_t runs;           // samples * runs_per_sample
    std::int64_t runs_per_sample;
    std::int64_t length;
    std::int64_t logit_stride;    // between the logits of an element, which are [W | H | D]
    std::int64_t element_stride;  // between those of neighbours
    int num_bins;
    int num_logits;
};

// What the splines are; the inputs are the y axis of an inverse.
struct SplineOptions {
    double input_low;
    double input_high;
    double output_low;
    double output_high;
    double ratio;  // (top - bottom) / (right - left)
    double min_width;
    double min_height;
    double min_derivative;
    double boundary_logit;       // of a derivative of 1
    double logit_scale;          // of W and H
    double size_softness;        // logits of W and H are a / (1 + size_softness |a|)
    double derivative_softness;  // and of D, with its own
    bool exponential;  // derivatives are exp(logit), else min_derivative + softplus(logit)
    bool inverse;
    Tails tails;
};

struct SplineParams {
    const void* x;       // [samples, sample_stride]
    const void* logits;  // [runs, num_logits, length] or [runs, length, num_logits], by the strides
    void* y;             // as x
    void* log_det;       // [runs, length] float32 (float64 for float64 x)
    SplineLayout layout;
    SplineOptions options;
    DType dtype;  // of x, logits, y
};

struct SplineBackwardParams {
    const void* grad_y;        // as x, or null for zeros
    const void* grad_log_det;  // [runs, length] float32 (float64 for float64 x), or null for zeros
    const void* x;             // as in SplineParams
    const void* logits;
    void* grad_x;       // as x
    void* grad_logits;  // as logits
    SplineLayout layout;
    SplineOptions options;
    DType dtype;  // of all but grad_log_det
};

WARPLOOM_DECLARE_CPU(spline_cpu, SplineParams)
WARPLOOM_DECLARE_CPU(spline_backward_cpu, SplineBackwardParams)
void spline_cuda(const SplineParams& params, Stream stream);
void spline_backward_cuda(const SplineBackwardParams& params, Stream stream);

}  // namespace warploom::coupling
