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

constexpr std::int64_t kLine = 512;
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

// Of each place of a line: the sums of g (x + before) and of g.
template <typename W>
struct alignas(64) Sums {
    W products[kLine];
    W grads[kLine];
};

template <typename W>
void clear(Sums<W>& sums, std::int64_t count) {
    std::fill_n(sums.products, count, W{0});
    std::fill_n(sums.grads, count, W{0});
}

template <typename W>
struct Gradients {
    W x;
    W product;
    W grad;
};

template <bool inverse, typename W>
inline Gradients<W> gradients_of(W grad, W value, W product, W sum, W scale, W before) {
    return {scaled<inverse>(grad, scale), fused_multiply_add(grad, value + before, product),
            sum + grad};
}

// Part `part`'s sums: partials[0 or 1, part, channel].
template <typename T>
struct PartialSums {
    Wide<T>* products;
    Wide<T>* grads;

    PartialSums(const ChannelAffineBackwardParams& params, std::int64_t part)
        : products(static_cast<Wide<T>*>(params.partials) + part * params.shape.channels),
          grads(products + params.parts.count * params.shape.channels) {}
};

template <typename T, bool inverse>
void backward_lines(const ChannelAffineBackwardParams& params) {
    using W = Wide<T>;
    const auto [outer, channels, inner] = params.shape;
    const ChannelParts& parts = params.parts;
    const std::int64_t elements = parts.group * parts.length;
    const auto run = [&, inner = inner, outer = outer](std::int64_t part, std::int64_t channel) {
        const auto [scale, before, after] = channel_of<T>(params.map, params.dtype, channel);
        const std::int64_t first = part % parts.ranges * parts.length;
        const std::int64_t length = std::min(parts.length, inner - first);
        const std::int64_t begin = part / parts.ranges * parts.group;
        const std::int64_t end = std::min(outer, begin + parts.group);
        Sums<W> sums;
        const std::int64_t places = std::min(length, kLine);
        clear(sums, places);
        for (std::int64_t sample = begin; sample < end; ++sample) {
            const std::int64_t at = channel * inner + first;
            const T* grad_z =
                static_cast<const T*>(params.grad_z) + sample * params.grad_z_stride + at;
            const T* x = static_cast<const T*>(params.x) + sample * params.x_stride + at;
            T* grad_x = static_cast<T*>(params.grad_x) + sample * channels * inner + at;
            for (std::int64_t start = 0; start < length; start += kLine) {
                for_each_element<T>(
                    std::min(kLine, length - start),
                    [scale = scale, before = before](W grad, W value, W product, W sum) {
                        return gradients_of<inverse>(grad, value, product, sum, scale, before);
                    },
                    [to = grad_x + start, &sums](std::int64_t i, auto... gradients) {
                        store<T>(to + i, gradients.x...);
                        store<W>(sums.products + i, gradients.product...);
                        store<W>(sums.grads + i, gradients.grad...);
                    },
                    grad_z + start, x + start, sums.products, sums.grads);
            }
        }
        W product = 0;
        W grad = 0;
#pragma omp simd reduction(+ : product, grad)
        for (std::int64_t i = 0; i < places; ++i) {
            product += sums.products[i];
            grad += sums.grads[i];
        }
        const PartialSums<T> partial(params, part);
        partial.products[channel] = product;
        partial.grads[channel] = grad;
    };
    parallel_for(parts.count * channels, grain_of(elements),
                 [&, channels = channels](std::int64_t begin, std::int64_t end) {
                     for (std::int64_t item = begin; item < end; ++item) {
                         run(item / channels, item % channels);
                     }
                 });
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
        const std::int64_t last = std::min(params.shape.outer, (part + 1) * parts.group);
        Sums<W> sums;
        clear(sums, tile.rows * tile.width);
        for (std::int64_t row = part * parts.group; row < last; row += tile.rows) {
            const T* grad_z = static_cast<const T*>(params.grad_z) + row * params.grad_z_stride;
            const T* x = static_cast<const T*>(params.x) + row * params.x_stride;
            T* grad_x = static_cast<T*>(params.grad_x) + row * channels + first;
            for_each_element<T>(
                std::min(tile.rows, last - row) * tile.width,
                [](W grad, W value, W product, W sum, W scale, W before) {
                    return gradients_of<inverse>(grad, value, product, sum, scale, before);
                },
                [grad_x, &sums](std::int64_t i, auto... gradients) {
                    store<T>(grad_x + i, gradients.x...);
                    store<W>(sums.products + i, gradients.product...);
                    store<W>(sums.grads + i, gradients.grad...);
                },
                grad_z + first, x + first, sums.products, sums.grads, columns.scale,
                columns.before);
        }
        const PartialSums<T> partial(params, part);
        for (std::int64_t i = 0; i < tile.width; ++i) {
            W product = 0;
            W grad = 0;
            for (std::int64_t row = 0; row < tile.rows; ++row) {
                product += sums.products[row * tile.width + i];
                grad += sums.grads[row * tile.width + i];
            }
            partial.products[first + i] = product;
            partial.grads[first + i] = grad;
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
