// Writes new tokens to a cache of latents: a warp normalises one's latent, turns its shared key,
// and where the cache is compressed turns each group of the latent into codes and a scale. Bound by
// memory.
#pragma once

#include <cmath>

#include "common/index.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "mla/mla_cache.cuh"
#include "rope/rotary.cuh"

namespace warploom::mla {

inline constexpr int kAppendThreads = 128;
inline constexpr int kAppendTokens = kAppendThreads / device::kWarpSize;
// Neighbouring features that a lane takes: a warp has a group of kScaleGroup at a time.
inline constexpr int kLaneFeatures = kScaleGroup / device::kWarpSize;

struct AppendWork {
    MlaCacheAppendParams params;
    std::int64_t tokens;
    // Whether kLaneFeatures neighbours may move in one access.
    bool source_vectors;
    bool weight_vectors;
    bool cache_vectors;
};

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Neighbours {
    T values[kCount];
};

// Features [first, first + kLaneFeatures) of a row of `columns`; 0 behind its end.
template <typename T>
WARPLOOM_DEVICE void load_features(const void* row, int first, int columns, bool vectors,
                                   float (&values)[kLaneFeatures]) {
    const T* from = static_cast<const T*>(row) + first;
    if (vectors && first + kLaneFeatures <= columns) {
        const auto loaded = device::load_vector<Neighbours<T, kLaneFeatures>>(from);
        WARPLOOM_UNROLL
        for (int index = 0; index < kLaneFeatures; ++index) {
            values[index] = device::to_float(loaded.values[index]);
        }
        return;
    }
    WARPLOOM_UNROLL
    for (int index = 0; index < kLaneFeatures; ++index) {
        values[index] = first + index < columns ? device::to_float(from[index]) : 0.0f;
    }
}

template <typename T>
WARPLOOM_DEVICE void store_features(T* row, int first, int columns, bool vectors,
                                    const T (&values)[kLaneFeatures]) {
    if (vectors && first + kLaneFeatures <= columns) {
        Neighbours<T, kLaneFeatures> stored;
        WARPLOOM_UNROLL
        for (int index = 0; index < kLaneFeatures; ++index) {
            stored.values[index] = values[index];
        }
        device::store_vector(row + first, stored);
        return;
    }
    WARPLOOM_UNROLL
    for (int index = 0; index < kLaneFeatures; ++index) {
        if (first + index < columns) {
            row[first + index] = values[index];
        }
    }
}

// The lowest kCount bytes of `bits`; a row of bytes has no alignment. They come from a 32-bit
// register: of a 16-bit one that a conversion to bfloat16 wrote, ptxas 13.0 converts the number,
// not the bits.
template <int kCount>
WARPLOOM_DEVICE void store_bytes(unsigned char* to, std::uint32_t bits) {
    WARPLOOM_UNROLL
    for (int byte = 0; byte < kCount; ++byte) {
        to[byte] = static_cast<unsigned char>(bits >> 8 * byte);
    }
}

// One token: of which sequence, and the how many-th of its new ones. Behind all sequences: batch
// -1.
struct NewToken {
    int batch;
    int index;
};

WARPLOOM_DEVICE NewToken new_token(const MlaCacheAppendParams& params, std::int64_t token) {
    if (params.cu_seqlens == nullptr) {
        const Division place = divide(token, params.count);
        return {static_cast<int>(place.quotient), static_cast<int>(place.remainder)};
    }
    if (token >= params.cu_seqlens[params.batch]) {
        return {-1, 0};
    }
    // The last sequence that begins at the token or before it.
    int low = 0;
    int high = params.batch;
    while (high - low > 1) {
        const int middle = low + (high - low) / 2;
        (params.cu_seqlens[middle] <= token ? low : high) = middle;
    }
    return {low, static_cast<int>(token) - params.cu_seqlens[low]};
}

// The group's codes, and the scale that gives its largest magnitude the largest number.
WARPLOOM_DEVICE void store_group(const AppendWork& work, unsigned char* row, int first,
                                 const float (&values)[kLaneFeatures]) {
    const MlaCacheAppendParams& params = work.params;
    const CacheFormat format = params.cache.format;
    float largest = 0.0f;
    WARPLOOM_UNROLL
    for (int index = 0; index < kLaneFeatures; ++index) {
        largest = fmaxf(largest, fabsf(values[index]));
    }
    largest = warp_reduce_max(largest);
    const float scale = largest == 0.0f ? 1.0f : largest / largest_number(format);
    unsigned char codes[kLaneFeatures];
    WARPLOOM_UNROLL
    for (int index = 0; index < kLaneFeatures; ++index) {
        codes[index] = static_cast<unsigned char>(encode_number(format, values[index] / scale));
    }
    store_features(row, first, params.d_latent, work.cache_vectors, codes);
    if (device::lane_index() == 0) {
        store_bytes<4>(row + params.d_latent + first / kScaleGroup * 4,
                       device::bit_cast<std::uint32_t>(scale));
    }
}

template <typename T>
WARPLOOM_DEVICE void append_latent(const AppendWork& work, const T* latent, void* row) {
    const MlaCacheAppendParams& params = work.params;
    const int lane_first = device::lane_index() * kLaneFeatures;
    float squares = 0.0f;
    float values[kLaneFeatures];
    for (int group = 0; group < params.d_latent; group += kScaleGroup) {
        load_features<T>(latent, group + lane_first, params.d_latent, work.source_vectors, values);
        WARPLOOM_UNROLL
        for (int index = 0; index < kLaneFeatures; ++index) {
            squares = fmaf(values[index], values[index], squares);
        }
    }
    const float mean = warp_reduce_sum(squares) / static_cast<float>(params.d_latent);
    const float rstd = 1.0f / sqrtf(mean + static_cast<float>(params.eps));

    for (int group = 0; group < params.d_latent; group += kScaleGroup) {
        const int first = group + lane_first;
        float weights[kLaneFeatures];
        load_features<T>(latent, first, params.d_latent, work.source_vectors, values);
        if (params.weight_dtype == DType::float32) {
            load_features<float>(params.norm_weight, first, params.d_latent, work.weight_vectors,
                                 weights);
        } else {
            load_features<T>(params.norm_weight, first, params.d_latent, work.weight_vectors,
                             weights);
        }
        WARPLOOM_UNROLL
        for (int index = 0; index < kLaneFeatures; ++index) {
            values[index] = values[index] * rstd * weights[index];
        }
        if (params.cache.format == CacheFormat::dense) {
            T rounded[kLaneFeatures];
            WARPLOOM_UNROLL
            for (int index = 0; index < kLaneFeatures; ++index) {
                rounded[index] = device::from_float<T>(values[index]);
            }
            store_features(static_cast<T*>(row), first, params.d_latent, work.cache_vectors,
                           rounded);
        } else {
            store_group(work, static_cast<unsigned char*>(row), first, values);
        }
    }
}

template <typename T>
WARPLOOM_DEVICE void append_key(const AppendWork& work, const T* key, void* row,
                                std::int64_t position) {
    const MlaCacheAppendParams& params = work.params;
    // Rounded to the tokens' type first: what a compressed cache holds is that, in bfloat16.
    const auto store = [&](int channel, float value) {
        const T rounded = device::from_float<T>(value);
        if (params.cache.format == CacheFormat::dense) {
            static_cast<T*>(row)[params.d_latent + channel] = rounded;
        } else {
            store_bytes<2>(static_cast<unsigned char*>(row) + params.d_latent +
                               4 * scale_count(params.d_latent) + 2 * channel,
                           device::pack<device::bfloat16>(device::to_float(rounded), 0.0f));
        }
    };
    if (params.cos == nullptr) {
        for (int channel = device::lane_index(); channel < params.d_rope;
             channel += device::kWarpSize) {
            store(channel, device::to_float(key[channel]));
        }
        return;
    }
    const int half = params.d_rope / 2;
    const std::int64_t table_row = position < params.table_rows ? position : params.table_rows - 1;
    const float* cos = static_cast<const float*>(params.cos) + table_row * half;
    const float* sin = static_cast<const float*>(params.sin) + table_row * half;
    for (int pair = device::lane_index(); pair < half; pair += device::kWarpSize) {
        const int first_channel = params.interleaved ? 2 * pair : pair;
        const int second_channel = params.interleaved ? 2 * pair + 1 : pair + half;
        float first = device::to_float(key[first_channel]);
        float second = device::to_float(key[second_channel]);
        rope::turn_pair(first, second, cos[pair], sin[pair]);
        store(first_channel, first);
        store(second_channel, second);
    }
}

// grid [ceil(tokens / kAppendTokens)], tokens beyond by a stride of the grid; a warp a token
template <typename T>
WARPLOOM_KERNEL(kAppendThreads, 8)
mla_cache_append_kernel(WARPLOOM_GRID_CONSTANT AppendWork work) {
    const MlaCacheAppendParams& params = work.params;
    WARPLOOM_NO_UNROLL
    for (std::int64_t token =
             static_cast<std::int64_t>(blockIdx.x) * kAppendTokens + device::warp_index();
         token < work.tokens; token += static_cast<std::int64_t>(gridDim.x) * kAppendTokens) {
        const NewToken place = new_token(params, token);
        if (place.batch < 0) {
            return;
        }
        const int position = params.cache.cache_seqlens[place.batch] + place.index;
        const std::int64_t offset = cache_offset(params.cache, place.batch, position);
        if (offset < 0) {
            continue;
        }
        const bool packed = params.cu_seqlens != nullptr;
        const T* source =
            static_cast<const T*>(params.compressed_kv) +
            (packed ? token * params.row_stride
                    : place.batch * params.batch_stride + place.index * params.row_stride);
        const int row_bytes =
            params.cache.format == CacheFormat::dense ? static_cast<int>(sizeof(T)) : 1;
        void* row = static_cast<unsigned char*>(params.kv_cache) + offset * row_bytes;
        append_latent(work, source, row);
        append_key(work, source + params.d_latent, row, position);
    }
}

}  // namespace warploom::mla
