// Spatial pyramid pooling on the CPU: every pixel is read once for all levels. A band of rows is
// first reduced to one row of columns, these to cells between two cuts (pool_windows.h), and the
// cells go to the bins that cover them. From the columns on, kLanes planes are taken at a time,
// each in a lane of a vector.
#include "spp/spatial_pyramid_pool.h"

#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/cpu_float.h"
#include "common/cpu_loops.h"
#include "common/parallel.h"
#include "spp/pool_windows.h"

namespace warploom::spp {
namespace WARPLOOM_CPU_ISA {
namespace {

using namespace ::warploom::WARPLOOM_CPU_ISA;

// Planes that are taken at a time: as many as make a vector, or where a pixel's channels are
// neighbours some lines of the cache.
constexpr int kPlanes = 16;
constexpr int kNeighbours = 64;
// Columns of a band that are taken at a time.
template <int kLanes>
constexpr int kColumns = 2048 / kLanes;
// Rows of so many pixels are reduced as vectors of them; shorter ones as vectors of planes.
constexpr int kLongRow = 32;
// Elements of a gradient of 16 bits that are summed at a time.
constexpr int kTile = 8192;
// Elements that are worth waking a thread for.
constexpr std::int64_t kGrain = 32768;

struct Grid {
    PoolRegion region;
    PoolAxis rows;
    PoolAxis columns;

    Grid(const PyramidParams& params, std::int64_t index) : region(pool_region(params, index)) {
        build_axis(rows, params, region, true);
        build_axis(columns, params, region, false);
    }
};

// Calls visit(level, bin of the level, its row among all windows, its column, number of the bin).
template <typename Visit>
void for_each_bin(const PyramidParams& params, Visit visit) {
    int first_row = 0;
    int first_column = 0;
    int number = 0;
    for (int place = 0; place < params.level_count; ++place) {
        const PyramidLevel& level = params.levels[place];
        for (int bin = 0; bin < level.rows * level.columns; ++bin) {
            visit(level, bin, first_row + bin / level.columns, first_column + bin % level.columns,
                  number++);
        }
        first_row += level.rows;
        first_column += level.columns;
    }
}

enum class Reduction { sum, max, indexed_max };

// What is held of a window, of each plane, so far: its maximum and the pixel, or its sum.
template <typename W, int kLanes>
struct alignas(64) Held {
    W values[kLanes];
    std::int32_t places[kLanes];
};

template <Reduction kReduction, typename W>
constexpr W kNothing = kReduction == Reduction::sum ? W{0} : -std::numeric_limits<W>::infinity();

// Pixels come in order: of equal ones the first stays, of NaN the last.
template <Reduction kReduction, typename W>
inline void take(W value, std::int32_t place, W& held, std::int32_t& held_place) {
    if constexpr (kReduction == Reduction::sum) {
        held += value;
    } else {
        const bool is_taken = (value > held) | (value != value);
        held = is_taken ? value : held;
        if constexpr (kReduction == Reduction::indexed_max) {
            held_place = is_taken ? place : held_place;
        }
    }
}

// The same of pixels that come in any order.
template <Reduction kReduction, typename W, int kLanes>
inline void combine(const Held<W, kLanes>& from, Held<W, kLanes>& to) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
        const W value = from.values[lane];
        const W held = to.values[lane];
        if constexpr (kReduction == Reduction::sum) {
            to.values[lane] = held + value;
        } else if constexpr (kReduction == Reduction::max) {
            to.values[lane] = ((value > held) | (value != value)) ? value : held;
        } else {
            const std::int32_t place = from.places[lane];
            const std::int32_t held_place = to.places[lane];
            const bool is_taken = (value > held) | ((value == held) & (place < held_place)) |
                                  ((value != value) & ((held == held) | (place > held_place)));
            to.values[lane] = is_taken ? value : held;
            to.places[lane] = is_taken ? place : held_place;
        }
    }
}

// Some planes of one image, a lane each.
template <typename T>
struct Planes {
    const T* first;
    int lanes;
    int pitch;
    std::int64_t row_stride;
    std::int64_t pixel_stride;
    std::int64_t channel_stride;
};

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
            columns[index].values[lane] = values[index];
            columns[index].places[lane] = places[index] + column + index;
        }
    }
}

