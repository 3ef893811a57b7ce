// What launchers of products share.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "common/copy_bytes.h"
#include "device/device.cuh"

namespace warploom {

// How wide copies may be of rows of `columns` elements of T, the first at `rows`, `stride` elements
// apart.
template <typename T>
int row_copy_unit(const void* rows, std::int64_t stride, std::int64_t columns) {
    return copy_unit(reinterpret_cast<std::uintptr_t>(rows) |
                     static_cast<std::uint64_t>(stride | columns) * sizeof(T));
}

// One block a tile.
template <typename Traits, typename Params>
void launch_tiles(const char* op, void (*kernel)(Params), std::int64_t tiles, device::Stream stream,
                  const Params& params) {
    if (tiles > std::numeric_limits<int>::max()) {
        throw std::invalid_argument(std::string(op) + ": expected at most 2^31 - 1 tiles, got " +
                                    std::to_string(tiles));
    }
    if (tiles > 0) {
        device::launch(kernel,
                       {dim3(static_cast<unsigned>(tiles)), Traits::kThreads,
                        sizeof(typename Traits::SharedPlan)},
                       stream, params);
    }
}

}  // namespace warploom
