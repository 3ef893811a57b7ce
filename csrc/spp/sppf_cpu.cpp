// The cascade of max pools on the CPU. A pool is separable, also in what it does with ties and NaN:
// a window's result is the last NaN of its cells in row-major order, else the first of the
// greatest. So each pool is two, along the rows and along the columns.
//
// Planes are taken as one long vector: `lanes` neighbouring channels (of channels-last tensors)
// stand side by side in each cell, and `radius` cells of -infinity behind each row are the border
// of that row and of the next one. So the loops are as long as the plane, however short its rows.
#include "spp/sppf.h"

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/cpu_float.h"
#include "common/cpu_loops.h"
#include "common/parallel.h"
#include "spp/turn_cpu.h"

namespace warploom::spp {
namespace WARPLOOM_CPU_ISA {
namespace {

using namespace ::warploom::WARPLOOM_CPU_ISA;

// Numbers and, backward, the places that they come from.
template <typename W>
struct Cells {
    W* values;
    std::int32_t* indices;

    Cells operator+(std::int64_t offset) const {
        return {values + offset, indices == nullptr ? nullptr : indices + offset};
    }
};

// Pixels of channels-last tensors that are asked for ahead: their distance is too long for the
// processor to guess.
constexpr std::int64_t kAhead = 16;
// Numbers that the loops take at a time.
constexpr std::int64_t kBlock = kSppfBlock;

// to[i] of the `window` cells from[i], from[i + shift], ..., of a whole block: of two neighbours
// the later where it is greater or NaN, else the earlier.
template <bool kIndexed, typename W>
inline void pool_block(Cells<W> to, Cells<W> from, std::int64_t window, std::int64_t shift) {
    typedef std::int32_t Stored __attribute__((vector_size(kSide<W> * sizeof(std::int32_t))));
    for (int first = 0; first < kBlock; first += kSide<W>) {
        Vector<W> values = load_vector(from.values + first);
        Indices<W> indices{};
        Stored stored{};
        if constexpr (kIndexed) {
            __builtin_memcpy(&stored, from.indices + first, sizeof(stored));
            indices = __builtin_convertvector(stored, Indices<W>);
        }
        for (std::int64_t cell = 1; cell < window; ++cell) {
            const std::int64_t at = first + cell * shift;
            const Vector<W> later = load_vector(from.values + at);
            const auto is_taken = (later > values) | (later != later);
            values = is_taken ? later : values;
            if constexpr (kIndexed) {
                __builtin_memcpy(&stored, from.indices + at, sizeof(stored));
                indices = is_taken ? __builtin_convertvector(stored, Indices<W>) : indices;
            }
        }
        __builtin_memcpy(to.values + first, &values, sizeof(values));
        if constexpr (kIndexed) {
            stored = __builtin_convertvector(indices, Stored);
            __builtin_memcpy(to.indices + first, &stored, sizeof(stored));
        }
    }
}

// The same of `count` numbers, in whole blocks: what lies behind `count` is written, too.
template <bool kIndexed, typename W>
inline void pool_blocks(Cells<W> to, Cells<W> from, std::int64_t count, std::int64_t window,
                        std::int64_t shift) {
    for (std::int64_t first = 0; first < count; first += kBlock) {
        pool_block<kIndexed>(to + first, from + first, window, shift);
    }
}

// Calls body(i) for the numbers up to `count`, some of them twice where there is a whole block: the
// last one overlaps.
template <typename Body>
inline void for_each_number(std::int64_t count, Body body) {
    if (count < kBlock) {
#pragma omp simd
        for (std::int64_t i = 0; i < count; ++i) {
            body(i);
        }
        return;
    }
    for (std::int64_t first = 0; first < count; first += kBlock) {
        const std::int64_t begin = std::min(first, count - kBlock);
#pragma omp simd
        for (std::int64_t i = begin; i < begin + kBlock; ++i) {
            body(i);
        }
    }
}

// One part's padded planes. Rows of all three are `pitch` numbers apart. Behind `padded` and behind
// all lies a block of padding, for loops that go too far.
template <typename W>
struct Planes {
    static constexpr std::int32_t kPadding = -1;

    std::int64_t height, radius, lanes, row, pitch;
    Cells<W> padded;      // radius cells, then height rows: what is pooled next
    Cells<W> columns;     // height rows of maxima along the rows between radius rows of padding
    Cells<W> row_maxima;  // one row, of windows

