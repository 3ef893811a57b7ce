// The windows of a pyramid's bins over one region, for all kernels.
//
// The ends of all levels' windows cut an axis into bands, and the image into cells. A cell lies
// wholly inside a window or outside, so that every pixel is read once, for its cell, and a bin is
// made of the cells that its window covers.
#pragma once

#include <cstdint>

#include "spatial_pyramid_pool.h"

namespace warploom::spp {

inline constexpr int kMostCuts = 2 * kMostBins;

// Rows or columns [begin, end); `span` of them count in an average.
struct PoolWindow {
    int begin;
    int end;
    int span;
};

// Where one region lies, and in which image.
struct PoolRegion {
    std::int64_t image;  // -1: none
    std::int64_t first;  // element of x at which the image begins
    std::int64_t row_stride;
    int pitch;
    int top;
    int left;
    int rows;
    int columns;
    int height;  // of the image
    int width;
};

// The windows of all levels along one axis of a region. Band b lies between cuts b and b + 1.
struct PoolAxis {
    PoolWindow windows[kMostBins];
    int first_band[kMostBins];  // window i covers bands [first_band[i], last_band[i])
    int last_band[kMostBins];
    int window_count;
    int cuts[kMostCuts];  // in order, each once
    int cut_count;
};

// Functions below are `static`: a CPU unit compiled for one instruction set must not lend its copy
// to another (common/cpu.h). constexpr: nvcc then compiles them for the device too.

static constexpr int clip(std::int64_t place, int limit) {
    return static_cast<int>(place < 0 ? 0 : place > limit ? limit : place);
}

// Window `index` of `bins` over [start, start + extent), cut to [0, limit).
static constexpr PoolWindow pool_window(BinMode mode, int bins, int index, int start, int extent,
                                        int limit) {
    std::int64_t begin = 0;
    std::int64_t end = 0;
    std::int64_t span = -1;
    const std::int64_t most = (static_cast<std::int64_t>(extent) + bins - 1) / bins;
    if (mode == BinMode::adaptive) {
        begin = static_cast<std::int64_t>(index) * extent / bins;
        end = (static_cast<std::int64_t>(index + 1) * extent + bins - 1) / bins;
    } else if (mode == BinMode::caffe) {
        const std::int64_t padding = (most * bins - extent + 1) / 2;
        begin = index * most - padding;
        end = begin + most < extent + padding ? begin + most : extent + padding;
        span = end - begin;
    } else if (mode == BinMode::sppnet) {
        begin = static_cast<std::int64_t>(index) * (extent / bins);
        end = begin + most;
    } else {
        // In float32, as torchvision's roi_pool divides: rounding moves some bins.
        const float size = static_cast<float>(extent) / static_cast<float>(bins);
        const float low = static_cast<float>(index) * size;
        const float high = static_cast<float>(index + 1) * size;
        begin = static_cast<std::int64_t>(low);
        end = static_cast<std::int64_t>(high);
        end += static_cast<float>(end) < high ? 1 : 0;
    }
    const int first = clip(start + begin, limit);
    const int last = clip(start + end, limit);
    return {first, last, span < 0 ? last - first : static_cast<int>(span)};
}

static constexpr PoolRegion pool_region(const PyramidParams& params, std::int64_t index) {
    PoolRegion region{index,
                      index * params.image_stride,
                      params.row_stride,
                      params.width,
                      0,
                      0,
                      params.height,
                      params.width,
                      params.height,
                      params.width};
    if (!params.has_regions) {
        return region;
    }
    const std::int32_t* entry = params.regions + 7 * index;
    region.image = entry[0] < 0 || entry[0] >= params.images ? -1 : entry[0];
    region.top = entry[1];
    region.left = entry[2];
    region.rows = entry[3] < 0 ? 0 : entry[3];
    region.columns = entry[4] < 0 ? 0 : entry[4];
    if (region.image < 0) {
        region.height = 0;
        region.width = 0;
    } else if (params.offsets != nullptr) {
        // Rows that the image does not have are cut off.
        const std::int64_t begin = params.offsets[region.image];
        const std::int64_t pixels = params.offsets[region.image + 1] - begin;
        region.first = begin * params.pixel_stride;
        region.width = entry[6] < 0 ? 0 : entry[6];
        region.height = region.width == 0 ? 0 : clip(pixels / region.width, entry[5]);
        region.pitch = region.width;
        region.row_stride = region.width * params.pixel_stride;
    } else {
        region.first = region.image * params.image_stride;
        region.height = clip(entry[5], params.height);
        region.width = clip(entry[6], params.width);
    }
    return region;
}

static constexpr int band_of(const PoolAxis& axis, int cut) {
    int band = 0;
    while (band < axis.cut_count && axis.cuts[band] < cut) {
        ++band;
    }
    return band;
}

static constexpr void add_cut(PoolAxis& axis, int cut) {
    const int place = band_of(axis, cut);
    if (place < axis.cut_count && axis.cuts[place] == cut) {
        return;
    }
    for (int index = axis.cut_count++; index > place; --index) {
        axis.cuts[index] = axis.cuts[index - 1];
    }
    axis.cuts[place] = cut;
}

static constexpr void build_axis(PoolAxis& axis, const PyramidParams& params,
                                 const PoolRegion& region, bool is_rows) {
    axis.window_count = 0;
    axis.cut_count = 0;
    for (int place = 0; place < params.level_count; ++place) {
        const int bins = is_rows ? params.levels[place].rows : params.levels[place].columns;
        for (int index = 0; index < bins; ++index) {
            const PoolWindow window = is_rows
                                          ? pool_window(params.bin_mode, bins, index, region.top,
                                                        region.rows, region.height)
                                          : pool_window(params.bin_mode, bins, index, region.left,
                                                        region.columns, region.width);
            axis.windows[axis.window_count++] = window;
            if (window.begin < window.end) {
                add_cut(axis, window.begin);
                add_cut(axis, window.end);
            }
        }
    }
    for (int index = 0; index < axis.window_count; ++index) {
        const PoolWindow window = axis.windows[index];
        const bool is_empty = window.begin >= window.end;
        axis.first_band[index] = is_empty ? 0 : band_of(axis, window.begin);
        axis.last_band[index] = is_empty ? 0 : band_of(axis, window.end);
    }
}

static constexpr bool covers(const PoolAxis& axis, int index, int band) {
    return axis.first_band[index] <= band && band < axis.last_band[index];
}

}  // namespace warploom::spp
