// Rows of tensors and of pages, and the tiles that they fill, for all attention kernels.
#pragma once

#include "attention/scores.cuh"
#include "common/tile.cuh"
#include "device/device.cuh"

namespace warploom::attention {

using warploom::Chunk;
using warploom::fill_rows;
using warploom::MatrixRows;
using warploom::Tile;
using warploom::write_chunk;

// The offset, in elements, of a row of a tensor [batch, sequence, head, columns].
WARPLOOM_DEVICE std::int64_t row_offset(const HeadStrides& strides, int batch, int row, int head) {
    return batch * strides.batch + row * strides.sequence + head * strides.head;
}

// Rows of one sequence and head in pages: row r is row (first_row + r) % page_size of the page that
// block_table[(first_row + r) / page_size] names. The table has no entry for rows that do not
// exist, or any.
template <typename T>
struct PagedRows {
    const T* pages;
    const std::int32_t* block_table;
    std::int64_t page_stride;
    std::int64_t stride;
    int page_size;
    int first_row;
    int rows;
    int columns;
    int copy_bytes;

    WARPLOOM_DEVICE const T* row(int index) const {
        if (index >= rows) {
            return pages;
        }
        const auto position = static_cast<unsigned>(first_row + index);
        const unsigned place = position / static_cast<unsigned>(page_size);
        const unsigned slot = position - place * static_cast<unsigned>(page_size);
        return pages + block_table[place] * page_stride + slot * stride;
    }
};

// fill_rows of common/tile.cuh for pages, which lie at multiples of 16 bytes or take the slow way.
template <int kRows, int kThreads, typename Tile, typename T>
WARPLOOM_DEVICE void fill_rows(Tile& tile, int kept, const PagedRows<T>& source) {
    if (source.copy_bytes == 16) {
        copy_chunks<kRows, kThreads>(tile, kept, source);
    } else {
        copy_elements<kRows>(tile, kept, source);
    }
}

}  // namespace warploom::attention