// The same as vectors of planes.
template <typename T, Reduction kReduction, int kLanes, typename W = Wide<T>>
void reduce_pixels(const Planes<T>& planes, int begin, int end, int column, int count,
                   Held<W, kLanes>* columns) {
    W turned[kColumns<kLanes>][kLanes];
    const bool is_dense = planes.channel_stride == 1 && planes.lanes == kLanes;
    for (int index = 0; index < count; ++index) {
        for (int lane = 0; lane < kLanes; ++lane) {
            columns[index].values[lane] = kNothing<kReduction, W>;
            columns[index].places[lane] = begin * planes.pitch + column + index;
            turned[index][lane] = 0;
        }
    }
    for (int row = begin; row < end; ++row) {
        const T* from = planes.first + row * planes.row_stride + column * planes.pixel_stride;
        for (int lane = 0; !is_dense && lane < planes.lanes; ++lane) {
            const T* plane = from + lane * planes.channel_stride;
            for (int index = 0; index < count; ++index) {
                turned[index][lane] = widen(plane[index * planes.pixel_stride]);
            }
        }
        for (int index = 0; index < count; ++index) {
            Held<W, kLanes>& held = columns[index];
            const std::int32_t place = row * planes.pitch + column + index;
            const T* pixel = from + index * planes.pixel_stride;
            if (is_dense) {
                prefetch(pixel + planes.row_stride, kLanes);
#pragma omp simd
                for (int lane = 0; lane < kLanes; ++lane) {
                    take<kReduction>(widen(pixel[lane]), place, held.values[lane],
                                     held.places[lane]);
                }
            } else {
#pragma omp simd
                for (int lane = 0; lane < kLanes; ++lane) {
                    take<kReduction>(turned[index][lane], place, held.values[lane],
                                     held.places[lane]);
                }
            }
        }
    }
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
            reduce_pixels<T, kReduction, kLanes>(planes, begin, end, column, count, columns);
        }
        for (int index = 0; index < count; ++index) {
            cell += column + index == axis.cuts[cell + 1];
            if (column + index == axis.cuts[cell]) {
                cells[cell] = columns[index];
            } else {
                combine<kReduction>(columns[index], cells[cell]);
            }
        }
    }
}

// One region of kLanes planes, from channel `channel` on.
template <typename T, Reduction kReduction, int kLanes>
void pool(const SpatialPyramidPoolParams& params, std::int64_t index, std::int64_t channel) {
    using W = Wide<T>;
    const Grid grid(params, index);
    const PoolRegion& region = grid.region;
    const std::int64_t rest = params.channels - channel;
    const Planes<T> planes{
        static_cast<const T*>(params.x) + region.first + channel * params.channel_stride,
        static_cast<int>(rest < kLanes ? rest : kLanes),
        region.pitch,
        region.row_stride,
        params.pixel_stride,
        params.channel_stride};
    Held<W, kLanes> bins[kMostBins * kMostBins];
    Held<W, kLanes> cells[kMostCuts];
    Held<W, kLanes> columns[kColumns<kLanes>] = {};
    const bool is_empty = grid.columns.cut_count == 0;
    for (int band = 0; !is_empty && band + 1 < grid.rows.cut_count; ++band) {
        bool is_covered = false;
        for (int row = 0; row < grid.rows.window_count; ++row) {
            is_covered |= covers(grid.rows, row, band);
        }
        if (!is_covered) {
            continue;
        }
        reduce_band<T, kReduction, kLanes>(planes, grid.rows.cuts[band], grid.rows.cuts[band + 1],
                                           grid.columns, columns, cells);
        int first_row = 0;
        int first_column = 0;
        int first_bin = 0;
        for (int place = 0; place < params.level_count; ++place) {
            const PyramidLevel& level = params.levels[place];
            for (int column = 0; column < level.columns; ++column) {
                const int first_cell = grid.columns.first_band[first_column + column];
                const int last_cell = grid.columns.last_band[first_column + column];
                if (first_cell == last_cell) {
                    continue;
                }
                Held<W, kLanes> piece = cells[first_cell];
                for (int cell = first_cell + 1; cell < last_cell; ++cell) {
                    combine<kReduction>(cells[cell], piece);
                }
                for (int row = 0; row < level.rows; ++row) {
                    Held<W, kLanes>& bin = bins[first_bin + row * level.columns + column];
                    if (grid.rows.first_band[first_row + row] == band &&
                        covers(grid.rows, first_row + row, band)) {
                        bin = piece;
                    } else if (covers(grid.rows, first_row + row, band)) {
                        combine<kReduction>(piece, bin);
                    }
                }
            }
            first_row += level.rows;
            first_column += level.columns;
            first_bin += level.rows * level.columns;
        }
    }
    for_each_bin(params, [&](const PyramidLevel& level, int bin, int row, int column, int number) {
        const PoolWindow& down = grid.rows.windows[row];
        const PoolWindow& across = grid.columns.windows[column];
        const bool has_pixels = down.begin < down.end && across.begin < across.end;
        const W area = static_cast<W>(down.span) * static_cast<W>(across.span);
        std::int64_t to =
            index * params.out_stride + level.offset + channel * level.channel_stride + bin;
        for (int lane = 0; lane < planes.lanes; ++lane, to += level.channel_stride) {
            W value = has_pixels ? bins[number].values[lane] : W{0};
            if (kReduction == Reduction::sum && has_pixels) {
                value /= area;
            }
            static_cast<T*>(params.out)[to] = narrow<T>(value);
            if constexpr (kReduction == Reduction::indexed_max) {
                const std::int32_t place = has_pixels ? bins[number].places[lane] : -1;
                if (params.is_narrow_index) {
                    static_cast<std::int16_t*>(params.argmax)[to] =
                        static_cast<std::int16_t>(place);
                } else {
                    static_cast<std::int32_t*>(params.argmax)[to] = place;
                }
            }
        }
    });
}

