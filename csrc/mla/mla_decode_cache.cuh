// How queries and rows of the cache come into shared memory.
#pragma once

#include "mla/mla_cache.cuh"
#include "mla/mla_decode_schedule.cuh"
#include "mla/mla_decode_tile.cuh"

namespace warploom::mla {

// Neighbouring threads that share a row of the cache: 8 chunks of a tile's row are 128 bytes.
inline constexpr int kRowThreads = 8;

// One row tile of one piece.
struct DecodeTask {
    Piece piece;
    int first_row;
    int rows;      // that exist
    int end_tile;  // of the piece, no more than some row sees
};

// Rows of q of a row tile.
template <typename T>
struct QueryRows {
    const MlaDecodeParams& decode;
    int batch;
    int first_row;
    int rows;
    int columns;

    WARPLOOM_DEVICE const T* row(int index) const {
        const int row = index < rows ? first_row + index : first_row;
        const int query = row / decode.heads;
        const int head = row - query * decode.heads;
        return static_cast<const T*>(decode.q) + batch * decode.q_batch_stride +
               query * decode.q_sequence_stride + head * decode.q_head_stride;
    }
};

// Rows of a cache of T that lie `offsets` behind its first element.
template <typename T>
struct CachedRows {
    const T* cache;
    const std::int64_t* offsets;
    int rows;
    int columns;

