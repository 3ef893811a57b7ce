// One C entry point that runs any of the primitives' kernels.
//
// nvcc compiles this text for a GPU and g++ for the host executor: tests/simt compares the executor
// with numpy, tests/device a GPU with the executor.
#include "harness.h"
#include "primitives.cuh"

namespace warploom::conformance {

struct Primitive {
    const char* name;
    void (*kernel)(Arguments);
    unsigned blocks;
    int threads;
    std::size_t shared_bytes;
};

const Primitive kPrimitives[] = {
    {"indices", indices, 3, kThreads, 0},
    {"shuffle_uint32", shuffle_lane<std::uint32_t>, 1, kThreads, 0},
    {"shuffle_float32", shuffle_lane<float>, 1, kThreads, 0},
    {"shuffle_float64", shuffle_lane<double>, 1, kThreads, 0},
    {"shuffle_int64", shuffle_lane<std::int64_t>, 1, kThreads, 0},
    {"shuffle_xor_float32", shuffle_butterfly<float>, 1, kThreads, 0},
    {"shuffle_xor_int64", shuffle_butterfly<std::int64_t>, 1, kThreads, 0},
    {"shuffle_up_float32", shuffle_upward<float>, 1, kThreads, 0},
    {"shuffle_up_float64", shuffle_upward<double>, 1, kThreads, 0},
    {"shuffle_down_float32", shuffle_downward<float>, 1, kThreads, 0},
    {"shuffle_down_uint32", shuffle_downward<std::uint32_t>, 1, kThreads, 0},
    {"shuffle_half_warp", shuffle_half_warp, 1, kThreads, 0},
    {"votes", votes, 1, kThreads, 0},
    {"votes_masked", votes_masked, 1, kThreads, 0},
    {"barrier_block", barrier_block, 1, kThreads, sizeof(TilePlan)},
    {"barrier_warp", barrier_warp, 1, kThreads, sizeof(TilePlan)},
    {"barrier_named", barrier_named, 1, kThreads, sizeof(TilePlan)},
    {"barrier_producer", barrier_producer, 1, kThreads, sizeof(TilePlan)},
    {"copy_async_4", copy_pipeline<4>, 1, kThreads, sizeof(CopyPlan<4>)},
    {"copy_async_8", copy_pipeline<8>, 1, kThreads, sizeof(CopyPlan<8>)},
    {"copy_async_16", copy_pipeline<16>, 1, kThreads, sizeof(CopyPlan<16>)},
    {"vector_4", vector_copy<4>, 1, kThreads, 4 * kThreads},
    {"vector_8", vector_copy<8>, 1, kThreads, 8 * kThreads},
    {"vector_16", vector_copy<16>, 1, kThreads, 16 * kThreads},
    {"readonly_4", vector_readonly<4>, 1, kThreads, 0},
    {"readonly_8", vector_readonly<8>, 1, kThreads, 0},
    {"readonly_16", vector_readonly<16>, 1, kThreads, 0},
    {"load_matrix_x1", matrix_load<1, false>, 1, kWarpSize, sizeof(MatrixPlan)},
    {"load_matrix_x2", matrix_load<2, false>, 1, kWarpSize, sizeof(MatrixPlan)},
    {"load_matrix_x4", matrix_load<4, false>, 1, kWarpSize, sizeof(MatrixPlan)},
    {"load_matrix_x2_transposed", matrix_load<2, true>, 1, kWarpSize, sizeof(MatrixPlan)},
    {"load_matrix_x4_transposed", matrix_load<4, true>, 1, kWarpSize, sizeof(MatrixPlan)},
    {"mma_bfloat16", mma_16bit<bfloat16>, 1, kWarpSize, 0},
    {"mma_float16", mma_16bit<half>, 1, kWarpSize, 0},
    {"mma_tf32", mma_tf32, 1, kWarpSize, 0},
    {"to_tf32", round_tf32, 1, kThreads, 0},
    {"pack_bfloat16", pack_pair<bfloat16>, 1, kThreads, 0},
    {"pack_float16", pack_pair<half>, 1, kThreads, 0},
    {"convert_bfloat16", convert_round_trip<bfloat16>, 1, kThreads, 0},
    {"convert_float16", convert_round_trip<half>, 1, kThreads, 0},
    {"convert_float32", convert_round_trip<float>, 1, kThreads, 0},
    {"exp2_approximate", elementwise<exp2_approximate>, 1, kThreads, 0},
    {"log2_approximate", elementwise<log2_approximate>, 1, kThreads, 0},
    {"reciprocal_sqrt", elementwise<reciprocal_sqrt>, 1, kThreads, 0},
    {"reciprocal_approximate", elementwise<reciprocal_approximate>, 1, kThreads, 0},
    {"tanh_approximate", elementwise<tanh_approximate>, 1, kThreads, 0},
    {"atomic_add_float32", atomic_sum<float>, 2, kThreads, 0},
    {"atomic_add_int32", atomic_sum<int>, 2, kThreads, 0},
    {"atomic_add_uint32", atomic_sum<unsigned>, 2, kThreads, 0},
    {"atomic_max", atomic_maximum, 2, kThreads, 0},
    {"atomic_exchange_float32", atomic_swap<float>, 2, kThreads, 0},
    {"atomic_exchange_int32", atomic_swap<int>, 2, kThreads, 0},
    {"atomic_exchange_uint32", atomic_swap<unsigned>, 2, kThreads, 0},
    {"atomic_compare_and_swap", atomic_claim, 2, kThreads, 0},
    {"atomic_add_shared", atomic_shared, 2, kThreads, sizeof(int)},
    {"reductions", reductions, 1, kThreads, sizeof(BlockReducePlan<kThreads>)},
    {"reduction_pair", reduction_pair, 1, kThreads, sizeof(BlockReducePlan<kThreads, 2>)},
    {"shared_strided", shared_strided, 1, kThreads, sizeof(StridedPlan)},
    {"shared_large", shared_large, 1, kThreads, sizeof(LargePlan)},
    {"refused_launch", indices, 1, 2048, 0},
};

}  // namespace warploom::conformance

// Runs the primitive `name` on copies of a, b and out, and copies out back. 0, or 1 with the reason
// in `error`.
WARPLOOM_TEST_ENTRY int run_primitive(const char* name, const void* a, std::size_t a_bytes,
                                      const void* b, std::size_t b_bytes, void* out,
                                      std::size_t out_bytes, int argument, char* error,
                                      std::size_t error_bytes) {
    using namespace warploom;
    return harness::report_errors(error, error_bytes, [&] {
        for (const conformance::Primitive& primitive : conformance::kPrimitives) {
            if (std::string_view(primitive.name) != name) {
                continue;
            }
            harness::Buffer device_a(a, a_bytes);
            harness::Buffer device_b(b, b_bytes);
            harness::Buffer device_out(out, out_bytes);
            const conformance::Arguments arguments{device_a.data(), device_b.data(),
                                                   device_out.data(), argument};
            device::launch(primitive.kernel,
                           {.grid = dim3(primitive.blocks),
                            .threads = primitive.threads,
                            .shared_bytes = primitive.shared_bytes},
                           device::Stream{}, arguments);
            harness::synchronise();
            device_out.copy_to(out);
            return;
        }
        throw std::runtime_error(std::string("no primitive is called ") + name);
    });
}