// Sums of gradients of `lanes` planes, of their pixels from `begin` to `end`.
template <typename W>
struct Sums {
    W* first;
    std::int64_t pixel_stride;
    std::int64_t channel_stride;
    std::int64_t begin;
    std::int64_t end;
    int lanes;
};

// Each bin's gradient to its maximum.
template <typename T, typename Index>
void add_to_maxima(const SpatialPyramidPoolBackwardParams& params, std::int64_t index,
                   std::int64_t channel, const Sums<Wide<T>>& sums) {
    const T* grad_out = static_cast<const T*>(params.grad_out) + index * params.out_stride;
    const Index* argmax = static_cast<const Index*>(params.argmax) + index * params.out_stride;
    for (int place = 0; place < params.level_count; ++place) {
        const PyramidLevel& level = params.levels[place];
        std::int64_t from = level.offset + channel * level.channel_stride;
        for (int lane = 0; lane < sums.lanes; ++lane, from += level.channel_stride) {
            for (int bin = 0; bin < level.rows * level.columns; ++bin) {
                const std::int64_t pixel = argmax[from + bin];
                if (pixel >= sums.begin && pixel < sums.end) {
                    sums.first[(pixel - sums.begin) * sums.pixel_stride +
                               lane * sums.channel_stride] += widen(grad_out[from + bin]);
                }
            }
        }
    }
}

// Each bin's gradient in equal parts to its window: what a cell gets of all bins, to its pixels.
template <typename T>
void add_to_windows(const SpatialPyramidPoolBackwardParams& params, std::int64_t index,
                    std::int64_t channel, const Sums<Wide<T>>& sums) {
    using W = Wide<T>;
    const Grid grid(params, index);
    const T* grad_out = static_cast<const T*>(params.grad_out) + index * params.out_stride;
    for (int band = 0; band + 1 < grid.rows.cut_count; ++band) {
        for (int cell = 0; cell + 1 < grid.columns.cut_count; ++cell) {
            W share[kNeighbours] = {};
            for_each_bin(params, [&](const PyramidLevel& level, int bin, int row, int column, int) {
                if (covers(grid.rows, row, band) && covers(grid.columns, column, cell)) {
                    const W area = static_cast<W>(grid.rows.windows[row].span) *
                                   static_cast<W>(grid.columns.windows[column].span);
                    const T* from = grad_out + level.offset + channel * level.channel_stride + bin;
                    for (int lane = 0; lane < sums.lanes; ++lane) {
                        share[lane] += widen(from[lane * level.channel_stride]) / area;
                    }
                }
            });
            for (int row = grid.rows.cuts[band]; row < grid.rows.cuts[band + 1]; ++row) {
                const std::int64_t first =
                    static_cast<std::int64_t>(row) * grid.region.pitch - sums.begin;
                std::int64_t pixel = first + grid.columns.cuts[cell];
                std::int64_t last = first + grid.columns.cuts[cell + 1];
                pixel = pixel < 0 ? 0 : pixel;
                last = last > sums.end - sums.begin ? sums.end - sums.begin : last;
                if (sums.pixel_stride == 1) {
                    for (int lane = 0; lane < sums.lanes; ++lane) {
                        W* to = sums.first + lane * sums.channel_stride;
#pragma omp simd
                        for (std::int64_t at = pixel; at < last; ++at) {
                            to[at] += share[lane];
                        }
                    }
                } else {
                    for (; pixel < last; ++pixel) {
                        W* to = sums.first + pixel * sums.pixel_stride;
#pragma omp simd
                        for (int lane = 0; lane < sums.lanes; ++lane) {
                            to[lane] += share[lane];
                        }
                    }
                }
            }
        }
    }
}

// What all regions of the image add, in their order.
template <typename T>
void add_regions(const SpatialPyramidPoolBackwardParams& params, std::int64_t image,
                 std::int64_t channel, const Sums<Wide<T>>& sums) {
    const bool is_listed = params.has_regions;
    for (std::int64_t index = is_listed ? 0 : image; index < (is_listed ? params.count : image + 1);
         ++index) {
        if (is_listed && params.regions[7 * index] != image) {
            continue;
        }
        if (params.is_average) {
            add_to_windows<T>(params, index, channel, sums);
        } else if (params.is_narrow_index) {
            add_to_maxima<T, std::int16_t>(params, index, channel, sums);
        } else {
            add_to_maxima<T, std::int32_t>(params, index, channel, sums);
        }
    }
}

