// RoIAlign on the CPU. A bilinear sample's weight is a product of its row's and its column's, and
// so is a bin's mean of samples: weights of pixels along both axes are made once a region, for all
// channels. A plane's rows are then added up for a bin's row of bins, along dense rows, and the sum
// is read at the columns of each bin; backward in the opposite order. Positions are float64: how
// many samples a bin has, and which lie outside, does not depend on rounding.
#include "spp/roi_align.h"

#include <cmath>
#include <cstdint>

#include "common/cpu_float.h"
#include "common/parallel.h"

namespace warploom::spp {
namespace WARPLOOM_CPU_ISA {
namespace {

using namespace ::warploom::WARPLOOM_CPU_ISA;

// For bin b of an axis the pixels and weights from bounds[b] up to bounds[b + 1].
template <typename W>
struct Axis {
    std::int32_t* bounds;
    std::int32_t* pixels;
    W* weights;
};

template <typename W>
struct Region {
    Axis<W> rows;
    Axis<W> columns;
    // In the place of bounds: the sample of the batch, and the columns that any bin touches.
    std::int32_t* extent;  // sample, first column, columns
    W* scale;              // 1 / samples of a bin
};

template <typename W>
Region<W> region_at(const RoiAlignShape& shape, const RoiAlignWorkspace& workspace,
                    std::int64_t index) {
    std::int32_t* integers = workspace.pixels + index * workspace.pixels_per_roi;
    W* weights = static_cast<W*>(workspace.weights) + index * workspace.weights_per_roi;
    Region<W> region{};
    region.extent = integers;
    region.rows.bounds = integers + 3;
    region.columns.bounds = region.rows.bounds + shape.pooled_height + 1;
    region.rows.pixels = region.columns.bounds + shape.pooled_width + 1;
    region.columns.pixels = region.rows.pixels + workspace.row_capacity;
    region.scale = weights;
    region.rows.weights = weights + 1;
    region.columns.weights = region.rows.weights + workspace.row_capacity;
    return region;
}

// Adds to the bin's weight of `pixel`, which is new or one of the last two: samples go one way.
template <typename W>
inline void add_weight(const Axis<W>& axis, std::int64_t begin, std::int64_t& count, int pixel,
                       double weight) {
    for (std::int64_t place = count - 1; place >= begin && place >= count - 2; --place) {
        if (axis.pixels[place] == pixel) {
            axis.weights[place] += static_cast<W>(weight);
            return;
        }
    }
    axis.pixels[count] = pixel;
    axis.weights[count] = static_cast<W>(weight);
    ++count;
}

// Fills an axis of `bins` bins, each `bin` pixels long, over `size` pixels; returns its samples a
// bin.
template <typename W>
double fill_axis(const Axis<W>& axis, double start, double bin, int bins, int sampling_ratio,
                 int size) {
    // Beyond, samples could not be counted; of what is not a number there are none either.
    const bool is_usable = std::fabs(start) + std::fabs(bin) * bins < 0x1p50;
    const double samples = !is_usable ? 0.0 : sampling_ratio > 0 ? sampling_ratio : std::ceil(bin);
    const double step = bin / samples;
    std::int64_t count = 0;
    axis.bounds[0] = 0;
    for (int index = 0; index < bins; ++index) {
        const std::int64_t begin = count;
        const double base = start + index * bin;
        // Of a region that is larger than the plane, only samples near it.
        double first = 0;
        double last = samples;
        if (sampling_ratio <= 0) {
            first = std::fmax(first, std::floor((-1 - base) / step - 1.5));
            last = std::fmin(last, std::ceil((size - base) / step + 1.5));
        }
        for (double sample = first; sample < last; sample += 1) {
            const double position = base + (sample + 0.5) * step;
            if (!(position >= -1 && position <= size)) {
                continue;
            }
            const int low = position > 0 ? static_cast<int>(position) : 0;
            if (position <= 0 || low >= size - 1) {
                add_weight(axis, begin, count, low < size - 1 ? low : size - 1, 1.0);
            } else {
                add_weight(axis, begin, count, low, low + 1 - position);
                add_weight(axis, begin, count, low + 1, position - low);
            }
        }
        axis.bounds[index + 1] = static_cast<std::int32_t>(count);
    }
    return samples;
}

// Pixels and weights of every region.
template <typename W>
void fill_regions(const RoiAlignShape& shape, const RoiAlignWorkspace& workspace) {
    parallel_for(shape.count, 16, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t index = begin; index < end; ++index) {
            const W* roi = static_cast<const W*>(shape.rois) + index * 5;
            const Region<W> region = region_at<W>(shape, workspace, index);
            const double offset = shape.aligned ? 0.5 : 0.0;
            const auto fill = [&](const Axis<W>& axis, W first, W last, int bins, int size) {
                const double start = first * shape.spatial_scale - offset;
                const double length = last * shape.spatial_scale - offset - start;
                const double least = shape.aligned || length > 1 ? length : 1.0;
                return fill_axis(axis, start, least / bins, bins, shape.sampling_ratio, size);
            };
            const double rows =
                fill(region.rows, roi[2], roi[4], shape.pooled_height, shape.height);
            const double columns =
                fill(region.columns, roi[1], roi[3], shape.pooled_width, shape.width);
            const double samples = rows * columns;
            *region.scale = static_cast<W>(1.0 / (samples > 1 ? samples : 1.0));
            std::int32_t first = shape.width;
            std::int32_t last = -1;
            for (std::int32_t i = 0; i < region.columns.bounds[shape.pooled_width]; ++i) {
                const std::int32_t pixel = region.columns.pixels[i];
                first = pixel < first ? pixel : first;
                last = pixel > last ? pixel : last;
            }
            region.extent[0] = static_cast<std::int32_t>(roi[0]);
            region.extent[1] = first;
            region.extent[2] = last < first ? 0 : last - first + 1;
        }
    });
}

template <typename T>
void forward(const RoiAlignParams& params) {
    using W = Wide<T>;
    const RoiAlignShape& shape = params.shape;
    const RoiAlignWorkspace& workspace = params.workspace;
    fill_regions<W>(shape, workspace);
    const std::int64_t planes = shape.count * shape.channels;
    const std::int64_t bins = static_cast<std::int64_t>(shape.pooled_height) * shape.pooled_width;
    parallel_for(workspace.parts, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t part = begin; part < end; ++part) {
            W* sums = static_cast<W*>(workspace.buffers) + part * workspace.buffer;
            const std::int64_t stop = (part + 1) * planes / workspace.parts;
            for (std::int64_t plane = part * planes / workspace.parts; plane < stop; ++plane) {
                const Region<W> region = region_at<W>(shape, workspace, plane / shape.channels);
                const std::int64_t channel =
                    static_cast<std::int64_t>(region.extent[0]) * shape.channels +
                    plane % shape.channels;
                const std::int32_t first = region.extent[1];
                const std::int32_t width = region.extent[2];
                const T* x =
                    static_cast<const T*>(params.x) + channel * shape.height * shape.width + first;
                T* out = static_cast<T*>(params.out) + plane * bins;
                for (int row = 0; row < shape.pooled_height; ++row) {
                    for (std::int32_t i = 0; i < width; ++i) {
                        sums[i] = 0;
                    }
                    for (std::int32_t place = region.rows.bounds[row];
                         place < region.rows.bounds[row + 1]; ++place) {
                        const W weight = region.rows.weights[place];
                        const T* from =
                            x + static_cast<std::int64_t>(region.rows.pixels[place]) * shape.width;
#pragma omp simd
                        for (std::int32_t i = 0; i < width; ++i) {
                            sums[i] += weight * widen(from[i]);
                        }
                    }
                    for (int column = 0; column < shape.pooled_width; ++column) {
                        W sum = 0;
                        for (std::int32_t place = region.columns.bounds[column];
                             place < region.columns.bounds[column + 1]; ++place) {
                            sum += region.columns.weights[place] *
                                   sums[region.columns.pixels[place] - first];
                        }
                        out[row * shape.pooled_width + column] = narrow<T>(sum * *region.scale);
                    }
                }
            }
        }
    });
}

