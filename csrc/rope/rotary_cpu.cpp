// Rotary position embedding on the CPU: bound by memory, shared out by token.
#include "rope/rotary.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <stdexcept>

#include "common/cpu_float.h"
#include "common/parallel.h"
#include "rope/turn_cpu.h"

namespace warploom::rope {
namespace WARPLOOM_CPU_ISA {
namespace {

// Elements that are worth waking a thread for.
constexpr std::int64_t kGrain = 16384;

// The row of the tables for token = batch index * sequence + sequence index.
std::int64_t table_row(const RotaryParams& params, std::int64_t token) {
    if (params.positions == nullptr) {
        return token % params.sequence;
    }
    return params.positions_are_int32 ? static_cast<const std::int32_t*>(params.positions)[token]
                                      : static_cast<const std::int64_t*>(params.positions)[token];
}

void check_positions(const RotaryParams& params) {
    for (std::int64_t token = 0; token < params.batch * params.sequence; ++token) {
        const std::int64_t row = table_row(params, token);
        if (row < 0 || row >= params.table_rows) {
            char message[128];
            std::snprintf(message, sizeof(message),
                          "apply_rotary: positions: expected values in [0, %lld), got %lld",
                          static_cast<long long>(params.table_rows), static_cast<long long>(row));
            throw std::runtime_error(message);
        }
    }
}

template <typename T>
void rotate(const RotaryParams& params) {
    using W = Wide<T>;
    const std::int64_t tokens = params.batch * params.sequence;
    const std::int64_t token_size = params.heads * params.head_dim;
    const W direction = params.conjugate ? W{-1} : W{1};
    const std::int64_t grain =
        std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(1, token_size));
    parallel_for(tokens, grain, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t token = begin; token < end; ++token) {
            const std::int64_t row = table_row(params, token);
            const W* cos = static_cast<const W*>(params.cos) + row * params.cos_row_stride;
            const W* sin = static_cast<const W*>(params.sin) + row * params.sin_row_stride;
            const T* x = static_cast<const T*>(params.x) +
                         token / params.sequence * params.x_batch_stride +
                         token % params.sequence * params.x_sequence_stride;
            T* out = static_cast<T*>(params.out) + token * token_size;
            for (std::int64_t head = 0; head < params.heads; ++head) {
                turn(params.interleaved, x + head * params.x_head_stride, cos, sin, direction,
                     params.rotary_dim / 2, params.head_dim, out + head * params.head_dim);
            }
        }
    });
}

}  // namespace

void apply_rotary_cpu(const RotaryParams& params) {
    if (params.positions != nullptr) {
        check_positions(params);
    }
    visit_element_type(params.dtype, [&]<typename T>() { rotate<T>(params); });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::rope
