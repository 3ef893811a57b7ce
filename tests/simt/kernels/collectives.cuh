// Seeded bugs of shuffles, votes and matrix instructions. Grid shape: [1].
#pragma once

#include "../../../csrc/common/reduce.cuh"
#include "cases.h"

namespace warploom::seeded {

// All lanes call with a mask that leaves the upper ones out.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
mask_without_caller(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    const float value = arguments.in[threadIdx.x];
    const float neighbour = shuffle_xor(value, 1, kSeeded ? 0x0000ffffu : kFullMask);  // BUG
    arguments.out[threadIdx.x] = neighbour;
}

// The lower lanes ask for the value of a lane that their mask does not name.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
source_outside_mask(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    float value = arguments.in[threadIdx.x];
    if (lane_index() < 16) {
        value = shuffle(value, kSeeded ? 20 : 4, 0x0000ffffu);  // BUG
    }
    arguments.out[threadIdx.x] = value;
}

// The mask names lanes that never come.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
divergent_collective(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    float value = arguments.in[threadIdx.x];
    if (lane_index() < 16) {
        value = shuffle_xor(value, 1, kSeeded ? kFullMask : 0x0000ffffu);  // BUG
    }
    arguments.out[threadIdx.x] = value;
}

// One warp meets in two source lines.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
collective_in_two_lines(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    const float value = arguments.in[threadIdx.x];
    float neighbour;
    if (kSeeded && lane_index() < 16) {
        neighbour = shuffle_xor(value, 1);  // BUG
    } else {
        neighbour = shuffle_xor(value, 1);
    }
    arguments.out[threadIdx.x] = neighbour;
}

// Lanes past the tail leave the loop before the vote.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
vote_in_divergent_loop(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    const int first = thread_index();
    const int end = kSeeded ? arguments.elements : kThreads;
    for (int index = first; index < end; index += kThreads) {
        const bool inside = index < arguments.elements;
        const bool positive = any(inside && arguments.in[index] > 0.0f);  // BUG
        if (inside) {
            arguments.out[index] = positive ? 1.0f : 0.0f;
        }
    }
}

// A butterfly that leaves its last distance out.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
short_butterfly(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    float sum = arguments.in[threadIdx.x];
    for (int lane_mask = 16; lane_mask > (kSeeded ? 1 : 0); lane_mask /= 2) {  // BUG
        sum += shuffle_xor(sum, lane_mask);
    }
    arguments.out[threadIdx.x] = sum;
}

// Half of a warp starts a matrix product.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
partial_warp_product(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    float accumulator[4] = {};
    const std::uint32_t a[4] = {};
    const std::uint32_t b[2] = {};
    if (!kSeeded || lane_index() < 16) {
        mma_m16n8k16<bfloat16>(accumulator, a, b);  // BUG
    }
    arguments.out[threadIdx.x] = arguments.in[threadIdx.x] + accumulator[0];
}

// A row pitch that is no multiple of 16 bytes.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
matrix_row_misaligned(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    constexpr int kPitch = kSeeded ? 9 : 8;  // 16-bit elements
    struct Plan {
        alignas(16) std::uint16_t rows[kThreads * kPitch];
    };
    Plan& plan = shared_memory<Plan>();
    std::uint16_t* row = plan.rows + thread_index() * kPitch;
    for (int column = 0; column < kPitch; ++column) {
        row[column] = static_cast<std::uint16_t>(threadIdx.x);
    }
    sync_warp();
    std::uint32_t fragment[4];
    load_matrix_x4(fragment, row);  // BUG
    const float loaded = static_cast<float>((fragment[0] & 0xffffu) % kWarpSize);
    arguments.out[threadIdx.x] = arguments.in[threadIdx.x] + loaded;
}

// Shared memory that another warp fills is read as a matrix without a barrier.
template <bool kSeeded>
WARPLOOM_KERNEL(kThreads, 1)
matrix_load_unsynchronised(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    struct Plan {
        alignas(16) std::uint16_t rows[kThreads][8];
    };
    Plan& plan = shared_memory<Plan>();
    for (int column = 0; column < 8; ++column) {
        plan.rows[threadIdx.x][column] = static_cast<std::uint16_t>(threadIdx.x);
    }
    if constexpr (!kSeeded) {
        sync_threads();
    }
    std::uint32_t fragment[4];
    load_matrix_x4(fragment, plan.rows[thread_index() ^ kWarpSize]);  // BUG
    const float loaded = static_cast<float>((fragment[0] & 0xffffu) % kWarpSize);
    arguments.out[threadIdx.x] = arguments.in[threadIdx.x] + loaded;
}

inline constexpr LaunchShape kMatrixShape = {
    .grid = dim3(1), .threads = kThreads, .shared_bytes = kThreads * 9 * sizeof(std::uint16_t)};

inline const Case kCollectiveCases[] = {
    WARPLOOM_SEEDED_CASE(mask_without_caller, kOneBlock),
    WARPLOOM_SEEDED_CASE(source_outside_mask, kOneBlock),
    WARPLOOM_SEEDED_CASE(divergent_collective, kOneBlock),
    WARPLOOM_SEEDED_CASE(collective_in_two_lines, kOneBlock),
    WARPLOOM_SEEDED_CASE(vote_in_divergent_loop, kOneBlock),
    WARPLOOM_SEEDED_CASE(short_butterfly, kOneBlock),
    WARPLOOM_SEEDED_CASE(partial_warp_product, kOneBlock),
    WARPLOOM_SEEDED_CASE(matrix_row_misaligned, kMatrixShape),
    WARPLOOM_SEEDED_CASE(matrix_load_unsynchronised, kMatrixShape),
};

}  // namespace warploom::seeded
