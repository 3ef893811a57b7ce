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

// Calls body(place, vector) for rows [begin, end) of plane `lane` from column `left` on, which is
// number `place` of it. What is loaded beyond a row is of the next ones, or behind the image zeros.
template <typename T, typename Body>
inline void for_each_row(const Planes<T>& planes, int lane, int begin, int end, int left,
                         Body body) {
    constexpr std::int64_t kBlock = kSide<Wide<T>>;
    const std::int64_t stride = planes.row_stride;
    const std::int64_t plane = lane * planes.channel_stride + left;
    const T* from = planes.first + plane + begin * stride;
    if (plane + (end - 1) * stride + kBlock <= planes.rest) {
        for (int row = begin; row < end; ++row, from += stride) {
            body(row, load_vector(from));
        }
        return;
    }
    for (int row = begin; row < end; ++row, from += stride) {
        T numbers[kBlock] = {};
        std::copy_n(from, std::min(planes.rest - (from - planes.first), kBlock), numbers);
        body(row, load_vector(numbers));
    }
}

// Whether there may be a NaN in the windows: there is none where the sum is a number. Asks for the
// next planes.
template <typename T>
[[gnu::flatten]] bool may_hold_nan(const Planes<T>& planes, const Grid& grid) {
    using W = Wide<T>;
    const int begin = grid.rows.cuts[0];
    const int end = grid.rows.cuts[grid.rows.cut_count - 1];
    const int left = grid.columns.cuts[0];
    Vector<W> sum{};
    for (int lane = 0; lane < planes.lanes; ++lane) {
        Vector<W> lane_sum{};
        const T* next = planes.first + (lane + kPlanes) * planes.channel_stride + left;
        for_each_row(planes, lane, begin, end, left, [&](int row, const Vector<W>& vector) {
            __builtin_prefetch(next + row * planes.row_stride, 0, 2);
            lane_sum += vector;
        });
        sum += lane_sum;
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
        Vector<W> held = Vector<W>{} + kNothing<kReduction, W>;
        Indices<W> place = Indices<W>{} + begin * planes.pitch;
        for_each_row(
            planes, first_lane + i, begin, end, left, [&](int row, const Vector<W>& vector) {
                take<kReduction, kMayBeNan>(vector, Indices<W>{} + row * planes.pitch, held, place);
            });
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
