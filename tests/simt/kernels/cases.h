// What the seeded-bug kernels share: their arguments, their plan and the table that names them.
#pragma once

#include "../../device/harness.h"

namespace warploom::seeded {

using namespace device;

// in, out (elements,) float32 in device memory; host (elements,) float32 in ordinary host memory.
struct Arguments {
    const float* in;
    float* out;
    const float* host;
    int elements;
};

constexpr int kThreads = 128;

struct TilePlan {
    alignas(16) float tile[kThreads];
};

WARPLOOM_DEVICE int thread_index() {
    return static_cast<int>(threadIdx.x);
}

// One kernel with its bug and without it.
struct Case {
    const char* name;
    void (*seeded)(Arguments);
    void (*clean)(Arguments);
    LaunchShape seeded_shape;
    LaunchShape clean_shape;
};

inline constexpr LaunchShape kOneBlock = {
    .grid = dim3(1), .threads = kThreads, .shared_bytes = sizeof(TilePlan)};

// The text of a kernel is a template over `bool kSeeded`.
#define WARPLOOM_SEEDED_CASE(kernel, shape) {#kernel, kernel<true>, kernel<false>, shape, shape}

}  // namespace warploom::seeded
