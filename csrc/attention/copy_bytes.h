// How wide the copies from a tensor may be, for launchers.
#pragma once

#include <cstdint>

#include "attention/attention.h"
#include "common/copy_bytes.h"

namespace warploom::attention {

// The largest of 16, 8, 4, ... bytes that divides the address of every row and the row's length.
// The stride of a dimension of size 1 does not matter.
inline int copy_bytes(const void* tensor, const HeadStrides& strides, int batch, int length,
                      int heads, int columns, int element_bytes) {
    const auto bytes = [&](std::int64_t elements) {
        return static_cast<std::uint64_t>(elements) * static_cast<std::uint64_t>(element_bytes);
    };
    std::uint64_t bits = reinterpret_cast<std::uintptr_t>(tensor) | bytes(columns);
    bits |= batch > 1 ? bytes(strides.batch) : 0;
    bits |= length > 1 ? bytes(strides.sequence) : 0;
    bits |= heads > 1 ? bytes(strides.head) : 0;
    return copy_unit(bits);
}

}  // namespace warploom::attention
