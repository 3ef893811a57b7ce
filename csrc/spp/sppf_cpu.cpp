// The cascade of max pools on the CPU. A pool is separable, also in what it does with ties and NaN:
// a window's result is the last NaN of its cells in row-major order, else the first of the
// greatest. So each pool is two, along the rows and along the columns.
//
// Planes are taken as one long vector: `radius` cells of -infinity behind each row are the border
// of that row and of the next one. So the loops are as long as the plane, however short its rows.
// Channels-last tensors have a way of their own (sppf_channels_cpu.h).
#include "spp/sppf.h"

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/cpu_float.h"
#include "common/cpu_loops.h"
#include "common/parallel.h"
#include "spp/sppf_channels_cpu.h"
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

    std::int64_t height, radius, row, pitch;
    Cells<W> padded;      // radius cells, then height rows: what is pooled next
    Cells<W> columns;     // height rows of maxima along the rows between radius rows of padding
    Cells<W> row_maxima;  // one row, of windows

    Planes(const SppfShape& shape, const SppfWorkspace& workspace, std::int64_t part, bool indexed)
        : height(shape.height), radius(shape.radius), row(shape.width), pitch(row + radius) {
        padded.values = static_cast<W*>(workspace.values) + part * workspace.values_per_part;
        padded.indices = indexed ? workspace.indices + part * workspace.indices_per_part : nullptr;
        columns = padded + (radius + height * pitch + kBlock);
        row_maxima = columns + (height + 2 * radius) * pitch;
        const std::int64_t count = sppf_padded_size(shape, 1);
        for (std::int64_t i = 0; i < count; ++i) {
            padded.values[i] = -std::numeric_limits<W>::infinity();
        }
        for (std::int64_t i = 0; indexed && i < count; ++i) {
            padded.indices[i] = kPadding;
        }
    }

    Cells<W> padded_row(std::int64_t y) const { return padded + (radius + y * pitch); }

    // Pools the padded rows. Calls finish(y) for each, when the maxima of its windows are in
    // row_maxima.
    template <bool kIndexed, typename Finish>
    void pool(Finish finish) const {
        const std::int64_t window = 2 * radius + 1;
        pool_blocks<kIndexed>(columns + radius * pitch, padded, height * pitch - radius, window, 1);
        for (std::int64_t y = 0; y < height; ++y) {
            pool_blocks<kIndexed>(row_maxima, columns + y * pitch, row, window, pitch);
            finish(y);
        }
    }
};

// The first element of plane `index` of x's, or of the same in slice `slice` of the output.
inline std::int64_t plane_of(const SppfShape& shape, std::int64_t index, std::int64_t slices,
                             std::int64_t slice) {
    const std::int64_t batch = index / shape.channels;
    const std::int64_t plane = (batch * slices + slice) * shape.channels + index % shape.channels;
    return plane * shape.height * shape.width;
}

template <typename W, typename T>
inline void load_run(W* to, const T* from, std::int64_t count) {
    for_each_number(count, [=](std::int64_t i) { to[i] = widen(from[i]); });
}

template <typename T, typename W>
inline void store_run(T* to, const W* from, std::int64_t count) {
    for_each_number(count, [=](std::int64_t i) { to[i] = narrow<T>(from[i]); });
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

// Calls body(planes, index) for every plane, parts side by side.
template <typename W, typename Body>
void for_each_plane(const SppfShape& shape, const SppfWorkspace& workspace, bool indexed,
                    Body body) {
    const std::int64_t count = shape.batch * shape.channels;
    const std::int64_t parts = workspace.parts;
    parallel_for(parts, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t part = begin; part < end; ++part) {
            const Planes<W> planes(shape, workspace, part, indexed);
            if (indexed) {
                number_cells(planes);
            }
            for (std::int64_t index = part * count / parts; index < (part + 1) * count / parts;
                 ++index) {
                body(planes, index);
            }
        }
    });
}

template <typename T>
void forward(const SppfParams& params) {
    using W = Wide<T>;
    const SppfShape& shape = params.shape;
    for_each_plane<W>(
        shape, params.workspace, false, [&](const Planes<W>& planes, std::int64_t index) {
            const T* const x = static_cast<const T*>(params.x) + plane_of(shape, index, 1, 0);
            const auto write_row = [&](std::int64_t slice, std::int64_t y) {
                T* const out =
                    static_cast<T*>(params.out) + plane_of(shape, index, kSppfSlices, slice);
                store_run(out + y * planes.row, planes.padded_row(y).values, planes.row);
            };
            for (std::int64_t y = 0; y < shape.height; ++y) {
                load_run(planes.padded_row(y).values, x + y * planes.row, planes.row);
                write_row(0, y);
            }
            for (std::int64_t stage = 1; stage <= kSppfStages; ++stage) {
                planes.template pool<false>([&](std::int64_t y) {
                    load_run(planes.padded_row(y).values, planes.row_maxima.values, planes.row);
                    write_row(stage, y);
                });
            }
        });
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
            index = first_row + std::max<std::int64_t>(i - planes.radius, 0);
        }
        sums[index] += grads[i];
    }
}

template <typename T>
void backward(const SppfBackwardParams& params) {
    using W = Wide<T>;
    const SppfShape& shape = params.shape;
    for_each_plane<W>(
        shape, params.workspace, true, [&](const Planes<W>& planes, std::int64_t index) {
            const std::int64_t size = planes.height * planes.row;
            // Of what a pool returned, and of what it was given.
            W* const grads = planes.padded.values + sppf_padded_size(shape, 1);
            W* const sums = grads + size;
            const auto slice_of = [&](const void* tensor, std::int64_t slice) {
                return static_cast<const T*>(tensor) + plane_of(shape, index, kSppfSlices, slice);
            };
            load_run(grads, slice_of(params.grad_out, kSppfStages), size);
            for (std::int64_t stage = kSppfStages; stage >= 1; --stage) {
                const T* const pooled = slice_of(params.out, stage - 1);
                for (std::int64_t y = 0; y < shape.height; ++y) {
                    load_run(planes.padded_row(y).values, pooled + y * planes.row, planes.row);
                }
                for (std::int64_t i = 0; i < size; ++i) {
                    sums[i] = 0;
                }
                planes.template pool<true>([&](std::int64_t y) {
                    scatter_row(planes, y, planes.row_maxima.indices, grads + y * planes.row, sums);
                });
                const T* const grad = slice_of(params.grad_out, stage - 1);
#pragma omp simd
                for (std::int64_t i = 0; i < size; ++i) {
                    grads[i] = widen(grad[i]) + sums[i];
                }
            }
            store_run(static_cast<T*>(params.grad_x) + plane_of(shape, index, 1, 0), grads, size);
        });
}

}  // namespace

void sppf_cpu(const SppfParams& params) {
    visit_element_type(params.shape.dtype, [&]<typename T>() {
        if (params.shape.channels_last) {
            forward_channels<T>(params);
        } else {
            forward<T>(params);
        }
    });
}

void sppf_backward_cpu(const SppfBackwardParams& params) {
    visit_element_type(params.shape.dtype, [&]<typename T>() {
        if (params.shape.channels_last) {
            backward_channels<T>(params);
        } else {
            backward<T>(params);
        }
    });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::spp
