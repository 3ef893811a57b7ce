// Joins the pieces of a row.
#pragma once

#include "common/combine_parts.cuh"
#include "mla/mla_decode_schedule.cuh"
#include "mla/mla_decode_tile.cuh"

namespace warploom::mla {

using Combine = CombineParts<kMaxLatent>;

// grid [batch * query_length * heads], as out
template <typename T>
WARPLOOM_KERNEL(Combine::kThreads, 4)
mla_decode_combine_kernel(WARPLOOM_GRID_CONSTANT DecodeWork work) {
    auto& shared = device::shared_memory<Combine::SharedPlan>();
    const MlaDecodeParams& decode = work.decode;
    const int rows = decode.query_length * decode.heads;
    const int batch = static_cast<int>(blockIdx.x) / rows;
    const int row = static_cast<int>(blockIdx.x) - batch * rows;
    const Pieces pieces = pieces_of(work, batch);
    if (pieces.count == 1) {
        return;  // It is the result.
    }
    const std::int64_t first = pieces.first * rows + row;
    const RowParts parts = {.lses = decode.partial_lse + first,
                            .outs = decode.partial_out + first * decode.d_latent,
                            .lse_stride = rows,
                            .out_stride = static_cast<std::int64_t>(rows) * decode.d_latent,
                            .count = pieces.count,
                            .columns = decode.d_latent};
    const Combine::Result result = Combine::combine(parts, shared);
    T* out = static_cast<T*>(decode.out) + static_cast<std::int64_t>(blockIdx.x) * decode.d_latent;
    for (int column = static_cast<int>(threadIdx.x); column < decode.d_latent;
         column += Combine::kThreads) {
        out[column] =
            device::from_float<T>(Combine::sum_of_column(shared, column) * result.normalizer);
    }
    if (threadIdx.x == 0) {
        const int query = row / decode.heads;
        const int head = row - query * decode.heads;
        const std::int64_t place =
            (static_cast<std::int64_t>(batch) * decode.heads + head) * decode.query_length + query;
        static_cast<float*>(decode.lse)[place] = result.lse;
    }
}

}  // namespace warploom::mla
