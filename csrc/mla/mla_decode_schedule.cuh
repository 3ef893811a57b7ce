// How the tokens of a batch are cut into pieces that a block works on by itself, and the kernel
// that shares them among the blocks of a device.
//
// A sequence is a run of tiles of tile_keys tokens. A piece is the tiles of one sequence that one
// part works on. Either every sequence is cut into `splits` parts of its own, or `parts` parts
// share all sequences of the batch, laid end to end with a gap behind each.
#pragma once

#include <cstdint>

#include "device/device.cuh"
#include "mla/mla_decode.h"

namespace warploom::mla {

// The host's part of the decision.
struct DecodeCut {
    int row_tiles;
    int tile_keys;
    int parts;
    int splits;       // parts of one sequence; 0: parts are shared by the sequences
    int split_tiles;  // tiles of such a part; 0: as many as make `splits` equal ones
};

struct DecodeWork {
    MlaDecodeParams decode;
    DecodeCut cut;
    float scale;      // softmax_scale log2(e)
    int cache_bytes;  // Copies of cache rows move units of so many bytes: 16, 4, or an element.
    int q_bytes;
};

// A part is not worth its start and its merge with fewer tokens.
inline constexpr int kLeastPartKeys = 128;
// What starting and ending a sequence costs, as tokens.
inline constexpr int kSequenceKeys = 128;

// What the scheduler writes: the tiles of a part, where each sequence begins, and the sequence in
// which each part begins, and in which the last one ends.
struct Schedule {
    std::int32_t* share;  // [1]
    std::int32_t* begin;  // [batch]
    std::int32_t* first;  // [parts + 1]

    static constexpr std::int64_t size(int batch, int parts) {
        return 2 + static_cast<std::int64_t>(batch) + parts;
    }
};

WARPLOOM_HOST_DEVICE Schedule schedule_of(const DecodeWork& work) {
    std::int32_t* const share = work.decode.schedule;
    return {share, share + 1, share + 1 + work.decode.batch};
}

WARPLOOM_DEVICE int sequence_length(const MlaDecodeParams& decode, int batch) {
    const int length = decode.cache.cache_seqlens[batch];
    return length < decode.cache.capacity ? length : decode.cache.capacity;
}

// An empty sequence counts as one tile, so that some part writes its zeros.
WARPLOOM_DEVICE int tiles_of(int length, int tile_keys) {
    return length > 0 ? (length - 1) / tile_keys + 1 : 1;
}

struct Piece {
    int batch;
    int length;  // of the sequence
    int first_tile;
    int end_tile;
    bool whole;            // the sequence has no other piece
    std::int64_t partial;  // the row of partial_out and partial_lse
};

WARPLOOM_DEVICE int split_tiles(const DecodeCut& cut, int tiles) {
    return cut.split_tiles > 0 ? cut.split_tiles : (tiles - 1) / cut.splits + 1;
}

// What `part` has of sequence `batch`; first_tile >= end_tile: nothing. Shared parts and their
// sequences rise together, so that no two pieces have one sum of both.
WARPLOOM_DEVICE Piece piece_of(const DecodeWork& work, int part, int batch) {
    Piece piece = {};
    piece.batch = batch;
    piece.length = sequence_length(work.decode, batch);
    const int tiles = tiles_of(piece.length, work.cut.tile_keys);
    int begin;
    int count;
    if (work.cut.splits > 0) {
        count = split_tiles(work.cut, tiles);
        // Parts beyond the tiles are empty; their place would not fit 32 bits for the wildest cuts.
        const std::int64_t place = static_cast<std::int64_t>(part % work.cut.splits) * count;
        begin = place < tiles ? static_cast<int>(place) : tiles;
        piece.partial = part;
    } else {
        const Schedule schedule = schedule_of(work);
        count = *schedule.share;
        begin = part * count - schedule.begin[batch];
        piece.partial = static_cast<std::int64_t>(part) + batch;
    }
    piece.first_tile = begin > 0 ? begin : 0;
    piece.end_tile = begin + count < tiles ? begin + count : tiles;
    piece.whole = piece.first_tile == 0 && piece.end_tile == tiles;
    return piece;
}

// The pieces of a sequence: `count` consecutive rows of the partial results from `first` on.
struct Pieces {
    std::int64_t first;
    int count;
};

WARPLOOM_DEVICE Pieces pieces_of(const DecodeWork& work, int batch) {
    const int tiles = tiles_of(sequence_length(work.decode, batch), work.cut.tile_keys);
    if (work.cut.splits > 0) {
        return {static_cast<std::int64_t>(batch) * work.cut.splits,
                (tiles - 1) / split_tiles(work.cut, tiles) + 1};
    }
    const Schedule schedule = schedule_of(work);
    const int share = *schedule.share;
    const int begin = schedule.begin[batch];
    const int first_part = begin / share;
    return {static_cast<std::int64_t>(first_part) + batch,
            (begin + tiles - 1) / share - first_part + 1};
}

// The sequences that a part may have pieces of: [first, end).
struct PartSequences {
    int first;
    int end;
};

WARPLOOM_DEVICE PartSequences sequences_of(const DecodeWork& work, int part) {
    if (work.cut.splits > 0) {
        return {part / work.cut.splits, part / work.cut.splits + 1};
    }
    const Schedule schedule = schedule_of(work);
    return {schedule.first[part], schedule.first[part + 1] + 1};
}

// grid [1], one warp
template <int kThreads>
WARPLOOM_KERNEL(kThreads, 1)
mla_decode_schedule_kernel(WARPLOOM_GRID_CONSTANT DecodeWork work) {
    static_assert(kThreads == device::kWarpSize, "mla_decode_schedule_kernel: one warp");
    const int lane = device::lane_index();
    const int batch = work.decode.batch;
    const Schedule schedule = schedule_of(work);

    int total = 0;
    WARPLOOM_NO_UNROLL
    for (int first = 0; first < batch; first += device::kWarpSize) {
        const int sequence = first + lane;
        int tiles = 0;
        if (sequence < batch) {
            tiles = tiles_of(sequence_length(work.decode, sequence), work.cut.tile_keys) +
                    kSequenceKeys / work.cut.tile_keys;
        }
        int sum = tiles;  // of the lanes up to this one
        for (int distance = 1; distance < device::kWarpSize; distance *= 2) {
            const int before = device::shuffle_up(sum, distance);
            sum += lane >= distance ? before : 0;
        }
        if (sequence < batch) {
            schedule.begin[sequence] = total + sum - tiles;
        }
        total += device::shuffle(sum, device::kWarpSize - 1);
    }
    const int least = kLeastPartKeys / work.cut.tile_keys;
    const int even = (total - 1) / work.cut.parts + 1;
    const int share = even > least ? even : least;
    if (lane == 0) {
        *schedule.share = share;
    }
    device::sync_warp();
    for (int part = lane; part <= work.cut.parts; part += device::kWarpSize) {
        // The last sequence that begins at the part's first tile or before it.
        int low = 0;
        int high = batch;
        while (high - low > 1) {
            const int middle = low + (high - low) / 2;
            (schedule.begin[middle] <= part * share ? low : high) = middle;
        }
        schedule.first[part] = low;
    }
}

}  // namespace warploom::mla
