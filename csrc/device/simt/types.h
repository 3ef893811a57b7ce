// Macros, types and indices of the dialect on the host. CUDA's own type headers compile under a
// plain C++ compiler; nothing of CUDA is linked.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_types.h>

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <type_traits>

#define WARPLOOM_DEVICE inline __attribute__((always_inline))
#define WARPLOOM_HOST_DEVICE inline __attribute__((always_inline))
#define WARPLOOM_KERNEL(max_threads, min_blocks) void
#define WARPLOOM_GRID_CONSTANT const
// Unrolled loops triple the time that a kernel unit takes to compile and gain nothing here.
#define WARPLOOM_UNROLL
#define WARPLOOM_NO_UNROLL _Pragma("GCC unroll 1")
#define WARPLOOM_ARCH 900

// CUDA's names for the indices, as values of the fibre that asks.
#define threadIdx (::warploom::device::simt::thread_index())
#define blockIdx (::warploom::device::simt::block_index())
#define blockDim (::warploom::device::simt::block_dimensions())
#define gridDim (::warploom::device::simt::grid_dimensions())

namespace warploom::device {

using bfloat16 = __nv_bfloat16;
using half = __half;
using Stream = cudaStream_t;

inline constexpr int kWarpSize = 32;
inline constexpr std::uint32_t kFullMask = 0xffffffffu;

struct LaunchShape {
    dim3 grid;
    int threads;
    std::size_t shared_bytes = 0;
};

// The call of a primitive in a kernel: every primitive takes it as its last argument, by default.
using Where = std::source_location;

namespace simt {

// As the largest devices have.
inline constexpr std::size_t kMaxSharedBytes = 227 * 1024;

// Constant while a thread runs, hence [[gnu::const]]: the compiler may keep the result.
[[gnu::const]] uint3 thread_index() noexcept;
[[gnu::const]] uint3 block_index() noexcept;
[[gnu::const]] uint3 block_dimensions() noexcept;
[[gnu::const]] uint3 grid_dimensions() noexcept;

}  // namespace simt

WARPLOOM_DEVICE int lane_index() {
    return static_cast<int>(threadIdx.x) % kWarpSize;
}
WARPLOOM_DEVICE int warp_index() {
    return static_cast<int>(threadIdx.x) / kWarpSize;
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
