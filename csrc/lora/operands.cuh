// Operands of the family's products: where they lie, and the parts of them that a block reads.
#pragma once

#include <cstdint>

#include "common/product.cuh"

namespace warploom::lora {

// A matrix in memory, rows `stride` elements apart; a copy moves units of copy_bytes bytes: see
// copy_unit.
struct MatrixPlace {
    const void* first;
    std::int64_t stride;
    int copy_bytes;
};

// What of an operand concerns the rows (of left) or columns (of right) of out from `begin` on, of
// which there are `end`: terms are rows in memory or columns.
template <bool kTransposed, typename T>
WARPLOOM_DEVICE MatrixRows<T> operand_rows(const MatrixPlace& place, int begin, int end,
                                           int terms) {
    const T* first = static_cast<const T*>(place.first);
    if constexpr (kTransposed) {
        return {first + begin, place.stride, terms, end - begin, place.copy_bytes};
    } else {
        return {first + begin * place.stride, place.stride, end - begin, terms, place.copy_bytes};
    }
}

}  // namespace warploom::lora
