// How the lanes of a block lie on its rows, and the sums of the products; norm_shrink.cuh says why.
#pragma once

#include <cstdint>

#include "norm/row_group.cuh"

namespace warploom::lora {

// kWhole: all rows begin and end on a multiple of 16 bytes; else elements are moved one by one.
template <typename Element_, bool kWhole_>
struct ShrinkTraits {
    using Element = Element_;
    static constexpr bool kWhole = kWhole_;
    static constexpr bool kTensorCores = sizeof(Element) == 2;
    static constexpr int kThreads = 256;
    // Of a multiprocessor; float32 would not keep its sums in the registers of two.
    static constexpr int kBlocks = kTensorCores ? 2 : 1;
    static constexpr int kWarps = kThreads / device::kWarpSize;
    static constexpr int kRows = 16;
    static constexpr int kVector = kVectorElements<Element>;  // Columns of a lane in a unit.
    static constexpr int kUnit = 4 * kVector;                 // Columns of a warp at a time.
    static constexpr int kStep = kWarps * kUnit;
    // Of one pass: 32 or 64 sums a lane.
    static constexpr int kRanks = kTensorCores ? 64 : 32;

    using Part = Packed<Element, kVector>;
};

template <typename Traits>
struct ShrinkPlan {
    float squares[Traits::kWarps][Traits::kRows];
    // 8 floats more a row: the sums of 4 rows, two neighbours each, lie in different banks.
    alignas(8) float sums[Traits::kWarps][Traits::kRows][Traits::kRanks + 8];
};

// The rows g and g + 8 of this lane: which of the tensor they are, and how many columns they have,
// none behind the last row.
struct LaneRows {
    std::int64_t row[2];
    int end[2];

    WARPLOOM_DEVICE LaneRows(int rows, int columns) {
        WARPLOOM_UNROLL
        for (int i = 0; i < 2; ++i) {
            row[i] = static_cast<std::int64_t>(blockIdx.x) * 16 + in_block(i);
            end[i] = row[i] < rows ? columns : 0;
        }
    }
    static WARPLOOM_DEVICE int in_block(int i) { return device::lane_index() / 4 + 8 * i; }
};

// Where this warp's columns begin in the first unit, and this lane's within a unit.
template <typename Traits>
WARPLOOM_DEVICE int first_unit() {
    return device::warp_index() * Traits::kUnit;
}
template <typename Traits>
WARPLOOM_DEVICE int lane_column() {
    return device::lane_index() % 4 * Traits::kVector;
}

// Elements [column, column + kVector) of a row of `columns`, zeros behind its end.
template <typename Traits>
WARPLOOM_DEVICE typename Traits::Part read_part(const typename Traits::Element* row, int column,
                                                int columns) {
    using Part = typename Traits::Part;
    Part part = zero_packed<typename Traits::Element, Traits::kVector>();
    if constexpr (Traits::kWhole) {
        if (column < columns) {
            part = load_packed<Traits::kVector>(row + column);
        }
    } else {
        WARPLOOM_UNROLL
        for (int index = 0; index < Traits::kVector; ++index) {
            if (column + index < columns) {
                part.values[index] = row[column + index];
            }
        }
    }
    return part;
}

template <typename Traits>
WARPLOOM_DEVICE void write_part(typename Traits::Element* row, int column, int columns,
                                const typename Traits::Part& part) {
    if constexpr (Traits::kWhole) {
        if (column < columns) {
            store_packed(row + column, part);
        }
    } else {
        WARPLOOM_UNROLL
        for (int index = 0; index < Traits::kVector; ++index) {
            if (column + index < columns) {
                row[column + index] = part.values[index];
            }
        }
    }
}

// The same of a parameter [columns], float32 or of the rows' type, as floats.
template <typename Traits>
WARPLOOM_DEVICE void read_parameter(const void* parameter, DType dtype, int column, int columns,
                                    float (&values)[Traits::kVector]) {
    WARPLOOM_UNROLL
    for (int index = 0; index < Traits::kVector; ++index) {
        values[index] = 0.0f;
    }
    if constexpr (Traits::kWhole) {
        if (column < columns) {
            norm::load_parameter<Traits>(parameter, dtype, column, values);
        }
    } else {
        WARPLOOM_UNROLL
        for (int index = 0; index < Traits::kVector; ++index) {
            if (column + index < columns) {
                values[index] = dtype == DType::float32
                                    ? static_cast<const float*>(parameter)[column + index]
                                    : device::to_float(static_cast<const typename Traits::Element*>(
                                          parameter)[column + index]);
            }
        }
    }
}

// The same of row `rank` of lora_a, zeros where it has none.
template <typename Traits>
WARPLOOM_DEVICE typename Traits::Part read_factors(const typename Traits::Element* factors,
                                                   int rank, int ranks, int column, int columns) {
    if (rank < ranks) {
        return read_part<Traits>(factors + static_cast<std::int64_t>(rank) * columns, column,
                                 columns);
    }
    return zero_packed<typename Traits::Element, Traits::kVector>();
}

// The sums of a warp: its 16 rows by kRanks rows of lora_a.
template <typename Traits, bool = Traits::kTensorCores>
struct ShrinkSums;

// mma.sync: a lane has the ranks 8 n + 2 t and 8 n + 2 t + 1 of its rows g (elements 0 and 1 of
// values[n]) and g + 8. Two steps of 16 terms a unit: the first 4 of a lane's 8, then the last.
template <typename Traits>
struct ShrinkSums<Traits, true> {
    using T = typename Traits::Element;
    using Part = typename Traits::Part;
    static constexpr int kTiles = Traits::kRanks / 8;

