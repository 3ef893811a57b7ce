// Macros, types and indices that every other wrapper uses. threadIdx, blockIdx, blockDim and
// gridDim keep CUDA's names.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#define WARPLOOM_DEVICE __device__ __forceinline__
#define WARPLOOM_HOST_DEVICE __host__ __device__ __forceinline__
#define WARPLOOM_KERNEL(max_threads, min_blocks) \
    __global__ void __launch_bounds__(max_threads, min_blocks)
#define WARPLOOM_GRID_CONSTANT const __grid_constant__
#define WARPLOOM_UNROLL _Pragma("unroll")
#define WARPLOOM_NO_UNROLL _Pragma("unroll 1")

// 800, 900, 1200, ... in nvcc's device passes, 0 in its host pass.
#if defined(__CUDA_ARCH__)
#define WARPLOOM_ARCH __CUDA_ARCH__
#else
#define WARPLOOM_ARCH 0
#endif

namespace warploom::device {

using bfloat16 = __nv_bfloat16;
using half = __half;

inline constexpr int kWarpSize = 32;
inline constexpr std::uint32_t kFullMask = 0xffffffffu;

// Blocks are one-dimensional, so both follow from threadIdx.x.
WARPLOOM_DEVICE int lane_index() {
    return static_cast<int>(threadIdx.x % kWarpSize);
}
WARPLOOM_DEVICE int warp_index() {
    return static_cast<int>(threadIdx.x / kWarpSize);
}

// Reads the bits of `value` as a `To`.
template <typename To, typename From>
WARPLOOM_DEVICE To bit_cast(const From& value) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast: both types must have one size");
    static_assert(std::is_trivially_copyable_v<To> && std::is_trivially_copyable_v<From>,
                  "bit_cast: both types must be trivially copyable");
    return __builtin_bit_cast(To, value);
}

}  // namespace warploom::device
