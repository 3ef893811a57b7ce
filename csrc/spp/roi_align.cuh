// RoIAlign: a bin of a region is the mean of bilinear samples of a plane. A region is laid out in
// float64, so that the number of its samples and which of them lie outside do not depend on
// rounding; from a bin's first pixel on, a step is the sum of two float32, so that a sample's place
// between two pixels is as exact far from that pixel as beside it.
//
//   forward:  a thread has one bin of one channel
//   backward: a block owns pixels of some channels and walks the regions in their order, without
//             atomics: weights of its rows and columns in each bin go to shared memory
#pragma once

#include <cmath>
#include <cstdint>

#include "common/index.cuh"
#include "roi_align.h"

namespace warploom::spp {

template <typename Element_>
struct RoiAlignTraits {
    using Element = Element_;
    static constexpr int kThreads = 256;
    // Forward: channels of a block. Backward: the same, and the pixels that it owns.
    static constexpr int kChannels = 32;
    static constexpr int kOwnedChannels = 4;
    static constexpr int kRows = 8;
    static constexpr int kColumns = kThreads / kRows;
    static constexpr int kMostBins = 64;  // of an axis, backward
};

template <typename Traits>
struct RoiAlignBackwardPlan {
    float rows[Traits::kMostBins][Traits::kRows];
    float columns[Traits::kMostBins][Traits::kColumns];
};

// The samples of a bin along an axis: sample s lies at cell + fraction + (s + 0.5) step.
struct BinSamples {
    std::int64_t cell;
    float fraction;
    float step;
    float step_rest;  // step + step_rest is the step
    int begin;        // samples from here up to `end` may lie in the plane
    int end;
};

// Along one axis.
struct RoiAxis {
    double start;
    double bin;
    double samples;  // of a bin, a whole number
    int size;        // of the plane

    WARPLOOM_DEVICE RoiAxis(float first, float last, int bins, int size, const RoiAlignShape& shape)
        : size(size) {
        const double offset = shape.aligned ? 0.5 : 0.0;
        start = first * shape.spatial_scale - offset;
        const double length = last * shape.spatial_scale - offset - start;
        bin = (shape.aligned || length > 1.0 ? length : 1.0) / bins;
        // Beyond, samples could not be counted; of what is not a number there are none either.
        constexpr double kLargest = 1125899906842624.0;
        const bool is_usable = fabs(start) + fabs(bin) * bins < kLargest;
        const double wanted = shape.sampling_ratio > 0 ? shape.sampling_ratio : ceil(bin);
        samples = is_usable ? wanted : 0.0;
    }

