// What the launchers of this family share.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/product_launch.cuh"
#include "lora/dropout.cuh"
#include "lora/lora_linear.h"
#include "lora/operands.cuh"

namespace warploom::lora {

template <typename Visit>
void dispatch(DType dtype, const Visit& visit) {
    dispatch_dtype<TypeCase<DType::float32, float>, TypeCase<DType::float16, device::half>,
                   TypeCase<DType::bfloat16, device::bfloat16>>(dtype, visit);
}

// Rows of `columns` elements, `stride` elements apart.
template <typename T>
MatrixPlace place_of(const void* first, std::int64_t stride, std::int64_t columns) {
    return {first, stride, row_copy_unit<T>(first, stride, columns)};
}

inline Mask mask_of(const Dropout& dropout) {
    return {dropout.seed, dropout_threshold(dropout.p)};
}

// What is left of a sum is divided by the share of its terms that stay.
inline double kept_scale(const Dropout& dropout) {
    return dropout.seed == nullptr ? 1.0 : 1.0 / (1.0 - dropout.p);
}

}  // namespace warploom::lora
