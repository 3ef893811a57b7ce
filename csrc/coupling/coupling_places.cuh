// Where the elements of an affine coupling and their parameters lie, and which threads take them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/index.cuh"
#include "coupling/affine_coupling.h"
#include "device/device.cuh"

namespace warploom::coupling {

// Threads take kVector neighbours of a line at a time. The backward loads the next ones before it
// computes; of the forward other warps keep the memory busy. As many blocks as have registers.
template <typename Element_, int kVector_, int kBlocks_, int kThreads_ = 256>
struct CouplingTraits {
    using Element = Element_;
    static constexpr int kVector = kVector_;
    static constexpr int kThreads = kThreads_;
    static constexpr int kBlocksPerMultiprocessor = kBlocks_;
};

// A sample is cut into tiles of so many elements, whatever the vectors: its sums are cut so, too.
inline constexpr int kTile = 4096;
// A block takes one tile, or as many small samples as it has threads for, so many elements each.
inline constexpr int kThreadElements = 16;

struct CouplingGrid {
    std::int64_t tiles;  // of a sample
    int sample_threads;  // a power of two: lanes of a warp, or the block
};

inline std::int64_t tiles_of(const CouplingOptions& options) {
    return std::max<std::int64_t>(ceil_divide(options.channels * options.pixels, kTile), 1);
}

inline CouplingGrid grid_of(const CouplingOptions& options, int block_threads) {
    const std::int64_t elements = options.channels * options.pixels;
    int threads = 1;
    while (threads <= device::kWarpSize && threads * kThreadElements < elements) {
        threads *= 2;
    }
    return {.tiles = tiles_of(options),
            .sample_threads = threads <= device::kWarpSize ? threads : block_threads};
}

// The vectors of one thread begin at the elements first + begin, first + begin + step, ... of its
// sample, before first + end.
struct Share {
    std::int64_t sample;
    std::int64_t tile;
    std::int64_t first;
    int begin;
    int end;
    int step;
};

// The samples past the last one have no elements.
template <typename Traits>
WARPLOOM_DEVICE Share share_of_thread(const CouplingOptions& options, const CouplingGrid& grid) {
    const int thread = static_cast<int>(threadIdx.x);
    const Division block = divide(blockIdx.x, grid.tiles);
    Share share;
    share.sample =
        block.quotient * (Traits::kThreads / grid.sample_threads) + thread / grid.sample_threads;
    share.tile = block.remainder;
    share.first = share.tile * kTile;
    share.begin = (thread % grid.sample_threads) * Traits::kVector;
    const std::int64_t elements =
        share.sample < options.batch ? options.channels * options.pixels - share.first : 0;
    share.end = static_cast<int>(elements < kTile ? elements : kTile);
    share.step = grid.sample_threads * Traits::kVector;
    return share;
}

// kVector neighbours along a line, and their parameters, neighbours too.
struct Place {
    std::int64_t pixel;  // of the first element
    int channel;
    int slot;        // the channel of the first element's parameters
    unsigned moved;  // bit i: element i is transformed
};

// The parameters' channel of a channel; not in [0, count) where it passes.
WARPLOOM_DEVICE int slot_of(const CouplingOptions& options, int channel) {
    switch (options.mask) {
        case CouplingMask::range:
            return channel - options.first;
        case CouplingMask::slots:
            return options.slots[channel];
        default:
            return channel;
    }
}

template <int kVector>
WARPLOOM_DEVICE Place place_at(const CouplingOptions& options, int channel, std::int64_t pixel) {
    Place place{pixel, channel, slot_of(options, channel), 0};
    const bool along_channels = options.channels_last;
    switch (options.mask) {
        case CouplingMask::range:
        case CouplingMask::slots: {
            // Neighbouring channels have neighbouring slots: launchers see to it.
            const bool moved = place.slot >= 0 && place.slot < options.count;
            place.moved = moved ? (1u << kVector) - 1 : 0;
            break;
        }
        case CouplingMask::free: {
            const std::uint8_t* bytes = options.free_mask + channel * options.mask_channel_stride +
                                        pixel * options.mask_pixel_stride;
            const std::int64_t stride =
                along_channels ? options.mask_channel_stride : options.mask_pixel_stride;
            WARPLOOM_UNROLL
            for (int index = 0; index < kVector; ++index) {
                place.moved |= (bytes[index * stride] != 0 ? 1u : 0u) << index;
            }
            break;
        }
        default: {
            const Division image = divide(pixel, options.width);
            std::int64_t row = image.quotient;
            std::int64_t column = image.remainder;
            WARPLOOM_UNROLL
            for (int index = 0; index < kVector; ++index) {
                const bool moved = ((row + column) & 1) == options.first;
                place.moved |= (moved ? 1u : 0u) << index;
                if (!along_channels && ++column == options.width) {
                    column = 0;
                    ++row;
                }
            }
        }
    }
    return place;
}

// The pixel of the first element's parameters. Vectors have packed ones nowhere (allows_vectors).
template <int kVector>
WARPLOOM_DEVICE std::int64_t slot_pixel_of(const CouplingOptions& options, const Place& place) {
    if (kVector > 1 || options.mask != CouplingMask::checkerboard_packed) {
        return place.pixel;
    }
    const Division image = divide(place.pixel, options.width);
    return image.quotient * (options.width / 2) + image.remainder / 2;
}

// Of the vector that begins at element `element` of a sample.
template <int kVector>
WARPLOOM_DEVICE Place place_of(const CouplingOptions& options, std::int64_t element) {
    if (options.channels_last) {
        const Division division = divide(element, options.channels);
        return place_at<kVector>(options, static_cast<int>(division.remainder), division.quotient);
    }
    const Division division = divide(element, options.pixels);
    return place_at<kVector>(options, static_cast<int>(division.quotient), division.remainder);
}

// Where a sample of a CouplingView or CouplingOutput begins. Samples of x, z, source and their
// gradients are dense: element e of theirs is the e-th from here.
template <typename T, typename View>
WARPLOOM_DEVICE auto* sample_in(const View& view, std::int64_t sample) {
    using Data = std::conditional_t<std::is_same_v<View, CouplingView>, const T, T>;
    return static_cast<Data*>(view.data) + sample * view.batch_stride;
}

// The address of element (sample, channel, pixel).
template <typename T, typename View>
WARPLOOM_DEVICE auto* address_in(const View& view, std::int64_t sample, std::int64_t channel,
                                 std::int64_t pixel) {
    return sample_in<T>(view, sample) + channel * view.channel_stride + pixel * view.pixel_stride;
}

}  // namespace warploom::coupling
