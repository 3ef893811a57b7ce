// RoIAlign: what the seam hands to the code that computes it. `reference/_roi_align.py` has the
// formulas.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dispatch.h"
#include "common/launch.h"

namespace warploom::spp {

struct RoiAlignShape {
    const void* rois;  // [count, 5] float32 (float64 of float64): sample, x1, y1, x2, y2
    std::int64_t count;
    std::int64_t batch;
    int channels;
    int height;
    int width;
    int pooled_height;
    int pooled_width;
    double spatial_scale;
    int sampling_ratio;  // 0 or less: as many samples as a bin has pixels, rounded up
    bool aligned;
    DType dtype;  // of all tensors but rois
};

// On the CPU: pixels and weights of all regions, made once for all channels. An axis has for each
// of its bins the pixels that its samples lie between, in `pixels` behind each region's bounds of
// bins.
struct RoiAlignWorkspace {
    std::int32_t* pixels;  // [count, pixels_per_roi]
    void* weights;         // float32 (float64 of float64) [count, weights_per_roi]
    void* buffers;         // of weights' type [parts, buffer]
    std::int64_t row_capacity;
    std::int64_t column_capacity;
    std::int64_t pixels_per_roi;
    std::int64_t weights_per_roi;
    std::int64_t buffer;
    int parts;
};

struct RoiAlignParams {
    RoiAlignShape shape;
    const void* x;  // [batch, channels, height, width], contiguous
    void* out;      // [count, channels, pooled_height, pooled_width], contiguous
    RoiAlignWorkspace workspace;
};

struct RoiAlignBackwardParams {
    RoiAlignShape shape;
    const void* grad_out;  // as out
    void* grad_x;          // as x
    RoiAlignWorkspace workspace;
};

WARPLOOM_DECLARE_CPU(roi_align_cpu, RoiAlignParams)
WARPLOOM_DECLARE_CPU(roi_align_backward_cpu, RoiAlignBackwardParams)
void roi_align_cuda(const RoiAlignParams& params, Stream stream);
void roi_align_backward_cuda(const RoiAlignBackwardParams& params, Stream stream);

}  // namespace warploom::spp
