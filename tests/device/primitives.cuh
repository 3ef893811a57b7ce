// One small kernel for each primitive of the dialect. Every kernel reads `a` and `b` and writes
// `out`, whose shapes and types stand above it; grid shape: [blocks].
#pragma once

#include "../../csrc/common/reduce.cuh"

namespace warploom::conformance {

using namespace device;

struct Arguments {
    const void* a;
    const void* b;
    void* out;
    int argument;
};

constexpr int kThreads = 128;

template <typename T>
WARPLOOM_DEVICE const T* input(const void* pointer) {
    return static_cast<const T*>(pointer);
}

template <typename T>
WARPLOOM_DEVICE T* output(void* pointer) {
    return static_cast<T*>(pointer);
}

WARPLOOM_DEVICE int thread_index() {
    return static_cast<int>(threadIdx.x);
}

struct NoPlan {};

// ---- indices ----

// out (3, 128, 6) int32: what each thread of three blocks calls itself.
WARPLOOM_KERNEL(kThreads, 1) indices(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    int* row = output<int>(arguments.out) + (blockIdx.x * blockDim.x + threadIdx.x) * 6;
    row[0] = lane_index();
    row[1] = warp_index();
    row[2] = static_cast<int>(blockIdx.x);
    row[3] = static_cast<int>(gridDim.x);
    row[4] = static_cast<int>(blockDim.x);
    row[5] = static_cast<int>(threadIdx.x);
}

// ---- shuffles and votes: a, out (128,) T ----

template <typename T>
WARPLOOM_KERNEL(kThreads, 1)
shuffle_lane(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    const T value = input<T>(arguments.a)[threadIdx.x];
    const int source = (lane_index() * 7 + arguments.argument) % kWarpSize;
    output<T>(arguments.out)[threadIdx.x] = shuffle(value, source);
}

template <typename T>
WARPLOOM_KERNEL(kThreads, 1)
shuffle_butterfly(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    const T value = input<T>(arguments.a)[threadIdx.x];
    output<T>(arguments.out)[threadIdx.x] = shuffle_xor(value, arguments.argument);
}

template <typename T>
WARPLOOM_KERNEL(kThreads, 1)
shuffle_upward(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    const T value = input<T>(arguments.a)[threadIdx.x];
    output<T>(arguments.out)[threadIdx.x] = shuffle_up(value, arguments.argument);
}

template <typename T>
WARPLOOM_KERNEL(kThreads, 1)
shuffle_downward(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    const T value = input<T>(arguments.a)[threadIdx.x];
    output<T>(arguments.out)[threadIdx.x] = shuffle_down(value, arguments.argument);
}

// Lanes 0-15 exchange among themselves, lanes 16-31 keep their values.
WARPLOOM_KERNEL(kThreads, 1) shuffle_half_warp(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    float value = input<float>(arguments.a)[threadIdx.x];
    if (lane_index() < 16) {
        value = shuffle_xor(value, arguments.argument, 0x0000ffffu);
    }
    output<float>(arguments.out)[threadIdx.x] = value;
}

// out (128, 3) uint32: ballot, any, all of a > argument.
WARPLOOM_KERNEL(kThreads, 1) votes(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    const bool predicate = input<int>(arguments.a)[threadIdx.x] > arguments.argument;
    std::uint32_t* row = output<std::uint32_t>(arguments.out) + threadIdx.x * 3;
    row[0] = ballot(predicate);
    row[1] = any(predicate);
    row[2] = all(predicate);
}

// out (128, 3) uint32: the same among lanes 8-31; lanes 0-7 leave out as it was.
WARPLOOM_KERNEL(kThreads, 1) votes_masked(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    constexpr std::uint32_t kUpperLanes = 0xffffff00u;
    const bool predicate = input<int>(arguments.a)[threadIdx.x] > arguments.argument;
    std::uint32_t* row = output<std::uint32_t>(arguments.out) + threadIdx.x * 3;
    if (lane_index() >= 8) {
        row[0] = ballot(predicate, kUpperLanes);
        row[1] = any(predicate, kUpperLanes);
        row[2] = all(predicate, kUpperLanes);
    }
}

// ---- barriers: a, out (128,) float32 ----

struct TilePlan {
    float tile[kThreads];
};

// Reverses the block.
WARPLOOM_KERNEL(kThreads, 1) barrier_block(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    plan.tile[threadIdx.x] = input<float>(arguments.a)[threadIdx.x];
    sync_threads();
    output<float>(arguments.out)[threadIdx.x] = plan.tile[kThreads - 1 - thread_index()];
}

// Reverses each warp.
WARPLOOM_KERNEL(kThreads, 1) barrier_warp(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    plan.tile[threadIdx.x] = input<float>(arguments.a)[threadIdx.x];
    sync_warp();
    output<float>(arguments.out)[threadIdx.x] =
        plan.tile[warp_index() * kWarpSize + kWarpSize - 1 - lane_index()];
}

// Reverses each half of the block; the halves pass their own barriers 3 and 5 times.
WARPLOOM_KERNEL(kThreads, 1) barrier_named(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    constexpr int kHalf = kThreads / 2;
    const int group = thread_index() / kHalf;
    const int rounds = group == 0 ? 3 : 5;
    const int mirrored = group * kHalf + kHalf - 1 - thread_index() % kHalf;
    float value = input<float>(arguments.a)[threadIdx.x];
    for (int round = 0; round < rounds; ++round) {
        plan.tile[threadIdx.x] = value;
        named_barrier_sync(1 + group, kHalf);
        value = plan.tile[mirrored];
        named_barrier_sync(1 + group, kHalf);
    }
    output<float>(arguments.out)[threadIdx.x] = value;
}

// Warps 0 and 1 produce four rounds of 64 values, warps 2 and 3 consume and sum them; out (64,)
// float32.
WARPLOOM_KERNEL(kThreads, 1) barrier_producer(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    TilePlan& plan = shared_memory<TilePlan>();
    constexpr int kHalf = kThreads / 2;
    constexpr int kRounds = 4;
    constexpr int kFull = 1;
    constexpr int kEmpty = 2;
    const int slot = thread_index() % kHalf;
    if (thread_index() < kHalf) {
        for (int round = 0; round < kRounds; ++round) {
            named_barrier_sync(kEmpty, kThreads);
            plan.tile[slot] = input<float>(arguments.a)[slot] * static_cast<float>(round + 1);
            thread_fence();
            named_barrier_arrive(kFull, kThreads);
        }
    } else {
        float sum = 0.0f;
        for (int round = 0; round < kRounds; ++round) {
            named_barrier_arrive(kEmpty, kThreads);
            named_barrier_sync(kFull, kThreads);
            sum += plan.tile[kHalf - 1 - slot];
        }
        output<float>(arguments.out)[slot] = sum;
    }
}

// ---- asynchronous copies: a (4, 128, kBytes) bytes, out the same ----

template <int kBytes>
struct CopyPlan {
    alignas(16) unsigned char stages[2][kThreads][kBytes];
};

// Four tiles through two stages; thread t writes what thread 127 - t copied. Threads with (t +
// tile) % 3 == argument copy zeros.
template <int kBytes>
WARPLOOM_KERNEL(kThreads, 1)
copy_pipeline(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    using Plan = CopyPlan<kBytes>;
    constexpr int kTiles = 4;
    Plan& plan = shared_memory<Plan>();
    const auto* source = input<unsigned char>(arguments.a);
    auto* destination = output<unsigned char>(arguments.out);
    const auto issue = [&](int tile) {
        const int row = tile * kThreads + thread_index();
        const bool valid = (thread_index() + tile) % 3 != arguments.argument;
        copy_async<kBytes>(plan.stages[tile % 2][threadIdx.x],
                           valid ? source + row * kBytes : source, valid);
    };
    issue(0);
    copy_async_commit();
    for (int tile = 0; tile < kTiles; ++tile) {
        if (tile + 1 < kTiles) {
            issue(tile + 1);
        }
        copy_async_commit();
        copy_async_wait<1>();
        sync_threads();
        const int mirrored = kThreads - 1 - thread_index();
        for (int byte = 0; byte < kBytes; ++byte) {
            destination[(tile * kThreads + mirrored) * kBytes + byte] =
                plan.stages[tile % 2][mirrored][byte];
        }
        sync_threads();
    }
    copy_async_wait<0>();
}

// ---- vector loads and stores: a, out (128, kBytes) bytes ----

template <int kBytes>
struct alignas(kBytes) Bytes {
    unsigned char values[kBytes];
};

// Through global and shared memory.
template <int kBytes>
WARPLOOM_KERNEL(kThreads, 1)
vector_copy(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    using Vector = Bytes<kBytes>;
    struct Plan {
        Vector tile[kThreads];
    };
    Plan& plan = shared_memory<Plan>();
    store_vector(&plan.tile[threadIdx.x],
                 load_vector<Vector>(input<Vector>(arguments.a) + threadIdx.x));
    sync_threads();
    const int mirrored = kThreads - 1 - thread_index();
    store_vector(output<Vector>(arguments.out) + threadIdx.x,
                 load_vector<Vector>(&plan.tile[mirrored]));
}

template <int kBytes>
WARPLOOM_KERNEL(kThreads, 1)
vector_readonly(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    using Vector = Bytes<kBytes>;
    store_vector(output<Vector>(arguments.out) + threadIdx.x,
                 load_readonly<Vector>(input<Vector>(arguments.a) + threadIdx.x));
}

// ---- ldmatrix: a (32, 8) uint16, eight columns of four 8x8 matrices; out (32, fragments) uint32
// ----

struct MatrixPlan {
    alignas(16) std::uint16_t rows[32][24];  // 48-byte pitch: a row starts in any bank
};

template <int kFragments, bool kTransposed>
WARPLOOM_KERNEL(kWarpSize, 1)
matrix_load(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    MatrixPlan& plan = shared_memory<MatrixPlan>();
    for (int column = 0; column < 8; ++column) {
        plan.rows[threadIdx.x][column] =
            input<std::uint16_t>(arguments.a)[threadIdx.x * 8 + column];
    }
    sync_warp();
    const void* row = plan.rows[threadIdx.x];
    std::uint32_t fragment[kFragments];
    if constexpr (kFragments == 1) {
        load_matrix_x1(fragment, row);
    } else if constexpr (kFragments == 2 && kTransposed) {
        load_matrix_x2_transposed(fragment, row);
    } else if constexpr (kFragments == 2) {
        load_matrix_x2(fragment, row);
    } else if constexpr (kTransposed) {
        load_matrix_x4_transposed(fragment, row);
    } else {
        load_matrix_x4(fragment, row);
    }
    for (int index = 0; index < kFragments; ++index) {
        output<std::uint32_t>(arguments.out)[threadIdx.x * kFragments + index] = fragment[index];
    }
}

// ---- mma: a (16, K), b (8, K) row-major, out (16, 8) float32 in and out ----

WARPLOOM_DEVICE void load_accumulator(float (&accumulator)[4], const float* out) {
    for (int index = 0; index < 4; ++index) {
        const int row = lane_index() / 4 + 8 * (index / 2);
        accumulator[index] = out[row * 8 + 2 * (lane_index() % 4) + index % 2];
    }
}

WARPLOOM_DEVICE void store_accumulator(float* out, const float (&accumulator)[4]) {
    for (int index = 0; index < 4; ++index) {
        const int row = lane_index() / 4 + 8 * (index / 2);
        out[row * 8 + 2 * (lane_index() % 4) + index % 2] = accumulator[index];
    }
}

// K = 16, 16-bit bits given as uint16.
template <typename T>
WARPLOOM_KERNEL(kWarpSize, 1)
mma_16bit(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    constexpr int kDepth = 16;
    const int group = lane_index() / 4;
    const int column = 2 * (lane_index() % 4);
    const auto* a = input<std::uint16_t>(arguments.a);
    const auto* b = input<std::uint16_t>(arguments.b);
    std::uint32_t a_fragment[4];
    for (int index = 0; index < 4; ++index) {
        const int row = group + 8 * (index % 2);
        a_fragment[index] = load_vector<std::uint32_t>(a + row * kDepth + column + 8 * (index / 2));
    }
    std::uint32_t b_fragment[2];
    for (int index = 0; index < 2; ++index) {
        b_fragment[index] = load_vector<std::uint32_t>(b + group * kDepth + column + 8 * index);
    }
    float accumulator[4];
    load_accumulator(accumulator, output<float>(arguments.out));
    mma_m16n8k16<T>(accumulator, a_fragment, b_fragment);
    store_accumulator(output<float>(arguments.out), accumulator);
}

// K = 8, float32.
WARPLOOM_KERNEL(kWarpSize, 1) mma_tf32(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    constexpr int kDepth = 8;
    const int group = lane_index() / 4;
    const int column = lane_index() % 4;
    const auto* a = input<float>(arguments.a);
    const auto* b = input<float>(arguments.b);
    std::uint32_t a_fragment[4];
    for (int index = 0; index < 4; ++index) {
        const int row = group + 8 * (index % 2);
        a_fragment[index] = to_tf32(a[row * kDepth + column + 4 * (index / 2)]);
    }
    std::uint32_t b_fragment[2];
    for (int index = 0; index < 2; ++index) {
        b_fragment[index] = to_tf32(b[group * kDepth + column + 4 * index]);
    }
    float accumulator[4];
    load_accumulator(accumulator, output<float>(arguments.out));
    mma_m16n8k8_tf32(accumulator, a_fragment, b_fragment);
    store_accumulator(output<float>(arguments.out), accumulator);
}

// ---- conversions and math: a, b (128,) float32 ----

// out (128,) uint32
WARPLOOM_KERNEL(kThreads, 1) round_tf32(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    output<std::uint32_t>(arguments.out)[threadIdx.x] =
        to_tf32(input<float>(arguments.a)[threadIdx.x]);
}

// out (128,) uint32: a in the low half, b in the high half.
template <typename T>
WARPLOOM_KERNEL(kThreads, 1)
pack_pair(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    output<std::uint32_t>(arguments.out)[threadIdx.x] =
        pack<T>(input<float>(arguments.a)[threadIdx.x], input<float>(arguments.b)[threadIdx.x]);
}

// out (128,) float32: a rounded to T and back.
template <typename T>
WARPLOOM_KERNEL(kThreads, 1)
convert_round_trip(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    output<float>(arguments.out)[threadIdx.x] =
        to_float(from_float<T>(input<float>(arguments.a)[threadIdx.x]));
}

// out (128,) float32
template <float (*kFunction)(float)>
WARPLOOM_KERNEL(kThreads, 1)
elementwise(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    output<float>(arguments.out)[threadIdx.x] = kFunction(input<float>(arguments.a)[threadIdx.x]);
}

// ---- atomics: two blocks, a (256,) T, out (257,) T: out[0] is updated, the old values follow ----

WARPLOOM_DEVICE int global_index() {
    return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

template <typename T>
WARPLOOM_KERNEL(kThreads, 1)
atomic_sum(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    T* out = output<T>(arguments.out);
    out[1 + global_index()] = atomic_add(out, input<T>(arguments.a)[global_index()]);
}

WARPLOOM_KERNEL(kThreads, 1) atomic_maximum(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    int* out = output<int>(arguments.out);
    out[1 + global_index()] = atomic_max(out, input<int>(arguments.a)[global_index()]);
}

template <typename T>
WARPLOOM_KERNEL(kThreads, 1)
atomic_swap(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    T* out = output<T>(arguments.out);
    out[1 + global_index()] = atomic_exchange(out, input<T>(arguments.a)[global_index()]);
}

// Exactly one thread finds out[0] == argument and replaces it.
WARPLOOM_KERNEL(kThreads, 1) atomic_claim(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    unsigned* out = output<unsigned>(arguments.out);
    out[1 + global_index()] =
        atomic_compare_and_swap(out, static_cast<unsigned>(arguments.argument),
                                input<unsigned>(arguments.a)[global_index()]);
}

// The same sum in shared memory: one total a block, out (2,) int32.
WARPLOOM_KERNEL(kThreads, 1) atomic_shared(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    struct Plan {
        int total;
    };
    Plan& plan = shared_memory<Plan>();
    if (threadIdx.x == 0) {
        plan.total = 0;
    }
    sync_threads();
    atomic_add(&plan.total, input<int>(arguments.a)[global_index()]);
    sync_threads();
    if (threadIdx.x == 0) {
        output<int>(arguments.out)[blockIdx.x] = plan.total;
    }
}

// ---- reductions and shared memory ----

// out (3, 128) float32: sum over the warp, maximum over the warp, sum over the block.
WARPLOOM_KERNEL(kThreads, 1) reductions(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    struct Plan {
        BlockReducePlan<kThreads> sum;
    };
    Plan& plan = shared_memory<Plan>();
    const float value = input<float>(arguments.a)[threadIdx.x];
    float* out = output<float>(arguments.out);
    out[threadIdx.x] = warp_reduce_sum(value);
    out[kThreads + threadIdx.x] = warp_reduce_max(value);
    out[2 * kThreads + threadIdx.x] = block_reduce_sum(value, plan.sum);
}

// out (128, 2) float32: sums of a and of b over the block, twice through one plan.
WARPLOOM_KERNEL(kThreads, 1) reduction_pair(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    struct Plan {
        BlockReducePlan<kThreads, 2> sums;
    };
    Plan& plan = shared_memory<Plan>();
    float values[2] = {input<float>(arguments.a)[threadIdx.x],
                       input<float>(arguments.b)[threadIdx.x]};
    block_reduce_sum(values, plan.sums);
    float again[2] = {values[0] + static_cast<float>(threadIdx.x), values[1]};
    block_reduce_sum(again, plan.sums);
    output<float>(arguments.out)[2 * threadIdx.x] = again[0];
    output<float>(arguments.out)[2 * threadIdx.x + 1] = again[1];
}

// Every lane reads a value argument floats after its neighbour's; a (1024,), out (128,) float32.
struct StridedPlan {
    float tile[kWarpSize * kWarpSize];
};

WARPLOOM_KERNEL(kThreads, 1) shared_strided(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    StridedPlan& plan = shared_memory<StridedPlan>();
    constexpr int kElements = kWarpSize * kWarpSize;
    for (int index = thread_index(); index < kElements; index += kThreads) {
        plan.tile[index] = input<float>(arguments.a)[index];
    }
    sync_threads();
    const float value = plan.tile[lane_index() * arguments.argument];
    output<float>(arguments.out)[threadIdx.x] = value;
}

// More shared memory than a kernel gets unasked: 96 KiB, which every chip from sm_80 on has; a, out
// (24576,) float32, reversed.
struct LargePlan {
    float tile[24576];
};

WARPLOOM_KERNEL(kThreads, 1) shared_large(WARPLOOM_GRID_CONSTANT Arguments arguments) {
    LargePlan& plan = shared_memory<LargePlan>();
    constexpr int kElements = sizeof(plan.tile) / sizeof(float);
    for (int index = thread_index(); index < kElements; index += kThreads) {
        plan.tile[index] = input<float>(arguments.a)[index];
    }
    sync_threads();
    for (int index = thread_index(); index < kElements; index += kThreads) {
        output<float>(arguments.out)[index] = plan.tile[kElements - 1 - index];
    }
}

}  // namespace warploom::conformance
