// How wide the copies from a tensor may be, for launchers.
#pragma once

#include <cstdint>

namespace warploom {

// The largest of 16, 8, 4, ... bytes that divides all of `places`: the bitwise or of an address and
// of the distances, in bytes, from it to what else is copied.
constexpr int copy_unit(std::uint64_t places) {
    places |= 16;
    return static_cast<int>(places & (~places + 1));
}

// The same for kernels that move 16 bytes, 4, or an element.
constexpr int coarse_copy_unit(std::uint64_t places, int element_bytes) {
    const int unit = copy_unit(places);
    return unit == 16 ? 16 : unit >= 4 ? 4 : element_bytes;
}

}  // namespace warploom
