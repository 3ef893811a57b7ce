// Tiles of rows in shared memory and how they are filled.
#pragma once

#include <cstdint>

#include "../device/device.cuh"

namespace warploom {

// 16 bytes of a tile: what one thread copies, loads or stores at once.
template <typename T>
struct alignas(16) Chunk {
    static constexpr int kSize = 16 / sizeof(T);
    T elements[kSize];
};

// Rows in shared memory, whose chunks are permuted so that the same chunk of 8 consecutive rows
// lies in 8 different groups of 4 banks: chunk c of row r is stored at place c ^ (r % 8). kRowBytes
// is a multiple of 128, so a chunk stays in its row.
template <typename T, int kTileRows, int kTileColumns>
struct alignas(128) Tile {
    static constexpr int kRows = kTileRows;
    static constexpr int kColumns = kTileColumns;
    using Element = T;
    static constexpr int kChunkElements = Chunk<T>::kSize;
    static constexpr int kRowBytes = kColumns * static_cast<int>(sizeof(T));
    static constexpr int kRowChunks = kRowBytes / 16;
    static_assert(kRowBytes % 128 == 0, "Tile: the permutation needs rows of 8, 16, ... chunks");

    unsigned char bytes[kRows * kRowBytes];

    // The byte at which a chunk begins. Others are reached from it with less arithmetic:
    //   offset(row, c ^ d) == advance(offset(row, c), d)
    //   offset(row + 8, c) == offset(row, c) + 8 kRowBytes
    static WARPLOOM_DEVICE int offset(int row, int chunk) {
        return advance(row * kRowBytes + row % 8 * 16, chunk);
    }
    // The chunks of 128 bytes are permuted among themselves.
    static WARPLOOM_DEVICE int advance(int offset, int chunks) {
        return (offset ^ (chunks % 8 * 16)) + chunks / 8 * 128;
    }
    WARPLOOM_DEVICE Chunk<T> load(int row, int chunk) const {
        return device::load_vector<Chunk<T>>(bytes + offset(row, chunk));
    }
};

// Rows of a tensor in global memory, of which `rows` and `columns` exist. What lies behind them is
// never read.
template <typename T>
struct MatrixRows {
    const T* first;
    std::int64_t stride;
    int rows;
    int columns;
    int copy_bytes;

    WARPLOOM_DEVICE const T* row(int index) const { return first + index * stride; }
};

// Starts copying to rows [kept, kept + kRows) of the tile, in units of kBytes.
template <int kBytes, int kRows, typename Tile, typename T>
WARPLOOM_DEVICE void copy_units(Tile& tile, int kept, const MatrixRows<T>& source) {
    constexpr int kUnit = kBytes / static_cast<int>(sizeof(T));
    constexpr int kRowUnits = Tile::kColumns / kUnit;
    constexpr int kChunkUnits = 16 / kBytes;
    for (unsigned unit = threadIdx.x; unit < kRows * kRowUnits; unit += blockDim.x) {
        const int row = static_cast<int>(unit / kRowUnits);
        const int place = static_cast<int>(unit % kRowUnits);
        const bool valid = row < source.rows && place * kUnit < source.columns;
        const int offset = tile.offset(kept + row, place / kChunkUnits);
        device::copy_async<kBytes>(tile.bytes + offset + place % kChunkUnits * kBytes,
                                   source.row(row) + place * kUnit, valid);
    }
}

// The same for 16 bytes, where each thread keeps to one chunk of every 128 bytes.
template <int kRows, int kThreads, typename Tile, typename Source>
WARPLOOM_DEVICE void copy_chunks(Tile& tile, int kept, const Source& source) {
    constexpr int kGroupChunks = 8;
    constexpr int kPassRows = kThreads / kGroupChunks;
    static_assert(kThreads % kGroupChunks == 0 && kRows % kPassRows == 0,
                  "copy_chunks: the threads must copy whole rows");
    const int first_chunk = static_cast<int>(threadIdx.x) % kGroupChunks;
    const int first_row = static_cast<int>(threadIdx.x) / kGroupChunks;
    WARPLOOM_UNROLL
    for (int pass = 0; pass < kRows / kPassRows; ++pass) {
        const int row = first_row + pass * kPassRows;
        const int offset = tile.offset(kept + row, first_chunk);
        const auto* from = source.row(row);
        WARPLOOM_UNROLL
        for (int group = 0; group < Tile::kRowChunks; group += kGroupChunks) {
            const int column = (group + first_chunk) * Tile::kChunkElements;
            device::copy_async<16>(tile.bytes + tile.advance(offset, group), from + column,
                                   row < source.rows && column < source.columns);
        }
    }
}

// The same for rows whose elements lie at any address: plain loads, finished on return.
template <int kRows, typename Tile, typename Source>
WARPLOOM_DEVICE void copy_elements(Tile& tile, int kept, const Source& source) {
    using T = typename Tile::Element;
    for (unsigned unit = threadIdx.x; unit < kRows * Tile::kRowChunks; unit += blockDim.x) {
        const int row = static_cast<int>(unit / Tile::kRowChunks);
        const int place = static_cast<int>(unit % Tile::kRowChunks);
        const T* from = source.row(row);
        Chunk<T> chunk;
        WARPLOOM_UNROLL
        for (int index = 0; index < Chunk<T>::kSize; ++index) {
            const int column = place * Chunk<T>::kSize + index;
            chunk.elements[index] = row < source.rows && column < source.columns
                                        ? from[column]
                                        : device::from_float<T>(0.0f);
        }
        device::store_vector(tile.bytes + tile.offset(kept + row, place), chunk);
    }
}

// Starts filling rows [kept, kept + kRows) of the tile by all kThreads threads of the block, with
// zeros where the source has no rows or columns. They are complete after the caller's commit, the
// wait for it and a barrier.
template <int kRows, int kThreads, typename Tile, typename T>
WARPLOOM_DEVICE void fill_rows(Tile& tile, int kept, const MatrixRows<T>& source) {
    if (source.copy_bytes == 16) {
        copy_chunks<kRows, kThreads>(tile, kept, source);
    } else if (source.copy_bytes == 8) {
        copy_units<8, kRows>(tile, kept, source);
    } else if (source.copy_bytes == 4) {
        copy_units<4, kRows>(tile, kept, source);
    } else {
        copy_elements<kRows>(tile, kept, source);
    }
}

// Writes one chunk of an output row, of which `columns` columns are left.
template <typename T>
WARPLOOM_DEVICE void write_chunk(T* destination, const Chunk<T>& chunk, int columns,
                                 int copy_bytes) {
    if (copy_bytes == 16) {
        if (columns > 0) {
            device::store_vector(destination, chunk);
        }
    } else {
        WARPLOOM_UNROLL
        for (int index = 0; index < Chunk<T>::kSize; ++index) {
            if (index < columns) {
                destination[index] = chunk.elements[index];
            }
        }
    }
}

}  // namespace warploom
