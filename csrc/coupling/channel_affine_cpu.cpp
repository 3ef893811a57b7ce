// A scale and a shift per channel on the CPU: every tensor crosses the memory bus once. Where the
// channels of a pixel are neighbours, as many pixels as fit a line are taken at once, with as many
// copies of the parameters side by side.
#include "coupling/channel_affine.h"

#include <algorithm>
#include <cstdint>

#include "common/cpu_float.h"
#include "common/cpu_loops.h"
#include "common/cpu_math.h"
#include "common/parallel.h"

namespace warploom::coupling {
namespace WARPLOOM_CPU_ISA {
namespace {

using namespace ::warploom::WARPLOOM_CPU_ISA;

constexpr std::int64_t kLine = 1024;
// Elements that are worth waking a thread for.
constexpr std::int64_t kGrain = 16384;

inline std::int64_t grain_of(std::int64_t elements) {
    return std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(1, elements));
}

template <typename W>
struct Channel {
    W scale;
    W before;
    W after;
};

template <typename T>
inline Wide<T> parameter(const void* values, DType own, DType dtype, std::int64_t channel) {
    return own == dtype ? widen(static_cast<const T*>(values)[channel])
                        : static_cast<Wide<T>>(static_cast<const float*>(values)[channel]);
}

template <typename T>
inline Channel<Wide<T>> channel_of(const ChannelMap& map, DType dtype, std::int64_t channel) {
    using W = Wide<T>;
    const W shift = parameter<T>(map.shift, map.dtype, dtype, channel);
    const W signed_shift = map.inverse ? -shift : shift;
    return {parameter<T>(map.scale, map.dtype, dtype, channel), map.add_first ? signed_shift : W{0},
            map.add_first ? W{0} : signed_shift};
}

template <bool inverse, typename W>
inline W scaled(W value, W scale) {
    return inverse ? value / scale : value * scale;
}

template <bool inverse, typename W>
inline W mapped(W value, W scale, W before, W after) {
    return scaled<inverse>(value + before, scale) + after;
}

// The parameters of `rows` pixels' channels, from `first` on.
template <typename W>
struct alignas(64) Columns {
    W scale[kLine];
    W before[kLine];
    W after[kLine];
    std::int64_t first = -1;
};

// How many pixels make a line, and how many of their channels.
struct RowTile {
    std::int64_t rows;
    std::int64_t width;
};

inline RowTile row_tile(const ChannelShape& shape, std::int64_t first, bool dense) {
    const std::int64_t width = std::min(shape.channels - first, kLine);
    return {dense ? std::max<std::int64_t>(1, kLine / shape.channels) : 1, width};
}

template <typename T>
void fill_columns(const ChannelMap& map, DType dtype, std::int64_t first, const RowTile& tile,
                  Columns<Wide<T>>& columns) {
    if (columns.first == first) {
        return;
    }
    columns.first = first;
    for (std::int64_t i = 0; i < tile.rows * tile.width; ++i) {
        const auto [scale, before, after] = channel_of<T>(map, dtype, first + i % tile.width);
        columns.scale[i] = scale;
        columns.before[i] = before;
        columns.after[i] = after;
    }
}

template <typename T, bool inverse>
void forward_lines(const ChannelAffineParams& params) {
    using W = Wide<T>;
    const auto [outer, channels, inner] = params.shape;
    const std::int64_t length = std::min(inner, kGrain);
    const std::int64_t ranges = ceil_divide(inner, length);
    parallel_for(
        outer * channels * ranges, grain_of(length), [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t item = begin; item < end; ++item) {
                const std::int64_t line = item / ranges;
                const std::int64_t channel = line % channels;
                const std::int64_t first = item % ranges * length;
                const auto [scale, before, after] =
                    channel_of<T>(params.map, params.dtype, channel);
                const T* x = static_cast<const T*>(params.x) + line / channels * params.x_stride +
                             channel * inner + first;
                T* z = static_cast<T*>(params.z) + line * inner + first;
                for_each_element<T>(
                    std::min(length, inner - first),
                    [scale = scale, before = before, after = after](W value) {
                        return mapped<inverse>(value, scale, before, after);
                    },
                    [z](std::int64_t i, auto... results) { store<T>(z + i, results...); }, x);
            }
        });
}

template <typename T, bool inverse>
void forward_rows(const ChannelAffineParams& params) {
    using W = Wide<T>;
    const std::int64_t channels = params.shape.channels;
    const bool dense = params.x_stride == channels;
    const std::int64_t block = std::max<std::int64_t>(1, kGrain / channels);
    parallel_for(
        ceil_divide(params.shape.outer, block), 1, [&](std::int64_t begin, std::int64_t end) {
            Columns<W> columns;
            for (std::int64_t item = begin; item < end; ++item) {
                const std::int64_t last = std::min(params.shape.outer, (item + 1) * block);
                for (std::int64_t first = 0; first < channels; first += kLine) {
                    const RowTile tile = row_tile(params.shape, first, dense);
                    fill_columns<T>(params.map, params.dtype, first, tile, columns);
                    for (std::int64_t row = item * block; row < last; row += tile.rows) {
                        const T* x = static_cast<const T*>(params.x) + row * params.x_stride;
                        T* z = static_cast<T*>(params.z) + row * channels + first;
                        for_each_element<T>(
                            std::min(tile.rows, last - row) * tile.width,
                            [](W value, W scale, W before, W after) {
                                return mapped<inverse>(value, scale, before, after);
                            },
                            [z](std::int64_t i, auto... results) { store<T>(z + i, results...); },
                            x + first, columns.scale, columns.before, columns.after);
                    }
                }
            }
        });
}

// Part `part`'s sums of g (x + before) and of g: partials[0 or 1, part, channel].
template <typename T>
struct PartialSums {
    Wide<T>* products;
    Wide<T>* grads;

