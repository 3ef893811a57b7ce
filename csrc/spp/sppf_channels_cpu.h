// The cascade of max pools of channels-last tensors on the CPU. Included by <op>_cpu.cpp only (see
// common/cpu.h on namespaces).
//
// Some neighbouring channels, the lanes, are taken at a time, side by side in each cell. A pool is
// two, along a row and along the columns, also in what it does with ties and NaN: a window's result
// is the last NaN of its cells in row-major order, else the first of the greatest. So is its
// gradient: it goes to the row that the window's maximum came from, and there to its column. All
// stages of a row follow each other as soon as they can, while it is in the cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "common/cpu_loops.h"
#include "common/parallel.h"
#include "spp/held_cpu.h"
#include "spp/sppf.h"
#include "spp/sppf_workspace_cpu.h"

namespace warploom::spp {
namespace WARPLOOM_CPU_ISA {

// Bytes of an output of which little remains in the caches until it is read.
constexpr std::int64_t kLargeOutput = 12 << 20;
constexpr std::int64_t kLine = 64;

// Writes whole lines of memory past the caches, which would first read them.
template <typename T>
inline void store_past_cache(T* to, const T* from, std::int64_t count) {
#if defined(__AVX__)
    for (std::int64_t at = 0; at < count; at += sizeof(__m256i) / sizeof(T)) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at)));
    }
#else
    std::copy_n(from, count, to);
#endif
}

// Before another thread may read what was written so.
inline void finish_past_cache() {
#if defined(__AVX__)
    _mm_sfence();
#endif
}

// Pixels that are asked for ahead: their distance is too long for the processor to guess.
constexpr std::int64_t kPixelsAhead = 16;

// `lanes` channels of one image, of a tensor that has `pixel_stride` of them.
template <typename T, int kLanes>
struct Channels {
    T* first;
    std::int64_t pixel_stride;
    std::int64_t lanes;

    Channels operator+(std::int64_t channels) const {
        return {first + channels, pixel_stride, lanes};
    }
    T* pixel(std::int64_t index) const { return first + index * pixel_stride; }
};

template <int kLanes, typename T, typename W>
inline void load_row(const Channels<const T, kLanes>& from, std::int64_t y, std::int64_t width,
                     W* to) {
    for (std::int64_t x = 0; x < width; ++x, to += kLanes) {
        const T* const pixel = from.pixel(y * width + x);
        prefetch(from.pixel(y * width + x + kPixelsAhead), kLanes);
        if (from.lanes == kLanes) {
#pragma omp simd
            for (int lane = 0; lane < kLanes; ++lane) {
                to[lane] = widen(pixel[lane]);
            }
        } else {
            for (std::int64_t lane = 0; lane < from.lanes; ++lane) {
                to[lane] = widen(pixel[lane]);
            }
        }
    }
}

template <int kLanes, typename T, typename W>
inline void store_row(const Channels<T, kLanes>& to, bool past_cache, std::int64_t y,
                      std::int64_t width, const W* from) {
    for (std::int64_t x = 0; x < width; ++x, from += kLanes) {
        T* const pixel = to.pixel(y * width + x);
        alignas(kLine) T numbers[kLanes];
#pragma omp simd
        for (int lane = 0; lane < kLanes; ++lane) {
            numbers[lane] = narrow<T>(from[lane]);
        }
        if (past_cache) {
            store_past_cache(pixel, numbers, kLanes);
        } else if (to.lanes == kLanes) {
            __builtin_memcpy(pixel, numbers, sizeof(numbers));
        } else {
            std::copy_n(numbers, to.lanes, pixel);
        }
    }
}

// The cells of an axis that a window, or what windows send to a cell, comes from.
struct Reach {
    std::int64_t begin;
    std::int64_t count;

    Reach(std::int64_t center, std::int64_t radius, std::int64_t extent)
        : begin(std::max<std::int64_t>(center - radius, 0)),
          count(std::min(center + radius + 1, extent) - begin) {}

    // Calls body(count): a constant of the usual window, whose loops are unrolled.
    template <typename Body>
    void visit(Body body) const {
        if (count == 5) {
            body(std::integral_constant<std::int64_t, 5>());
        } else {
            body(count);
        }
    }
};

template <typename W>
inline void store_vector(W* to, const Vector<W>& vector) {
    __builtin_memcpy(to, &vector, sizeof(vector));
}

// Calls body(whether, as a constant).
template <typename Body>
inline void visit_flag(bool flag, Body body) {
    if (flag) {
        body(std::true_type());
    } else {
        body(std::false_type());
    }
}

// The maximum of cells `stride` numbers apart and, if kPlaced, which it is, from `number` on.
template <bool kPlaced, typename MayBeNan, typename W, typename Count>
inline void pool_cells(MayBeNan, const W* cells, std::int64_t stride, Count count,
                       std::int64_t number, W* maximum, W* place) {
    constexpr Reduction kReduction = kPlaced ? Reduction::indexed_max : Reduction::max;
    Vector<W> held = load_vector(cells);
    Vector<W> held_place = Vector<W>{} + static_cast<W>(number);
    for (std::int64_t cell = 1; cell < count; ++cell) {
        take<kReduction, MayBeNan::value>(load_vector(cells + cell * stride),
                                          Vector<W>{} + static_cast<W>(number + cell), held,
                                          held_place);
    }
    store_vector(maximum, held);
    if constexpr (kPlaced) {
        store_vector(place, held_place);
    }
}

