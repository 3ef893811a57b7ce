// The bins of small planes. Included by <op>_cpu.cpp only (see common/cpu.h on namespaces).
//
// All pixels are turned at once, and lie in the first cache as vectors of planes: each bin is then
// reduced by itself, pixel by pixel, however windows overlap.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/cpu_loops.h"
#include "spp/held_cpu.h"
#include "spp/pyramid_cpu.h"
#include "spp/spatial_pyramid_pool.h"
#include "spp/turn_cpu.h"

namespace warploom::spp {
namespace WARPLOOM_CPU_ISA {

// Turned pixels of a plane, with those between its rows.
constexpr int kSmallPlane = 512;
// Parts in which the next planes are asked for.
constexpr int kPrefetchParts = 4;

// The level of whose bins those of level `place` are made, or -1.
template <Reduction kReduction>
int finer_of(const Grid& grid, int place) {
    return kReduction == Reduction::sum ? -1 : grid.places[place].finer;
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
    std::int64_t size;  // elements from the first to the last of a plane
};

// turned[index][lane]: pixels [first, first + count) of a row of the planes. Blocks may go beyond
// the row, not beyond the plane: `turned` has kSide numbers before the first and behind the last.
template <typename T, int kLanes, bool kAhead, typename W = Wide<T>>
inline void turn_row(const Planes<T>& planes, std::int64_t first, int count, W (*turned)[kLanes]) {
    constexpr int kBlock = kSide<W>;
    if (planes.pixel_stride == 1 && planes.lanes == kLanes && planes.size >= kBlock) {
        for (int index = 0; index < count; index += kBlock) {
            const std::int64_t last = planes.size - kBlock - first;
            const std::int64_t at = index < last ? index : last;
            turn_block<kLanes, kAhead>(planes.first + first + at, planes.channel_stride,
                                       turned + at);
        }
        return;
    }
    for (int lane = 0; lane < planes.lanes; ++lane) {
        const T* from = planes.first + first + lane * planes.channel_stride;
        for (int index = 0; index < count; ++index) {
            turned[index][lane] = widen(from[index * planes.pixel_stride]);
        }
    }
}

// Where a region's pixels lie, turned: row after row, with a block between two of them where rows
// are not whole.
template <typename W>
struct SmallRegion {
    int top;
    int left;
    int rows;
    int width;
    bool is_whole;
    int pitch;  // turned pixels from one row to the next

    SmallRegion(const Grid& grid, std::int64_t row_stride)
        : top(grid.rows.cuts[0]),
          left(grid.columns.cuts[0]),
          rows(grid.rows.cuts[grid.rows.cut_count - 1] - top),
          width(grid.columns.cuts[grid.columns.cut_count - 1] - left),
          is_whole(width == row_stride),
          pitch(is_whole ? width : width + kSide<W>) {}

