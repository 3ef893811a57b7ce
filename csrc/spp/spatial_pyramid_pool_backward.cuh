// The gradient of spatial pyramid pooling, in one write.
//
//   grid [images * groups, tiles by a stride of the grid], a group being 32 planes of one image. A
//   warp owns the pixels of a tile of 32 planes: it sums what all regions of the image give them,
//   each lane one plane in the order of regions and bins, and writes them once. No atomics.
#pragma once

#include "spatial_pyramid_pool.cuh"

namespace warploom::spp {

inline constexpr int kGradientTile = 64;  // pixels
inline constexpr int kGradientWarps = 4;

struct TilePlan {
    float sums[kGradientTile]
              [kWarpSize + 1];  // (pixel, plane), columns of no common bank either way
    PoolAxis rows;
    PoolAxis columns;
};

struct PyramidBackwardPlan {
    TilePlan warps[kGradientWarps];
};

// Of one region, to this lane's plane: each bin's gradient to its maximum.
template <typename T>
WARPLOOM_DEVICE void add_to_maxima(const SpatialPyramidPoolBackwardParams& params,
                                   std::int64_t index, std::int64_t channel, std::int64_t begin,
                                   TilePlan& plan) {
    for (int place = 0; place < params.level_count; ++place) {
        const PyramidLevel& level = params.levels[place];
        const std::int64_t first =
            index * params.out_stride + level.offset + channel * level.channel_stride;
        for (int bin = 0; bin < level.rows * level.columns; ++bin) {
            const std::int64_t pixel =
                params.is_narrow_index
                    ? static_cast<const std::int16_t*>(params.argmax)[first + bin]
                    : static_cast<const std::int32_t*>(params.argmax)[first + bin];
            if (pixel >= begin && pixel < begin + kGradientTile) {
                plan.sums[pixel - begin][lane_index()] +=
                    to_float(static_cast<const T*>(params.grad_out)[first + bin]);
            }
        }
    }
}

// What the pixels of cell (band, cell) get: of each bin that covers it an equal part of its
// gradient.
template <typename T>
WARPLOOM_DEVICE float share_of_cell(const SpatialPyramidPoolBackwardParams& params,
                                    const T* grad_out, std::int64_t channel, int band, int cell,
                                    const TilePlan& plan) {
    float share = 0.0f;
    BinWindows before{0, 0};
    for (int place = 0; place < params.level_count; ++place) {
        const PyramidLevel& level = params.levels[place];
        const T* grads = grad_out + level.offset + channel * level.channel_stride;
        for (int row = 0; row < level.rows; ++row) {
            if (!covers(plan.rows, before.row + row, band)) {
                continue;
            }
            const auto height = static_cast<float>(plan.rows.windows[before.row + row].span);
            for (int column = 0; column < level.columns; ++column) {
                if (covers(plan.columns, before.column + column, cell)) {
                    const auto width =
                        static_cast<float>(plan.columns.windows[before.column + column].span);
                    share += to_float(grads[row * level.columns + column]) / (height * width);
                }
            }
        }
        before.row += level.rows;
        before.column += level.columns;
    }
    return share;
}

// Each bin's gradient in equal parts to its window.
template <typename T>
WARPLOOM_DEVICE void add_to_windows(const SpatialPyramidPoolBackwardParams& params,
                                    const PoolRegion& region, std::int64_t index,
                                    std::int64_t channel, std::int64_t begin, TilePlan& plan) {
    const T* grad_out = static_cast<const T*>(params.grad_out) + index * params.out_stride;
    for (int band = 0; band + 1 < plan.rows.cut_count; ++band) {
        const std::int64_t first_row = plan.rows.cuts[band];
        const std::int64_t last_row = plan.rows.cuts[band + 1];
        if (last_row * region.pitch <= begin || first_row * region.pitch >= begin + kGradientTile) {
            continue;
        }
        for (int cell = 0; cell + 1 < plan.columns.cut_count; ++cell) {
            const float share = share_of_cell(params, grad_out, channel, band, cell, plan);
            for (std::int64_t row = first_row; row < last_row; ++row) {
                const std::int64_t left = row * region.pitch - begin;
                const int first = clip(left + plan.columns.cuts[cell], kGradientTile);
                const int last = clip(left + plan.columns.cuts[cell + 1], kGradientTile);
                for (int pixel = first; pixel < last; ++pixel) {
                    plan.sums[pixel][lane_index()] += share;
                }
            }
        }
    }
}

template <typename T>
WARPLOOM_KERNEL(kGradientWarps* kWarpSize, 1)
spatial_pyramid_pool_backward_kernel(
    WARPLOOM_GRID_CONSTANT SpatialPyramidPoolBackwardParams params) {
    TilePlan& plan = shared_memory<PyramidBackwardPlan>().warps[warp_index()];
    const int lane = lane_index();
    const Division item = divide(blockIdx.x, (params.channels + kWarpSize - 1) / kWarpSize);
    const std::int64_t image = item.quotient;
    const std::int64_t channel = item.remainder * kWarpSize;
    const std::int64_t rest = params.channels - channel;
    const int lanes = rest < kWarpSize ? static_cast<int>(rest) : kWarpSize;
    std::int64_t first = image * params.image_stride;
    std::int64_t pixels = static_cast<std::int64_t>(params.height) * params.width;
    if (params.offsets != nullptr) {
        first = params.offsets[image] * params.pixel_stride;
        pixels = params.offsets[image + 1] - params.offsets[image];
    }
    T* grad_x = static_cast<T*>(params.grad_x) + first + channel * params.channel_stride;
    const std::int64_t begin_index = params.has_regions ? 0 : image;
    const std::int64_t end_index = params.has_regions ? params.count : image + 1;
    const std::int64_t step = static_cast<std::int64_t>(gridDim.y) * kGradientWarps * kGradientTile;
    for (std::int64_t begin =
             (blockIdx.y * std::int64_t{kGradientWarps} + warp_index()) * kGradientTile;
         begin < pixels; begin += step) {
        for (int pixel = 0; pixel < kGradientTile; ++pixel) {
            plan.sums[pixel][lane] = 0.0f;
        }
        for (std::int64_t index = begin_index; index < end_index; ++index) {
            const PoolRegion region = pool_region(params, index);
            if (region.image != image) {
                continue;
            }
            if (params.is_average) {
                if (lane < 2) {
                    build_axis(lane == 0 ? plan.rows : plan.columns, params, region, lane == 0);
                }
                sync_warp();
            }
            if (params.is_average && lane < lanes) {
                add_to_windows<T>(params, region, index, channel + lane, begin, plan);
            } else if (lane < lanes) {
                add_to_maxima<T>(params, index, channel + lane, begin, plan);
            }
            sync_warp();
        }
        sync_warp();
        const int count =
            pixels - begin < kGradientTile ? static_cast<int>(pixels - begin) : kGradientTile;
        if (params.pixel_stride == 1) {
            for (int plane = 0; plane < lanes; ++plane) {
                for (int pixel = lane; pixel < count; pixel += kWarpSize) {
                    grad_x[plane * params.channel_stride + begin + pixel] =
                        from_float<T>(plan.sums[pixel][plane]);
                }
            }
        } else if (lane < lanes) {
            for (int pixel = 0; pixel < count; ++pixel) {
                grad_x[(begin + pixel) * params.pixel_stride + lane * params.channel_stride] =
                    from_float<T>(plan.sums[pixel][lane]);
            }
        }
        sync_warp();
    }
}

}  // namespace warploom::spp
