// RMSNorm and gated activations that emit the rank-r product of their rows.
//
// Grid: one block of 8 warps per 16 rows. Warp w has the units of columns w, w + 8, ... of all its
// rows. With g = lane / 4 and t = lane % 4, a lane makes the 16 bytes t of the unit's 64, of rows g
// and g + 8, and stores them to out; they are, as they lie in its registers, the left operand of
// the product, and the same 16 bytes of row g of lora_a the right one: the terms of a sum may
// stand in any order, if it is the same of both. So the rows pass through no shared memory. At the
// end the warps' sums are added up there, in the order of the warps.
//
// lora_a is read from the L2 cache once a block. Ranks beyond kRanks take a further pass, which
// reads the rows of out again.
#pragma once

#include <cstdint>

#include "activation/gated_activation.cuh"
#include "norm/rms_norm.cuh"
#include "norm_shrink.h"
#include "norm_shrink_sums.cuh"

namespace warploom::lora {

// out = weight sum rstd. A lane reads of the sum what it has written itself.
template <typename Traits>
struct NormalisedRows {
    using T = typename Traits::Element;
    using Part = typename Traits::Part;

    const RmsNormShrinkParams& params;
    const LaneRows& lane;
    float rstd[2];

    // Sums the squares, of x and residual where there is one, and writes their sum and rstd.
    WARPLOOM_DEVICE NormalisedRows(const RmsNormShrinkParams& params, const LaneRows& lane,
                                   ShrinkPlan<Traits>& plan)
        : params(params), lane(lane) {
        // Units whose loads are under way at the same time.
        constexpr int kItems = Traits::kWhole ? 2 : 1;
        const bool has_residual = params.residual != nullptr;
        float squares[2] = {};
        for (int first = first_unit<Traits>() + lane_column<Traits>(); first < params.columns;
             first += kItems * Traits::kStep) {
            Part parts[kItems][2];
            Part added[kItems][2];
            WARPLOOM_UNROLL
            for (int item = 0; item < kItems; ++item) {
                WARPLOOM_UNROLL
                for (int i = 0; i < 2; ++i) {
                    const int column = first + item * Traits::kStep;
                    parts[item][i] = read_part<Traits>(
                        static_cast<const T*>(params.x) + lane.row[i] * params.x_row_stride, column,
                        lane.end[i]);
                    if (has_residual) {
                        added[item][i] =
                            read_part<Traits>(static_cast<const T*>(params.residual) +
                                                  lane.row[i] * params.residual_row_stride,
                                              column, lane.end[i]);
                    }
                }
            }
            WARPLOOM_UNROLL
            for (int item = 0; item < kItems; ++item) {
                WARPLOOM_UNROLL
                for (int i = 0; i < 2; ++i) {
                    if (has_residual) {
                        parts[item][i] = norm::add_rounded(parts[item][i], added[item][i]);
                        write_part<Traits>(
                            static_cast<T*>(params.sum) + lane.row[i] * params.columns,
                            first + item * Traits::kStep, lane.end[i], parts[item][i]);
                    }
                    squares[i] += norm::sum_of_squares(parts[item][i]);
                }
            }
        }
        WARPLOOM_UNROLL
        for (int i = 0; i < 2; ++i) {
            squares[i] += device::shuffle_xor(squares[i], 1);
            squares[i] += device::shuffle_xor(squares[i], 2);
            if (device::lane_index() % 4 == 0) {
                plan.squares[device::warp_index()][LaneRows::in_block(i)] = squares[i];
            }
        }
        device::sync_threads();
        WARPLOOM_UNROLL
        for (int i = 0; i < 2; ++i) {
            float total = plan.squares[0][LaneRows::in_block(i)];
            WARPLOOM_UNROLL
            for (int warp = 1; warp < Traits::kWarps; ++warp) {
                total += plan.squares[warp][LaneRows::in_block(i)];
            }
            rstd[i] = 1.0f / sqrtf(total / static_cast<float>(params.columns) +
                                   static_cast<float>(params.eps));
            if (threadIdx.x < device::kWarpSize && device::lane_index() % 4 == 0 &&
                lane.end[i] > 0) {
                static_cast<float*>(params.rstd)[lane.row[i]] = rstd[i];
            }
        }
    }

    WARPLOOM_DEVICE void make(Part (&parts)[2], int column) const {
        float weights[Traits::kVector];
        read_parameter<Traits>(params.weight, params.weight_dtype, column, params.columns, weights);
        const bool has_residual = params.residual != nullptr;
        const T* source = static_cast<const T*>(has_residual ? params.sum : params.x);
        const std::int64_t stride = has_residual ? params.columns : params.x_row_stride;
        WARPLOOM_UNROLL
        for (int i = 0; i < 2; ++i) {
            float values[Traits::kVector];
            unpack(read_part<Traits>(source + lane.row[i] * stride, column, lane.end[i]), values);
            WARPLOOM_UNROLL
            for (int index = 0; index < Traits::kVector; ++index) {
                values[index] = values[index] * rstd[i] * weights[index];
            }
            parts[i] = pack_floats<T>(values);
        }
    }
};

// out = act(gate) up.
template <typename Traits>
struct GatedRows {
    using T = typename Traits::Element;
    using Part = typename Traits::Part;

