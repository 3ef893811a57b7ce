// The gradient of means over whole images, in one write: all pixels of a cell get the same.
//
//   grid [images * ceil(channels / kPlanes), parts of the rows], a block taking kPlanes planes of
//   one image, as many at a time as have room in shared memory for what their cells get.
#pragma once

#include "common/vec.cuh"
#include "spatial_pyramid_pool.cuh"

namespace warploom::spp {

// Threads write kVector neighbours: pixels of a row, or channels of a pixel.
template <typename Element_, int kVector_, bool kInRows_>
struct MeansTraits {
    using Element = Element_;
    static constexpr int kVector = kVector_;
    static constexpr bool kInRows = kInRows_;
    static constexpr int kThreads = 256;
    static constexpr int kPlanes = 16;
};

// Room for one plane of any pyramid: 32 by 32 bins, 65 by 65 cells with those that no bin covers.
inline constexpr int kMeansBins = 2048;
inline constexpr int kMeansCells = 8192;
// Elements of a block's part of the rows.
inline constexpr std::int64_t kMeansElements = 65536;

struct MeansPlan {
    float bins[kMeansBins];    // (plane, bin): its gradient over its size
    float cells[kMeansCells];  // (plane, row, column); where channels are neighbours (.., plane)
    PoolAxis rows;
    PoolAxis columns;
};

// Cells of a plane; along an axis cell i has the pixels that i cuts do not lie behind.
WARPLOOM_DEVICE int cell_count(const MeansPlan& plan) {
    return (plan.rows.cut_count + 1) * (plan.columns.cut_count + 1);
}

// The cell of a pixel at or behind those of cell `cell`.
WARPLOOM_DEVICE int next_cell(const PoolAxis& axis, int place, int cell) {
    while (cell < axis.cut_count && axis.cuts[cell] <= place) {
        ++cell;
    }
    return cell;
}

// Of `planes` planes, the first one's bins at `channel` of the image's `grad_out`.
template <typename T>
WARPLOOM_DEVICE void divide_bins(const PyramidParams& params, const T* grad_out,
                                 std::int64_t channel, int planes, int bins, MeansPlan& plan) {
    for (int index = static_cast<int>(threadIdx.x); index < planes * bins;
         index += static_cast<int>(blockDim.x)) {
        const int plane = index / bins;
        const auto divide_bin = [&](const PyramidLevel& level, int number,
                                    const BinWindows& windows) {
            const auto height = static_cast<float>(plan.rows.windows[windows.row].span);
            const auto width = static_cast<float>(plan.columns.windows[windows.column].span);
            const T grad =
                grad_out[level.offset + (channel + plane) * level.channel_stride + number];
            plan.bins[index] = to_float(grad) / (height * width);
        };
        visit_bin(params, index - plane * bins, divide_bin);
    }
}

// What the pixels of cell (row, column) of a plane get, from the plane's bins.
WARPLOOM_DEVICE float sum_of_bins(const PyramidParams& params, const float* bins, int row,
                                  int column, const MeansPlan& plan) {
    float sum = 0.0f;
    BinWindows first{0, 0};
    for (int place = 0; place < params.level_count; ++place) {
        const PyramidLevel& level = params.levels[place];
        for (int down = 0; down < level.rows; ++down, bins += level.columns) {
            if (!covers(plan.rows, first.row + down, row - 1)) {
                continue;
            }
            for (int across = 0; across < level.columns; ++across) {
                sum +=
                    covers(plan.columns, first.column + across, column - 1) ? bins[across] : 0.0f;
            }
        }
        first.row += level.rows;
        first.column += level.columns;
    }
    return sum;
}

template <typename Traits>
WARPLOOM_DEVICE void sum_cells(const PyramidParams& params, int planes, int bins, MeansPlan& plan) {
    const int cells = cell_count(plan);
    const int columns = plan.columns.cut_count + 1;
    for (int index = static_cast<int>(threadIdx.x); index < planes * cells;
         index += Traits::kThreads) {
        const int plane = index / cells;
        const int cell = index - plane * cells;
        const int row = cell / columns;
        plan.cells[Traits::kInRows ? index : cell * planes + plane] =
            sum_of_bins(params, plan.bins + plane * bins, row, cell - row * columns, plan);
    }
}

// Rows [first_row, last_row) of `planes` planes, the first one's at `grad_x`. A thread has columns
// of its own.
template <typename Traits>
WARPLOOM_DEVICE void write_rows(const PyramidParams& params, typename Traits::Element* grad_x,
                                int planes, int first_row, int last_row, const MeansPlan& plan) {
    using T = typename Traits::Element;
    constexpr int kVector = Traits::kVector;
    constexpr int kColumns = Traits::kInRows ? kVector : 1;
    const int across = Traits::kInRows ? 1 : planes / kVector;  // threads of one pixel
    const int column_vectors = params.width / kColumns;
    const int slots = Traits::kThreads / across;
    const int columns_at_once = slots < column_vectors ? slots : column_vectors;
    const int rows_at_once = slots / columns_at_once;
    const int slot = static_cast<int>(threadIdx.x) / across;
    const int slot_row = slot / columns_at_once;
    const int plane_of_thread = (static_cast<int>(threadIdx.x) - slot * across) * kVector;
    if (slot_row >= rows_at_once) {
        return;
    }
    const int cells = cell_count(plan);
    const int cell_columns = plan.columns.cut_count + 1;
    for (int vector = slot - slot_row * columns_at_once; vector < column_vectors;
         vector += columns_at_once) {
        int cell[kColumns];
        cell[0] = next_cell(plan.columns, vector * kColumns, 0);
        WARPLOOM_UNROLL
        for (int index = 1; index < kColumns; ++index) {
            cell[index] = next_cell(plan.columns, vector * kColumns + index, cell[index - 1]);
        }
        for (int plane = plane_of_thread; plane < planes; plane += Traits::kInRows ? 1 : planes) {
            int band = 0;
            for (int row = first_row + slot_row; row < last_row; row += rows_at_once) {
                band = next_cell(plan.rows, row, band);
                float values[kVector];
                WARPLOOM_UNROLL
                for (int index = 0; index < kVector; ++index) {
                    const int place = band * cell_columns + cell[Traits::kInRows ? index : 0];
                    values[index] = plan.cells[Traits::kInRows ? plane * cells + place
                                                               : place * planes + plane + index];
                }
                store_packed(grad_x + plane * params.channel_stride + row * params.row_stride +
                                 vector * kColumns * params.pixel_stride,
                             pack_floats<T>(values));
            }
        }
    }
}

template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 4)
spread_means_kernel(WARPLOOM_GRID_CONSTANT SpatialPyramidPoolBackwardParams params) {
    using T = typename Traits::Element;
    auto& plan = shared_memory<MeansPlan>();
    const Division item =
        divide(blockIdx.x, (params.channels + Traits::kPlanes - 1) / Traits::kPlanes);
    const std::int64_t image = item.quotient;
    const std::int64_t channel = item.remainder * Traits::kPlanes;
    const std::int64_t rest = params.channels - channel;
    const int planes = rest < Traits::kPlanes ? static_cast<int>(rest) : Traits::kPlanes;
    const PoolRegion region = pool_region(params, image);
    if (threadIdx.x == 0) {
        build_axis(plan.rows, params, region, true);
    } else if (threadIdx.x == kWarpSize) {
        build_axis(plan.columns, params, region, false);
    }
    sync_threads();
    const int bins = bin_count(params);
    const int bin_room = kMeansBins / bins;
    const int cell_room = kMeansCells / cell_count(plan);
    const int room = bin_room < cell_room ? bin_room : cell_room;
    // Launchers see to it that there is room for a vector.
    const int at_once = Traits::kInRows ? room : room / Traits::kVector * Traits::kVector;
    const int parts = static_cast<int>(gridDim.y);
    const int part_rows = (params.height + parts - 1) / parts;
    const int first_row = static_cast<int>(blockIdx.y) * part_rows;
    const int last_row =
        first_row + part_rows < params.height ? first_row + part_rows : params.height;
    const T* grad_out = static_cast<const T*>(params.grad_out) + image * params.out_stride;
    T* grad_x = static_cast<T*>(params.grad_x) + region.first + channel * params.channel_stride;
    for (int first = 0; first < planes; first += at_once) {
        const int count = planes - first < at_once ? planes - first : at_once;
        divide_bins(params, grad_out, channel + first, count, bins, plan);
        sync_threads();
        sum_cells<Traits>(params, count, bins, plan);
        sync_threads();
        write_rows<Traits>(params, grad_x + first * params.channel_stride, count, first_row,
                           last_row, plan);
        sync_threads();
    }
}

}  // namespace warploom::spp
