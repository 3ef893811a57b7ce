// Attention forward: checks the arguments, and launches the 16-bit kernels.
#include "attention/attention.cuh"

#include "attention/attention_launch.cuh"

namespace warploom::attention {
namespace {

constexpr int kMaxHeadDim = 256;

void check(const AttentionParams& params) {
    if (std::min(params.head_dim, params.value_dim) < 1 ||
        std::max(params.head_dim, params.value_dim) > kMaxHeadDim) {
        throw std::invalid_argument("attention: head dimensions: expected 1 to 256, got q, k " +
                                    std::to_string(params.head_dim) + " and v " +
                                    std::to_string(params.value_dim));
    }
    if (params.kv_heads < 1 || params.heads % params.kv_heads != 0) {
        throw std::invalid_argument("attention: q: expected a multiple of " +
                                    std::to_string(params.kv_heads) + " heads, got " +
                                    std::to_string(params.heads));
    }
    const int length = std::max(params.sequences.query_length, params.sequences.key_length);
    if (length >= kMaxLength) {
        throw std::invalid_argument("attention: q, k: expected sequences shorter than " +
                                    std::to_string(kMaxLength) + ", got " + std::to_string(length));
    }
}

template <typename T>
void launch_forward_16bit(const AttentionParams& params, Stream stream) {
    choose_traits(params, [&]<int kHeadDim, int kValueDim, bool kScored>() {
        using Traits = ForwardTraits<T, kHeadDim, kValueDim, kScored>;
        launch_forward<Traits>(attention_forward_kernel<Traits>, params, stream);
    });
}

}  // namespace

void attention_forward_cuda(const AttentionParams& params, Stream stream) {
    check(params);
    if (params.sequences.batch == 0 || params.heads == 0 || params.sequences.query_length == 0) {
        return;
    }
    dispatch_dtype<TypeCase<DType::float32, float>, TypeCase<DType::float16, device::half>,
                   TypeCase<DType::bfloat16, device::bfloat16>>(params.dtype, [&]<typename T>() {
        if constexpr (std::is_same_v<T, float>) {
            attention_forward_float32(params, stream);
        } else {
            launch_forward_16bit<T>(params, stream);
        }
    });
}

}  // namespace warploom::attention
