// Spatial pyramid pooling: what its kernels are given.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dispatch.h"
#include "common/launch.h"

namespace warploom::spp {

// Windows of all levels along one axis.
inline constexpr int kMostBins = 32;

enum class BinMode : int { adaptive, caffe, sppnet, roi };

struct PyramidLevel {
    int rows;  // bins down and across
    int columns;
    std::int64_t channel_stride;  // numbers of the output from one channel's bins to the next's
    std::int64_t offset;          // of the first channel's first bin in a row of the output
};

// A pyramid of bins over regions of planes. A plane is one channel of one image; its pixel
// (row, column) is number row * pitch + column, the pitch being `width`, or a packed image's own.
struct PyramidParams {
    // [count, 7] (image, top, left, height, width, height and width of the image)
    const std::int32_t* regions;
    const std::int32_t* offsets;  // [images + 1] rows of packed pixels, or null: images padded
    std::int64_t count;           // of regions
    std::int64_t images;
    std::int64_t channels;
    int height;  // of padded images
    int width;
    std::int64_t image_stride;  // elements of x and of its gradient
    std::int64_t row_stride;
    std::int64_t pixel_stride;
    std::int64_t channel_stride;
    std::int64_t out_stride;  // numbers of a row of the output, channels * bins
    PyramidLevel levels[kMostBins];
    int level_count;
    BinMode bin_mode;
    bool has_regions;  // else each image is one
    bool is_average;
    bool is_narrow_index;  // argmax is int16, not int32
    DType dtype;
};

struct SpatialPyramidPoolParams : PyramidParams {
    const void* x;
    void* out;     // [count, out_stride]
    void* argmax;  // as out, the number of the pixel in its plane, -1 of none; null: not asked for
};

struct SpatialPyramidPoolBackwardParams : PyramidParams {
    const void* grad_out;  // [count, out_stride]
    const void* argmax;    // as out; null of averages
    void* grad_x;
};

WARPLOOM_DECLARE_CPU(spatial_pyramid_pool_cpu, SpatialPyramidPoolParams)
WARPLOOM_DECLARE_CPU(spatial_pyramid_pool_backward_cpu, SpatialPyramidPoolBackwardParams)
void spatial_pyramid_pool_cuda(const SpatialPyramidPoolParams& params, Stream stream);
void spatial_pyramid_pool_backward_cuda(const SpatialPyramidPoolBackwardParams& params,
                                        Stream stream);

}  // namespace warploom::spp
