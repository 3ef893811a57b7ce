// Writing to a cache on the CPU: copies, and a rotation of the keys.
#include <algorithm>
#include <cstdint>

#include "attention/attention_decode.h"
#include "common/cpu_float.h"
#include "common/parallel.h"
#include "rope/turn_cpu.h"

namespace warploom::attention {
namespace WARPLOOM_CPU_ISA {
namespace {

using namespace rope::WARPLOOM_CPU_ISA;

template <typename T>
void write_row(const CacheAppendParams& params, std::int64_t batch, std::int64_t step) {
    using W = Wide<T>;
    const std::int64_t position = std::int64_t{params.cache_seqlens[batch]} + step;
    if (position < 0 || position >= params.capacity) {
        return;
    }
    std::int64_t block = batch;
    std::int64_t slot = position;
    if (params.block_table != nullptr) {
        block = params.block_table[batch * params.block_table_stride + position / params.page_size];
        slot = position % params.page_size;
        if (block < 0) {
            return;
        }
    }
    const auto at = [](const HeadStrides& strides, std::int64_t outer, std::int64_t row,
                       std::int64_t head) {
        return outer * strides.batch + row * strides.sequence + head * strides.head;
    };
    const std::int64_t pairs = params.rotary_dim / 2;
    const std::int64_t table_row = std::min<std::int64_t>(position, params.table_rows - 1) * pairs;
    const W* cos = static_cast<const W*>(params.cos) + table_row;
    const W* sin = static_cast<const W*>(params.sin) + table_row;
    for (std::int64_t head = 0; head < params.kv_heads; ++head) {
        const T* k = static_cast<const T*>(params.k) + at(params.k_strides, batch, step, head);
        const T* v = static_cast<const T*>(params.v) + at(params.v_strides, batch, step, head);
        T* k_to = static_cast<T*>(params.k_cache) + at(params.k_cache_strides, block, slot, head);
        T* v_to = static_cast<T*>(params.v_cache) + at(params.v_cache_strides, block, slot, head);
        turn(params.interleaved, k, cos, sin, W{1}, pairs, params.head_dim, k_to);
        std::copy_n(v, params.value_dim, v_to);
    }
}

}  // namespace

void attention_cache_append_cpu(const CacheAppendParams& params) {
    visit_element_type(params.dtype, [&]<typename T>() {
        const std::int64_t rows = std::int64_t{params.batch} * params.count;
        parallel_for(rows, 8, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t row = begin; row < end; ++row) {
                write_row<T>(params, row / params.count, row % params.count);
            }
        });
    });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::attention
