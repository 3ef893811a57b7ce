// The kernel dialect: the one header that a kernel file includes from outside its family and
// csrc/common.
//
// nvcc compiles it to CUDA and PTX (ptx/), any other C++20 compiler to the host executor (simt/),
// which gives each name below the same meaning on a CPU. Both sides declare the same names with the
// same signatures in warploom::device; docs/dialect.md is the list.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#include "ptx/atomic.cuh"
#include "ptx/barrier.cuh"
#include "ptx/copy_async.cuh"
#include "ptx/index.cuh"
#include "ptx/launch.cuh"
#include "ptx/math.cuh"
#include "ptx/matrix.cuh"
#include "ptx/memory.cuh"
#include "ptx/shuffle.cuh"
#else
#include "simt/dialect.h"
#endif