// sum + what cells `stride` numbers apart, each with its place, give to place `number`.
template <typename W, typename Count>
inline Vector<W> add_cells(Vector<W> sum, const W* grads, const W* places, std::int64_t stride,
                           Count count, W number) {
    for (std::int64_t cell = 0; cell < count; ++cell) {
        const auto is_here = load_vector(places + cell * stride) == Vector<W>{} + number;
        sum += is_here ? load_vector(grads + cell * stride) : Vector<W>{};
    }
    return sum;
}

// What is computed of planes of kLanes channels; rows lie `pitch` numbers apart.
template <typename W, int kLanes>
struct Cascade {
    std::int64_t height;
    std::int64_t width;
    std::int64_t radius;
    std::int64_t pitch;

    explicit Cascade(const SppfShape& shape)
        : height(shape.height),
          width(shape.width),
          radius(shape.radius),
          pitch(shape.width * kLanes) {}

    std::int64_t size() const { return height * pitch; }
    bool has_row(std::int64_t y) const { return 0 <= y && y < height; }

    // Along a row, and the columns of the maxima.
    template <bool kPlaced>
    void pool_row(bool has_nan, const W* row, W* maxima, W* columns) const {
        visit_flag(has_nan, [&](auto may_be_nan) {
            for (std::int64_t x = 0; x < width; ++x) {
                const Reach reach(x, radius, width);
                reach.visit([&](auto count) {
                    for (int lane = 0; lane < kLanes; lane += kSide<W>) {
                        const std::int64_t at = x * kLanes + lane;
                        pool_cells<kPlaced>(may_be_nan, row + reach.begin * kLanes + lane, kLanes,
                                            count, reach.begin, maxima + at, columns + at);
                    }
                });
            }
        });
    }

    // Along the columns, of the windows of row `y`, and the rows of the maxima.
    template <bool kPlaced>
    void pool_columns(bool has_nan, const W* plane, std::int64_t y, W* maxima, W* rows) const {
        const Reach reach(y, radius, height);
        visit_flag(has_nan, [&](auto may_be_nan) {
            reach.visit([&](auto count) {
                for (std::int64_t at = 0; at < pitch; at += kSide<W>) {
                    pool_cells<kPlaced>(may_be_nan, plane + reach.begin * pitch + at, pitch, count,
                                        reach.begin, maxima + at, rows + at);
                }
            });
        });
    }

    // What windows send to row `y`.
    void gather_rows(const W* grads, const W* rows, std::int64_t y, W* to) const {
        const Reach reach(y, radius, height);
        reach.visit([&](auto count) {
            for (std::int64_t at = 0; at < pitch; at += kSide<W>) {
                const std::int64_t first = reach.begin * pitch + at;
                store_vector(to + at, add_cells(Vector<W>{}, grads + first, rows + first, pitch,
                                                count, static_cast<W>(y)));
            }
        });
    }

    // Adds what a row's windows send to its cells.
    void add_columns(const W* grads, const W* columns, W* to) const {
        for (std::int64_t x = 0; x < width; ++x) {
            const Reach reach(x, radius, width);
            reach.visit([&](auto count) {
                for (int lane = 0; lane < kLanes; lane += kSide<W>) {
                    const std::int64_t first = reach.begin * kLanes + lane;
                    W* const sum = to + x * kLanes + lane;
                    store_vector(sum, add_cells(load_vector(sum), grads + first, columns + first,
                                                kLanes, count, static_cast<W>(x)));
                }
            });
        }
    }

    template <typename T>
    [[gnu::flatten]] void forward(const Channels<const T, kLanes>& x,
                                  const Channels<T, kLanes>& out, bool past_cache,
                                  std::int64_t channels, W* workspace) const {
        W* const row = workspace;
        W* const row_maxima = workspace + pitch;
        std::fill_n(row, pitch, W{0});
        bool has_nan = false;
        for (std::int64_t time = 0; time < height + kSppfStages * radius; ++time) {
            for (std::int64_t stage = 0; stage < kSppfSlices; ++stage) {
                const std::int64_t y = time - stage * radius;
                if (!has_row(y)) {
                    continue;
                }
                if (stage == 0) {
                    load_row(x, y, width, row);
                    has_nan |= may_hold_nan(row, pitch);
                } else {
                    pool_columns<false>(has_nan, row_maxima + (stage - 1) * size(), y, row, row);
                }
                store_row(out + stage * channels, past_cache, y, width, row);
                if (stage < kSppfStages) {
                    pool_row<false>(has_nan, row, row_maxima + stage * size() + y * pitch, row);
                }
            }
        }
    }

