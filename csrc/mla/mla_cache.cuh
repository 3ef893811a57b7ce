// The rows of a cache of latents: where they lie, and what a compressed one's codes mean.
#pragma once

#include <cstdint>
#include <limits>

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

// e4m3: a sign, 4 bits of exponent with bias 7, 3 of mantissa; all but the sign set is NaN, and
// there is no infinity. By integer operations, so that every architecture has them.

// Placed at a float's exponent, of bias 127, the bits mean 2^-120 of the number, subnormals too.
WARPLOOM_DEVICE float decode_e4m3(std::uint32_t code) {
    const std::uint32_t magnitude = code & 0x7f;
    const float value = device::bit_cast<float>((code & 0x80) << 24 | magnitude << 20) * 0x1p120f;
    return magnitude == 0x7f ? std::numeric_limits<float>::quiet_NaN() : value;
}

// To nearest, ties to even; NaN from 464 on, which is half way to the number after the largest.
WARPLOOM_DEVICE std::uint32_t encode_e4m3(float value) {
    const auto bits = device::bit_cast<std::uint32_t>(value);
    const std::uint32_t sign = bits >> 24 & 0x80;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    constexpr float kLeastNormal = 0x1p-6f;
    constexpr float kSubnormalsOfOne = 0x1p9f;
    if (device::bit_cast<float>(magnitude) < kLeastNormal) {
        const float steps = rintf(device::bit_cast<float>(magnitude) * kSubnormalsOfOne);
        return sign | static_cast<std::uint32_t>(steps);
    }
    const std::uint32_t rounded = magnitude + 0x7ffff + (magnitude >> 20 & 1);
    const std::uint32_t code = (rounded >> 20) - (127 - 7) * 8;
    return sign | (code < 0x7f ? code : 0x7f);
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
