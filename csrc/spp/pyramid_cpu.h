// The bins of a pyramid over one region after the other. Included by <op>_cpu.cpp only (see
// common/cpu.h on namespaces).
#pragma once

#include <cstdint>

#include "common/cpu_float.h"
#include "spp/pool_windows.h"

namespace warploom::spp {
namespace WARPLOOM_CPU_ISA {

using namespace ::warploom::WARPLOOM_CPU_ISA;

// Planes that are taken at a time: as many as make a vector, or where a pixel's channels are
// neighbours some lines of the cache.
constexpr int kPlanes = 16;
constexpr int kNeighbours = 64;
// Elements that are worth waking a thread for.
constexpr std::int64_t kGrain = 32768;

// Of a level: its first window of all down and across, its first bin of all, and a later level of
// whose windows its own are made, or -1.
struct LevelPlace {
    int row;
    int column;
    int bin;
    int finer;
};

// Whether windows [window, window + bins) are unions of so many of the `finer_bins` from `finer`
// on.
inline bool is_made_of(const PoolAxis& axis, int window, int bins, int finer, int finer_bins) {
    const int pieces = finer_bins / bins;
    bool holds = finer_bins % bins == 0;
    for (int index = 0; holds && index < finer_bins; ++index) {
        const PoolWindow& whole = axis.windows[window + index / pieces];
        const PoolWindow& piece = axis.windows[finer + index];
        const bool is_first = index % pieces == 0;
        const bool is_last = index % pieces == pieces - 1;
        holds = piece.begin < piece.end &&
                (is_first ? piece.begin == whole.begin : piece.begin <= (&piece)[-1].end) &&
                (is_last ? piece.end == whole.end : piece.end <= whole.end);
    }
    return holds;
}

// Of a plane, on average.
inline std::int64_t pixel_count(const PyramidParams& params) {
    return params.offsets == nullptr ? static_cast<std::int64_t>(params.height) * params.width
                                     : params.offsets[params.images] / params.images;
}

struct Grid {
    std::int64_t index = -1;
    PoolRegion region;
    PoolAxis rows;
    PoolAxis columns;
    LevelPlace places[kMostBins];

    // To another region. Whole images have the same windows.
    void move_to(const PyramidParams& params, std::int64_t next) {
        if (index == next) {
            return;
        }
        const bool is_new = index < 0 || params.has_regions;
        index = next;
        region = pool_region(params, index);
        if (is_new) {
            build_axis(rows, params, region, true);
            build_axis(columns, params, region, false);
            find_places(params);
        }
    }

  private:
    void find_places(const PyramidParams& params) {
        LevelPlace next{0, 0, 0, -1};
        for (int number = 0; number < params.level_count; ++number) {
            places[number] = next;
            next.row += params.levels[number].rows;
            next.column += params.levels[number].columns;
            next.bin += params.levels[number].rows * params.levels[number].columns;
        }
        for (int number = 0; number < params.level_count; ++number) {
            const PyramidLevel& level = params.levels[number];
            LevelPlace& place = places[number];
            for (int finer = params.level_count - 1; finer > number; --finer) {
                const PyramidLevel& other = params.levels[finer];
                if (is_made_of(rows, place.row, level.rows, places[finer].row, other.rows) &&
                    is_made_of(columns, place.column, level.columns, places[finer].column,
                               other.columns)) {
                    place.finer = finer;
                }
            }
        }
    }
};

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::spp
