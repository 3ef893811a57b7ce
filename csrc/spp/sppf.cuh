// The cascade of three max pools of stride 1 beside their input. A block holds a tile of one plane
// (kLanes planes of channels-last tensors) with a halo: stage after stage it pools along the
// columns, then along the rows, in shared memory, and x is read once.
//
//   forward:  stage s has the tile and 3 - s radii around it
//   backward: stage s finds in slice s - 1 of the output, on the tile and s radii around it, where
//             its maxima come from; each cell then gathers the gradients of those that it gave,
//             in row-major order, so that two runs give the same bits
//
// A window's maximum is the last NaN of its cells in row-major order, else the first of the
// greatest, which may be found along the columns first.
#pragma once

#include <cstdint>

#include "common/index.cuh"
#include "sppf.h"

namespace warploom::spp {

template <typename Element_, int kLanes_>
struct SppfTraits {
    using Element = Element_;
    static constexpr int kLanes = kLanes_;
    static constexpr int kThreads = 256;
    static constexpr int kForwardNumbers = 8192;  // of a tile with its halo
    static constexpr int kBackwardNumbers = 4096;
};

// A launcher's choice of tiles, `tiles` [rows, columns] of them a plane.
struct SppfTiling {
    int height;
    int width;
    int tile_rows;
    int tile_columns;
    int groups;  // of kLanes channels
};

template <typename Params>
struct Tiled {
    Params params;
    SppfTiling tiling;
};

// `maxima` holds the maxima along the columns of what `values` holds.
template <typename Traits>
struct SppfPlan {
    typename Traits::Element values[Traits::kForwardNumbers];
    typename Traits::Element maxima[Traits::kForwardNumbers];
};

template <typename Traits>
struct SppfBackwardPlan {
    float maxima[Traits::kBackwardNumbers];
    std::int16_t columns[Traits::kBackwardNumbers];  // where a maximum along them stands in them
    std::int16_t places[Traits::kBackwardNumbers];   // the same of a window, row by row
    float grads[2][Traits::kBackwardNumbers];
};

// Cells of a plane, their numbers row by row, kLanes a cell.
struct Region {
    int first_row;
    int first_column;
    int rows;
    int columns;

    WARPLOOM_DEVICE int cells() const { return rows * columns; }
    WARPLOOM_DEVICE int cell(int row, int column) const {
        return (row - first_row) * columns + column - first_column;
    }
    WARPLOOM_DEVICE bool has(int row, int column) const {
        return row >= first_row && row < first_row + rows && column >= first_column &&
               column < first_column + columns;
    }
};

struct Window {
    int first;
    int last;
};

// The cells of a line of `size` that a window around `center` covers.
WARPLOOM_DEVICE Window window_at(int center, int radius, int size) {
    const int last = center + radius;
    return {center > radius ? center - radius : 0, last < size ? last : size - 1};
}

WARPLOOM_DEVICE bool replaces(float later, float maximum) {
    return later > maximum || later != later;
}

// The tile of this block and what it belongs to.
template <typename Traits>
struct SppfTile {
    SppfShape shape;
    Region region;
    std::int64_t sample;
    int channel;  // of lane 0

    WARPLOOM_DEVICE SppfTile(const SppfShape& shape, const SppfTiling& tiling) : shape(shape) {
        const int tiles = tiling.tile_rows * tiling.tile_columns;
        const Division group = divide(blockIdx.x, tiles);
        const Division owner = divide(group.quotient, tiling.groups);
        const int tile = static_cast<int>(group.remainder);
        sample = owner.quotient;
        channel = static_cast<int>(owner.remainder) * Traits::kLanes;
        const int row = tile / tiling.tile_columns * tiling.height;
        const int column = tile % tiling.tile_columns * tiling.width;
        region = {row, column, min_of(tiling.height, shape.height - row),
                  min_of(tiling.width, shape.width - column)};
    }

    static WARPLOOM_DEVICE int min_of(int left, int right) { return left < right ? left : right; }