    // Of samples that lie between `low` and `high`, and perhaps some beside them.
    WARPLOOM_DEVICE BinSamples samples_of(int index, double low, double high) const {
        if (!(samples >= 1.0)) {
            return {};
        }
        const double base = start + index * bin;
        const double step = bin / samples;
        double begin = 0.0;
        double end = samples;
        if (step > 0.0) {
            begin = fmax(begin, floor((low - base) / step - 1.5));
            end = fmin(end, ceil((high - base) / step + 1.5));
        }
        if (!(begin < end)) {
            return {};
        }
        // Counted from the first: what is left is as small as the plane.
        const double moved = base + begin * step;
        const double cell = floor(moved);
        const float rounded = static_cast<float>(step);
        return {static_cast<std::int64_t>(cell),
                static_cast<float>(moved - cell),
                rounded,
                static_cast<float>(step - rounded),
                0,
                static_cast<int>(end - begin)};
    }
};

// The two pixels beside a sample; weights of 0 outside.
struct Sample {
    int low;
    int high;
    float low_weight;
    float high_weight;
};

WARPLOOM_DEVICE Sample sample_at(const BinSamples& samples, int index, int size) {
    const float steps = static_cast<float>(index) + 0.5f;
    const float moved = steps * samples.step;
    const float rest = fmaf(steps, samples.step, -moved) + steps * samples.step_rest;
    const float whole = floorf(moved);
    const float beyond = (moved - whole) + (samples.fraction + rest);
    const float carried = floorf(beyond);
    const float part = beyond - carried;
    const std::int64_t pixel =
        samples.cell + static_cast<std::int64_t>(whole) + static_cast<std::int64_t>(carried);
    if (pixel < -1 || pixel > size || (pixel == size && part > 0.0f)) {
        return {0, 0, 0.0f, 0.0f};
    }
    if (pixel < 0) {
        return {0, 0, 1.0f, 0.0f};
    }
    if (pixel >= size - 1) {
        return {size - 1, size - 1, 1.0f, 0.0f};
    }
    return {static_cast<int>(pixel), static_cast<int>(pixel) + 1, 1.0f - part, part};
}

WARPLOOM_DEVICE float mean_scale(const RoiAxis& rows, const RoiAxis& columns) {
    const double samples = rows.samples * columns.samples;
    return static_cast<float>(1.0 / (samples > 1.0 ? samples : 1.0));
}

// grid [count * ceil(channels / kChannels)]
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 4)
roi_align_kernel(WARPLOOM_GRID_CONSTANT RoiAlignParams params) {
    using T = typename Traits::Element;
    const RoiAlignShape& shape = params.shape;
    const int chunks = (shape.channels + Traits::kChannels - 1) / Traits::kChannels;
    const Division block = divide(blockIdx.x, chunks);
    const float* roi = static_cast<const float*>(shape.rois) + block.quotient * 5;
    const bool exists = roi[0] >= 0.0f && roi[0] < static_cast<float>(shape.batch);
    const std::int64_t sample = exists ? static_cast<std::int64_t>(roi[0]) : 0;
    const RoiAxis rows(roi[2], roi[4], shape.pooled_height, shape.height, shape);
    const RoiAxis columns(roi[1], roi[3], shape.pooled_width, shape.width, shape);
    const float scale = mean_scale(rows, columns);
    const int bins = shape.pooled_height * shape.pooled_width;
    const int first = static_cast<int>(block.remainder) * Traits::kChannels;
    const int left = shape.channels - first;
    const int count = (left < Traits::kChannels ? left : Traits::kChannels) * bins;

    WARPLOOM_NO_UNROLL
    for (int number = static_cast<int>(threadIdx.x); number < count; number += Traits::kThreads) {
        const int channel = first + number / bins;
        const int bin = number % bins;
        const T* x = static_cast<const T*>(params.x) +
                     (sample * shape.channels + channel) * shape.height * shape.width;
        const BinSamples across = columns.samples_of(bin % shape.pooled_width, -1.0, columns.size);
        const BinSamples down = rows.samples_of(bin / shape.pooled_width, -1.0, rows.size);
        float sum = 0.0f;
        WARPLOOM_NO_UNROLL
        for (int i = down.begin; i < down.end; ++i) {
            const Sample row = sample_at(down, i, rows.size);
            const T* low = x + static_cast<std::int64_t>(row.low) * shape.width;
            const T* high = x + static_cast<std::int64_t>(row.high) * shape.width;
            if (row.low_weight + row.high_weight == 0.0f) {
                continue;
            }
            WARPLOOM_NO_UNROLL
            for (int j = across.begin; j < across.end; ++j) {
                const Sample column = sample_at(across, j, columns.size);
                if (column.low_weight + column.high_weight == 0.0f) {
                    continue;
                }
                const float above = column.low_weight * device::to_float(low[column.low]) +
                                    column.high_weight * device::to_float(low[column.high]);
                const float below = column.low_weight * device::to_float(high[column.low]) +
                                    column.high_weight * device::to_float(high[column.high]);
                sum += row.low_weight * above + row.high_weight * below;
            }
        }
        static_cast<T*>(params.out)[(block.quotient * shape.channels + channel) * bins + bin] =
            device::from_float<T>(exists ? sum * scale : 0.0f);
    }
}

// What a bin's samples give to one pixel of the axis.
WARPLOOM_DEVICE float weight_of(const RoiAxis& axis, int bin, int pixel) {
    // Samples outside by up to a pixel belong to the border.
    const double low = pixel - 1.0;
    const double high = pixel == axis.size - 1 ? axis.size : pixel + 1.0;
    const BinSamples samples = axis.samples_of(bin, low, high);
    float weight = 0.0f;
    WARPLOOM_NO_UNROLL
    for (int index = samples.begin; index < samples.end; ++index) {
        const Sample sample = sample_at(samples, index, axis.size);
        weight += sample.low == pixel ? sample.low_weight : 0.0f;
        weight += sample.high == pixel ? sample.high_weight : 0.0f;
    }
    return weight;
}

// True where no sample of the axis lies between `low` and `high`; the same in every thread.
WARPLOOM_DEVICE bool misses(const RoiAxis& axis, int bins, double low, double high) {
    const double end = axis.start + axis.bin * bins;
    return !(fmax(axis.start, end) >= low && fmin(axis.start, end) <= high);
}

