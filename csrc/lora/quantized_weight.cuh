// Tiles of a weight that is stored in 4 or 8 bits: its bytes go through registers, are multiplied
// with their scales in float32, rounded once to the product's type and stored to the tile.
#pragma once

#include <cstdint>

#include "common/e4m3.cuh"
#include "common/tile.cuh"
#include "common/vec.cuh"
#include "lora/lora_linear.h"

namespace warploom::lora {

// kNf4 in shared memory: whatever the codes of a warp, their reads meet in no bank.
struct Nf4Table {
    float values[16];
};

// All see it after a barrier.
WARPLOOM_DEVICE void copy_table(Nf4Table& table, const Nf4Table& source) {
    if (threadIdx.x < 16) {
        table.values[threadIdx.x] = source.values[threadIdx.x];
    }
}

template <WeightFormat kFormat>
inline constexpr int kElementBits = kFormat == WeightFormat::nf4 ? 4 : 8;

// A weight [rows, columns], of which the tiles are parts.
struct QuantizedWeight {
    const unsigned char* values;
    const float* scale;
    int rows;
    int columns;
    int scale_block;
    int scale_stride;
    WeightFormat format;
    // A chunk's bytes can be loaded at once, and have one scale.
    bool whole_chunks;

    WARPLOOM_DEVICE float scale_at(int row, int column) const {
        return scale[static_cast<std::int64_t>(row) * scale_stride + column / scale_block];
    }
};

// Calls visit.template operator()<kFormat>(): one branch of the whole grid, not of a thread.
template <typename Visit>
WARPLOOM_DEVICE void visit_format(WeightFormat format, const Visit& visit) {
    switch (format) {
        case WeightFormat::nf4:
            return visit.template operator()<WeightFormat::nf4>();
        case WeightFormat::int8:
            return visit.template operator()<WeightFormat::int8>();
        default:
            return visit.template operator()<WeightFormat::fp8_e4m3>();
    }
}

// A thread's part of a tile between load() and store(), so that the products of another stage can
// run while its bytes are on their way.
template <typename Tile, int kThreads>
struct QuantizedChunks {
    using T = typename Tile::Element;
    static constexpr int kElements = Chunk<T>::kSize;
    static constexpr int kCount = Tile::kRows * Tile::kRowChunks / kThreads;
    static_assert(kCount * kThreads == Tile::kRows * Tile::kRowChunks,
                  "QuantizedChunks: the threads must share the tile evenly");

    struct Codes {
        std::uint32_t words[kElements / 4];  // The first element in the low bits.
    };

    Codes codes[kCount];
    float scales[kCount];  // Of each chunk's first element.

    static WARPLOOM_DEVICE int tile_row(int index) {
        return (index * kThreads + static_cast<int>(threadIdx.x)) / Tile::kRowChunks;
    }
    static WARPLOOM_DEVICE int tile_chunk(int index) {
        return (index * kThreads + static_cast<int>(threadIdx.x)) % Tile::kRowChunks;
    }

    // Loads the part of the tile that begins at (row, column) of the weight, an even column.
    WARPLOOM_DEVICE void load(const QuantizedWeight& weight, int row, int column) {
        visit_format(weight.format, [&]<WeightFormat kFormat>() {
            WARPLOOM_UNROLL
            for (int index = 0; index < kCount; ++index) {
                load_chunk<kFormat>(weight, index, row + tile_row(index),
                                    column + tile_chunk(index) * kElements);
            }
        });
    }

    // What was loaded, to the tile; zeros where the weight has no rows or columns.
    WARPLOOM_DEVICE void store(Tile& tile, const QuantizedWeight& weight, const Nf4Table& table,
                               int row, int column) const {
        visit_format(weight.format, [&]<WeightFormat kFormat>() {
            WARPLOOM_UNROLL
            for (int index = 0; index < kCount; ++index) {
                store_chunk<kFormat>(tile, weight, table, index, row + tile_row(index),
                                     column + tile_chunk(index) * kElements);
            }
        });
    }

  private:
    template <WeightFormat kFormat>
    WARPLOOM_DEVICE void load_chunk(const QuantizedWeight& weight, int index, int row, int column) {
        constexpr int kBytes = kElements * kElementBits<kFormat> / 8;
        codes[index] = {};
        scales[index] = 0.0f;
        if (row >= weight.rows || column >= weight.columns) {
            return;
        }
        scales[index] = weight.scale_at(row, column);
        const std::int64_t row_bytes =
            static_cast<std::int64_t>(weight.columns) * kElementBits<kFormat> / 8;
        const std::int64_t first = static_cast<std::int64_t>(column) * kElementBits<kFormat> / 8;
        const unsigned char* from = weight.values + row * row_bytes + first;
        std::uint32_t (&words)[kElements / 4] = codes[index].words;
        if (kBytes == sizeof(Codes) && weight.whole_chunks) {
            codes[index] = device::load_readonly<Codes>(from);
        } else if (kBytes == 4 && weight.whole_chunks) {
            words[0] = device::load_readonly<std::uint32_t>(from);
        } else {
            WARPLOOM_UNROLL
            for (int byte = 0; byte < kBytes; ++byte) {
                if (first + byte < row_bytes) {
                    words[byte / 4] |= static_cast<std::uint32_t>(from[byte]) << (byte % 4 * 8);
                }
            }
        }
    }

    template <WeightFormat kFormat>
    WARPLOOM_DEVICE float number(int index, int element, const Nf4Table& table) const {
        const std::uint32_t (&words)[kElements / 4] = codes[index].words;
        if constexpr (kFormat == WeightFormat::nf4) {
            return table.values[words[0] >> (element / 2 * 8 + (element % 2 == 0 ? 4 : 0)) & 0xf];
        }
        const std::uint32_t code = words[element / 4] >> (element % 4 * 8) & 0xff;
        return kFormat == WeightFormat::int8 ? static_cast<float>(static_cast<std::int8_t>(code))
                                             : decode_e4m3(code);
    }

    template <WeightFormat kFormat>
    WARPLOOM_DEVICE void store_chunk(Tile& tile, const QuantizedWeight& weight,
                                     const Nf4Table& table, int index, int row, int column) const {
        float values[kElements];
        float scale = scales[index];
        WARPLOOM_UNROLL
        for (int element = 0; element < kElements; ++element) {
            if (element > 0 && element % 2 == 0 && !weight.whole_chunks) {
                const bool exists = row < weight.rows && column + element < weight.columns;
                scale = exists ? weight.scale_at(row, column + element) : 0.0f;
            }
            values[element] = number<kFormat>(index, element, table) * scale;
        }
        device::store_vector(tile.bytes + tile.offset(tile_row(index), tile_chunk(index)),
                             pack_floats<T>(values));
    }
};

}  // namespace warploom::lora
