// Affine coupling: what its kernels are given. `reference/coupling.py` has the formulas.
//
// A tensor [B, C, *spatial] is seen as [batch, channels, pixels]. The elements of a line are
// neighbours in memory: a line is a channel, pixel_stride 1, or where `channels_last` a pixel,
// channel_stride 1. Tensors without spatial dimensions have one pixel and are channels_last.
// Of x, z, source and their gradients, samples are dense: channel_stride = pixels, or pixel_stride
// = channels where `channels_last`; the strides between samples are free. Shift and raw scale have
// the same strides, and so have their gradients; interleaved ones have twice those of one half.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dispatch.h"
#include "common/launch.h"

namespace warploom::coupling {

enum class CouplingMask : int { range, slots, checkerboard, checkerboard_packed, free };
enum class CouplingScale : int { additive, exp, tanh, atan, centered_sigmoid, sigmoid, softclip };
enum class CouplingCenter : int { none, channel, sample };

constexpr double kAtanSlope = 0.636;  // what FrEIA has for 2 / pi

// Element (b, c, p) is data[b * batch_stride + c * channel_stride + p * pixel_stride].
struct CouplingView {
    const void* data;  // null: absent
    std::int64_t batch_stride;
    std::int64_t channel_stride;
    std::int64_t pixel_stride;
};

struct CouplingOutput {
    void* data;
    std::int64_t batch_stride;
    std::int64_t channel_stride;
    std::int64_t pixel_stride;
};

// What forward and backward share. The parameters' views have `count` channels, and where the mask
// is checkerboard_packed `pixels` / 2 pixels: pixel j of a row of the image for its j-th
// transformed one, which has w = 2 j + ((h + first) & 1).
struct CouplingOptions {
    std::int64_t batch;
    std::int64_t pixels;
    std::int64_t width;  // of an image: pixel p has h = p / width, w = p % width; for checkerboards
    int channels;
    int first;  // range: the first transformed channel; checkerboards: (h + w) & 1 of its pixels
    int count;  // k, the channels of the parameters: `channels` for the masks over pixels
    const std::int32_t* slots;  // [channels] or null: the parameters' channel, -1: passes; a
                                // channel whose slot is not in [0, count) passes
    const std::int32_t* slot_channels;  // CPU, beside slots: [count], their channels
    const std::uint8_t* free_mask;      // or null: element (c, p) at c * mask_channel_stride +
                                        // p * mask_pixel_stride, 1 along a line, else 0 or more
    std::int64_t mask_channel_stride;
    std::int64_t mask_pixel_stride;
    const void* scale_weight;  // [count] float32 (float64 of float64) or null: 1
    double clamp;
    double eps;
    double params_scale;
    int shift_sign;  // q
    int log_sign;    // p
    bool add_first;
    bool channels_last;
    CouplingMask mask;
    CouplingScale scale;
    CouplingCenter center;  // none, but for range and slots
    DType dtype;            // of all views; arithmetic is float32, float64 of float64
};

struct AffineCouplingParams {
    CouplingView x;          // [batch, channels, pixels]
    CouplingView shift;      // [batch, count, pixels]
    CouplingView raw_scale;  // [batch, count, pixels], absent for additive
    CouplingOutput z;        // [batch, channels, pixels]; z.data may be x.data, with its strides
    const void* log_det_in;  // [batch] as log_det, or null: 0
    void* log_det;           // [batch] float32 (float64 of float64)
    void* partials;  // workspace [batch, parts] as log_det: sums over parts of a sample, or means
    std::int64_t parts;
    CouplingOptions options;
};

struct AffineCouplingBackwardParams {
    CouplingView grad_z;            // [batch, channels, pixels], absent: 0
    const void* grad_log_det;       // [batch] float32 (float64 of float64), or null: 0
    CouplingView source;            // [batch, channels, pixels]: z where from_output, else x
    CouplingView shift;             // [batch, count, pixels]
    CouplingView raw_scale;         // [batch, count, pixels], absent for additive
    CouplingOutput grad_x;          // [batch, channels, pixels]
    CouplingOutput grad_shift;      // [batch, count, pixels]; 0 where x passes
    CouplingOutput grad_raw_scale;  // [batch, count, pixels], null for additive; 0 where x passes
    void* grad_weight;  // [batch, count] as log_det, or null without scale_weight: sums over pixels
    void* partials;     // workspace [batch, parts, count] beside grad_weight or a center
    std::int64_t parts;
    bool from_output;
    CouplingOptions options;
};

// On a GPU: how many sums of log_det and of grad_weight a sample has, fixed by the shape as well.
std::int64_t affine_coupling_parts_cuda(const CouplingOptions& options);
std::int64_t affine_coupling_weight_parts_cuda(const CouplingOptions& options);

WARPLOOM_DECLARE_CPU(affine_coupling_cpu, AffineCouplingParams)
WARPLOOM_DECLARE_CPU(affine_coupling_backward_cpu, AffineCouplingBackwardParams)
void affine_coupling_cuda(const AffineCouplingParams& params, Stream stream);
void affine_coupling_backward_cuda(const AffineCouplingBackwardParams& params, Stream stream);

}  // namespace warploom::coupling
