// The bins of planes that are no wider than a vector. Included by <op>_cpu.cpp only (see
// common/cpu.h on namespaces).
//
// Each window of rows is reduced to one row, which is one vector; these are turned, and the columns
// of all planes, a lane each, reduced to the bins. Rows of several windows are read again, from the
// first cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include "spp/held_cpu.h"
#include "spp/pyramid_cpu.h"

namespace warploom::spp {
namespace WARPLOOM_CPU_ISA {

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
    std::int64_t rest;  // from the first of these planes to the last of the image
};

// A vector of which `rest` elements may be read.
template <typename T>
inline Vector<Wide<T>> load_part(const T* from, std::int64_t rest) {
    if (rest >= kSide<Wide<T>>) {
        return load_vector(from);
    }
    T numbers[kSide<Wide<T>>] = {};
    std::copy_n(from, rest, numbers);
    return load_vector(numbers);
}

// Whether there may be a NaN in the windows: there is none where the sum is a number.
template <typename T>
inline bool may_hold_nan(const Planes<T>& planes, const Grid& grid) {
    using W = Wide<T>;
    Vector<W> sum{};
    for (int lane = 0; lane < planes.lanes; ++lane) {
        const std::int64_t first = lane * planes.channel_stride + grid.columns.cuts[0];
        for (int row = 0; row < grid.rows.cuts[grid.rows.cut_count - 1]; ++row) {
            const std::int64_t at = first + row * planes.row_stride;
            sum += load_part(planes.first + at, planes.rest - at);
        }
    }
    bool holds = false;
    for (int lane = 0; lane < kSide<W>; ++lane) {
        holds |= sum[lane] != sum[lane];
    }
    return holds;
}

// Rows [begin, end) of kSide planes from `first_lane` on, as columns[0, kSide) from `left` on.
template <Reduction kReduction, bool kMayBeNan, typename T, typename W = Wide<T>>
inline void reduce_window(const Planes<T>& planes, int first_lane, int begin, int end, int left,
                          Vector<W>* values, Indices<W>* places) {
    constexpr int kBlock = kSide<W>;
    for (int i = 0; i < kBlock; ++i) {
        values[i] = Vector<W>{};
        places[i] = Indices<W>{};
    }
    const int lanes = std::min(planes.lanes - first_lane, kBlock);
    for (int i = 0; i < lanes; ++i) {
        std::int64_t at =
            (first_lane + i) * planes.channel_stride + begin * planes.row_stride + left;
        Vector<W> held = load_part(planes.first + at, planes.rest - at);
        Indices<W> place = Indices<W>{} + begin * planes.pitch;
        for (int row = begin + 1; row < end; ++row) {
            at += planes.row_stride;
            take<kReduction, kMayBeNan>(load_part(planes.first + at, planes.rest - at),
                                        Indices<W>{} + row * planes.pitch, held, place);
        }
        values[i] = held;
        places[i] = place;
    }
    transpose<W>(values);
    if constexpr (kReduction == Reduction::indexed_max) {
        transpose<W>(places);
        for (int column = 0; column < kBlock; ++column) {
            places[column] += left + column;
        }
    }
}

// The bins of one level.
template <Reduction kReduction, bool kMayBeNan, typename T, typename W = Wide<T>>
[[gnu::flatten]] void pool_narrow(const Planes<T>& planes, const Grid& grid,
                                  const PyramidLevel& level, const LevelPlace& first,
                                  Held<W, kPlanes>* bins) {
    constexpr int kBlock = kSide<W>;
    const int left = grid.columns.cuts[0];
    for (int row = 0; row < level.rows; ++row) {
        const PoolWindow& down = grid.rows.windows[first.row + row];
        for (int part = 0; down.begin < down.end && part * kBlock < planes.lanes; ++part) {
            Vector<W> values[kBlock];
            Indices<W> places[kBlock];
            reduce_window<kReduction, kMayBeNan>(planes, part * kBlock, down.begin, down.end, left,
                                                 values, places);
            for (int column = 0; column < level.columns; ++column) {
                const PoolWindow& across = grid.columns.windows[first.column + column];
                Held<W, kPlanes>& bin = bins[row * level.columns + column];
                if (across.begin >= across.end) {
                    continue;
                }
                Held<W, kBlock> held{{values[across.begin - left]}, {places[across.begin - left]}};
                for (int at = across.begin - left + 1; at < across.end - left; ++at) {
                    combine<kReduction, kMayBeNan>(
                        held, Held<W, kBlock>{{values[at]}, {places[at]}}, held);
                }
                bin.values[part] = held.values[0];
                bin.places[part] = held.places[0];
            }
        }
    }
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::spp
