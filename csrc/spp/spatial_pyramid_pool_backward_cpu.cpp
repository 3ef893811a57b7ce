// The gradients of spatial pyramid pooling on the CPU. Each element belongs to one thread, which
// adds to it what bins give, region after region: to zeros that it has just written, while they are
// in the cache. Means of whole images are written once: a pixel's gradient is that of its cell.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/cpu_float.h"
#include "common/cpu_loops.h"
#include "common/parallel.h"
#include "spp/pyramid_cpu.h"
#include "spp/pyramid_means_cpu.h"
#include "spp/spatial_pyramid_pool.h"

namespace warploom::spp {
namespace WARPLOOM_CPU_ISA {
namespace {

// Elements of a gradient of 16 bits that are summed at a time.
constexpr int kTile = 8192;
// Of a channels-last gradient: some of the second cache.
constexpr std::int64_t kPartBytes = 1 << 19;

// Sums of gradients of `lanes` planes, of their pixels from `begin` to `end`.
template <typename W>
struct Sums {
    W* first;
    std::int64_t pixel_stride;
    std::int64_t channel_stride;
    std::int64_t begin;
    std::int64_t end;
    std::int64_t lanes;
};

// Calls body(index) for the regions of an image, in their order.
template <typename Body>
inline void for_each_region(const SpatialPyramidPoolBackwardParams& params, std::int64_t image,
                            Body body) {
    if (!params.has_regions) {
        body(image);
        return;
    }
    for (std::int64_t index = 0; index < params.count; ++index) {
        if (params.regions[7 * index] == image) {
            body(index);
        }
    }
}

// Calls body(pixel - begin, gradient) for the bins of one channel whose maximum lies in pixels
// [begin, end).
template <typename T, typename Body>
inline void for_each_maximum(const SpatialPyramidPoolBackwardParams& params, std::int64_t image,
                             std::int64_t channel, std::int64_t begin, std::int64_t end,
                             Body body) {
    const auto size = static_cast<std::uint64_t>(end - begin);
    const auto visit = [&](std::int64_t index, const auto* argmax) {
        const T* const grad_out = static_cast<const T*>(params.grad_out);
        for (int place = 0; place < params.level_count; ++place) {
            const PyramidLevel& level = params.levels[place];
            const std::int64_t first =
                index * params.out_stride + level.offset + channel * level.channel_stride;
            const std::int64_t last = first + level.rows * level.columns;
            for (std::int64_t bin = first; bin < last; ++bin) {
                // -1, of none, is beyond the end, too.
                const auto pixel = static_cast<std::uint64_t>(argmax[bin] - begin);
                if (pixel < size) {
                    body(static_cast<std::int64_t>(pixel), widen(grad_out[bin]));
                }
            }
        }
    };
    for_each_region(params, image, [&](std::int64_t index) {
        if (params.is_narrow_index) {
            visit(index, static_cast<const std::int16_t*>(params.argmax));
        } else {
            visit(index, static_cast<const std::int32_t*>(params.argmax));
        }
    });
}

// Each bin's gradient to its maximum, where there are zeros: of 16 bits the few sums of a plane are
// made in float32, and rounded once.
template <typename T>
void add_to_maxima(const SpatialPyramidPoolBackwardParams& params, std::int64_t image,
                   std::int64_t channel, const Sums<T>& grads) {
    for (std::int64_t lane = 0; lane < grads.lanes; ++lane) {
        T* const plane = grads.first + lane * grads.channel_stride;
        const auto visit = [&](std::int64_t begin, std::int64_t end, auto body) {
            for_each_maximum<T>(params, image, channel + lane, begin, end, body);
        };
        if constexpr (std::is_same_v<T, Wide<T>>) {
            visit(grads.begin, grads.end,
                  [&](std::int64_t pixel, T grad) { plane[pixel * grads.pixel_stride] += grad; });
        } else {
            float sums[kTile];
            for (std::int64_t begin = grads.begin; begin < grads.end; begin += kTile) {
                const std::int64_t end = std::min<std::int64_t>(begin + kTile, grads.end);
                T* const tile = plane + (begin - grads.begin) * grads.pixel_stride;
                visit(begin, end, [&](std::int64_t pixel, float) { sums[pixel] = 0; });
                visit(begin, end, [&](std::int64_t pixel, float grad) { sums[pixel] += grad; });
                visit(begin, end, [&](std::int64_t pixel, float) {
                    tile[pixel * grads.pixel_stride] = narrow<T>(sums[pixel]);
                });
            }
        }
    }
}

// Each bin's gradient in equal parts to its window.
template <typename T>
void add_to_windows(const SpatialPyramidPoolBackwardParams& params, const Grid& grid,
                    std::int64_t channel, const Sums<Wide<T>>& sums) {
    using W = Wide<T>;
    W shares[kMostCuts][kNeighbours];
    for (int band = 0; band + 1 < grid.rows.cut_count; ++band) {
        share_band<T, kNeighbours>(params, grid, band, channel, sums.lanes, shares);
        for (int row = grid.rows.cuts[band]; row < grid.rows.cuts[band + 1]; ++row) {
            const std::int64_t first =
                static_cast<std::int64_t>(row) * grid.region.pitch - sums.begin;
            for (int cell = 0; cell + 1 < grid.columns.cut_count; ++cell) {
                const std::int64_t begin =
                    std::max<std::int64_t>(first + grid.columns.cuts[cell], 0);
                const std::int64_t end =
                    std::min(first + grid.columns.cuts[cell + 1], sums.end - sums.begin);
                for (std::int64_t lane = 0; sums.pixel_stride == 1 && lane < sums.lanes; ++lane) {
                    W* to = sums.first + lane * sums.channel_stride;
#pragma omp simd
                    for (std::int64_t at = begin; at < end; ++at) {
                        to[at] += shares[cell][lane];
                    }
                }
                for (std::int64_t at = begin; sums.pixel_stride != 1 && at < end; ++at) {
                    W* to = sums.first + at * sums.pixel_stride;
#pragma omp simd
                    for (std::int64_t lane = 0; lane < sums.lanes; ++lane) {
                        to[lane] += shares[cell][lane];
                    }
                }
            }
        }
    }
}

template <typename T>
void fill_zeros(const Sums<T>& sums) {
    const std::int64_t pixels = sums.end - sums.begin;
    const bool in_planes = sums.pixel_stride == 1;
    const std::int64_t stride = in_planes ? sums.channel_stride : sums.pixel_stride;
    std::int64_t runs = in_planes ? sums.lanes : pixels;
    std::int64_t run = in_planes ? pixels : sums.lanes;
    if (run == stride) {
        run *= runs;
        runs = 1;
    }
    for (std::int64_t at = 0; at < runs; ++at) {
        __builtin_memset(sums.first + at * stride, 0, static_cast<std::size_t>(run) * sizeof(T));
    }
}

// The gradient of `lanes` planes, whose image is grad_x, of pixels [begin, end): in place, or of
// means of 16 bits a tile at a time, rounded once.
template <typename T>
void pool_backward(const SpatialPyramidPoolBackwardParams& params, Grid& grid, T* grad_x,
                   std::int64_t image, std::int64_t channel, std::int64_t lanes, std::int64_t begin,
                   std::int64_t end) {
    using W = Wide<T>;
    grad_x += channel * params.channel_stride;
    const Sums<T> grads{grad_x + begin * params.pixel_stride,
                        params.pixel_stride,
                        params.channel_stride,
                        begin,
                        end,
                        lanes};
    const auto add_means = [&](const Sums<W>& sums) {
        fill_zeros(sums);
        for_each_region(params, image, [&](std::int64_t index) {
            grid.move_to(params, index);
            add_to_windows<T>(params, grid, channel, sums);
        });
    };
    if (!params.is_average) {
        fill_zeros(grads);
        add_to_maxima(params, image, channel, grads);
    } else if constexpr (std::is_same_v<T, W>) {
        add_means(grads);
    } else {
        const bool in_planes = params.pixel_stride == 1;
        float tile[kTile];
        const std::int64_t most = kTile / lanes;
        for (std::int64_t first = begin; first < end; first += most) {
            const std::int64_t last = std::min(first + most, end);
            add_means({tile, in_planes ? 1 : lanes, in_planes ? most : 1, first, last, lanes});
            const std::int64_t outer = in_planes ? lanes : last - first;
            const std::int64_t inner = in_planes ? last - first : lanes;
            for (std::int64_t at = 0; at < outer; ++at) {
                T* to = grad_x + (in_planes ? at * params.channel_stride + first
                                            : (first + at) * params.pixel_stride);
                const float* from = tile + at * (in_planes ? most : lanes);
#pragma omp simd
                for (std::int64_t index = 0; index < inner; ++index) {
                    to[index] = narrow<T>(from[index]);
                }
            }
        }
    }
}

template <typename T>
void add_all(const SpatialPyramidPoolBackwardParams& params) {
    const bool in_planes = params.pixel_stride == 1;
    const bool is_whole = !in_planes && !params.is_average;
    const std::int64_t most = is_whole ? params.channels : in_planes ? kPlanes : kNeighbours;
    const std::int64_t groups = ceil_divide(params.channels, most);
    const std::int64_t parts =
        is_whole ? ceil_divide(pixel_count(params) * most * std::int64_t{sizeof(T)}, kPartBytes)
                 : 1;
    const std::int64_t grain = 1 + kGrain * parts / (most * (1 + pixel_count(params)));
    parallel_for(params.images * groups * parts, grain, [&](std::int64_t begin, std::int64_t end) {
        Grid grid;
        for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t part = item % parts;
            const std::int64_t image = item / parts / groups;
            std::int64_t first = image * params.image_stride;
            std::int64_t pixels = static_cast<std::int64_t>(params.height) * params.width;
            if (params.offsets != nullptr) {
                first = params.offsets[image] * params.pixel_stride;
                pixels = params.offsets[image + 1] - params.offsets[image];
            }
            const std::int64_t channel = item / parts % groups * most;
            pool_backward(params, grid, static_cast<T*>(params.grad_x) + first, image, channel,
                          std::min(params.channels - channel, most), part * pixels / parts,
                          (part + 1) * pixels / parts);
        }
    });
}

}  // namespace

void spatial_pyramid_pool_backward_cpu(const SpatialPyramidPoolBackwardParams& params) {
    visit_element_type(params.dtype, [&]<typename T>() {
        if (params.is_average && !params.has_regions) {
            Grid grid;
            grid.move_to(params, 0);
            if (spans(grid.rows, params.height) && spans(grid.columns, params.width)) {
                write_all_means<T>(params, grid);
                return;
            }
        }
        add_all<T>(params);
    });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::spp
