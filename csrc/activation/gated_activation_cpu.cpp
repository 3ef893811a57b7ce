// Gated activations on the CPU: elementwise, bound by memory. Rows are cut into blocks so that one
// long row is shared out like many short ones.
#include "activation/gated_activation.h"

#include <algorithm>
#include <cstdint>

#include "activation/activate_cpu.h"
#include "common/cpu_loops.h"
#include "common/parallel.h"

namespace warploom::activation {
namespace WARPLOOM_CPU_ISA {
namespace {

using namespace ::warploom::WARPLOOM_CPU_ISA;

// Elements of a block, and elements that are worth waking a thread for.
constexpr std::int64_t kBlock = 4096;
constexpr std::int64_t kGrain = 16384;

// Calls body(row, first column, count) for blocks that cover [rows, columns].
template <typename Body>
void for_each_block(std::int64_t rows, std::int64_t columns, Body body) {
    const std::int64_t blocks_per_row = ceil_divide(columns, kBlock);
    const std::int64_t grain = std::max<std::int64_t>(1, kGrain / std::min(columns, kBlock));
    parallel_for(rows * blocks_per_row, grain, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t block = begin; block < end; ++block) {
            const std::int64_t first = block % blocks_per_row * kBlock;
            body(block / blocks_per_row, first, std::min(kBlock, columns - first));
        }
    });
}

template <typename T, typename Act>
void forward(const GatedActivationParams& params) {
    using W = Wide<T>;
    const std::int64_t columns = params.columns;
    for_each_block(
        params.rows, columns, [&](std::int64_t row, std::int64_t first, std::int64_t count) {
            const T* gate =
                static_cast<const T*>(params.gate) + row * params.gate_row_stride + first;
            const T* up = static_cast<const T*>(params.up) + row * params.up_row_stride + first;
            T* out = static_cast<T*>(params.out) + row * columns + first;
            for_each_element<T>(
                count, [](W gate, W up) { return Act::template value<T>(gate) * up; },
                [out](std::int64_t i, auto... results) { store<T>(out + i, results...); }, gate,
                up);
        });
}

template <typename W>
struct Gradients {
    W gate;
    W up;
};

template <typename T, typename Act>
void backward(const GatedActivationBackwardParams& params) {
    using W = Wide<T>;
    const std::int64_t columns = params.columns;
    for_each_block(
        params.rows, columns, [&](std::int64_t row, std::int64_t first, std::int64_t count) {
            const T* grad_out =
                static_cast<const T*>(params.grad_out) + row * params.grad_out_row_stride + first;
            const T* gate =
                static_cast<const T*>(params.gate) + row * params.gate_row_stride + first;
            const T* up = static_cast<const T*>(params.up) + row * params.up_row_stride + first;
            T* grad_gate = static_cast<T*>(params.grad_gate) + row * columns + first;
            T* grad_up = static_cast<T*>(params.grad_up) + row * columns + first;
            for_each_element<T>(
                count,
                [](W upstream, W gate, W up) {
                    const ValueAndSlope<W> act = Act::template value_and_slope<T>(gate);
                    return Gradients<W>{upstream * up * act.slope, upstream * act.value};
                },
                [=](std::int64_t i, auto... gradients) {
                    store<T>(grad_gate + i, gradients.gate...);
                    store<T>(grad_up + i, gradients.up...);
                },
                grad_out, gate, up);
        });
}

}  // namespace

void gated_activation_cpu(const GatedActivationParams& params) {
    visit_element_type(params.dtype, [&]<typename T>() {
        visit_activation(params.activation, [&]<typename Act>() { forward<T, Act>(params); });
    });
}

void gated_activation_backward_cpu(const GatedActivationBackwardParams& params) {
    visit_element_type(params.dtype, [&]<typename T>() {
        visit_activation(params.activation, [&]<typename Act>() { backward<T, Act>(params); });
    });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::activation
