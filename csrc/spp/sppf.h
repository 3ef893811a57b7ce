// The cascade of three max pools of stride 1 beside their input: what the seam hands to the code
// that computes it. `reference/_sppf.py` has the formulas.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dispatch.h"
#include "common/launch.h"

namespace warploom::spp {

// Pools, and channels of the output for each of the input's.
constexpr int kSppfStages = 3;
constexpr int kSppfSlices = kSppfStages + 1;

struct SppfShape {
    std::int64_t batch;
    int channels;
    int height;
    int width;
    int radius;  // windows of 2 radius + 1 cells, cut off at the borders
    bool
        channels_last;  // tensors are [batch, height, width, channels], else [batch, channels, ...]
    DType dtype;        // of every tensor
};

// What a part of the work on the CPU has for itself, padded planes of `lanes` neighbouring channels
// (see sppf_cpu.cpp).
struct SppfWorkspace {
    void* values;           // float32 (float64 of float64) [parts, values_per_part]
    std::int32_t* indices;  // [parts, indices_per_part], backward alone
    std::int64_t values_per_part;
    std::int64_t indices_per_part;
    int parts;
    int lanes;  // 1 unless channels_last
};

// Numbers that loops on the CPU take at a time: they may go so far beyond a plane.
constexpr std::int64_t kSppfBlock = 16;

// Numbers of the padded planes of `lanes` channels: before and behind each row radius cells, then a
// copy with radius rows above and below, and one row.
constexpr std::int64_t sppf_padded_size(const SppfShape& shape, std::int64_t lanes) {
    const std::int64_t pitch = (shape.width + shape.radius) * lanes;
    return shape.radius * lanes + (2 * shape.height + 2 * shape.radius + 1) * pitch +
           2 * kSppfBlock;
}

struct SppfParams {
    SppfShape shape;
    const void* x;  // contiguous
    void* out;      // contiguous, 4 channels: x, then each pool
    SppfWorkspace workspace;
};

struct SppfBackwardParams {
    SppfShape shape;
    const void* grad_out;  // as out
    const void* out;       // of the forward: what was pooled is found in it again
    void* grad_x;          // as x
    SppfWorkspace workspace;
};

WARPLOOM_DECLARE_CPU(sppf_cpu, SppfParams)
WARPLOOM_DECLARE_CPU(sppf_backward_cpu, SppfBackwardParams)
void sppf_cuda(const SppfParams& params, Stream stream);
void sppf_backward_cuda(const SppfBackwardParams& params, Stream stream);

}  // namespace warploom::spp
