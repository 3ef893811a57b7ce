// A scale and a shift per channel, and its gradients; channel_affine.h has the formulas.
//
// Threads take kVector neighbours at a time: pixels of one channel, or where `inner` is 1 channels
// of one pixel. The sums of the backward belong to a part (see ChannelParts), in a fixed order;
// those over the parts are a launch of their own.
#pragma once

#include <cstdint>

#include "common/index.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "coupling/channel_affine.h"

namespace warploom::coupling {

template <typename Element_, int kVector_>
struct ChannelTraits {
    using Element = Element_;
    static constexpr int kVector = kVector_;
    static constexpr int kThreads = 256;
    static constexpr int kItems = 4;  // vectors that a thread loads before it uses them
    using Vector = Packed<Element, kVector>;
};

// The parameters of a vector's elements.
template <int kVector>
struct ChannelFactors {
    float scale[kVector];
    float before[kVector];
    float after[kVector];
};

// Of the channels from `channel` on, or all of this one where not `along_channels`.
template <typename T, int kVector>
WARPLOOM_DEVICE void load_channels(const void* values, DType dtype, std::int64_t channel,
                                   bool along_channels, float (&to)[kVector]) {
    if (along_channels) {
        if (dtype == DType::float32) {
            load_floats(static_cast<const float*>(values) + channel, to);
        } else {
            load_floats(static_cast<const T*>(values) + channel, to);
        }
        return;
    }
    const float value = dtype == DType::float32
                            ? static_cast<const float*>(values)[channel]
                            : device::to_float(static_cast<const T*>(values)[channel]);
    WARPLOOM_UNROLL
    for (int index = 0; index < kVector; ++index) {
        to[index] = value;
    }
}

template <typename T, int kVector>
WARPLOOM_DEVICE void load_factors(const ChannelMap& map, std::int64_t channel, bool along_channels,
                                  ChannelFactors<kVector>& factors) {
    float shifts[kVector];
    load_channels<T>(map.scale, map.dtype, channel, along_channels, factors.scale);
    load_channels<T>(map.shift, map.dtype, channel, along_channels, shifts);
    WARPLOOM_UNROLL
    for (int index = 0; index < kVector; ++index) {
        const float shift = map.inverse ? -shifts[index] : shifts[index];
        factors.before[index] = map.add_first ? shift : 0.0f;
        factors.after[index] = map.add_first ? 0.0f : shift;
    }
}

WARPLOOM_DEVICE float scaled(const ChannelMap& map, float value, float scale) {
    return map.inverse ? value / scale : value * scale;
}

// grid [ceil(elements / (kThreads kItems kVector))], the vectors of a block side by side
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 4)
channel_affine_kernel(WARPLOOM_GRID_CONSTANT ChannelAffineParams params) {
    using T = typename Traits::Element;
    constexpr int kVector = Traits::kVector;
    const ChannelShape& shape = params.shape;
    const bool along_channels = shape.inner == 1;
    const std::int64_t sample = shape.channels * shape.inner;
    const std::int64_t elements = shape.outer * sample;
    const std::int64_t first =
        (static_cast<std::int64_t>(blockIdx.x) * Traits::kItems * Traits::kThreads + threadIdx.x) *
        kVector;
    typename Traits::Vector vectors[Traits::kItems];
    std::int64_t channels[Traits::kItems];
    WARPLOOM_UNROLL
    for (int item = 0; item < Traits::kItems; ++item) {
        const std::int64_t element = first + item * Traits::kThreads * kVector;
        if (element < elements) {
            const Division place = divide(element, sample);
            channels[item] =
                along_channels ? place.remainder : divide(place.remainder, shape.inner).quotient;
            vectors[item] =
                load_packed<kVector>(static_cast<const T*>(params.x) +
                                     place.quotient * params.x_stride + place.remainder);
        }
    }
    WARPLOOM_UNROLL
    for (int item = 0; item < Traits::kItems; ++item) {
        const std::int64_t element = first + item * Traits::kThreads * kVector;
        if (element < elements) {
            ChannelFactors<kVector> factors;
            load_factors<T>(params.map, channels[item], along_channels, factors);
            float values[kVector];
            unpack(vectors[item], values);
            WARPLOOM_UNROLL
            for (int index = 0; index < kVector; ++index) {
                values[index] = scaled(params.map, values[index] + factors.before[index],
                                       factors.scale[index]) +
                                factors.after[index];
            }
            store_packed(static_cast<T*>(params.z) + element, pack_floats<T>(values));
        }
    }
}