// grid [batch * ceil(channels / kOwnedChannels) * tiles], tiles of kRows x kColumns pixels
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 2)
roi_align_backward_kernel(WARPLOOM_GRID_CONSTANT RoiAlignBackwardParams params) {
    using T = typename Traits::Element;
    constexpr int kChannels = Traits::kOwnedChannels;
    auto& plan = device::shared_memory<RoiAlignBackwardPlan<Traits>>();
    const RoiAlignShape& shape = params.shape;
    const int chunks = (shape.channels + kChannels - 1) / kChannels;
    const int row_tiles = (shape.height + Traits::kRows - 1) / Traits::kRows;
    const int column_tiles = (shape.width + Traits::kColumns - 1) / Traits::kColumns;
    const Division place = divide(blockIdx.x, row_tiles * column_tiles);
    const Division owner = divide(place.quotient, chunks);
    const int tile = static_cast<int>(place.remainder);
    const int first_row = tile / column_tiles * Traits::kRows;
    const int first_column = tile % column_tiles * Traits::kColumns;
    const int first_channel = static_cast<int>(owner.remainder) * kChannels;
    const int thread = static_cast<int>(threadIdx.x);
    const int own_row = thread / Traits::kColumns;
    const int own_column = thread % Traits::kColumns;
    const std::int64_t bins = static_cast<std::int64_t>(shape.pooled_height) * shape.pooled_width;
    float sums[kChannels] = {};

    WARPLOOM_NO_UNROLL
    for (std::int64_t index = 0; index < shape.count; ++index) {
        const float* roi = static_cast<const float*>(shape.rois) + index * 5;
        if (!(roi[0] >= 0.0f) || static_cast<std::int64_t>(roi[0]) != owner.quotient) {
            continue;
        }
        const RoiAxis rows(roi[2], roi[4], shape.pooled_height, shape.height, shape);
        const RoiAxis columns(roi[1], roi[3], shape.pooled_width, shape.width, shape);
        if (misses(rows, shape.pooled_height, first_row - 1.0, first_row + Traits::kRows) ||
            misses(columns, shape.pooled_width, first_column - 1.0,
                   first_column + Traits::kColumns)) {
            continue;
        }
        device::sync_threads();  // of the region before, weights are read no more
        for (int number = thread; number < shape.pooled_height * Traits::kRows;
             number += Traits::kThreads) {
            const int row = number % Traits::kRows;
            const int bin = number / Traits::kRows;
            plan.rows[bin][row] = weight_of(rows, bin, first_row + row);
        }
        for (int number = thread; number < shape.pooled_width * Traits::kColumns;
             number += Traits::kThreads) {
            const int column = number % Traits::kColumns;
            const int bin = number / Traits::kColumns;
            plan.columns[bin][column] = weight_of(columns, bin, first_column + column);
        }
        device::sync_threads();
        const float scale = mean_scale(rows, columns);
        const T* grad_out = static_cast<const T*>(params.grad_out) +
                            (index * shape.channels + first_channel) * bins;
        WARPLOOM_NO_UNROLL
        for (int row = 0; row < shape.pooled_height; ++row) {
            const float row_weight = plan.rows[row][own_row] * scale;
            if (row_weight == 0.0f) {
                continue;
            }
            WARPLOOM_NO_UNROLL
            for (int column = 0; column < shape.pooled_width; ++column) {
                const float weight = row_weight * plan.columns[column][own_column];
                if (weight == 0.0f) {
                    continue;
                }
                WARPLOOM_UNROLL
                for (int channel = 0; channel < kChannels; ++channel) {
                    if (first_channel + channel < shape.channels) {
                        sums[channel] +=
                            weight *
                            device::to_float(
                                grad_out[channel * bins + row * shape.pooled_width + column]);
                    }
                }
            }
        }
    }

    const int row = first_row + own_row;
    const int column = first_column + own_column;
    if (row < shape.height && column < shape.width) {
        T* grad_x =
            static_cast<T*>(params.grad_x) +
            ((owner.quotient * shape.channels + first_channel) * shape.height + row) * shape.width +
            column;
        WARPLOOM_UNROLL
        for (int channel = 0; channel < kChannels; ++channel) {
            if (first_channel + channel < shape.channels) {
                grad_x[static_cast<std::int64_t>(channel) * shape.height * shape.width] =
                    device::from_float<T>(sums[channel]);
            }
        }
    }
}

}  // namespace warploom::spp
