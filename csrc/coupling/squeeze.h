// Blocks of factor x factor pixels that become channels, and back: what its kernels are given.
// `reference/_squeeze.py` says which pixel goes where. In every order and layout it is one thing,
// done to many small matrices: `ways` lines of `length` elements each on one side lie packed on the
// other, as `length` groups of `ways` neighbours.
//
//   channels first      the image's rows are packed: ways = factor columns of a block, which are
//                       rows of as many channels
//   channels last       "channel_major": the channels of a squeezed pixel are packed: ways =
//                       factor^2, the pixels of a block, whose channels are lines
//                       "position_major": runs of factor pixels are one line, on both sides
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dispatch.h"
#include "common/launch.h"

namespace warploom::coupling {

// Where the matrix [i0, i1, i2, i3] begins: at the sum of i_d strides[d].
struct SqueezeStrides {
    std::int64_t strides[4];
};

struct SqueezeParams {
    const void* from = nullptr;
    void* to = nullptr;
    bool to_lines = false;  // from packed to lines, or the other way round
    std::int64_t sizes[4];  // how many matrices; sizes[0] is the batch
    SqueezeStrides packed;  // element i of line k lies i * ways + k further
    SqueezeStrides lines;  // and (k / factor) * block_row + (k % factor) * block_column + i further
    std::int64_t length;
    std::int64_t ways;
    std::int64_t factor;
    std::int64_t block_row = 0;
    std::int64_t block_column = 0;
    DType dtype = DType::float32;  // elements are moved, whatever they are
};

// An image [B, C, factor * height, factor * width], squeezed [B, C factor^2, height, width].
struct SqueezeShape {
    std::int64_t batch;
    std::int64_t channels;  // of the image
    std::int64_t height;    // of the squeezed planes
    std::int64_t width;
    std::int64_t factor;
    bool by_position;
};

// The matrices of dense samples, whose strides are the caller's to set.
constexpr SqueezeParams squeeze_matrices(const SqueezeShape& shape, bool channels_last) {
    const auto [batch, channels, height, width, factor, by_position] = shape;
    if (!channels_last) {
        // [batch, channel, row of blocks, row of the block]
        const std::int64_t plane = height * width;
        const std::int64_t position = by_position ? channels * plane : plane;
        const std::int64_t channel = by_position ? plane : factor * factor * plane;
        const std::int64_t row = factor * width;
        return {.sizes = {batch, channels, height, factor},
                .packed = {{0, factor * height * row, factor * row, row}},
                .lines = {{0, channel, width, factor * position}},
                .length = width,
                .ways = factor,
                .factor = factor,
                .block_column = position};
    }
    // [batch, row of blocks, block, row of the block, where that is not among the ways]
    const std::int64_t run = factor * channels;
    const std::int64_t row = width * run;
    return {.sizes = {batch, height, width, by_position ? factor : 1},
            .packed = {{0, factor * row, factor * run, run}},
            .lines = {{0, factor * row, run, row}},
            .length = by_position ? run : channels,
            .ways = by_position ? 1 : factor * factor,
            .factor = factor,
            .block_row = row,
            .block_column = channels};
}

WARPLOOM_DECLARE_CPU(squeeze_cpu, SqueezeParams)
void squeeze_cuda(const SqueezeParams& params, Stream stream);

}  // namespace warploom::coupling