    float values[kTiles][4] = {};

    // lora_a's rows begin at `factors`, `ranks` of them are left.
    WARPLOOM_DEVICE void add(const Part (&parts)[2], const T* factors, int ranks, int column,
                             int columns) {
        constexpr int kGroup = 4;  // Tiles whose loads are under way at the same time.
        const auto upper = device::bit_cast<PackedWords<4>>(parts[0]);
        const auto lower = device::bit_cast<PackedWords<4>>(parts[1]);
        WARPLOOM_UNROLL
        for (int first = 0; first < kTiles; first += kGroup) {
            PackedWords<4> right[kGroup];
            WARPLOOM_UNROLL
            for (int n = 0; n < kGroup; ++n) {
                const int rank = 8 * (first + n) + device::lane_index() / 4;
                right[n] = device::bit_cast<PackedWords<4>>(
                    read_factors<Traits>(factors, rank, ranks, column, columns));
            }
            WARPLOOM_UNROLL
            for (int n = 0; n < kGroup; ++n) {
                if (8 * (first + n) < ranks) {
                    WARPLOOM_UNROLL
                    for (int word = 0; word < 4; word += 2) {
                        const std::uint32_t a[4] = {upper.pairs[word], lower.pairs[word],
                                                    upper.pairs[word + 1], lower.pairs[word + 1]};
                        const std::uint32_t b[2] = {right[n].pairs[word], right[n].pairs[word + 1]};
                        device::mma_m16n8k16<T>(values[first + n], a, b);
                    }
                }
            }
        }
    }

    WARPLOOM_DEVICE void store(float (&sums)[Traits::kRows][Traits::kRanks + 8]) const {
        WARPLOOM_UNROLL
        for (int n = 0; n < kTiles; ++n) {
            WARPLOOM_UNROLL
            for (int i = 0; i < 2; ++i) {
                const Pair pair = {values[n][2 * i], values[n][2 * i + 1]};
                device::store_vector(
                    &sums[LaneRows::in_block(i)][8 * n + device::lane_index() % 4 * 2], pair);
            }
        }
    }

  private:
    struct Pair {
        float first;
        float second;
    };
};

// Fused multiply-adds: a lane sums over its own columns, for all ranks of its rows.
template <typename Traits>
struct ShrinkSums<Traits, false> {
    using Part = typename Traits::Part;

    float values[2][Traits::kRanks] = {};

    WARPLOOM_DEVICE void add(const Part (&parts)[2], const float* factors, int ranks, int column,
                             int columns) {
        constexpr int kGroup = 4;
        WARPLOOM_UNROLL
        for (int first = 0; first < Traits::kRanks; first += kGroup) {
            Part right[kGroup];
            WARPLOOM_UNROLL
            for (int n = 0; n < kGroup; ++n) {
                right[n] = read_factors<Traits>(factors, first + n, ranks, column, columns);
            }
            WARPLOOM_UNROLL
            for (int n = 0; n < kGroup; ++n) {
                WARPLOOM_UNROLL
                for (int i = 0; i < 2; ++i) {
                    float& sum = values[i][first + n];
                    WARPLOOM_UNROLL
                    for (int term = 0; term < Traits::kVector; ++term) {
                        sum = fmaf(parts[i].values[term], right[n].values[term], sum);
                    }
                }
            }
        }
    }

    WARPLOOM_DEVICE void store(float (&sums)[Traits::kRows][Traits::kRanks + 8]) const {
        WARPLOOM_UNROLL
        for (int i = 0; i < 2; ++i) {
            WARPLOOM_UNROLL
            for (int rank = 0; rank < Traits::kRanks; ++rank) {
                float sum = values[i][rank];
                sum += device::shuffle_xor(sum, 1);
                sum += device::shuffle_xor(sum, 2);
                if (device::lane_index() % 4 == rank % 4) {
                    sums[LaneRows::in_block(i)][rank] = sum;
                }
            }
        }
    }
};

}  // namespace warploom::lora