    // The tile's rows and columns with as many radii around them as lie in the plane.
    WARPLOOM_DEVICE Region around(int row_radii, int column_radii) const {
        const int above = row_radii * shape.radius;
        const int beside = column_radii * shape.radius;
        const int row = region.first_row > above ? region.first_row - above : 0;
        const int column = region.first_column > beside ? region.first_column - beside : 0;
        const int end_row = min_of(region.first_row + region.rows + above, shape.height);
        const int end_column = min_of(region.first_column + region.columns + beside, shape.width);
        return {row, column, end_row - row, end_column - column};
    }

    // The element of slice `slice` of a tensor with `slices` times x's channels.
    WARPLOOM_DEVICE std::int64_t element(int slices, int slice, int row, int column,
                                         int lane) const {
        const std::int64_t channels = static_cast<std::int64_t>(slices) * shape.channels;
        const std::int64_t own = static_cast<std::int64_t>(slice) * shape.channels + channel + lane;
        if (shape.channels_last) {
            return ((sample * shape.height + row) * shape.width + column) * channels + own;
        }
        return ((sample * channels + own) * shape.height + row) * shape.width + column;
    }

    // Calls body(number, row, column, lane) for this thread's share of the region's numbers.
    template <typename Body>
    WARPLOOM_DEVICE void for_each(const Region& cells, const Body& body) const {
        const int count = cells.cells() * Traits::kLanes;
        WARPLOOM_NO_UNROLL
        for (int number = static_cast<int>(threadIdx.x); number < count;
             number += Traits::kThreads) {
            const int lane = number % Traits::kLanes;
            const int cell = number / Traits::kLanes;
            const int row = cell / cells.columns;
            if (channel + lane < shape.channels) {
                body(number, cells.first_row + row, cells.first_column + cell - row * cells.columns,
                     lane);
            }
        }
    }
};

// grid [batch * groups * tiles]
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 2)
sppf_kernel(WARPLOOM_GRID_CONSTANT Tiled<SppfParams> tiled) {
    using T = typename Traits::Element;
    constexpr int kLanes = Traits::kLanes;
    auto& plan = device::shared_memory<SppfPlan<Traits>>();
    const SppfShape& shape = tiled.params.shape;
    const SppfTile<Traits> tile(shape, tiled.tiling);
    const T* x = static_cast<const T*>(tiled.params.x);
    T* out = static_cast<T*>(tiled.params.out);
    const int radius = shape.radius;

    Region given = tile.around(kSppfStages, kSppfStages);
    tile.for_each(given, [&](int number, int row, int column, int lane) {
        const T value = x[tile.element(1, 0, row, column, lane)];
        plan.values[number] = value;
        if (tile.region.has(row, column)) {
            out[tile.element(kSppfSlices, 0, row, column, lane)] = value;
        }
    });
    device::sync_threads();
    WARPLOOM_NO_UNROLL
    for (int stage = 1; stage <= kSppfStages; ++stage) {
        const Region along = tile.around(kSppfStages - stage + 1, kSppfStages - stage);
        const Region pooled = tile.around(kSppfStages - stage, kSppfStages - stage);
        tile.for_each(along, [&](int number, int row, int column, int lane) {
            const Window window = window_at(column, radius, shape.width);
            const T* values = plan.values + given.cell(row, 0) * kLanes + lane;
            float maximum = device::to_float(values[window.first * kLanes]);
            for (int place = window.first + 1; place <= window.last; ++place) {
                const float value = device::to_float(values[place * kLanes]);
                maximum = replaces(value, maximum) ? value : maximum;
            }
            plan.maxima[number] = device::from_float<T>(maximum);
        });
        device::sync_threads();
        tile.for_each(pooled, [&](int number, int row, int column, int lane) {
            const Window window = window_at(row, radius, shape.height);
            const T* maxima = plan.maxima + along.cell(window.first, column) * kLanes + lane;
            float maximum = device::to_float(*maxima);
            for (int place = window.first + 1; place <= window.last; ++place) {
                maxima += along.columns * kLanes;
                const float value = device::to_float(*maxima);
                maximum = replaces(value, maximum) ? value : maximum;
            }
            const T value = device::from_float<T>(maximum);
            plan.values[number] = value;
            if (tile.region.has(row, column)) {
                out[tile.element(kSppfSlices, stage, row, column, lane)] = value;
            }
        });
        device::sync_threads();
        given = pooled;
    }
}

