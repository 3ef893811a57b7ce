// The gradient of means. Included by <op>_cpu.cpp only (see common/cpu.h on namespaces).
//
// Means of whole images are written once: a pixel's gradient is that of its cell.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/parallel.h"
#include "spp/pyramid_cpu.h"
#include "spp/spatial_pyramid_pool.h"
#include "spp/turn_cpu.h"
#include "spp/write_bins_cpu.h"

namespace warploom::spp {
namespace WARPLOOM_CPU_ISA {

// Neighbouring channels that are written one after the other.
constexpr int kRun = 256;

// What each pixel of a bin's window gets of it: share[lane].
template <typename T, typename Lanes, typename W = Wide<T>>
inline void share_bin(const SpatialPyramidPoolBackwardParams& params, const Grid& grid, int place,
                      int bin, std::int64_t channel, Lanes lanes, W* share) {
    const PyramidLevel& level = params.levels[place];
    const LevelPlace& first = grid.places[place];
    const W area = static_cast<W>(grid.rows.windows[first.row + bin / level.columns].span) *
                   static_cast<W>(grid.columns.windows[first.column + bin % level.columns].span);
    const T* from = static_cast<const T*>(params.grad_out) + grid.index * params.out_stride +
                    level.offset + channel * level.channel_stride + bin;
    for (int lane = 0; lane < lanes; ++lane) {
        share[lane] = widen(from[lane * level.channel_stride]);
    }
#pragma omp simd
    for (int lane = 0; lane < lanes; ++lane) {
        share[lane] /= area;
    }
}

// What each pixel of a band of rows gets of all bins, in their order: shares[cell][lane].
// share_of(place, bin) is a bin's share.
template <int kLanes, typename Lanes, typename ShareOf, typename W>
inline void add_shares(const SpatialPyramidPoolBackwardParams& params, const Grid& grid, int band,
                       Lanes lanes, ShareOf share_of, W (*shares)[kLanes]) {
    for (int cell = 0; cell + 1 < grid.columns.cut_count; ++cell) {
        std::fill_n(shares[cell], lanes, W{0});
    }
    for (int place = 0; place < params.level_count; ++place) {
        const PyramidLevel& level = params.levels[place];
        const LevelPlace& first = grid.places[place];
        for (int row = 0; row < level.rows; ++row) {
            if (!covers(grid.rows, first.row + row, band)) {
                continue;
            }
            for (int column = 0; column < level.columns; ++column) {
                const W* const share = share_of(place, row * level.columns + column);
                for (int cell = grid.columns.first_band[first.column + column];
                     cell < grid.columns.last_band[first.column + column]; ++cell) {
#pragma omp simd
                    for (int lane = 0; lane < lanes; ++lane) {
                        shares[cell][lane] += share[lane];
                    }
                }
            }
        }
    }
}

// The same, each share made where it is added.
template <typename T, int kLanes, typename Lanes, typename W = Wide<T>>
inline void share_band(const SpatialPyramidPoolBackwardParams& params, const Grid& grid, int band,
                       std::int64_t channel, Lanes lanes, W (*shares)[kLanes]) {
    W share[kLanes];
    const auto share_of = [&](int place, int bin) {
        share_bin<T>(params, grid, place, bin, channel, lanes, share);
        return share;
    };
    add_shares(params, grid, band, lanes, share_of, shares);
}

// The gradient of means of a whole image, of one band of its rows and `lanes` planes.
template <typename T, int kLanes, typename Lanes>
void write_means(const SpatialPyramidPoolBackwardParams& params, const Grid& grid, int band,
                 std::int64_t channel, Lanes lanes) {
    Wide<T> shares[kMostCuts][kLanes];
    T gradients[kMostCuts][kLanes];
    share_band<T>(params, grid, band, channel, lanes, shares);
    const int cells = grid.columns.cut_count - 1;
    const int* const cuts = grid.columns.cuts;
    for (int cell = 0; cell < cells; ++cell) {
#pragma omp simd
        for (int lane = 0; lane < lanes; ++lane) {
            gradients[cell][lane] = narrow<T>(shares[cell][lane]);
        }
    }
    T* const grad_x =
        static_cast<T*>(params.grad_x) + grid.region.first + channel * params.channel_stride;
    const int begin = grid.rows.cuts[band];
    const int end = grid.rows.cuts[band + 1];
    for (int lane = 0; params.pixel_stride == 1 && lane < lanes; ++lane) {
        T* to = grad_x + lane * params.channel_stride + begin * params.row_stride;
        for (int cell = 0; cell < cells; ++cell) {
            std::fill(to + cuts[cell], to + cuts[cell + 1], gradients[cell][lane]);
        }
        for (int row = begin + 1; row < end; ++row) {
            __builtin_memcpy(to + (row - begin) * params.row_stride, to,
                             static_cast<std::size_t>(params.width) * sizeof(T));
        }
    }
    for (int row = begin; params.pixel_stride != 1 && row < end; ++row) {
        for (int cell = 0; cell < cells; ++cell) {
            for (int column = cuts[cell]; column < cuts[cell + 1]; ++column) {
                T* to = grad_x + row * params.row_stride + column * params.pixel_stride;
                std::copy_n(gradients[cell], lanes, to);
            }
        }
    }
}

// The same of all bands where a row is no longer than a vector: whole vectors are written, in the
// order of memory, and what goes beyond a row is written again.
template <typename T, typename Lanes, typename W = Wide<T>>
void write_narrow_means(const SpatialPyramidPoolBackwardParams& params, const Grid& grid,
                        std::int64_t channel, Lanes lanes) {
    constexpr int kBlock = kSide<W>;
    const PoolAxis& across = grid.columns;
    const int bands = grid.rows.cut_count - 1;
    // A bin gives to several bands.
    W of_bin[kMostBins * kMostBins][kPlanes];
    for (int place = 0; place < params.level_count; ++place) {
        const PyramidLevel& level = params.levels[place];
        for (int bin = 0; bin < level.rows * level.columns; ++bin) {
            share_bin<T>(params, grid, place, bin, channel, lanes,
                         of_bin[grid.places[place].bin + bin]);
        }
    }
    const auto share_of = [&](int place, int bin) { return of_bin[grid.places[place].bin + bin]; };
    T rows[kMostCuts][kPlanes][kBlock];
    W shares[kMostCuts][kPlanes] = {};
    for (int band = 0; band < bands; ++band) {
        add_shares(params, grid, band, lanes, share_of, shares);
        for (int part = 0; part < kPlanes; part += kBlock) {
            Vector<W> columns[kBlock];
            int cell = 0;
            for (int column = 0; column < kBlock; ++column) {
                cell += cell + 2 < across.cut_count && column == across.cuts[cell + 1] ? 1 : 0;
                columns[column] = load_vector(shares[cell] + part);
            }
            transpose<W>(columns);
            for (int lane = 0; lane < kBlock; ++lane) {
                write_vector<T>(columns[lane], rows[band][part + lane]);
            }
        }
    }
    T* const grad_x =
        static_cast<T*>(params.grad_x) + grid.region.first + channel * params.channel_stride;
    const std::int64_t end =
        (lanes - 1) * params.channel_stride + params.height * params.row_stride;
    for (int lane = 0; lane < lanes; ++lane) {
        std::int64_t to = lane * params.channel_stride;
        for (int band = 0; band < bands; ++band) {
            const T* const from = rows[band][lane];
            for (int row = grid.rows.cuts[band]; row < grid.rows.cuts[band + 1]; ++row) {
                if (to + kBlock <= end) {
                    __builtin_memcpy(grad_x + to, from, sizeof(rows[band][lane]));
                } else {
                    std::copy_n(from, params.width, grad_x + to);
                }
                to += params.row_stride;
            }
        }
    }
}

// Of all images, each given to body(grid, first channel, lanes, part) in `parts`.
template <int kLanes, typename Body>
void for_each_planes(const SpatialPyramidPoolBackwardParams& params, const Grid& first_grid,
                     std::int64_t parts, Body body) {
    const std::int64_t groups = ceil_divide(params.channels, kLanes);
    const std::int64_t pixels = static_cast<std::int64_t>(params.height) * params.width;
    const std::int64_t grain = 1 + kGrain * parts / (kLanes * (1 + pixels));
    parallel_for(params.images * groups * parts, grain, [&](std::int64_t begin, std::int64_t end) {
        Grid grid = first_grid;
        for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t group = item / parts;
            const std::int64_t channel = group % groups * kLanes;
            const int part = static_cast<int>(item % parts);
            grid.move_to(params, group / groups);
            if (params.channels - channel >= kLanes) {
                body(grid, channel, std::integral_constant<int, kLanes>(), part);
            } else {
                body(grid, channel, static_cast<int>(params.channels - channel), part);
            }
        }
    });
}

template <typename T>
void write_all_means(const SpatialPyramidPoolBackwardParams& params, const Grid& first_grid) {
    const int bands = first_grid.rows.cut_count - 1;
    if (params.pixel_stride != 1) {
        for_each_planes<kRun>(params, first_grid, bands,
                              [&](const Grid& grid, std::int64_t channel, auto lanes, int band) {
                                  write_means<T, kRun>(params, grid, band, channel, lanes);
                              });
    } else if (params.width > kSide<Wide<T>>) {
        for_each_planes<kPlanes>(params, first_grid, bands,
                                 [&](const Grid& grid, std::int64_t channel, auto lanes, int band) {
                                     write_means<T, kPlanes>(params, grid, band, channel, lanes);
                                 });
    } else {
        for_each_planes<kPlanes>(params, first_grid, 1,
                                 [&](const Grid& grid, std::int64_t channel, auto lanes, int) {
                                     write_narrow_means<T>(params, grid, channel, lanes);
                                 });
    }
}

// Whether windows lie from the first to the last place of an axis.
inline bool spans(const PoolAxis& axis, int extent) {
    return axis.cut_count > 0 && axis.cuts[0] == 0 && axis.cuts[axis.cut_count - 1] == extent;
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::spp