// Sums of g (x + before) and of g, as shares of the parameters' gradients.
WARPLOOM_DEVICE void store_shares(const ChannelAffineBackwardParams& params, std::int64_t part,
                                  std::int64_t channel, float scale, float product, float grad) {
    const ChannelMap& map = params.map;
    const std::int64_t channels = params.shape.channels;
    float* partials = static_cast<float*>(params.partials) + part * channels + channel;
    const float shift_share = map.add_first ? scaled(map, grad, scale) : grad;
    partials[0] = map.inverse ? -(product / scale / scale) : product;
    partials[params.parts.count * channels] = map.inverse ? -shift_share : shift_share;
}

// grad_x of one vector, and its terms of the sums.
template <typename T, int kVector>
WARPLOOM_DEVICE void add_gradients(const ChannelMap& map, const Packed<T, kVector>& grad_z,
                                   const Packed<T, kVector>& x,
                                   const ChannelFactors<kVector>& factors, T* grad_x,
                                   float (&products)[kVector], float (&grads)[kVector]) {
    float upstream[kVector];
    float values[kVector];
    unpack(grad_z, upstream);
    unpack(x, values);
    WARPLOOM_UNROLL
    for (int index = 0; index < kVector; ++index) {
        products[index] += upstream[index] * (values[index] + factors.before[index]);
        grads[index] += upstream[index];
        values[index] = scaled(map, upstream[index], factors.scale[index]);
    }
    store_packed(grad_x, pack_floats<T>(values));
}

template <typename Traits>
struct ChannelLinesPlan {
    BlockReducePlan<Traits::kThreads, 2> reduce;
};

// Where a channel has pixels side by side. grid [parts * channels], a part's channels side by side
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 2)
channel_lines_backward_kernel(WARPLOOM_GRID_CONSTANT ChannelAffineBackwardParams params) {
    using T = typename Traits::Element;
    constexpr int kVector = Traits::kVector;
    auto& plan = device::shared_memory<ChannelLinesPlan<Traits>>();
    const ChannelShape& shape = params.shape;
    const ChannelParts& parts = params.parts;
    const Division block = divide(blockIdx.x, shape.channels);
    const std::int64_t part = block.quotient;
    const std::int64_t channel = block.remainder;
    const Division range = divide(part, parts.ranges);
    const std::int64_t inner = range.remainder * parts.length;
    const std::int64_t outer = range.quotient * parts.group;
    const std::int64_t rest = shape.inner - inner;
    const std::int64_t length = rest < parts.length ? rest : parts.length;
    const std::int64_t samples =
        shape.outer - outer < parts.group ? shape.outer - outer : parts.group;
    const std::int64_t offset = channel * shape.inner + inner;
    const T* grad_z = static_cast<const T*>(params.grad_z) + outer * params.grad_z_stride + offset;
    const T* x = static_cast<const T*>(params.x) + outer * params.x_stride + offset;
    const std::int64_t sample_elements = shape.channels * shape.inner;
    T* grad_x = static_cast<T*>(params.grad_x) + outer * sample_elements + offset;

    ChannelFactors<kVector> factors;
    load_factors<T>(params.map, channel, false, factors);
    float products[kVector] = {};
    float grads[kVector] = {};
    constexpr int kStep = Traits::kThreads * kVector;
    WARPLOOM_NO_UNROLL
    for (std::int64_t first = threadIdx.x * kVector; first < samples * length;
         first += Traits::kItems * kStep) {
        typename Traits::Vector upstream[Traits::kItems];
        typename Traits::Vector values[Traits::kItems];
        std::int64_t places[Traits::kItems];
        WARPLOOM_UNROLL
        for (int item = 0; item < Traits::kItems; ++item) {
            const std::int64_t element = first + item * kStep;
            if (element < samples * length) {
                const Division place = divide(element, length);
                places[item] = place.quotient * sample_elements + place.remainder;
                upstream[item] = load_packed<kVector>(
                    grad_z + place.quotient * params.grad_z_stride + place.remainder);
                values[item] =
                    load_packed<kVector>(x + place.quotient * params.x_stride + place.remainder);
            }
        }
        WARPLOOM_UNROLL
        for (int item = 0; item < Traits::kItems; ++item) {
            if (first + item * kStep < samples * length) {
                add_gradients(params.map, upstream[item], values[item], factors,
                              grad_x + places[item], products, grads);
            }
        }
    }
    float sums[2] = {};
    WARPLOOM_UNROLL
    for (int index = 0; index < kVector; ++index) {
        sums[0] += products[index];
        sums[1] += grads[index];
    }
    block_reduce_sum<Traits::kThreads, 2>(sums, plan.reduce);
    if (threadIdx.x == 0) {
        store_shares(params, part, channel, factors.scale[0], sums[0], sums[1]);
    }
}

