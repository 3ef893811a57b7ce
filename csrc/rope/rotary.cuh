// Rotary position embedding: the first rotary_dim channels of every head turn, pair by pair, by the
// angle of the token's position; the others are copied.
//
//   y1 = x1 cos - x2 sin     y2 = x2 cos + x1 sin     (conjugate: the sign of sin flips)
//
// Pairs are (i, i + rotary_dim / 2), or (2i, 2i + 1) where interleaved.
#pragma once

#include <cstdint>

#include "common/index.cuh"
#include "common/vec.cuh"
#include "rotary.h"

namespace warploom::rope {

// A head is cut into pieces: kVector pairs that turn (two vectors), or kVector channels that are
// copied (one). A thread takes one piece of kHeads neighbouring heads, for which it reads cos and
// sin once.
template <typename Element_, int kVector_>
struct RotaryTraits {
    using Element = Element_;
    using Vector = Packed<Element, kVector_>;
    static constexpr int kVector = kVector_;
    static constexpr int kThreads = 128;
    static constexpr int kHeads = 2;
};

// What the kernel is given: the op's Params and the sizes of the work.
struct RotaryWork {
    RotaryParams params;
    std::int64_t pieces;       // of one head
    std::int64_t head_groups;  // of kHeads heads, of one token
    std::int64_t items;        // threads that have work
};

template <typename Traits>
RotaryWork rotary_work(const RotaryParams& params) {
    const std::int64_t copied = params.head_dim - params.rotary_dim;
    const std::int64_t pieces = (params.rotary_dim / 2 + copied) / Traits::kVector;
    const std::int64_t head_groups = ceil_divide(params.heads, Traits::kHeads);
    return {.params = params,
            .pieces = pieces,
            .head_groups = head_groups,
            .items = params.batch * params.sequence * head_groups * pieces};
}

// The row of cos and sin for token (batch, sequence).
WARPLOOM_DEVICE std::int64_t table_row(const RotaryParams& params, std::int64_t batch,
                                       std::int64_t sequence) {
    const std::int64_t token = batch * params.sequence + sequence;
    if (params.positions == nullptr) {
        return sequence;
    }
    return params.positions_are_int32 ? static_cast<const std::int32_t*>(params.positions)[token]
                                      : static_cast<const std::int64_t*>(params.positions)[token];
}

WARPLOOM_DEVICE void turn_pair(float& first, float& second, float cos, float sin) {
    const float turned = first * cos - second * sin;
    second = second * cos + first * sin;
    first = turned;
}

// Turns the kVector pairs whose channels are those of `first` and then of `second`.
template <typename Traits>
WARPLOOM_DEVICE void turn(typename Traits::Vector& first, typename Traits::Vector& second,
                          const float (&cos)[Traits::kVector], const float (&sin)[Traits::kVector],
                          bool interleaved) {
    using T = typename Traits::Element;
    constexpr int kVector = Traits::kVector;
    float low[kVector];
    float high[kVector];
    unpack(first, low);
    unpack(second, high);
    if (interleaved && kVector > 1) {
        WARPLOOM_UNROLL
        for (int pair = 0; pair < kVector / 2; ++pair) {
            turn_pair(low[2 * pair], low[2 * pair + 1], cos[pair], sin[pair]);
            turn_pair(high[2 * pair], high[2 * pair + 1], cos[kVector / 2 + pair],
                      sin[kVector / 2 + pair]);
        }
    } else {
        WARPLOOM_UNROLL
        for (int pair = 0; pair < kVector; ++pair) {
            turn_pair(low[pair], high[pair], cos[pair], sin[pair]);
        }
    }
    first = pack_floats<T>(low);
    second = pack_floats<T>(high);
}

// grid [ceil(items / kThreads)], items beyond by a stride of the grid
template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, 8)
rotary_kernel(WARPLOOM_GRID_CONSTANT RotaryWork work) {
    using T = typename Traits::Element;
    using Vector = typename Traits::Vector;
    constexpr int kVector = Traits::kVector;
    constexpr int kHeads = Traits::kHeads;
    const RotaryParams& params = work.params;
    const std::int64_t half = params.rotary_dim / 2;
    const std::int64_t turning_pieces = half / kVector;

    WARPLOOM_NO_UNROLL
    for (std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * Traits::kThreads + threadIdx.x;
         item < work.items; item += static_cast<std::int64_t>(gridDim.x) * Traits::kThreads) {
        const Division by_piece = divide(item, work.pieces);
        const Division by_group = divide(by_piece.quotient, work.head_groups);
        const Division by_sequence = divide(by_group.quotient, params.sequence);
        const std::int64_t piece = by_piece.remainder;
        const std::int64_t first_head = by_group.remainder * kHeads;
        const bool turns = piece < turning_pieces;

        // The channels of the piece's first and second vector.
        std::int64_t first_channel = params.rotary_dim + (piece - turning_pieces) * kVector;
        std::int64_t second_channel = 0;
        float cos[kVector] = {};
        float sin[kVector] = {};
        if (turns) {
            const std::int64_t pair = piece * kVector;
            first_channel = params.interleaved ? 2 * pair : pair;
            second_channel = params.interleaved ? 2 * pair + kVector : pair + half;
            const std::int64_t row = table_row(params, by_sequence.quotient, by_sequence.remainder);
            load_floats(static_cast<const float*>(params.cos) + row * params.cos_row_stride + pair,
                        cos);
            load_floats(static_cast<const float*>(params.sin) + row * params.sin_row_stride + pair,
                        sin);
            WARPLOOM_UNROLL
            for (int index = 0; index < kVector; ++index) {
                sin[index] = params.conjugate ? -sin[index] : sin[index];
            }
        }

        const T* x =
            static_cast<const T*>(params.x) + by_sequence.quotient * params.x_batch_stride +
            by_sequence.remainder * params.x_sequence_stride + first_head * params.x_head_stride;
        T* out = static_cast<T*>(params.out) +
                 (by_group.quotient * params.heads + first_head) * params.head_dim;
        Vector first[kHeads];
        Vector second[kHeads];
        WARPLOOM_UNROLL
        for (int head = 0; head < kHeads; ++head) {
            const bool exists = first_head + head < params.heads;
            const T* channels = x + head * params.x_head_stride;
            first[head] =
                exists ? load_packed<kVector>(channels + first_channel) : zero_packed<T, kVector>();
            second[head] = exists && turns ? load_packed<kVector>(channels + second_channel)
                                           : zero_packed<T, kVector>();
        }
        WARPLOOM_UNROLL
        for (int head = 0; head < kHeads; ++head) {
            if (first_head + head < params.heads) {
                T* channels = out + head * params.head_dim;
                if (turns) {
                    turn<Traits>(first[head], second[head], cos, sin, params.interleaved);
                    store_packed(channels + second_channel, second[head]);
                }
                store_packed(channels + first_channel, first[head]);
            }
        }
    }
}

}  // namespace warploom::rope
