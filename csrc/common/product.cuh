// The sums of a product of tiles, on the cores that its element type has.
#pragma once

#include <type_traits>

#include "common/product_fma.cuh"
#include "common/product_mma.cuh"

namespace warploom {

template <typename Shape>
using ProductSums = std::conditional_t<std::is_same_v<typename Shape::Element, float>,
                                       FmaSums<Shape>, MmaSums<Shape>>;

}  // namespace warploom