    template <typename T>
    [[gnu::flatten]] void backward(const Channels<const T, kLanes>& grad_out,
                                   const Channels<const T, kLanes>& out,
                                   const Channels<T, kLanes>& grad_x, std::int64_t channels,
                                   W* workspace) const {
        W* const row = workspace;
        W* const row_maxima = row + pitch;
        W* const columns = row_maxima + size();
        W* const rows = columns + size();
        W* grads = rows + size();  // of what a stage returned
        W* next = grads + size();  // of what it was given
        std::fill_n(row, pitch, W{0});
        bool has_nan = false;
        for (std::int64_t y = 0; y < height; ++y) {
            load_row(grad_out + kSppfStages * channels, y, width, grads + y * pitch);
        }
        for (std::int64_t slice = kSppfStages - 1; slice >= 0; --slice) {
            for (std::int64_t time = 0; time < height + 2 * radius; ++time) {
                if (const std::int64_t y = time; has_row(y)) {
                    load_row(out + slice * channels, y, width, row);
                    has_nan |= may_hold_nan(row, pitch);
                    pool_row<true>(has_nan, row, row_maxima + y * pitch, columns + y * pitch);
                }
                if (const std::int64_t y = time - radius; has_row(y)) {
                    pool_columns<true>(has_nan, row_maxima, y, row, rows + y * pitch);
                }
                if (const std::int64_t y = time - 2 * radius; has_row(y)) {
                    gather_rows(grads, rows, y, row);
                    load_row(grad_out + slice * channels, y, width, next + y * pitch);
                    add_columns(row, columns + y * pitch, next + y * pitch);
                }
            }
            std::swap(grads, next);
        }
        for (std::int64_t y = 0; y < height; ++y) {
            store_row(grad_x, false, y, width, grads + y * pitch);
        }
    }
};

// Calls body(image, first channel, lanes, workspace) for all groups of kLanes channels.
template <typename W, int kLanes, typename Body>
void for_each_channels(const SppfShape& shape, const SppfWorkspace& workspace, Body body) {
    const std::int64_t per_image = ceil_divide(shape.channels, kLanes);
    const std::int64_t groups = shape.batch * per_image;
    const std::int64_t parts = workspace.parts;
    parallel_for(parts, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t part = begin; part < end; ++part) {
            W* const own = static_cast<W*>(workspace.values) + part * workspace.values_per_part;
            for (std::int64_t index = part * groups / parts; index < (part + 1) * groups / parts;
                 ++index) {
                const std::int64_t channel = index % per_image * kLanes;
                body(index / per_image, channel,
                     std::min<std::int64_t>(kLanes, shape.channels - channel), own);
            }
        }
    });
}

template <typename T>
void forward_channels(const SppfParams& params) {
    using W = Wide<T>;
    constexpr int kLanes = kSppfForwardLanes;
    const SppfShape& shape = params.shape;
    const Cascade<W, kLanes> cascade(shape);
    const std::int64_t pixels = static_cast<std::int64_t>(shape.height) * shape.width;
    const std::int64_t stride = kSppfSlices * static_cast<std::int64_t>(shape.channels);
    const auto is_of_lines = [](std::uint64_t bytes) { return bytes % kLine == 0; };
    const bool past_cache = is_of_lines(reinterpret_cast<std::uintptr_t>(params.out)) &&
                            is_of_lines(shape.channels * sizeof(T)) &&
                            is_of_lines(kLanes * sizeof(T)) &&
                            shape.batch * pixels * stride * std::int64_t{sizeof(T)} >= kLargeOutput;
    for_each_channels<W, kLanes>(
        shape, params.workspace,
        [&](std::int64_t image, std::int64_t channel, std::int64_t lanes, W* workspace) {
            const T* x =
                static_cast<const T*>(params.x) + image * pixels * shape.channels + channel;
            T* out = static_cast<T*>(params.out) + image * pixels * stride + channel;
            cascade.forward(Channels<const T, kLanes>{x, shape.channels, lanes},
                            Channels<T, kLanes>{out, stride, lanes}, past_cache && lanes == kLanes,
                            shape.channels, workspace);
            finish_past_cache();
        });
}

template <typename T>
void backward_channels(const SppfBackwardParams& params) {
    using W = Wide<T>;
    constexpr int kLanes = kSppfBackwardLanes;
    const SppfShape& shape = params.shape;
    const Cascade<W, kLanes> cascade(shape);
    const std::int64_t pixels = static_cast<std::int64_t>(shape.height) * shape.width;
    const std::int64_t stride = kSppfSlices * static_cast<std::int64_t>(shape.channels);
    for_each_channels<W, kLanes>(
        shape, params.workspace,
        [&](std::int64_t image, std::int64_t channel, std::int64_t lanes, W* workspace) {
            const std::int64_t first = image * pixels * stride + channel;
            T* grad_x = static_cast<T*>(params.grad_x) + image * pixels * shape.channels + channel;
            cascade.backward(
                Channels<const T, kLanes>{static_cast<const T*>(params.grad_out) + first, stride,
                                          lanes},
                Channels<const T, kLanes>{static_cast<const T*>(params.out) + first, stride, lanes},
                Channels<T, kLanes>{grad_x, shape.channels, lanes}, shape.channels, workspace);
        });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::spp