    WARPLOOM_DEVICE const T* row(int index) const { return cache + offsets[index]; }
};

template <typename Traits>
WARPLOOM_DEVICE void copy_queries(const DecodeWork& work, const DecodeTask& task,
                                  typename Traits::SharedPlan& plan) {
    const MlaDecodeParams& decode = work.decode;
    const QueryRows<typename Traits::Element> source = {decode, task.piece.batch, task.first_row,
                                                        task.rows, decode.d_latent + decode.d_rope};
    if constexpr (Traits::kTensorCores) {
        if (work.q_bytes == 16) {
            copy_chunks<Traits::kRows, Traits::kThreads>(plan.queries, 0, source);
            return;
        }
    }
    copy_elements<Traits::kRows>(plan.queries, 0, source);
}

// Where this thread's row of a tile lies in the cache, for the threads that have one; rows that are
// not read lie anywhere.
template <typename Traits>
WARPLOOM_DEVICE std::int64_t look_up(const DecodeWork& work, const DecodeTask& task, int tile) {
    const int row = static_cast<int>(threadIdx.x);
    const int token = tile * Traits::kKeys + row;
    if (row >= Traits::kKeys || tile >= task.end_tile || token >= task.piece.length) {
        return 0;
    }
    return cache_offset(work.decode.cache, task.piece.batch, token);
}

template <typename Traits>
WARPLOOM_DEVICE void store_offset(typename Traits::SharedPlan& plan, int tile,
                                  std::int64_t offset) {
    if (threadIdx.x < Traits::kKeys) {
        plan.row_offsets[tile % 2][threadIdx.x] = offset;
    }
}

template <typename Traits>
WARPLOOM_DEVICE int rows_of_tile(const DecodeTask& task, int tile) {
    const int rows = task.piece.length - tile * Traits::kKeys;
    return rows < Traits::kKeys ? rows : Traits::kKeys;
}

// Copies the bytes of compressed rows as they are, kRowThreads threads a row. Copies of single
// bytes are finished on return.
template <int kBytes, typename Traits>
WARPLOOM_DEVICE void copy_raw_rows(typename Traits::SharedPlan& plan,
                                   const CachedRows<unsigned char>& source) {
    for (int row = static_cast<int>(threadIdx.x) / kRowThreads; row < source.rows;
         row += Traits::kThreads / kRowThreads) {
        const unsigned char* from = source.row(row);
        unsigned char* to = plan.raw_row(row);
        for (int byte = static_cast<int>(threadIdx.x) % kRowThreads * kBytes; byte < source.columns;
             byte += kRowThreads * kBytes) {
            if constexpr (kBytes >= 4) {
                device::copy_async<kBytes>(to + byte, from + byte);
            } else {
                to[byte] = from[byte];
            }
        }
    }
}

// Starts copying a tile of tokens: to its stage, or as raw rows.
template <typename Traits>
WARPLOOM_DEVICE void copy_keys(const DecodeWork& work, const DecodeTask& task, int tile,
                               typename Traits::SharedPlan& plan) {
    using T = typename Traits::Element;
    const MlaDecodeParams& decode = work.decode;
    const std::int64_t* offsets = plan.row_offsets[tile % 2];
    const int rows = rows_of_tile<Traits>(task, tile);
    if (decode.cache.format == CacheFormat::dense) {
        auto& stage = plan.stages[tile % Traits::kStages];
        const CachedRows<T> source = {static_cast<const T*>(decode.kv_cache), offsets, rows,
                                      decode.d_latent + decode.d_rope};
        if (work.cache_bytes == 16) {
            copy_chunks<Traits::kKeys, Traits::kThreads>(stage, 0, source);
        } else {
            copy_elements<Traits::kKeys>(stage, 0, source);
        }
    } else {
        const CachedRows<unsigned char> source = {
            static_cast<const unsigned char*>(decode.kv_cache), offsets, rows,
            compressed_row_bytes(decode.d_latent, decode.d_rope)};
        if (work.cache_bytes == 16) {
            copy_raw_rows<16, Traits>(plan, source);
        } else if (work.cache_bytes == 4) {
            copy_raw_rows<4, Traits>(plan, source);
        } else {
            copy_raw_rows<1, Traits>(plan, source);
        }
    }
    device::copy_async_commit();
}

template <int kCount>
struct alignas(kCount) Codes {
    std::uint32_t words[kCount / 4];
};

// Fills the first stage from raw rows: a number is its code times its scale in float32, rounded
// once to the stage's type. Zeros where there are no rows.
template <typename Traits>
WARPLOOM_DEVICE void expand_rows(const DecodeWork& work, const DecodeTask& task, int tile,
                                 typename Traits::SharedPlan& plan) {
    using T = typename Traits::Element;
    constexpr int kSize = Chunk<T>::kSize;
    const MlaDecodeParams& decode = work.decode;
    const CacheFormat format = decode.cache.format;
    const int rows = rows_of_tile<Traits>(task, tile);
    const int latent_chunks = decode.d_latent / kSize;
    const int chunks = latent_chunks + decode.d_rope / kSize;
    const int rope_byte = decode.d_latent + 4 * scale_count(decode.d_latent);
    for (int row = static_cast<int>(threadIdx.x) / kRowThreads; row < Traits::kKeys;
         row += Traits::kThreads / kRowThreads) {
        const unsigned char* raw = plan.raw_row(row);
        for (int chunk = static_cast<int>(threadIdx.x) % kRowThreads; chunk < chunks;
             chunk += kRowThreads) {
            float values[kSize] = {};
            if (row < rows && chunk < latent_chunks) {
                const int column = chunk * kSize;
                const float scale =
                    device::load_vector<float>(raw + decode.d_latent + column / kScaleGroup * 4);
                const auto codes = device::load_vector<Codes<kSize>>(raw + column);
                WARPLOOM_UNROLL
                for (int index = 0; index < kSize; ++index) {
                    const std::uint32_t code = codes.words[index / 4] >> 8 * (index % 4) & 0xff;
                    values[index] = scale * decode_number(format, code);
                }
            } else if (row < rows) {
                const unsigned char* pairs = raw + rope_byte + (chunk - latent_chunks) * kSize * 2;
                WARPLOOM_UNROLL
                for (int index = 0; index < kSize; index += 2) {
                    const auto pair = device::load_vector<std::uint32_t>(pairs + index * 2);
                    values[index] = device::bit_cast<float>(pair << 16);
                    values[index + 1] = device::bit_cast<float>(pair & 0xffff0000u);
                }
            }
            auto& stage = plan.stages[0];
            store_packed(reinterpret_cast<T*>(stage.bytes + stage.offset(row, chunk)),
                         pack_floats<T>(values));
        }
    }
}

}  // namespace warploom::mla