    std::int64_t size() const { return static_cast<std::int64_t>(rows) * pitch; }
};

template <typename T>
bool is_small(const Planes<T>& planes, const Grid& grid) {
    return planes.pixel_stride == 1 && grid.rows.cut_count > 0 && grid.columns.cut_count > 0 &&
           SmallRegion<Wide<T>>(grid, planes.row_stride).size() <= kSmallPlane;
}

// Calls body(width): a constant of windows of a few columns, whose loops are unrolled.
template <int kWidth = 1, typename Body>
inline void visit_width(int width, Body body) {
    if constexpr (kWidth > 8) {
        body(width);
    } else if (width == kWidth) {
        body(std::integral_constant<int, kWidth>());
    } else {
        visit_width<kWidth + 1>(width, body);
    }
}

// One bin of `height` rows and `width` columns from `pixel` on, whose place is `place`. Rows are
// taken each by itself: so there are chains of few steps.
template <Reduction kReduction, bool kMayBeNan, typename W, typename Width>
inline void reduce_window(const W* pixel, std::int64_t stride, int place, int pitch, int height,
                          Width width, Vector<W>& value, Indices<W>& value_place) {
    Vector<W> bin = Vector<W>{} + kNothing<kReduction, W>;
    Indices<W> bin_place = Indices<W>{} + place;
    for (int row = 0; row < height; ++row, pixel += stride, place += pitch) {
        Vector<W> held = load_vector(pixel);
        Indices<W> held_place = Indices<W>{} + place;
        for (int column = 1; column < width; ++column) {
            take<kReduction, kMayBeNan>(load_vector(pixel + column * kPlanes),
                                        Indices<W>{} + (place + column), held, held_place);
        }
        take<kReduction, kMayBeNan>(held, held_place, bin, bin_place);
    }
    value = bin;
    value_place = bin_place;
}

// The bins of all levels that are not made of others', from turned[0, region.size()). Calls
// next_row() for each row of them.
template <Reduction kReduction, bool kMayBeNan, typename W, typename NextRow>
[[gnu::flatten]] void pool_turned(const SpatialPyramidPoolParams& params, const Grid& grid,
                                  const SmallRegion<W>& region, const W (*turned)[kPlanes],
                                  Held<W, kPlanes>* bins, NextRow next_row) {
    const int pitch = grid.region.pitch;
    for (int number = 0; number < params.level_count; ++number) {
        const PyramidLevel& level = params.levels[number];
        const LevelPlace& first = grid.places[number];
        Held<W, kPlanes>* bin = bins + first.bin;
        for (int row = 0; finer_of<kReduction>(grid, number) < 0 && row < level.rows; ++row) {
            const PoolWindow& down = grid.rows.windows[first.row + row];
            for (int column = 0; column < level.columns; ++column, ++bin) {
                const PoolWindow& across = grid.columns.windows[first.column + column];
                const int corner =
                    (down.begin - region.top) * region.pitch + across.begin - region.left;
                visit_width(across.end - across.begin, [&](auto width) {
                    for (int part = 0; width > 0 && part < bin->kVectors; ++part) {
                        reduce_window<kReduction, kMayBeNan>(
                            turned[corner] + part * kSide<W>, region.pitch * kPlanes,
                            down.begin * pitch + across.begin, pitch, down.end - down.begin, width,
                            bin->values[part], bin->places[part]);
                    }
                });
            }
            next_row();
        }
    }
}

template <typename T, Reduction kReduction, typename W = Wide<T>>
void pool_small(const SpatialPyramidPoolParams& params, const Grid& grid, const Planes<T>& planes,
                Held<W, kPlanes>* bins) {
    const SmallRegion<W> region(grid, planes.row_stride);
    alignas(kVectorBytes) W buffer[kSmallPlane + 2 * kSide<W>][kPlanes];
    W(*const turned)[kPlanes] = buffer + kSide<W>;
    if (!region.is_whole || planes.lanes < kPlanes) {
        std::fill_n(turned[0], region.size() * kPlanes, W{0});
    }
    const int runs = region.is_whole ? 1 : region.rows;
    const int run = region.is_whole ? region.rows * region.width : region.width;
    for (int row = 0; row < runs; ++row) {
        turn_row<T, kPlanes, false>(planes, (region.top + row) * planes.row_stride + region.left,
                                    run, turned + row * region.pitch);
    }
    // Asks for the next planes, a part each time, where all of them is read.
    const T* next = planes.first + kPlanes * planes.channel_stride;
    const std::int64_t part =
        region.is_whole ? kPlanes * region.rows * planes.row_stride / kPrefetchParts : 0;
    const auto next_row = [&] {
        prefetch(next, part);
        next += part;
    };
    if (kReduction == Reduction::sum || may_hold_nan(turned[0], region.size() * kPlanes)) {
        pool_turned<kReduction, true>(params, grid, region, turned, bins, next_row);
    } else {
        pool_turned<kReduction, false>(params, grid, region, turned, bins, next_row);
    }
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::spp
