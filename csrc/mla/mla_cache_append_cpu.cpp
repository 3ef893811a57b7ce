// Writing to a latent cache on the CPU: token by token, the latent normalised and the key rotated.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "attention/sequences_cpu.h"
#include "attention/tile_cpu.h"
#include "common/cpu_float.h"
#include "common/cpu_loops.h"
#include "common/parallel.h"
#include "mla/cache_cpu.h"
#include "rope/turn_cpu.h"

namespace warploom::mla {
namespace WARPLOOM_CPU_ISA {
namespace {

using namespace attention::WARPLOOM_CPU_ISA;

template <typename T, typename WeightT>
class Append {
    using W = Wide<T>;

  public:
    explicit Append(const MlaCacheAppendParams& params)
        : params_(params), pairs_(params.cos == nullptr ? 0 : params.d_rope / 2) {}

    void run() const {
        constexpr std::int64_t kGrain = 8;
        const bool packed = params_.cu_seqlens != nullptr;
        const std::int64_t sequences = packed ? 1 : params_.batch;
        parallel_for(sequences * params_.count, kGrain, [&](std::int64_t begin, std::int64_t end) {
            // A token before it is compressed.
            const Scratch<W> latent(params_.d_latent);
            const Scratch<T> k_rope(params_.d_rope);
            for (std::int64_t token = begin; token < end; ++token) {
                const std::int64_t batch =
                    packed ? last_at_most(params_.cu_seqlens, params_.batch + 1, token)
                           : token / params_.count;
                // Behind the last sequence there may be tokens of none.
                if (batch < params_.batch) {
                    const std::int64_t first =
                        packed ? std::int64_t{params_.cu_seqlens[batch]} : batch * params_.count;
                    write_token(batch, token - first, packed ? token : token - first, latent.data(),
                                k_rope.data());
                }
            }
        });
    }

  private:
    // Token `step` of a sequence's new ones, which lies in row `row` of its compressed_kv.
    void write_token(std::int64_t batch, std::int64_t step, std::int64_t row, W* latent,
                     T* k_rope) const {
        const std::int64_t position = params_.cache.cache_seqlens[batch] + step;
        if (position < 0 || position >= params_.cache.capacity) {
            return;
        }
        const CachePlace to = place_of(params_.cache, batch, position);
        if (to.block < 0) {
            return;
        }
        const T* from = static_cast<const T*>(params_.compressed_kv) +
                        batch * params_.batch_stride + row * params_.row_stride;
        if (params_.cache.format == CacheFormat::dense) {
            T* cache_row = static_cast<T*>(params_.kv_cache) + to.offset;
            normalise(from, cache_row);
            rotate(from + params_.d_latent, position, cache_row + params_.d_latent);
            return;
        }
        normalise(from, latent);
        rotate(from + params_.d_latent, position, k_rope);
        visit_code(params_.cache.format, [&]<typename Code>() {
            compress_row<Code>(latent, k_rope, params_.d_latent, params_.d_rope,
                               static_cast<std::uint8_t*>(params_.kv_cache) + to.offset);
        });
    }

    template <typename Out>
    void normalise(const T* from, Out* to) const {
        const auto* weight = static_cast<const WeightT*>(params_.norm_weight);
        const std::int64_t d_latent = params_.d_latent;
        const W squares = sum_elements<T>(d_latent, [](W value) { return value * value; }, from);
        const W rstd =
            W{1} / std::sqrt(squares / static_cast<W>(d_latent) + static_cast<W>(params_.eps));
#pragma omp simd
        for (std::int64_t i = 0; i < d_latent; ++i) {
            to[i] = narrow<Out>(widen(from[i]) * rstd * static_cast<W>(widen(weight[i])));
        }
    }

    void rotate(const T* from, std::int64_t position, T* to) const {
        const std::int64_t row = std::min<std::int64_t>(position, params_.table_rows - 1) * pairs_;
        rope::WARPLOOM_CPU_ISA::turn(
            params_.interleaved, from, static_cast<const W*>(params_.cos) + row,
            static_cast<const W*>(params_.sin) + row, W{1}, pairs_, params_.d_rope, to);
    }

    const MlaCacheAppendParams& params_;
    const std::int64_t pairs_;  // that are rotated
};

}  // namespace

void mla_cache_append_cpu(const MlaCacheAppendParams& params) {
    visit_element_types(params.dtype, params.weight_dtype,
                        [&]<typename T, typename WeightT>() { Append<T, WeightT>(params).run(); });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::mla
