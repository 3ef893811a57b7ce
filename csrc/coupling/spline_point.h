// One element of a rational-quadratic spline in its bin, forward and backward: what the CPU and the
// CUDA kernels have in common. Included by spline_cpu.cpp and spline.cuh alone, for each in a
// namespace and with a kind of function of its own (see common/cpu.h on namespaces).
//
// Both axes are scaled to [0, 1]: knot k lies at the sum of the k sizes before it. The bin has
// start x0 and width w on the x axis, y0 and h on the y axis, derivatives d0 and d1 at its knots,
// and s = ratio h / w is its slope in the units of x and y. With t = (x - x0) / w and q = t (1 -
// t),
//
//   R = (s t^2 + d0 q) / D,  D = s + (d0 + d1 - 2 s) q = s (1 - 2 q) + (d0 + d1) q
//   y = y0 + h R,  log_det = log(dy/dx) = L = log(P (s / D)^2),  P = d1 t^2 + 2 s q + d0 (1 - t)^2
//
// The second form of D, and P, are sums of positive numbers. The inverse finds t with R(t) = r =
// (y - y0) / h, the root in [0, 1] of a t^2 + b t - s r, where
//
//   a = s - d0 + r (d0 + d1 - 2 s),  b = d0 - r (d0 + d1 - 2 s)
//
// as 2 s r / (b + root) or, for b < 0, (root - b) / (2 a): each adds numbers of one sign, since
// a + b - s r = s (1 - r) >= 0 makes a positive there.
//
// The gradients. R and L are functions of t, s, d0 and d1:
//
//   R_t = s P / D^2                   L_t = 2 (d1 t + s (1 - 2 t) - d0 (1 - t)) / P
//                                           - 2 (d0 + d1 - 2 s) (1 - 2 t) / D
//   R_s = (t^2 - R (1 - 2 q)) / D     L_s = 2 / s + 2 q / P - 2 (1 - 2 q) / D
//   R_d0 = q (1 - R) / D              L_d0 = (1 - t)^2 / P - 2 q / D
//   R_d1 = -q R / D                   L_d1 = t^2 / P - 2 q / D
//
// Forward, with upstream gradients g_y (of y) and g_L: g_z = g_y h R_z + g_L L_z for each z of the
// four; since ds/dh = s / h, ds/dw = -s / w, dt/dx = -dt/dx0 = 1 / w and dt/dw = -t / w,
//
//   g_x = -g_x0 = g_t / w    g_w = g_x0 t - g_s s / w    g_y0 = g_y    g_h = g_y R + g_s s / h
//
// The inverse x = x0 + w t, log_det = -L has upstream gradients g_x and g_L, g_t = g_x w - g_L L_t,
// and t is a function of y, y0, h, s, d0 and d1 by y0 + h R = y: dt = (dy - dy0 - R dh - h (R_s ds
// +
// ...)) / (h R_t). So the gradient of its input is l = g_t / (h R_t), and the rest are those above
// with -l in the place of g_y, -g_L in that of g_L, and g_x in that of g_x0.
#pragma once

#include <cmath>

#if defined(WARPLOOM_CPU_ISA)
#define WARPLOOM_SPLINE_FUNCTION inline
#define WARPLOOM_SPLINE_NAMESPACE namespace WARPLOOM_CPU_ISA
#else
#include "../device/device.cuh"
#define WARPLOOM_SPLINE_FUNCTION WARPLOOM_DEVICE
#define WARPLOOM_SPLINE_NAMESPACE inline namespace on_device
#endif