// Adds one region's gradients to those of a plane.
template <typename T, typename W>
void add_region(const RoiAlignShape& shape, const Region<W>& region, const T* grad_out, W* plane,
                W* sums) {
    const std::int32_t first = region.extent[1];
    const std::int32_t width = region.extent[2];
    for (int row = 0; row < shape.pooled_height; ++row) {
        for (std::int32_t i = 0; i < width; ++i) {
            sums[i] = 0;
        }
        for (int column = 0; column < shape.pooled_width; ++column) {
            const W grad = widen(grad_out[row * shape.pooled_width + column]) * *region.scale;
            for (std::int32_t place = region.columns.bounds[column];
                 place < region.columns.bounds[column + 1]; ++place) {
                sums[region.columns.pixels[place] - first] += region.columns.weights[place] * grad;
            }
        }
        for (std::int32_t place = region.rows.bounds[row]; place < region.rows.bounds[row + 1];
             ++place) {
            const W weight = region.rows.weights[place];
            W* to =
                plane + static_cast<std::int64_t>(region.rows.pixels[place]) * shape.width + first;
#pragma omp simd
            for (std::int32_t i = 0; i < width; ++i) {
                to[i] += weight * sums[i];
            }
        }
    }
}

template <typename T>
void backward(const RoiAlignBackwardParams& params) {
    using W = Wide<T>;
    const RoiAlignShape& shape = params.shape;
    const RoiAlignWorkspace& workspace = params.workspace;
    fill_regions<W>(shape, workspace);
    const std::int64_t planes = shape.batch * shape.channels;
    const std::int64_t bins = static_cast<std::int64_t>(shape.pooled_height) * shape.pooled_width;
    const std::int64_t size = static_cast<std::int64_t>(shape.height) * shape.width;
    parallel_for(workspace.parts, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t part = begin; part < end; ++part) {
            W* sums = static_cast<W*>(workspace.buffers) + part * workspace.buffer;
            W* grads = sums + shape.width;
            const std::int64_t stop = (part + 1) * planes / workspace.parts;
            for (std::int64_t plane = part * planes / workspace.parts; plane < stop; ++plane) {
                for (std::int64_t i = 0; i < size; ++i) {
                    grads[i] = 0;
                }
                for (std::int64_t index = 0; index < shape.count; ++index) {
                    const Region<W> region = region_at<W>(shape, workspace, index);
                    if (region.extent[0] == plane / shape.channels) {
                        const std::int64_t own = index * shape.channels + plane % shape.channels;
                        add_region(shape, region,
                                   static_cast<const T*>(params.grad_out) + own * bins, grads,
                                   sums);
                    }
                }
                T* grad_x = static_cast<T*>(params.grad_x) + plane * size;
#pragma omp simd
                for (std::int64_t i = 0; i < size; ++i) {
                    grad_x[i] = narrow<T>(grads[i]);
                }
            }
        }
    });
}

}  // namespace

void roi_align_cpu(const RoiAlignParams& params) {
    visit_element_type(params.shape.dtype, [&]<typename T>() { forward<T>(params); });
}

void roi_align_backward_cpu(const RoiAlignBackwardParams& params) {
    visit_element_type(params.shape.dtype, [&]<typename T>() { backward<T>(params); });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::spp