    const GatedShrinkParams& params;
    const LaneRows& lane;

    WARPLOOM_DEVICE void make(Part (&parts)[2], int column) const {
        Part ups[2];
        WARPLOOM_UNROLL
        for (int i = 0; i < 2; ++i) {
            parts[i] = read_part<Traits>(
                static_cast<const T*>(params.gate) + lane.row[i] * params.gate_row_stride, column,
                lane.end[i]);
            ups[i] = read_part<Traits>(
                static_cast<const T*>(params.up) + lane.row[i] * params.up_row_stride, column,
                lane.end[i]);
        }
        activation::visit_activation(params.activation, [&]<activation::Activation kActivation>() {
            WARPLOOM_UNROLL
            for (int i = 0; i < 2; ++i) {
                float values[Traits::kVector];
                float factors[Traits::kVector];
                unpack(parts[i], values);
                unpack(ups[i], factors);
                WARPLOOM_UNROLL
                for (int index = 0; index < Traits::kVector; ++index) {
                    values[index] =
                        activation::activate<kActivation>(values[index]) * factors[index];
                }
                parts[i] = pack_floats<T>(values);
            }
        });
    }
};

// Makes the block's rows of out from `source`, and their product with lora_a.
template <typename Traits, typename Source, typename Params>
WARPLOOM_DEVICE void shrink_rows(const Source& source, const LaneRows& lane, const Params& params,
                                 ShrinkPlan<Traits>& plan) {
    using T = typename Traits::Element;
    const int columns = params.columns;
    T* out = static_cast<T*>(params.out);
    WARPLOOM_NO_UNROLL
    for (int first_rank = 0; first_rank < params.rank; first_rank += Traits::kRanks) {
        const int ranks = params.rank - first_rank;
        const T* factors =
            static_cast<const T*>(params.lora_a) + static_cast<std::int64_t>(first_rank) * columns;
        ShrinkSums<Traits> sums;
        WARPLOOM_NO_UNROLL
        for (int unit = first_unit<Traits>(); unit < columns; unit += Traits::kStep) {
            const int column = unit + lane_column<Traits>();
            typename Traits::Part parts[2];
            if (first_rank == 0) {
                source.make(parts, column);
            }
            WARPLOOM_UNROLL
            for (int i = 0; i < 2; ++i) {
                T* row = out + lane.row[i] * columns;
                if (first_rank == 0) {
                    write_part<Traits>(row, column, lane.end[i], parts[i]);
                } else {
                    parts[i] = read_part<Traits>(row, column, lane.end[i]);
                }
            }
            sums.add(parts, factors, ranks, column, columns);
        }
        sums.store(plan.sums[device::warp_index()]);
        device::sync_threads();
        for (int index = static_cast<int>(threadIdx.x); index < Traits::kRows * Traits::kRanks;
             index += Traits::kThreads) {
            const int row = index / Traits::kRanks;
            const int rank = index % Traits::kRanks;
            const std::int64_t tensor_row =
                static_cast<std::int64_t>(blockIdx.x) * Traits::kRows + row;
            if (rank < ranks && tensor_row < params.rows) {
                float total = plan.sums[0][row][rank];
                WARPLOOM_UNROLL
                for (int warp = 1; warp < Traits::kWarps; ++warp) {
                    total += plan.sums[warp][row][rank];
                }
                static_cast<T*>(params.shrunk)[tensor_row * params.rank + first_rank + rank] =
                    device::from_float<T>(total);
            }
        }
        device::sync_threads();
    }
}

template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, Traits::kBlocks)
rms_norm_shrink_kernel(WARPLOOM_GRID_CONSTANT RmsNormShrinkParams params) {
    auto& plan = device::shared_memory<ShrinkPlan<Traits>>();
    const LaneRows lane(params.rows, params.columns);
    const NormalisedRows<Traits> source(params, lane, plan);
    shrink_rows<Traits>(source, lane, params, plan);
}

template <typename Traits>
WARPLOOM_KERNEL(Traits::kThreads, Traits::kBlocks)
gated_shrink_kernel(WARPLOOM_GRID_CONSTANT GatedShrinkParams params) {
    auto& plan = device::shared_memory<ShrinkPlan<Traits>>();
    const LaneRows lane(params.rows, params.columns);
    const GatedRows<Traits> source{params, lane};
    shrink_rows<Traits>(source, lane, params, plan);
}

}  // namespace warploom::lora
