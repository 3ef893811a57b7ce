// Spatial pyramid pooling, bound by memory: every pixel is read once for all levels.
//
//   grid [regions * groups, chunks of bins], a group being 32 planes of one image. Band by band of
//   rows the block reduces the cells (pool_windows.h) of all its planes, to shared memory with a
//   plane in each lane, and then combines them into the bins that cover them.
#pragma once

#include <cstdint>
#include <limits>

#include "common/index.cuh"
#include "device/device.cuh"
#include "pool_windows.h"

namespace warploom::spp {

using namespace device;

template <typename Element_, bool kAverage_, bool kInRows_>
struct PyramidTraits {
    using Element = Element_;
    static constexpr bool kAverage = kAverage_;
    // Pixels of a row are neighbours in memory, not channels.
    static constexpr bool kInRows = kInRows_;
    // A warp takes the rows of a few planes, or one cell of 32 planes, of which a band has few.
    static constexpr int kThreads = kInRows ? 256 : 128;
    static constexpr int kWarps = kThreads / kWarpSize;
    // Planes that a warp reads at once, so that their loads and shuffles overlap.
    static constexpr int kPlanes = kWarpSize / kWarps;
    // Bins of a block: those of levels 1, 2, 4, 8 together.
    static constexpr int kBins = 96;
};

// The maximum of some pixels and its number, or their sum.
struct HeldPixel {
    float value;
    int place;
};

struct BinWindows {
    int row;  // numbers among the windows of all levels
    int column;
};

template <typename Traits>
struct PyramidPlan {
    float cell_values[kMostCuts][kWarpSize];  // of a band: (cell, plane)
    int cell_places[kMostCuts][kWarpSize];
    float bin_values[Traits::kBins][kWarpSize];
    int bin_places[Traits::kBins][kWarpSize];
    BinWindows bins[Traits::kBins];
    PoolAxis rows;
    PoolAxis columns;
};

// Of pixels in any order the greatest value is kept; of equal ones the first, of NaN the last.
template <bool kAverage>
WARPLOOM_DEVICE void combine(const HeldPixel& from, HeldPixel& to) {
    if constexpr (kAverage) {
        to.value += from.value;
    } else {
        const bool is_nan = from.value != from.value;
        const bool is_taken = from.value > to.value ||
                              (from.value == to.value && from.place < to.place) ||
                              (is_nan && (to.value == to.value || from.place > to.place));
        to = is_taken ? from : to;
    }
}

// The same of a pixel behind all those in `to`: a third of the instructions.
template <bool kAverage>
WARPLOOM_DEVICE void append(const HeldPixel& from, HeldPixel& to) {
    if constexpr (kAverage) {
        to.value += from.value;
    } else {
        to = from.value > to.value || from.value != from.value ? from : to;
    }
}

// Pixels from `place` on, none seen so far.
template <bool kAverage>
WARPLOOM_DEVICE HeldPixel nothing_from(int place) {
    return {kAverage ? 0.0f : -std::numeric_limits<float>::infinity(), place};
}

// Calls visit(level, bin of the level, its windows) with the pyramid's bin `number`.
template <typename Visit>
WARPLOOM_DEVICE void visit_bin(const PyramidParams& params, int number, const Visit& visit) {
    BinWindows before{0, 0};
    WARPLOOM_NO_UNROLL
    for (int place = 0; place < params.level_count; ++place) {
        const PyramidLevel& level = params.levels[place];
        const int count = level.rows * level.columns;
        if (number < count) {
            visit(level, number,
                  BinWindows{before.row + number / level.columns,
                             before.column + number % level.columns});
            return;
        }
        number -= count;
        before.row += level.rows;
        before.column += level.columns;
    }
}

WARPLOOM_DEVICE int bin_count(const PyramidParams& params) {
    int count = 0;
    for (int place = 0; place < params.level_count; ++place) {
        count += params.levels[place].rows * params.levels[place].columns;
    }
    return count;
}

// A band's rows of every kWarps-th of `lanes` planes, from that of the warp's own number on: each
// thread reduces a column, and the first of each cell's threads gets the cell, in the order of the
// columns.
template <typename Traits>
WARPLOOM_DEVICE void reduce_rows(const typename Traits::Element* planes,
                                 const PyramidParams& params, const PoolRegion& region, int band,
                                 int lanes, PyramidPlan<Traits>& plan) {
    constexpr int kPlanes = Traits::kPlanes;
    const int warp = warp_index();
    const PoolAxis& axis = plan.columns;
    const int begin = plan.rows.cuts[band];
    const int end = plan.rows.cuts[band + 1];
    const int last = axis.cuts[axis.cut_count - 1];
    for (int first = axis.cuts[0]; first < last; first += kWarpSize) {
        const int column = first + lane_index();
        int cell = -1;
        HeldPixel held[kPlanes];
        const typename Traits::Element* from[kPlanes];
        WARPLOOM_UNROLL
        for (int index = 0; index < kPlanes; ++index) {
            held[index] = nothing_from<Traits::kAverage>(begin * region.pitch + column);
            // Past the last plane that one again, for nothing.
            const int lane = warp + index * Traits::kWarps;
            from[index] = planes + (lane < lanes ? lane : lanes - 1) * params.channel_stride +
                          begin * region.row_stride + column * params.pixel_stride;
        }
        if (column < last) {
            for (int row = begin; row < end; ++row) {
                WARPLOOM_UNROLL
                for (int index = 0; index < kPlanes; ++index) {
                    append<Traits::kAverage>({to_float(*from[index]), row * region.pitch + column},
                                             held[index]);
                    from[index] += region.row_stride;
                }
            }
            while (axis.cuts[cell + 1] <= column) {
                ++cell;
            }
        }
        WARPLOOM_UNROLL
        for (int distance = 1; distance < kWarpSize; distance *= 2) {
            const int other_cell = shuffle_down(cell, distance);
            const bool is_joined = lane_index() + distance < kWarpSize && other_cell == cell;
            WARPLOOM_UNROLL
            for (int index = 0; index < kPlanes; ++index) {
                const HeldPixel other{shuffle_down(held[index].value, distance),
                                      shuffle_down(held[index].place, distance)};
                if (is_joined) {
                    combine<Traits::kAverage>(other, held[index]);
                }
            }
        }
        const int cell_before = shuffle_up(cell, 1);
        if (cell >= 0 && (lane_index() == 0 || cell_before != cell)) {
            WARPLOOM_UNROLL
            for (int index = 0; index < kPlanes; ++index) {
                const int lane = warp + index * Traits::kWarps;
                if (lane >= lanes) {
                    break;
                }
                if (column > axis.cuts[cell]) {
                    HeldPixel whole{plan.cell_values[cell][lane], plan.cell_places[cell][lane]};
                    combine<Traits::kAverage>(held[index], whole);
                    held[index] = whole;
                }
                plan.cell_values[cell][lane] = held[index].value;
                plan.cell_places[cell][lane] = held[index].place;
            }
        }
        sync_warp();
    }
}

// One cell of 32 planes, this lane's beginning at `plane`.
template <typename Traits>
WARPLOOM_DEVICE void reduce_cell(const typename Traits::Element* plane, const PyramidParams& params,
                                 const PoolRegion& region, int band, int cell,
                                 PyramidPlan<Traits>& plan) {
    const int begin = plan.rows.cuts[band];
    const int first = plan.columns.cuts[cell];
    const int last = plan.columns.cuts[cell + 1];
    HeldPixel held = nothing_from<Traits::kAverage>(begin * region.pitch + first);
    for (int row = begin; row < plan.rows.cuts[band + 1]; ++row) {
        const typename Traits::Element* from =
            plane + row * region.row_stride + first * params.pixel_stride;
        for (int column = first; column < last; ++column, from += params.pixel_stride) {
            append<Traits::kAverage>({to_float(*from), row * region.pitch + column}, held);
        }
    }
    plan.cell_values[cell][lane_index()] = held.value;
    plan.cell_places[cell][lane_index()] = held.place;
}

// This warp's bins, as far as they cover the band.
template <typename Traits>
WARPLOOM_DEVICE void combine_cells(int band, int bins, PyramidPlan<Traits>& plan) {
    const int lane = lane_index();
    for (int bin = warp_index(); bin < bins; bin += Traits::kWarps) {
        const BinWindows windows = plan.bins[bin];
        if (!covers(plan.rows, windows.row, band)) {
            continue;
        }
        int cell = plan.columns.first_band[windows.column];
        const int last = plan.columns.last_band[windows.column];
        if (cell == last) {
            continue;
        }
        HeldPixel held{plan.cell_values[cell][lane], plan.cell_places[cell][lane]};
        for (++cell; cell < last; ++cell) {
            combine<Traits::kAverage>({plan.cell_values[cell][lane], plan.cell_places[cell][lane]},
                                      held);
        }
        if (plan.rows.first_band[windows.row] < band) {
            HeldPixel whole{plan.bin_values[bin][lane], plan.bin_places[bin][lane]};
            combine<Traits::kAverage>(held, whole);
            held = whole;
        }
        plan.bin_values[bin][lane] = held.value;
        plan.bin_places[bin][lane] = held.place;
    }
}

template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 1)
spatial_pyramid_pool_kernel(WARPLOOM_GRID_CONSTANT SpatialPyramidPoolParams params) {
    using T = typename Traits::Element;
    auto& plan = shared_memory<PyramidPlan<Traits>>();
    const Division item = divide(blockIdx.x, (params.channels + kWarpSize - 1) / kWarpSize);
    const PoolRegion region = pool_region(params, item.quotient);
    const std::int64_t channel = item.remainder * kWarpSize;
    const std::int64_t rest = params.channels - channel;
    const int lanes = rest < kWarpSize ? static_cast<int>(rest) : kWarpSize;
    const int first_bin = static_cast<int>(blockIdx.y) * Traits::kBins;
    const int rest_bins = bin_count(params) - first_bin;
    const int bins = rest_bins < Traits::kBins ? rest_bins : Traits::kBins;
    if (threadIdx.x == 0) {
        build_axis(plan.rows, params, region, true);
    } else if (threadIdx.x == kWarpSize) {
        build_axis(plan.columns, params, region, false);
    }
    if (static_cast<int>(threadIdx.x) < bins) {
        visit_bin(params, first_bin + static_cast<int>(threadIdx.x),
                  [&](const PyramidLevel&, int, const BinWindows& windows) {
                      plan.bins[threadIdx.x] = windows;
                  });
    }
    sync_threads();
    const T* planes =
        static_cast<const T*>(params.x) + region.first + channel * params.channel_stride;
    const int bands = plan.columns.cut_count == 0 ? 0 : plan.rows.cut_count - 1;
    for (int band = 0; band < bands; ++band) {
        if constexpr (Traits::kInRows) {
            reduce_rows<Traits>(planes, params, region, band, lanes, plan);
        } else if (lane_index() < lanes) {
            for (int cell = warp_index(); cell + 1 < plan.columns.cut_count;
                 cell += Traits::kWarps) {
                reduce_cell<Traits>(planes + lane_index() * params.channel_stride, params, region,
                                    band, cell, plan);
            }
        }
        sync_threads();
        if (lane_index() < lanes) {
            combine_cells<Traits>(band, bins, plan);
        }
        sync_threads();
    }
    for (int bin = warp_index(); bin < bins; bin += Traits::kWarps) {
        if (lane_index() >= lanes) {
            continue;
        }
        const PoolWindow down = plan.rows.windows[plan.bins[bin].row];
        const PoolWindow across = plan.columns.windows[plan.bins[bin].column];
        HeldPixel held{0.0f, -1};
        if (down.begin < down.end && across.begin < across.end) {
            held = {plan.bin_values[bin][lane_index()], plan.bin_places[bin][lane_index()]};
            if constexpr (Traits::kAverage) {
                held.value /= static_cast<float>(down.span) * static_cast<float>(across.span);
            }
        }
        visit_bin(params, first_bin + bin, [&](const PyramidLevel& level, int number, BinWindows) {
            const std::int64_t to = item.quotient * params.out_stride + level.offset +
                                    (channel + lane_index()) * level.channel_stride + number;
            static_cast<T*>(params.out)[to] = from_float<T>(held.value);
            if (params.argmax != nullptr && params.is_narrow_index) {
                static_cast<std::int16_t*>(params.argmax)[to] =
                    static_cast<std::int16_t>(held.place);
            } else if (params.argmax != nullptr) {
                static_cast<std::int32_t*>(params.argmax)[to] = held.place;
            }
        });
    }
}

}  // namespace warploom::spp