    PartialSums(const ChannelAffineBackwardParams& params, std::int64_t part)
        : products(static_cast<Wide<T>*>(params.partials) + part * params.shape.channels),
          grads(products + params.parts.count * params.shape.channels) {}
};

struct Totals {
    double product = 0;
    double grad = 0;
};

// grad_x of neighbours in a channel, whose terms of the sums stay in registers.
template <typename T, bool inverse>
void backward_line(std::int64_t count, const T* grad_z, const T* x, Wide<T> scale, Wide<T> before,
                   T* grad_x, Totals& totals) {
    using W = Wide<T>;
    W product = 0;
    W grad = 0;
    std::int64_t first = 0;
    if constexpr (kInPairs<T>) {
        first = count / 2 * 2;
#pragma omp simd reduction(+ : product, grad)
        for (std::int64_t i = 0; i < first; i += 2) {
            const Pair<W> upstream = widen_pair(grad_z + i);
            const Pair<W> value = widen_pair(x + i);
            product += upstream.even * (value.even + before) + upstream.odd * (value.odd + before);
            grad += upstream.even + upstream.odd;
            store<T>(grad_x + i, scaled<inverse>(upstream.even, scale),
                     scaled<inverse>(upstream.odd, scale));
        }
    }
#pragma omp simd reduction(+ : product, grad)
    for (std::int64_t i = first; i < count; ++i) {
        const W upstream = widen(grad_z[i]);
        product += upstream * (widen(x[i]) + before);
        grad += upstream;
        store<T>(grad_x + i, scaled<inverse>(upstream, scale));
    }
    totals.product += product;
    totals.grad += grad;
}

template <typename T, bool inverse>
void backward_lines(const ChannelAffineBackwardParams& params) {
    const auto [outer, channels, inner] = params.shape;
    const ChannelParts& parts = params.parts;
    const auto run = [&, inner = inner, outer = outer](std::int64_t part, std::int64_t channel) {
        const auto [scale, before, after] = channel_of<T>(params.map, params.dtype, channel);
        const std::int64_t first = part % parts.ranges * parts.length;
        const std::int64_t length = std::min(parts.length, inner - first);
        const std::int64_t begin = part / parts.ranges * parts.group;
        const std::int64_t end = std::min(outer, begin + parts.group);
        Totals totals;
        for (std::int64_t sample = begin; sample < end; ++sample) {
            const std::int64_t at = channel * inner + first;
            const T* grad_z =
                static_cast<const T*>(params.grad_z) + sample * params.grad_z_stride + at;
            const T* x = static_cast<const T*>(params.x) + sample * params.x_stride + at;
            T* grad_x = static_cast<T*>(params.grad_x) + sample * channels * inner + at;
            for (std::int64_t start = 0; start < length; start += kLine) {
                backward_line<T, inverse>(std::min(kLine, length - start), grad_z + start,
                                          x + start, scale, before, grad_x + start, totals);
            }
        }
        const PartialSums<T> partial(params, part);
        partial.products[channel] = static_cast<Wide<T>>(totals.product);
        partial.grads[channel] = static_cast<Wide<T>>(totals.grad);
    };
    parallel_for(parts.count * channels, grain_of(parts.group * parts.length),
                 [&, channels = channels](std::int64_t begin, std::int64_t end) {
                     for (std::int64_t item = begin; item < end; ++item) {
                         run(item / channels, item % channels);
                     }
                 });
}

// Of each place of a line of channels: its sums.
template <typename W>
struct alignas(64) LineSums {
    W products[kLine];
    W grads[kLine];
};

template <typename W>
struct Gradients {
    W x[4];
    W product;
    W grad;
};

// grad_x of `kLines` lines, grad_z_step, x_step and grad_x_step apart. Four at once load and store
// the sums once.
template <typename T, bool inverse, int kLines>
void add_lines(std::int64_t count, const T* grad_z, std::int64_t grad_z_step, const T* x,
               std::int64_t x_step, T* grad_x, std::int64_t grad_x_step,
               const Columns<Wide<T>>& columns, LineSums<Wide<T>>& sums) {
    using W = Wide<T>;
    W* products = sums.products;
    W* grads = sums.grads;
    if constexpr (kLines == 1) {
        for_each_element<T>(
            count,
            [](W grad, W value, W product, W sum, W scale, W before) {
                return Gradients<W>{{scaled<inverse>(grad, scale)},
                                    fused_multiply_add(grad, value + before, product),
                                    sum + grad};
            },
            [=](std::int64_t i, auto... gradients) {
                store<T>(grad_x + i, gradients.x[0]...);
                store<W>(products + i, gradients.product...);
                store<W>(grads + i, gradients.grad...);
            },
            grad_z, x, products, grads, columns.scale, columns.before);
    } else {
        for_each_element<T>(
            count,
            [](W g0, W g1, W g2, W g3, W x0, W x1, W x2, W x3, W product, W sum, W scale,
               W before) {
                product = fused_multiply_add(g0, x0 + before, product);
                product = fused_multiply_add(g1, x1 + before, product);
                product = fused_multiply_add(g2, x2 + before, product);
                product = fused_multiply_add(g3, x3 + before, product);
                return Gradients<W>{{scaled<inverse>(g0, scale), scaled<inverse>(g1, scale),
                                     scaled<inverse>(g2, scale), scaled<inverse>(g3, scale)},
                                    product,
                                    sum + (g0 + g1) + (g2 + g3)};
            },
            [=](std::int64_t i, auto... gradients) {
                store<T>(grad_x + i, gradients.x[0]...);
                store<T>(grad_x + grad_x_step + i, gradients.x[1]...);
                store<T>(grad_x + 2 * grad_x_step + i, gradients.x[2]...);
                store<T>(grad_x + 3 * grad_x_step + i, gradients.x[3]...);
                store<W>(products + i, gradients.product...);
                store<W>(grads + i, gradients.grad...);
            },
            grad_z, grad_z + grad_z_step, grad_z + 2 * grad_z_step, grad_z + 3 * grad_z_step, x,
            x + x_step, x + 2 * x_step, x + 3 * x_step, products, grads, columns.scale,
            columns.before);
    }
}

template <typename T, bool inverse>
void backward_rows(const ChannelAffineBackwardParams& params) {
    using W = Wide<T>;
    const std::int64_t channels = params.shape.channels;
    const ChannelParts& parts = params.parts;
    const bool dense = params.x_stride == channels && params.grad_z_stride == channels;
    const auto run = [&](std::int64_t part, std::int64_t first, Columns<W>& columns) {
        const RowTile tile = row_tile(params.shape, first, dense);
        fill_columns<T>(params.map, params.dtype, first, tile, columns);
        LineSums<W> sums{};
        const auto add = [&]<int kLines>(std::int64_t row, std::int64_t rows) {
            add_lines<T, inverse, kLines>(
                rows * tile.width,
                static_cast<const T*>(params.grad_z) + row * params.grad_z_stride + first,
                tile.rows * params.grad_z_stride,
                static_cast<const T*>(params.x) + row * params.x_stride + first,
                tile.rows * params.x_stride,
                static_cast<T*>(params.grad_x) + row * channels + first, tile.rows * channels,
                columns, sums);
        };
        const std::int64_t last = std::min(params.shape.outer, (part + 1) * parts.group);
        std::int64_t row = part * parts.group;
        for (; row + 4 * tile.rows <= last; row += 4 * tile.rows) {
            add.template operator()<4>(row, tile.rows);
        }
        for (; row < last; row += tile.rows) {
            add.template operator()<1>(row, std::min(tile.rows, last - row));
        }
        const PartialSums<T> partial(params, part);
        for (std::int64_t i = 0; i < tile.width; ++i) {
            Totals totals;
            for (std::int64_t place = i; place < tile.rows * tile.width; place += tile.width) {
                totals.product += sums.products[place];
                totals.grad += sums.grads[place];
            }
            partial.products[first + i] = static_cast<W>(totals.product);
            partial.grads[first + i] = static_cast<W>(totals.grad);
        }
    };
    parallel_for(parts.count, 1, [&](std::int64_t begin, std::int64_t end) {
        Columns<W> columns;
        for (std::int64_t part = begin; part < end; ++part) {
            for (std::int64_t first = 0; first < channels; first += kLine) {
                run(part, first, columns);
            }
        }
    });
}

template <typename T>
void store_gradient(void* to, DType own, DType dtype, std::int64_t channel, double value) {
    if (own == dtype) {
        static_cast<T*>(to)[channel] = narrow<T>(static_cast<Wide<T>>(value));
    } else {
        static_cast<float*>(to)[channel] = static_cast<float>(value);
    }
}

// The sums over the parts, in their order, and what they are as gradients.
template <typename T>
void finish(const ChannelAffineBackwardParams& params) {
    const ChannelMap& map = params.map;
    parallel_for(params.shape.channels, grain_of(params.parts.count),
                 [&](std::int64_t begin, std::int64_t end) {
                     for (std::int64_t channel = begin; channel < end; ++channel) {
                         double product = 0;
                         double grad = 0;
                         for (std::int64_t part = 0; part < params.parts.count; ++part) {
                             const PartialSums<T> partial(params, part);
                             product += partial.products[channel];
                             grad += partial.grads[channel];
                         }
                         const double scale =
                             parameter<T>(map.scale, map.dtype, params.dtype, channel);
                         if (map.add_first) {
                             grad = map.inverse ? grad / scale : grad * scale;
                         }
                         store_gradient<T>(params.grad_scale, map.dtype, params.dtype, channel,
                                           map.inverse ? -product / scale / scale : product);
                         store_gradient<T>(params.grad_shift, map.dtype, params.dtype, channel,
                                           map.inverse ? -grad : grad);
                     }
                 });
}

template <typename T, bool inverse>
void backward(const ChannelAffineBackwardParams& params) {
    if (params.shape.inner == 1) {
        backward_rows<T, inverse>(params);
    } else {
        backward_lines<T, inverse>(params);
    }
    finish<T>(params);
}

template <typename T, bool inverse>
void forward(const ChannelAffineParams& params) {
    if (params.shape.inner == 1) {
        forward_rows<T, inverse>(params);
    } else {
        forward_lines<T, inverse>(params);
    }
}

}  // namespace

void channel_affine_cpu(const ChannelAffineParams& params) {
    visit_element_type(params.dtype, [&]<typename T>() {
        params.map.inverse ? forward<T, true>(params) : forward<T, false>(params);
    });
}

void channel_affine_backward_cpu(const ChannelAffineBackwardParams& params) {
    visit_element_type(params.dtype, [&]<typename T>() {
        params.map.inverse ? backward<T, true>(params) : backward<T, false>(params);
    });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::coupling
