// What launchers and their callers share without any CUDA header.
#pragma once

#include <algorithm>
#include <cstdint>

struct CUstream_st;

namespace warploom {

// cudaStream_t by its own definition; null under the host executor.
using Stream = CUstream_st*;

constexpr std::int64_t ceil_divide(std::int64_t value, std::int64_t by) {
    return (value + by - 1) / by;
}

}  // namespace warploom