template <typename T>
void fill_zeros(const Sums<T>& sums) {
    const std::int64_t pixels = sums.end - sums.begin;
    const bool in_planes = sums.pixel_stride == 1;
    const std::int64_t run = in_planes ? pixels : sums.lanes;
    for (std::int64_t at = 0; at < (in_planes ? sums.lanes : pixels); ++at) {
        T* to = sums.first + at * (in_planes ? sums.channel_stride : sums.pixel_stride);
        __builtin_memset(to, 0, static_cast<std::size_t>(run) * sizeof(T));
    }
}

// The gradient of `lanes` planes: in place, or of 16 bits a tile at a time, rounded once.
template <typename T>
void pool_backward(const SpatialPyramidPoolBackwardParams& params, std::int64_t image,
                   std::int64_t channel, int lanes) {
    std::int64_t first = image * params.image_stride;
    std::int64_t pixels = static_cast<std::int64_t>(params.height) * params.width;
    if (params.offsets != nullptr) {
        first = params.offsets[image] * params.pixel_stride;
        pixels = params.offsets[image + 1] - params.offsets[image];
    }
    T* grad_x = static_cast<T*>(params.grad_x) + first + channel * params.channel_stride;
    if constexpr (std::is_same_v<T, Wide<T>>) {
        const Sums<T> sums{grad_x, params.pixel_stride, params.channel_stride, 0, pixels, lanes};
        fill_zeros(sums);
        add_regions<T>(params, image, channel, sums);
    } else {
        const bool in_planes = params.pixel_stride == 1;
        float tile[kTile];
        const std::int64_t most = kTile / lanes;
        for (std::int64_t begin = 0; begin < pixels; begin += most) {
            const std::int64_t end = pixels - begin < most ? pixels : begin + most;
            const Sums<float> sums{tile, in_planes ? 1 : lanes, in_planes ? most : 1, begin, end,
                                   lanes};
            fill_zeros(sums);
            add_regions<T>(params, image, channel, sums);
            const std::int64_t outer = in_planes ? lanes : end - begin;
            const std::int64_t inner = in_planes ? end - begin : lanes;
            for (std::int64_t at = 0; at < outer; ++at) {
                T* to = grad_x + (in_planes ? at * params.channel_stride + begin
                                            : (begin + at) * params.pixel_stride);
                const float* from = tile + at * (in_planes ? most : lanes);
#pragma omp simd
                for (std::int64_t index = 0; index < inner; ++index) {
                    to[index] = narrow<T>(from[index]);
                }
            }
        }
    }
}

// Of a plane, on average.
std::int64_t pixel_count(const PyramidParams& params) {
    return params.offsets == nullptr ? static_cast<std::int64_t>(params.height) * params.width
                                     : params.offsets[params.images] / params.images;
}

}  // namespace

void spatial_pyramid_pool_cpu(const SpatialPyramidPoolParams& params) {
    const auto run = [&]<typename T, Reduction kReduction, int kLanes>() {
        const std::int64_t groups = ceil_divide(params.channels, kLanes);
        const std::int64_t grain = 1 + kGrain / (kLanes * (1 + pixel_count(params)));
        parallel_for(params.count * groups, grain, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t item = begin; item < end; ++item) {
                pool<T, kReduction, kLanes>(params, item / groups, item % groups * kLanes);
            }
        });
    };
    const auto run_lanes = [&]<typename T, Reduction kReduction>() {
        if (params.channel_stride == 1 && params.channels >= kNeighbours) {
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

void spatial_pyramid_pool_backward_cpu(const SpatialPyramidPoolBackwardParams& params) {
    // A plane that stands alone is filled and added to while it is in the cache; of means the
    // windows are found once for several.
    const int planes = params.is_average ? kPlanes : 1;
    const int lanes = params.pixel_stride == 1 ? planes : kNeighbours;
    const std::int64_t groups = ceil_divide(params.channels, lanes);
    const std::int64_t grain = 1 + kGrain / (lanes * (1 + pixel_count(params)));
    visit_element_type(params.dtype, [&]<typename T>() {
        parallel_for(params.images * groups, grain, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t item = begin; item < end; ++item) {
                const std::int64_t channel = item % groups * lanes;
                const std::int64_t rest = params.channels - channel;
                pool_backward<T>(params, item / groups, channel,
                                 rest < lanes ? static_cast<int>(rest) : lanes);
            }
        });
    });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::spp
