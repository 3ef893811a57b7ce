// A scale and a shift per channel: what its kernels are given. `reference/_channel_affine.py` has
// the formulas, of which these are the common form; the arguments before and after are 0 or q
// shift:
//
//   z = (x + before) * scale + after, of an inverse (x + before) / scale + after
//
// A tensor [B, C, *spatial] is seen as [outer, channels, inner]: as samples, channels, pixels; or,
// where the channels of a pixel are neighbours in memory, as pixels of all samples, channels, 1.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cpu.h"
#include "common/dispatch.h"
#include "common/launch.h"

namespace warploom::coupling {

struct ChannelShape {
    std::int64_t outer;
    std::int64_t channels;
    std::int64_t inner;
};

struct ChannelMap {
    const void* scale;  // [channels]
    const void* shift;  // [channels]
    bool add_first;     // before = q shift, after = 0; else the other way round
    bool inverse;       // q = -1, and a division; else q = 1
    DType dtype;        // of scale and shift: that of x, or float32
};

struct ChannelAffineParams {
    const void* x;  // [outer, channels, inner], dense but for the stride of outer
    void* z;        // [outer, channels, inner], dense
    std::int64_t x_stride;
    ChannelShape shape;
    ChannelMap map;
    DType dtype;  // of x and z; arithmetic is float32, float64 of float64
};

// How the sums are cut, by the shape alone: into groups of outer ones, and these into ranges of
// inner ones. A part is range + ranges * group, of all channels.
struct ChannelParts {
    std::int64_t group;   // outer ones, but for the last group
    std::int64_t length;  // inner ones, but for the last range
    std::int64_t ranges;
    std::int64_t count;
};

// With g = grad_z and the sums over outer and inner of g and of g (x + before):
//
//   grad_x = g scale or g / scale      grad_scale = sum g (x + before), of an inverse -that /
//   scale^2 grad_shift = q sum g, where add_first q sum grad_x
struct ChannelAffineBackwardParams {
    const void* grad_z;  // [outer, channels, inner], dense but for the stride of outer
    const void* x;       // [outer, channels, inner], dense but for the stride of outer
    void* grad_x;        // [outer, channels, inner], dense
    void* grad_scale;    // [channels] of map.dtype
    void* grad_shift;    // [channels] of map.dtype
    void* partials;      // workspace [2, parts.count, channels] float32 (float64 of float64)
    std::int64_t grad_z_stride;
    std::int64_t x_stride;
    ChannelParts parts;
    ChannelShape shape;
    ChannelMap map;
    DType dtype;  // of grad_z, x, grad_x
};

// Of about `elements` elements; where inner is 1, no more than `most` parts. `together` channels
// count as one part's.
constexpr ChannelParts channel_parts(const ChannelShape& shape, std::int64_t elements,
                                     std::int64_t most, std::int64_t together) {
    if (shape.outer * shape.channels * shape.inner == 0) {
        return {1, 1, 1, 0};
    }
    const std::int64_t length = std::min(shape.inner, elements);
    const std::int64_t ranges = ceil_divide(shape.inner, length);
    const std::int64_t group =
        shape.inner == 1
            ? std::max(ceil_divide(elements, shape.channels), ceil_divide(shape.outer, most))
            : std::max<std::int64_t>(1, elements / (together * length));
    return {group, length, ranges, ranges * ceil_divide(shape.outer, group)};
}

// A thread takes the channels of a part one by one, whose data then share its cache.
constexpr ChannelParts channel_parts_cpu(const ChannelShape& shape) {
    return channel_parts(shape, 16384, 64, shape.channels);
}

// A block takes one channel of a part, or where inner is 1 all of them.
constexpr ChannelParts channel_parts_cuda(const ChannelShape& shape) {
    return channel_parts(shape, 8192, 264, 1);
}

WARPLOOM_DECLARE_CPU(channel_affine_cpu, ChannelAffineParams)
WARPLOOM_DECLARE_CPU(channel_affine_backward_cpu, ChannelAffineBackwardParams)
void channel_affine_cuda(const ChannelAffineParams& params, Stream stream);
void channel_affine_backward_cuda(const ChannelAffineBackwardParams& params, Stream stream);

}  // namespace warploom::coupling
