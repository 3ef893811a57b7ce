// What a part of the work on channels-last tensors has for itself (sppf_channels_cpu.h), for the
// seam, too.
#pragma once

#include <cstdint>

#include "spp/sppf.h"

namespace warploom::spp {

// Channels that are taken at a time: forward a run of memory of two lines, backward, where more
// planes lie in the cache, of one.
constexpr int kSppfForwardLanes = 32;
constexpr int kSppfBackwardLanes = 16;

// Numbers: of a row, and forward of the maxima along the rows of each stage, backward of these,
// their columns, the rows of maxima, and the gradients of both sides of a pool.
constexpr std::int64_t sppf_channels_size(const SppfShape& shape, bool backward) {
    const std::int64_t planes = backward ? 5 : kSppfStages;
    const std::int64_t lanes = backward ? kSppfBackwardLanes : kSppfForwardLanes;
    return (planes * shape.height + 1) * shape.width * lanes;
}

}  // namespace warploom::spp
