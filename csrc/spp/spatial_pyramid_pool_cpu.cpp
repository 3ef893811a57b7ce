// Spatial pyramid pooling on the CPU: every pixel is read once for all levels. A band of rows is
// first reduced to one row of columns, these to cells between two cuts (pool_windows.h), and the
// cells go to the bins that cover them; where a level's windows are made of whole windows of a
// finer one, its maxima are taken of that level's. kLanes planes are taken at a time, each in a
// lane of a vector.
#include "spp/spatial_pyramid_pool.h"

#include <cstdint>
#include <type_traits>

#include "common/cpu_float.h"
#include "common/cpu_loops.h"
#include "common/parallel.h"
#include "spp/held_cpu.h"
#include "spp/pyramid_cpu.h"
#include "spp/small_planes_cpu.h"
#include "spp/turn_cpu.h"
#include "spp/write_bins_cpu.h"

namespace warploom::spp {
namespace WARPLOOM_CPU_ISA {
namespace {

// Channels of which all are taken at a time where that reads large images from end to end.
constexpr int kWholePixel = 256;
// Columns of a band that are taken at a time.
template <int kLanes>
constexpr int kColumns = 2048 / kLanes;
// Rows of so many pixels are reduced as vectors of them; shorter ones as vectors of planes.
constexpr int kLongRow = 32;

// Rows [begin, end) of `count` columns to columns[0, count): plane after plane, as vectors of
// columns, which are then turned.
template <typename T, Reduction kReduction, int kLanes, typename W = Wide<T>>
void reduce_rows(const Planes<T>& planes, int begin, int end, int column, int count,
                 Held<W, kLanes>* columns) {
    for (int lane = 0; lane < planes.lanes; ++lane) {
        W values[kColumns<kLanes>];
        std::int32_t places[kColumns<kLanes>];
        for (int index = 0; index < count; ++index) {
            values[index] = kNothing<kReduction, W>;
            places[index] = begin * planes.pitch;
        }
        const T* from =
            planes.first + lane * planes.channel_stride + begin * planes.row_stride + column;
        for (int row = begin; row < end; ++row, from += planes.row_stride) {
            const std::int32_t place = row * planes.pitch;
            prefetch(from + planes.channel_stride, count);
#pragma omp simd
            for (int index = 0; index < count; ++index) {
                take<kReduction>(widen(from[index]), place, values[index], places[index]);
            }
        }
        for (int index = 0; index < count; ++index) {
            columns[index].values[lane / kSide<W>][lane % kSide<W>] = values[index];
            columns[index].places[lane / kSide<W>][lane % kSide<W>] =
                places[index] + column + index;
        }
    }
}

// The same as reduce_rows as vectors of planes. Returns whether the result holds: not where a NaN
// may have been taken for a number, which there is none of where the sum is a number.
template <typename T, Reduction kReduction, bool kMayBeNan, int kLanes, typename W = Wide<T>>
[[gnu::flatten]] bool reduce_pixels(const Planes<T>& planes, int begin, int end, int column,
                                    int count, Held<W, kLanes>* columns) {
    constexpr int kVectors = Held<W, kLanes>::kVectors;
    constexpr int kSums = 4;
    Vector<W> sums[kSums] = {};
    alignas(kVectorBytes) W buffer[kColumns<kLanes> + 2 * kSide<W>][kLanes];
    W(*const turned)[kLanes] = buffer + kSide<W>;
    const bool is_dense = planes.channel_stride == 1 && planes.lanes == kLanes;
    for (int index = 0; index < count; ++index) {
        for (int part = 0; part < kVectors; ++part) {
            columns[index].values[part] = Vector<W>{} + kNothing<kReduction, W>;
            columns[index].places[part] = Indices<W>{} + (begin * planes.pitch + column + index);
        }
        for (int lane = planes.lanes; lane < kLanes; ++lane) {
            turned[index][lane] = 0;
        }
    }
    for (int row = begin; row < end; ++row) {
        const std::int64_t first = row * planes.row_stride + column * planes.pixel_stride;
        const int place = row * planes.pitch + column;
        const auto take_pixel = [&](int index, const auto* pixel) {
#pragma GCC unroll 16
            for (int part = 0; part < kVectors; ++part) {
                const Vector<W> vector = load_vector(pixel + part * kSide<W>);
                if constexpr (!kMayBeNan) {
                    sums[part % kSums] += vector;
                }
                take<kReduction, kMayBeNan>(vector, Indices<W>{} + (place + index),
                                            columns[index].values[part],
                                            columns[index].places[part]);
            }
        };
        if (is_dense) {
            for (int index = 0; index < count; ++index) {
                const T* pixel = planes.first + first + index * planes.pixel_stride;
                prefetch(pixel + planes.row_stride, kLanes);
                take_pixel(index, pixel);
            }
        } else {
            turn_row<T, kLanes, true>(planes, first, count, turned);
            for (int index = 0; index < count; ++index) {
                take_pixel(index, turned[index]);
            }
        }
    }
    return !is_nan((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The cells of one band of rows: cells[c] of columns from cut c to cut c + 1.
template <typename T, Reduction kReduction, int kLanes, typename W = Wide<T>>
void reduce_band(const Planes<T>& planes, int begin, int end, const PoolAxis& axis,
                 Held<W, kLanes>* columns, Held<W, kLanes>* cells) {
    const int first = axis.cuts[0];
    const int last = axis.cuts[axis.cut_count - 1];
    const bool in_rows = planes.pixel_stride == 1 && last - first >= kLongRow;
    int cell = 0;
    for (int column = first; column < last; column += kColumns<kLanes>) {
        const int count = last - column < kColumns<kLanes> ? last - column : kColumns<kLanes>;
        if (in_rows) {
            reduce_rows<T, kReduction, kLanes>(planes, begin, end, column, count, columns);
        } else {
            constexpr bool kMayBeNan = kReduction == Reduction::sum;
            if (!reduce_pixels<T, kReduction, kMayBeNan, kLanes>(planes, begin, end, column, count,
                                                                 columns)) {
                reduce_pixels<T, kReduction, true, kLanes>(planes, begin, end, column, count,
                                                           columns);
            }
        }
        for (int index = 0; index < count; ++index) {
            cell += column + index == axis.cuts[cell + 1];
            if (column + index == axis.cuts[cell]) {
                cells[cell] = columns[index];
            } else {
                combine<kReduction>(cells[cell], columns[index], cells[cell]);
            }
        }
    }
}

// What one band gives to the bins of a level, whose first is bins[0].
template <Reduction kReduction, typename W, int kLanes>
void add_band(const Grid& grid, const PyramidLevel& level, const LevelPlace& first, int band,
              const Held<W, kLanes>* cells, Held<W, kLanes>* bins) {
    for (int column = 0; column < level.columns; ++column) {
        const int first_cell = grid.columns.first_band[first.column + column];
        const int last_cell = grid.columns.last_band[first.column + column];
        if (first_cell == last_cell) {
            continue;
        }
        Held<W, kLanes> several;
        const Held<W, kLanes>* piece = &cells[first_cell];
        for (int cell = first_cell + 1; cell < last_cell; ++cell, piece = &several) {
            combine<kReduction>(*piece, cells[cell], several);
        }
        for (int row = 0; row < level.rows; ++row) {
            Held<W, kLanes>& bin = bins[row * level.columns + column];
            if (!covers(grid.rows, first.row + row, band)) {
                continue;
            }
            if (grid.rows.first_band[first.row + row] == band) {
                bin = *piece;
            } else {
                combine<kReduction>(bin, *piece, bin);
            }
        }
    }
}

// The maxima of a level's bins, each of whole bins of a finer one.
template <Reduction kReduction, typename W, int kLanes>
void join_bins(const PyramidLevel& level, const PyramidLevel& finer,
               const Held<W, kLanes>* finer_bins, Held<W, kLanes>* bins) {
    const int down = finer.rows / level.rows;
    const int across = finer.columns / level.columns;
    for (int row = 0; row < level.rows; ++row, finer_bins += down * finer.columns) {
        for (int column = 0; column < level.columns; ++column, ++bins) {
            const Held<W, kLanes>* piece = finer_bins + column * across;
            *bins = *piece;
            for (int y = 0; y < down; ++y, piece += finer.columns) {
                for (int x = y == 0 ? 1 : 0; x < across; ++x) {
                    combine<kReduction>(*bins, piece[x], *bins);
                }
            }
        }
    }
}

// The bins of all levels that are not made of others', band after band.
template <typename T, Reduction kReduction, int kLanes, typename W = Wide<T>>
void pool_bands(const SpatialPyramidPoolParams& params, const Grid& grid, const Planes<T>& planes,
                Held<W, kLanes>* bins) {
    Held<W, kLanes> cells[kMostCuts];
    Held<W, kLanes> columns[kColumns<kLanes>];
    for (int band = 0; grid.columns.cut_count > 0 && band + 1 < grid.rows.cut_count; ++band) {
        bool is_covered = false;
        for (int row = 0; row < grid.rows.window_count; ++row) {
            is_covered |= covers(grid.rows, row, band);
        }
        if (!is_covered) {
            continue;
        }
        reduce_band<T, kReduction, kLanes>(planes, grid.rows.cuts[band], grid.rows.cuts[band + 1],
                                           grid.columns, columns, cells);
        for (int place = 0; place < params.level_count; ++place) {
            if (finer_of<kReduction>(grid, place) < 0) {
                const LevelPlace& first = grid.places[place];
                add_band<kReduction>(grid, params.levels[place], first, band, cells,
                                     bins + first.bin);
            }
        }
    }
}

// One region of kLanes planes, from channel `channel` on.
template <typename T, Reduction kReduction, int kLanes>
void pool(const SpatialPyramidPoolParams& params, const Grid& grid, std::int64_t channel) {
    using W = Wide<T>;
    const PoolRegion& region = grid.region;
    const std::int64_t rest = params.channels - channel;
    const std::int64_t size =
        (region.height - 1) * region.row_stride + (region.width - 1) * params.pixel_stride + 1;
    const Planes<T> planes{
        static_cast<const T*>(params.x) + region.first + channel * params.channel_stride,
        static_cast<int>(rest < kLanes ? rest : kLanes),
        region.pitch,
        region.row_stride,
        params.pixel_stride,
        params.channel_stride,
        size};
    Held<W, kLanes> bins[kMostBins * kMostBins];
    if constexpr (kLanes == kPlanes) {
        if (is_small<T>(planes, grid)) {
            pool_small<T, kReduction>(params, grid, planes, bins);
        } else {
            pool_bands<T, kReduction>(params, grid, planes, bins);
        }
    } else {
        pool_bands<T, kReduction>(params, grid, planes, bins);
    }
    for (int place = params.level_count - 1; place >= 0; --place) {
        const PyramidLevel& level = params.levels[place];
        const LevelPlace& first = grid.places[place];
        const int finer = finer_of<kReduction>(grid, place);
        if (finer >= 0) {
            join_bins<kReduction>(level, params.levels[finer], bins + grid.places[finer].bin,
                                  bins + first.bin);
        }
        const std::int64_t to =
            grid.index * params.out_stride + level.offset + channel * level.channel_stride;
        write_bins<kReduction, T, kLanes>(params, grid, level, first, planes.lanes, to,
                                          bins + first.bin);
    }
}

}  // namespace

void spatial_pyramid_pool_cpu(const SpatialPyramidPoolParams& params) {
    const auto run = [&]<typename T, Reduction kReduction, int kLanes>() {
        const std::int64_t groups = ceil_divide(params.channels, kLanes);
        const std::int64_t grain = 1 + kGrain / (kLanes * (1 + pixel_count(params)));
        parallel_for(params.count * groups, grain, [&](std::int64_t begin, std::int64_t end) {
            Grid grid;
            for (std::int64_t item = begin; item < end; ++item) {
                grid.move_to(params, item / groups);
                pool<T, kReduction, kLanes>(params, grid, item % groups * kLanes);
            }
        });
    };
    const auto run_lanes = [&]<typename T, Reduction kReduction>() {
        if (params.channel_stride == 1 && params.channels == kWholePixel &&
            params.width >= kLongRow) {
            run.template operator()<T, kReduction, kWholePixel>();
        } else if (params.channel_stride == 1 && params.channels >= kNeighbours) {
            run.template operator()<T, kReduction, kNeighbours>();
        } else {
            run.template operator()<T, kReduction, kPlanes>();
        }
    };
    visit_element_type(params.dtype, [&]<typename T>() {
        if (params.is_average) {
            run_lanes.template operator()<T, Reduction::sum>();
        } else if (params.argmax == nullptr) {
            run_lanes.template operator()<T, Reduction::max>();
        } else {
            run_lanes.template operator()<T, Reduction::indexed_max>();
        }
    });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::spp