    Planes(const SppfShape& shape, const SppfWorkspace& workspace, std::int64_t part, bool indexed)
        : height(shape.height),
          radius(shape.radius),
          lanes(workspace.lanes),
          row(shape.width * lanes),
          pitch(row + radius * lanes) {
        padded.values = static_cast<W*>(workspace.values) + part * workspace.values_per_part;
        padded.indices = indexed ? workspace.indices + part * workspace.indices_per_part : nullptr;
        columns = padded + (radius * lanes + height * pitch + kBlock);
        row_maxima = columns + (height + 2 * radius) * pitch;
        const std::int64_t count = sppf_padded_size(shape, lanes);
        for (std::int64_t i = 0; i < count; ++i) {
            padded.values[i] = -std::numeric_limits<W>::infinity();
        }
        for (std::int64_t i = 0; indexed && i < count; ++i) {
            padded.indices[i] = kPadding;
        }
    }

    Cells<W> padded_row(std::int64_t y) const { return padded + (radius * lanes + y * pitch); }

    // Pools the padded rows. Calls finish(y) for each, when the maxima of its windows are in
    // row_maxima.
    template <bool kIndexed, typename Finish>
    void pool(Finish finish) const {
        const std::int64_t window = 2 * radius + 1;
        pool_blocks<kIndexed>(columns + radius * pitch, padded, height * pitch - radius * lanes,
                              window, lanes);
        for (std::int64_t y = 0; y < height; ++y) {
            pool_blocks<kIndexed>(row_maxima, columns + y * pitch, row, window, pitch);
            finish(y);
        }
    }
};

// Where a group of planes, one a lane, lies in tensors of x's channels and in slices of the output.
struct Group {
    std::int64_t batch;
    std::int64_t channel;
    std::int64_t lanes;  // that exist
};

inline std::int64_t groups_per_sample(const SppfShape& shape, std::int64_t lanes) {
    return ceil_divide(shape.channels, lanes);
}

inline Group group_of(const SppfShape& shape, std::int64_t lanes, std::int64_t index) {
    const std::int64_t count = groups_per_sample(shape, lanes);
    const std::int64_t channel = index % count * lanes;
    return {index / count, channel, std::min(lanes, shape.channels - channel)};
}

// Calls body(number in a row of the plane, element of the tensor, count) for the runs of row `y`
// that are dense in both. The tensor has `slices` times x's channels, the plane is of `slice`.
template <typename Body>
inline void for_each_run(const SppfShape& shape, std::int64_t lanes, const Group& group,
                         std::int64_t slices, std::int64_t slice, std::int64_t y, Body body) {
    const std::int64_t width = shape.width;
    const std::int64_t channels = slices * shape.channels;
    const std::int64_t channel = slice * shape.channels + group.channel;
    if (!shape.channels_last) {
        body(std::int64_t{0}, ((group.batch * channels + channel) * shape.height + y) * width,
             width);
        return;
    }
    const std::int64_t first = (group.batch * shape.height + y) * width;
    for (std::int64_t x = 0; x < width; ++x) {
        body(x * lanes, (first + x) * channels + channel, group.lanes);
    }
}

template <typename W, typename T>
inline void load_run(W* to, const T* from, std::int64_t count) {
    for_each_number(count, [=](std::int64_t i) { to[i] = widen(from[i]); });
}

template <typename T, typename W>
inline void store_run(T* to, const W* from, std::int64_t count) {
    for_each_number(count, [=](std::int64_t i) { to[i] = narrow<T>(from[i]); });
}

// Calls body(part, group) for every group of planes, parts side by side.
template <typename Body>
void for_each_group(const SppfShape& shape, const SppfWorkspace& workspace, Body body) {
    const std::int64_t groups = shape.batch * groups_per_sample(shape, workspace.lanes);
    const std::int64_t parts = workspace.parts;
    parallel_for(parts, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t part = begin; part < end; ++part) {
            body(part, part * groups / parts, (part + 1) * groups / parts);
        }
    });
}

template <typename T>
void forward(const SppfParams& params) {
    using W = Wide<T>;
    const SppfShape& shape = params.shape;
    const std::int64_t lanes = params.workspace.lanes;
    const T* x = static_cast<const T*>(params.x);
    T* out = static_cast<T*>(params.out);
    for_each_group(
        shape, params.workspace, [&](std::int64_t part, std::int64_t begin, std::int64_t end) {
            const Planes<W> planes(shape, params.workspace, part, false);
            for (std::int64_t index = begin; index < end; ++index) {
                const Group group = group_of(shape, lanes, index);
                const auto write_row = [&](std::int64_t slice, std::int64_t y) {
                    const W* from = planes.padded_row(y).values;
                    for_each_run(shape, lanes, group, kSppfSlices, slice, y,
                                 [&](std::int64_t place, std::int64_t element, std::int64_t count) {
                                     store_run(out + element, from + place, count);
                                 });
                };
                for (std::int64_t y = 0; y < shape.height; ++y) {
                    W* to = planes.padded_row(y).values;
                    for_each_run(shape, lanes, group, 1, 0, y,
                                 [&](std::int64_t place, std::int64_t element, std::int64_t count) {
                                     load_run(to + place, x + element, count);
                                 });
                    write_row(0, y);
                }
                for (std::int64_t stage = 1; stage <= kSppfStages; ++stage) {
                    planes.template pool<false>([&](std::int64_t y) {
                        load_run(planes.padded_row(y).values, planes.row_maxima.values, planes.row);
                        write_row(stage, y);
                    });
                }
            }
        });
}

// The numbers of gradients' planes are not padded: number i of row y is y * row + i, which is also
// the index that a cell has in `padded`.
template <typename W>
inline void number_cells(const Planes<W>& planes) {
    for (std::int64_t y = 0; y < planes.height; ++y) {
        for (std::int64_t i = 0; i < planes.row; ++i) {
            planes.padded_row(y).indices[i] = static_cast<std::int32_t>(y * planes.row + i);
        }
    }
}

// Sends row y's gradients where its maxima come from. A window of nothing but -infinity may have
// found padding: it comes from its first cell.
template <typename W>
inline void scatter_row(const Planes<W>& planes, std::int64_t y, const std::int32_t* indices,
                        const W* grads, W* sums) {
    const std::int64_t first_row = std::max<std::int64_t>(y - planes.radius, 0) * planes.row;
    for (std::int64_t i = 0; i < planes.row; ++i) {
        std::int64_t index = indices[i];
        if (index == Planes<W>::kPadding) {
            const std::int64_t lane = i % planes.lanes;
            index = first_row + std::max(i - planes.radius * planes.lanes, lane);
        }
        sums[index] += grads[i];
    }
}

template <typename T>
void backward(const SppfBackwardParams& params) {
    using W = Wide<T>;
    const SppfShape& shape = params.shape;
    const std::int64_t lanes = params.workspace.lanes;
    const T* grad_out = static_cast<const T*>(params.grad_out);
    const T* out = static_cast<const T*>(params.out);
    T* grad_x = static_cast<T*>(params.grad_x);
    for_each_group(
        shape, params.workspace, [&](std::int64_t part, std::int64_t begin, std::int64_t end) {
            const Planes<W> planes(shape, params.workspace, part, true);
            number_cells(planes);
            const std::int64_t size = planes.height * planes.row;
            const std::int64_t ahead =
                shape.channels_last ? kAhead * kSppfSlices * shape.channels : 0;
            // Of what a pool returned, and of what it was given.
            W* grads = planes.padded.values + sppf_padded_size(shape, lanes);
            W* sums = grads + size;
            for (std::int64_t index = begin; index < end; ++index) {
                const Group group = group_of(shape, lanes, index);
                const auto load_slice = [&](const T* from, std::int64_t slice, auto row_of) {
                    for (std::int64_t y = 0; y < shape.height; ++y) {
                        for_each_run(
                            shape, lanes, group, kSppfSlices, slice, y,
                            [&](std::int64_t place, std::int64_t element, std::int64_t count) {
                                prefetch(from + element + ahead, count);
                                load_run(row_of(y) + place, from + element, count);
                            });
                    }
                };
                const auto grads_row = [&](std::int64_t y) { return grads + y * planes.row; };
                load_slice(grad_out, kSppfStages, grads_row);
                for (std::int64_t stage = kSppfStages; stage >= 1; --stage) {
                    load_slice(out, stage - 1,
                               [&](std::int64_t y) { return planes.padded_row(y).values; });
                    for (std::int64_t i = 0; i < size; ++i) {
                        sums[i] = 0;
                    }
                    planes.template pool<true>([&](std::int64_t y) {
                        scatter_row(planes, y, planes.row_maxima.indices, grads_row(y), sums);
                    });
                    load_slice(grad_out, stage - 1, grads_row);
#pragma omp simd
                    for (std::int64_t i = 0; i < size; ++i) {
                        grads[i] += sums[i];
                    }
                }
                for (std::int64_t y = 0; y < shape.height; ++y) {
                    for_each_run(shape, lanes, group, 1, 0, y,
                                 [&](std::int64_t place, std::int64_t element, std::int64_t count) {
                                     store_run(grad_x + element, grads_row(y) + place, count);
                                 });
                }
            }
        });
}

}  // namespace

void sppf_cpu(const SppfParams& params) {
    visit_element_type(params.shape.dtype, [&]<typename T>() { forward<T>(params); });
}

void sppf_backward_cpu(const SppfBackwardParams& params) {
    visit_element_type(params.shape.dtype, [&]<typename T>() { backward<T>(params); });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::spp
