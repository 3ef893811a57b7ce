// The rows of a cache of latents: where they lie, and what a compressed one's codes mean.
#pragma once

#include <cstdint>

#include "common/e4m3.cuh"
#include "device/device.cuh"
#include "mla/mla_decode.h"

namespace warploom::mla {

// The first element of a token's row, -1 where the cache has no place for it.
WARPLOOM_DEVICE std::int64_t cache_offset(const CacheLayout& cache, int batch, int token) {
    if (token >= cache.capacity) {
        return -1;
    }
    int block = batch;
    int slot = token;
    if (cache.block_table != nullptr) {
        const int place = token / cache.page_size;
        block = cache.block_table[batch * cache.block_table_stride + place];
        slot = token - place * cache.page_size;
    }
    return block < 0 ? -1 : block * cache.batch_stride + slot * cache.row_stride;
}

// The number of 8 bits that a scale multiplies.
WARPLOOM_DEVICE float decode_number(CacheFormat format, std::uint32_t code) {
    return format == CacheFormat::int8 ? static_cast<float>(static_cast<std::int8_t>(code & 0xff))
                                       : decode_e4m3(code);
}
WARPLOOM_DEVICE std::uint32_t encode_number(CacheFormat format, float value) {
    return format == CacheFormat::int8 ? static_cast<std::uint32_t>(static_cast<int>(rintf(value)))
                                       : encode_e4m3(value);
}
WARPLOOM_DEVICE float largest_number(CacheFormat format) {
    return format == CacheFormat::int8 ? 127.0f : 448.0f;
}

}  // namespace warploom::mla
