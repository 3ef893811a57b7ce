// What a block of decoding works on, and how its queries, keys and values come into shared memory.
#pragma once

#include "attention/attention_decode_combine.cuh"
#include "attention/attention_decode_tile.cuh"

namespace warploom::attention {

struct DecodeKernelParams {
    AttentionDecodeParams decode;
    ScoreConstants scores;
    int row_tiles;
    // Copies into shared memory move units of so many bytes: 16, 4, or an element.
    int q_bytes;
    int k_bytes;
    int v_bytes;
    int out_bytes;
};

// One block's rows, heads * queries of one group with the head fastest, and its keys.
struct DecodeTask {
    Sequence sequence;
    KeyWindow window;  // Its `keys` is where the part ends.
    int kv_head;
    int split;
    int first_row;
    int rows;
    int origin;     // Where the first tile begins; no key before first_key is read.
    int first_key;  // The first that some row sees.
    int end_key;    // No row sees this one or a later one, or they are another part's.

    WARPLOOM_DEVICE bool empty() const { return first_key >= end_key; }
};

// Keys are cut where sizes and the sequence say, never where the batch does.
template <typename Traits>
WARPLOOM_DEVICE DecodeTask decode_task(const DecodeKernelParams& params) {
    const AttentionDecodeParams& decode = params.decode;
    const int group = decode.heads / decode.kv_heads;
    unsigned block = blockIdx.x;
    DecodeTask task;
    task.first_row = static_cast<int>(block % params.row_tiles) * Traits::kRows;
    block /= params.row_tiles;
    task.kv_head = static_cast<int>(block % decode.kv_heads);
    block /= decode.kv_heads;
    task.split = static_cast<int>(block % decode.num_splits);
    const int batch = static_cast<int>(block / decode.num_splits);
    const int rows = decode.query_length * group - task.first_row;
    task.rows = rows < Traits::kRows ? rows : Traits::kRows;

    const int length = decode.cache_seqlens[batch];
    task.sequence = {batch, 0, 0, decode.query_length,
                     length < decode.capacity ? length : decode.capacity};
    task.window = window_of(decode.scoring, task.sequence);
    const int first = task.window.first_key(task.first_row / group);
    const int end = task.window.end_key((task.first_row + task.rows - 1) / group);
    int part_begin = task.split * decode.split_size;
    int part_keys = decode.split_size;
    if (decode.split_size == 0) {
        const int begin = first / Traits::kStep * Traits::kStep;
        const int steps = end > begin ? (end - begin - 1) / Traits::kStep + 1 : 0;
        part_keys = ((steps - 1) / decode.num_splits + 1) * Traits::kStep;
        part_begin = begin + task.split * part_keys;
    }
    task.first_key = first > part_begin ? first : part_begin;
    task.end_key = end - part_begin < part_keys ? end : part_begin + part_keys;
    task.origin = part_begin + (task.first_key - part_begin) / Traits::kStep * Traits::kStep;
    task.window.keys = task.end_key;
    return task;
}

// Starts copying the rows [first_row, end_row) of a tile's kKeys from `tensor` by one warp, units
// of kBytes; zeros take the place of other rows and of columns that do not exist. Lane first_lane +
// r has the offset of row r.
template <int kBytes, typename Traits, typename Tile>
WARPLOOM_DEVICE void copy_rows(Tile& tile, int kept, const typename Traits::Element* tensor,
                               int columns, std::int64_t offsets, int first_lane, int first_row,
                               int end_row) {
    using T = typename Traits::Element;
    constexpr int kUnit = kBytes / static_cast<int>(sizeof(T));
    constexpr int kRowUnits = Traits::kColumns / kUnit;
    constexpr int kChunkUnits = 16 / kBytes;
    const auto copy = [&](int unit) {
        const int row = unit / kRowUnits;
        const int place = unit % kRowUnits;
        const bool valid = row >= first_row && row < end_row && place * kUnit < columns;
        const T* source = tensor + device::shuffle(offsets, first_lane + row) + place * kUnit;
        unsigned char* destination = tile.bytes + tile.offset(kept + row, place / kChunkUnits) +
                                     place % kChunkUnits * kBytes;
        if constexpr (kBytes >= 4) {
            device::copy_async<kBytes>(destination, source, valid);
        } else {
            *reinterpret_cast<T*>(destination) = valid ? *source : device::from_float<T>(0.0f);
        }
    };
    constexpr int kUnits = Traits::kKeys * kRowUnits;
    if constexpr (kBytes == 16) {
        WARPLOOM_UNROLL
        for (int pass = 0; pass < kUnits / device::kWarpSize; ++pass) {
            copy(pass * device::kWarpSize + device::lane_index());
        }
    } else {
        WARPLOOM_NO_UNROLL
        for (int unit = device::lane_index(); unit < kUnits; unit += device::kWarpSize) {
            copy(unit);
        }
    }
}

template <typename Traits, typename Tile>
WARPLOOM_DEVICE void copy_rows(int bytes, Tile& tile, int kept, const void* tensor, int columns,
                               std::int64_t offsets, int first_lane, int first_row, int end_row) {
    using T = typename Traits::Element;
    const T* elements = static_cast<const T*>(tensor);
    if (bytes == 16) {
        copy_rows<16, Traits>(tile, kept, elements, columns, offsets, first_lane, first_row,
                              end_row);
    } else if (bytes == 4) {
        copy_rows<4, Traits>(tile, kept, elements, columns, offsets, first_lane, first_row,
                             end_row);
    } else if constexpr (sizeof(T) == 2) {
        copy_rows<2, Traits>(tile, kept, elements, columns, offsets, first_lane, first_row,
                             end_row);
    }
}

template <typename Traits>
WARPLOOM_DEVICE DecodeRow decode_row(const AttentionDecodeParams& decode, const DecodeTask& task,
                                     int row) {
    const int group = decode.heads / decode.kv_heads;
    const int query = (task.first_row + row) / group;
    return {task.sequence.batch, query,
            task.kv_head * group + task.first_row + row - query * group};
}

// The query tile, by one warp: it has as many rows as a tile of keys.
template <typename Traits>
WARPLOOM_DEVICE void copy_queries(typename Traits::RowTile& tile, const DecodeTask& task,
                                  const DecodeKernelParams& params) {
    const AttentionDecodeParams& decode = params.decode;
    const DecodeRow row = decode_row<Traits>(decode, task, device::lane_index() % Traits::kRows);
    const std::int64_t offset =
        row_offset(decode.q_strides, task.sequence.batch, row.query, row.head);
    copy_rows<Traits>(params.q_bytes, tile, 0, decode.q, decode.head_dim, offset, 0, 0, task.rows);
}

// Lane l looks up where row l % kKeys of a tile lies, in the keys' cache, or in the values' where
// l / kKeys is odd. Only entries of keys that are read are looked at.
template <typename Traits>
WARPLOOM_DEVICE std::int64_t cache_offsets(const AttentionDecodeParams& decode,
                                           const DecodeTask& task, int tile_key) {
    const int lane = device::lane_index();
    const int key = tile_key + lane % Traits::kKeys;
    if (key < task.first_key || key >= task.end_key) {
        return 0;
    }
    int block = task.sequence.batch;
    int slot = key;
    if (decode.block_table != nullptr) {
        const int place = key / decode.page_size;
        block = decode.block_table[block * decode.block_table_stride + place];
        slot = key - place * decode.page_size;
    }
    return row_offset(lane / Traits::kKeys % 2 == 0 ? decode.k_strides : decode.v_strides, block,
                      slot, task.kv_head);
}

}  // namespace warploom::attention