template <typename Traits>
struct ChannelRowsPlan {
    float products[Traits::kVector][Traits::kThreads];
    float grads[Traits::kVector][Traits::kThreads];
};

// Where a pixel has channels side by side. A block has so many columns of vectors, and as many rows
// of them as its threads make. grid [ceil(columns of vectors / kThreads), parts]
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 2)
channel_rows_backward_kernel(WARPLOOM_GRID_CONSTANT ChannelAffineBackwardParams params) {
    using T = typename Traits::Element;
    constexpr int kVector = Traits::kVector;
    auto& plan = device::shared_memory<ChannelRowsPlan<Traits>>();
    const std::int64_t channels = params.shape.channels;
    const ChannelParts& parts = params.parts;
    const int thread = static_cast<int>(threadIdx.x);
    const std::int64_t first_column = static_cast<std::int64_t>(blockIdx.x) * Traits::kThreads;
    const std::int64_t columns_left = channels / kVector - first_column;
    const int columns =
        columns_left < Traits::kThreads ? static_cast<int>(columns_left) : Traits::kThreads;
    const int rows = Traits::kThreads / columns;
    const int own_row = thread / columns;
    const std::int64_t channel = (first_column + thread % columns) * kVector;
    const std::int64_t begin = blockIdx.y * parts.group;
    std::int64_t end =
        begin + parts.group < params.shape.outer ? begin + parts.group : params.shape.outer;
    if (own_row >= rows) {
        end = begin;  // a thread without a row
    }
    const T* grad_z = static_cast<const T*>(params.grad_z) + channel;
    const T* x = static_cast<const T*>(params.x) + channel;
    T* grad_x = static_cast<T*>(params.grad_x) + channel;

    ChannelFactors<kVector> factors;
    load_factors<T>(params.map, channel, true, factors);
    float products[kVector] = {};
    float grads[kVector] = {};
    WARPLOOM_NO_UNROLL
    for (std::int64_t first = begin + own_row; first < end; first += Traits::kItems * rows) {
        typename Traits::Vector upstream[Traits::kItems];
        typename Traits::Vector values[Traits::kItems];
        WARPLOOM_UNROLL
        for (int item = 0; item < Traits::kItems; ++item) {
            const std::int64_t row = first + item * rows;
            if (row < end) {
                upstream[item] = load_packed<kVector>(grad_z + row * params.grad_z_stride);
                values[item] = load_packed<kVector>(x + row * params.x_stride);
            }
        }
        WARPLOOM_UNROLL
        for (int item = 0; item < Traits::kItems; ++item) {
            const std::int64_t row = first + item * rows;
            if (row < end) {
                add_gradients(params.map, upstream[item], values[item], factors,
                              grad_x + row * channels, products, grads);
            }
        }
    }
    WARPLOOM_UNROLL
    for (int index = 0; index < kVector; ++index) {
        plan.products[index][thread] = products[index];
        plan.grads[index][thread] = grads[index];
    }
    device::sync_threads();
    WARPLOOM_NO_UNROLL
    for (int half = Traits::kThreads / 2; half > 0; half /= 2) {
        if (own_row < half && own_row + half < rows) {
            WARPLOOM_UNROLL
            for (int index = 0; index < kVector; ++index) {
                plan.products[index][thread] += plan.products[index][thread + half * columns];
                plan.grads[index][thread] += plan.grads[index][thread + half * columns];
            }
        }
        device::sync_threads();
    }
    if (own_row == 0) {
        WARPLOOM_UNROLL
        for (int index = 0; index < kVector; ++index) {
            store_shares(params, blockIdx.y, channel + index, factors.scale[index],
                         plan.products[index][thread], plan.grads[index][thread]);
        }
    }
}

}  // namespace warploom::coupling