// grid [batch * groups * tiles]
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 2)
sppf_backward_kernel(WARPLOOM_GRID_CONSTANT Tiled<SppfBackwardParams> tiled) {
    using T = typename Traits::Element;
    constexpr int kLanes = Traits::kLanes;
    auto& plan = device::shared_memory<SppfBackwardPlan<Traits>>();
    const SppfShape& shape = tiled.params.shape;
    const SppfTile<Traits> tile(shape, tiled.tiling);
    const T* out = static_cast<const T*>(tiled.params.out);
    const T* grad_out = static_cast<const T*>(tiled.params.grad_out);
    T* grad_x = static_cast<T*>(tiled.params.grad_x);
    const int radius = shape.radius;
    const int size = 2 * radius + 1;

    Region pooled = tile.around(kSppfStages, kSppfStages);
    tile.for_each(pooled, [&](int number, int row, int column, int lane) {
        const std::int64_t element = tile.element(kSppfSlices, kSppfStages, row, column, lane);
        plan.grads[kSppfStages % 2][number] = device::to_float(grad_out[element]);
    });
    WARPLOOM_NO_UNROLL
    for (int stage = kSppfStages; stage >= 1; --stage) {
        const Region along = tile.around(stage + 1, stage);
        const Region given = tile.around(stage - 1, stage - 1);
        const float* grads = plan.grads[stage % 2];
        float* given_grads = plan.grads[(stage + 1) % 2];
        tile.for_each(along, [&](int number, int row, int column, int lane) {
            const Window window = window_at(column, radius, shape.width);
            const auto value_at = [&](int place) {
                return device::to_float(
                    out[tile.element(kSppfSlices, stage - 1, row, place, lane)]);
            };
            float maximum = value_at(window.first);
            int found = window.first;
            for (int place = window.first + 1; place <= window.last; ++place) {
                const float value = value_at(place);
                const bool take = replaces(value, maximum);
                maximum = take ? value : maximum;
                found = take ? place : found;
            }
            plan.maxima[number] = maximum;
            plan.columns[number] = static_cast<std::int16_t>(found - column + radius);
        });
        device::sync_threads();
        tile.for_each(pooled, [&](int number, int row, int column, int lane) {
            const Window window = window_at(row, radius, shape.height);
            const int first = along.cell(0, column) * kLanes + lane;
            const int pitch = along.columns * kLanes;
            float maximum = plan.maxima[first + window.first * pitch];
            int found = window.first;
            for (int place = window.first + 1; place <= window.last; ++place) {
                const float value = plan.maxima[first + place * pitch];
                const bool take = replaces(value, maximum);
                maximum = take ? value : maximum;
                found = take ? place : found;
            }
            plan.places[number] = static_cast<std::int16_t>((found - row + radius) * size +
                                                            plan.columns[first + found * pitch]);
        });
        device::sync_threads();
        tile.for_each(given, [&](int number, int row, int column, int lane) {
            const Window rows = window_at(row, radius, shape.height);
            const Window columns = window_at(column, radius, shape.width);
            float sum = 0.0f;
            for (int y = rows.first; y <= rows.last; ++y) {
                const int from = pooled.cell(y, 0) * kLanes + lane;
                const int own = (row - y + radius) * size + column + radius;  // place + its column
                for (int x = columns.first; x <= columns.last; ++x) {
                    const int place = from + x * kLanes;
                    sum += plan.places[place] == own - x ? grads[place] : 0.0f;
                }
            }
            const std::int64_t element = tile.element(kSppfSlices, stage - 1, row, column, lane);
            const float grad = device::to_float(grad_out[element]) + sum;
            if (stage == 1) {
                grad_x[tile.element(1, 0, row, column, lane)] = device::from_float<T>(grad);
            } else {
                given_grads[number] = grad;
            }
        });
        device::sync_threads();
        pooled = given;
    }
}

}  // namespace warploom::spp
