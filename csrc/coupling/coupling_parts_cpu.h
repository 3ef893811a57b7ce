// How the CPU cuts the samples of an affine coupling into parts, for the seam, too.
#pragma once

#include <algorithm>
#include <cstdint>

#include "coupling/affine_coupling.h"

namespace warploom::coupling {

inline constexpr std::int64_t kCouplingPartElements = 16384;
// What is found of these pixels for the mean over channels stays in a core's cache until it is
// used, and each channel's float32 fill a page of memory.
inline constexpr std::int64_t kCouplingCentredPixels = 1024;

// How a sample is cut: into ranges of pixels, and where `channel_parts` each of them into
// channels; fixed by the shape, whatever the number of threads. A part is range + ranges * channel.
struct CouplingParts {
    std::int64_t pixels;  // of a range, but for the last one
    std::int64_t ranges;
    std::int64_t count;
    bool channel_parts;
};

constexpr CouplingParts coupling_parts_cpu(const CouplingOptions& options) {
    const std::int64_t most = kCouplingPartElements;
    const bool of_pixels = options.center == CouplingCenter::channel;
    std::int64_t pixels = most;
    if (options.channels_last) {
        pixels = std::clamp<std::int64_t>(most / std::max(1, options.channels), 1,
                                          of_pixels ? kCouplingCentredPixels : most);
    } else if (of_pixels) {
        pixels = kCouplingCentredPixels;
    } else if (options.mask == CouplingMask::checkerboard ||
               options.mask == CouplingMask::checkerboard_packed) {
        const std::int64_t width = std::max<std::int64_t>(1, options.width);
        pixels = std::max<std::int64_t>(1, most / width) * width;
    }
    const std::int64_t ranges = ceil_divide(options.pixels, pixels);
    const bool channel_parts = !options.channels_last && !of_pixels;
    return {pixels, ranges, ranges * (channel_parts ? options.channels : 1), channel_parts};
}

}  // namespace warploom::coupling
