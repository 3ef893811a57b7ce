// What becomes of the products of a backward kernel, for all dtypes, and where its sums go.
#pragma once

#include <type_traits>

#include "mla/mla_absorbed_backward_block.cuh"

namespace warploom::mla {

WARPLOOM_DEVICE void add(Chunk<float>& sums, const Chunk<float>& parts) {
    WARPLOOM_UNROLL
    for (int element = 0; element < Chunk<float>::kSize; ++element) {
        sums.elements[element] += parts.elements[element];
    }
}

template <typename T>
WARPLOOM_DEVICE void store_pair(T* to, float low, float high) {
    if constexpr (std::is_same_v<T, float>) {
        device::store_vector(to, float2{low, high});
    } else {
        device::store_vector(to, device::pack<T>(low, high));
    }
}

// Turns the products of a passing tile into probabilities and gradients of products. A thread has
// two neighbouring passing rows and one owned row.
template <typename Traits>
WARPLOOM_DEVICE void differentiate(typename Traits::SharedPlan& shared, const BackwardTask& task,
                                   const BackwardKernelParams& params, int tile) {
    constexpr int kElements = Traits::SharedPlan::kElements;
    const auto& statistics = shared.statistics[Traits::kOwnsQueries ? 0 : tile % Traits::kStages];
    for (int index = 2 * static_cast<int>(threadIdx.x); index < kElements;
         index += 2 * BackwardSizes::kThreads) {
        const int owned = index / 8 % Traits::kOwnedRows;
        const int passing = index / (8 * Traits::kOwnedRows) * 8 + index % 8;
        float products[2][2] = {};
        WARPLOOM_UNROLL
        for (int part = 0; part < Traits::kDepthParts; ++part) {
            WARPLOOM_UNROLL
            for (int tensor = 0; tensor < 2; ++tensor) {
                const auto pair =
                    device::load_vector<float2>(shared.products[tensor][part] + index);
                products[tensor][0] += pair.x;
                products[tensor][1] += pair.y;
            }
        }
        float probabilities[2];
        float score_grads[2];
        WARPLOOM_UNROLL
        for (int element = 0; element < 2; ++element) {
            const int query = Traits::kOwnsQueries ? owned : passing + element;
            const int key = Traits::kOwnsQueries ? tile * Traits::kPassingRows + passing + element
                                                 : task.first_owned + owned;
            const float lse = statistics.lse[query];
            const bool seen = key < statistics.end_key[query] && lse != -kInfinity;
            // One rounding of the difference, before log2(e): little is lost where it is near 0.
            const float exponent = kLog2E * fmaf(products[0][element], params.softmax_scale, -lse);
            const float probability = seen ? device::exp2_approximate(exponent) : 0.0f;
            probabilities[element] = probability;
            // The difference first: both of it may be much larger than the gradient of lse.
            const float difference = products[1][element] - statistics.delta[query];
            score_grads[element] =
                params.softmax_scale * probability * (difference + statistics.grad_lse[query]);
        }
        store_pair(shared.probabilities + index, probabilities[0], probabilities[1]);
        store_pair(shared.score_grads + index, score_grads[0], score_grads[1]);
    }
}

// Where a block writes its gradient: rows of `columns` elements side by side, the first one that of
// its first owned row.
template <typename T>
struct GradientRows {
    T* first;
    int rows;
    int columns;

    WARPLOOM_DEVICE T* row(int index) const {
        return first + static_cast<std::int64_t>(index) * columns;
    }
};

template <typename Traits>
WARPLOOM_DEVICE GradientRows<typename Traits::Element> gradient_rows(
    const BackwardTask& task, const BackwardKernelParams& params) {
    using T = typename Traits::Element;
    const MlaAbsorbedBackwardParams& mla = params.mla;
    const int rows = Traits::kOwnsQueries ? params.rows : mla.kv_length;
    const int columns = mla.d_latent + mla.d_rope;
    T* gradient = static_cast<T*>(Traits::kOwnsQueries ? mla.grad_q : mla.grad_kv);
    const std::int64_t first = static_cast<std::int64_t>(task.batch) * rows + task.first_owned;
    return {gradient + first * columns, rows - task.first_owned, columns};
}

// The same for the block's part of grad_kv.
WARPLOOM_DEVICE GradientRows<float> part_rows(const BackwardTask& task,
                                              const BackwardKernelParams& params) {
    const MlaAbsorbedBackwardParams& mla = params.mla;
    const int columns = mla.d_latent + mla.d_rope;
    const std::int64_t part = static_cast<std::int64_t>(task.batch) * mla.query_parts + task.part;
    const std::int64_t first = part * mla.kv_length + task.first_owned;
    return {mla.partial_grad_kv + first * columns, mla.kv_length - task.first_owned, columns};
}

}  // namespace warploom::mla