namespace warploom::coupling {
WARPLOOM_SPLINE_NAMESPACE {
    template <typename W>
    struct SplineBin {
        W x0;
        W w;
        W y0;
        W h;
        W s;
        W d0;
        W d1;
    };

    template <typename W>
    struct SplinePoint {
        W t;
        W q;
        W denominator;  // D
        W slopes;       // P
        W height;       // R
    };

    // `value` in [0, 1]; a NaN stays.
    template <typename W>
    WARPLOOM_SPLINE_FUNCTION W to_unit(W value) {
        const W raised = value < W{0} ? W{0} : value;
        return raised > W{1} ? W{1} : raised;
    }

    // `position`: of the input, in [0, 1].
    template <typename W>
    WARPLOOM_SPLINE_FUNCTION SplinePoint<W> spline_point(const SplineBin<W>& bin, W position,
                                                         bool inverse) {
        W t;
        if (inverse) {
            const W r = (position - bin.y0) / bin.h;
            const W bend = r * (bin.d0 + bin.d1 - W{2} * bin.s);
            const W a = bin.s - bin.d0 + bend;
            const W b = bin.d0 - bend;
            const W square = b * b + W{4} * a * bin.s * r;
            const W root = std::sqrt(square < W{0} ? W{0} : square);
            const W numerator = b < W{0} ? root - b : W{2} * bin.s * r;
            const W denominator = b < W{0} ? W{2} * a : b + root;
            t = to_unit(numerator / denominator);
        } else {
            t = to_unit((position - bin.x0) / bin.w);
        }
        const W back = W{1} - t;
        const W q = t * back;
        const W denominator = bin.s * (W{1} - W{2} * q) + (bin.d0 + bin.d1) * q;
        return {t, q, denominator, bin.d1 * t * t + W{2} * bin.s * q + bin.d0 * back * back,
                (bin.s * t * t + bin.d0 * q) / denominator};
    }

    // Of the output, in [0, 1].
    template <typename W>
    WARPLOOM_SPLINE_FUNCTION W spline_output(const SplineBin<W>& bin, const SplinePoint<W>& point,
                                             bool inverse) {
        return to_unit(inverse ? bin.x0 + bin.w * point.t : bin.y0 + bin.h * point.height);
    }

    // dy/dx = exp(L)
    template <typename W>
    WARPLOOM_SPLINE_FUNCTION W spline_slope(const SplineBin<W>& bin, const SplinePoint<W>& point) {
        const W factor = bin.s / point.denominator;
        return point.slopes * factor * factor;
    }

    template <typename W>
    struct SplineGradients {
        W position;  // of the input
        W x0;
        W w;
        W y0;
        W h;
        W d0;
        W d1;
    };

    // `output`: the upstream gradient of the output in [0, 1].
    template <typename W>
    WARPLOOM_SPLINE_FUNCTION SplineGradients<W> spline_gradients(
        const SplineBin<W>& bin, const SplinePoint<W>& point, W output, W log_det, bool inverse) {
        const W t = point.t;
        const W q = point.q;
        const W back = W{1} - t;
        const W tilt = W{1} - W{2} * t;
        const W per_denominator = W{1} / point.denominator;
        const W per_slopes = W{1} / point.slopes;
        const W bend = bin.d0 + bin.d1 - W{2} * bin.s;
        const W h_r_t = bin.h * bin.s * point.slopes * per_denominator * per_denominator;
        const W l_t = W{2} * ((bin.d1 * t + bin.s * tilt - bin.d0 * back) * per_slopes -
                              bend * tilt * per_denominator);
        SplineGradients<W> gradients;
        if (inverse) {
            gradients.position = (output * bin.w - log_det * l_t) / h_r_t;
            gradients.x0 = output;
            gradients.y0 = -gradients.position;
            log_det = -log_det;
        } else {
            gradients.position = (output * h_r_t + log_det * l_t) / bin.w;
            gradients.x0 = -gradients.position;
            gradients.y0 = output;
        }
        const W r = point.height;
        const W scaled = gradients.y0 * bin.h * per_denominator;
        const W wide = W{1} - W{2} * q;
        const W flat = W{2} * q * per_denominator;
        // g_s s
        const W slope = scaled * bin.s * (t * t - r * wide) +
                        log_det * W{2} * (W{1} + bin.s * (q * per_slopes - wide * per_denominator));
        gradients.w = gradients.x0 * t - slope / bin.w;
        gradients.h = gradients.y0 * r + slope / bin.h;
        gradients.d0 = scaled * q * (W{1} - r) + log_det * (back * back * per_slopes - flat);
        gradients.d1 = -scaled * q * r + log_det * (t * t * per_slopes - flat);
        return gradients;
    }

}  // WARPLOOM_SPLINE_NAMESPACE
}  // namespace warploom::coupling
