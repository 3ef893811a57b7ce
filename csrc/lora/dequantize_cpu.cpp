// A part of a quantised weight as numbers, for PyTorch's products.
#include <algorithm>
#include <bit>

#include "common/cpu_codes.h"
#include "common/parallel.h"
#include "lora/tile_cpu.h"

namespace warploom::lora {
namespace WARPLOOM_CPU_ISA {
namespace {

// What codes at column `first` (even) of a row and the next ones stand for, without their scale.
struct Nf4 {
    typedef std::uint64_t Bytes __attribute__((vector_size(kVectorBytes)));
    typedef std::uint32_t Places __attribute__((vector_size(kVectorBytes)));
    static constexpr int kCodes = kLanes<float>;

    // The numbers of kCodes codes, in registers: a table of 16 fits in one vector or two. A lane of
    // 64 bits takes a byte, and each half of it one of the byte's codes.
    static Vector<float> decode_vector(const std::uint8_t* codes) {
        std::uint64_t word = 0;
        __builtin_memcpy(&word, codes, kCodes / 2);
        Bytes bytes;
        for (int lane = 0; lane < kCodes / 2; ++lane) {
            bytes[lane] = 8 * lane;
        }
        bytes = word >> bytes;
        const auto places = std::bit_cast<Places>((bytes >> 4 & 15) | (bytes & 15) << 32);
        if constexpr (kCodes == 16) {
            return __builtin_shuffle(load(kNf4), places);
        } else {
            return __builtin_shuffle(load(kNf4), load(kNf4 + kCodes), places);
        }
    }

    static void decode(const std::uint8_t* row, std::int64_t first, std::int64_t count, float* to) {
        const std::uint8_t* codes = row + first / 2;
        std::int64_t j = 0;
        for (; j + kCodes <= count; j += kCodes) {
            store(to + j, decode_vector(codes + j / 2));
        }
        for (; j < count; ++j) {
            to[j] = kNf4[codes[j / 2] >> (j % 2 == 0 ? 4 : 0) & 15];
        }
    }
};
template <typename Code>
struct Bytes {
    static void decode(const std::uint8_t* row, std::int64_t first, std::int64_t count, float* to) {
#pragma omp simd
        for (std::int64_t j = 0; j < count; ++j) {
            to[j] = Code::decode(row[first + j]);
        }
    }
};

// Calls visit.template operator()<Code>() with the code of a quantised weight.
template <typename Visit>
void visit_code(WeightFormat format, Visit&& visit) {
    switch (format) {
        case WeightFormat::nf4:
            visit.template operator()<Nf4>();
            break;
        case WeightFormat::int8:
            visit.template operator()<Bytes<Int8>>();
            break;
        default:
            visit.template operator()<Bytes<Float8>>();
    }
}

// T: what elements are rounded to, Out: what they are stored as.
template <typename Code, typename T, typename Out>
void dequantize(const DequantizeParams& params) {
    const std::int64_t row_bytes =
        params.weight.format == WeightFormat::nf4 ? params.in_features / 2 : params.in_features;
    const std::int64_t block = params.weight.scale_block;
    const std::int64_t blocks = params.in_features / block;
    const std::int64_t last = params.first_column + params.columns;
    parallel_for(params.rows, 8, [&](std::int64_t begin, std::int64_t end) {
        alignas(kVectorBytes) float values[kCpuColumns];
        for (std::int64_t i = begin; i < end; ++i) {
            const std::int64_t row = params.first_row + i;
            const auto* codes =
                static_cast<const std::uint8_t*>(params.weight.values) + row * row_bytes;
            const float* scales = params.weight.scale + row * blocks;
            Out* to = static_cast<Out*>(params.out) + i * params.columns - params.first_column;
            for (std::int64_t first = params.first_column; first < last;) {
                const std::int64_t count = std::min<std::int64_t>(
                    {(first / block + 1) * block - first, last - first, kCpuColumns});
                Code::decode(codes, first, count, values);
                const float scale = scales[first / block];
#pragma omp simd
                for (std::int64_t j = 0; j < count; ++j) {
                    to[first + j] =
                        narrow<Out>(widen(narrow<T>(static_cast<Wide<T>>(values[j] * scale))));
                }
                first += count;
            }
        }
    });
}

}  // namespace

void dequantize_cpu(const DequantizeParams& params) {
    visit_code(params.weight.format, [&]<typename Code>() {
        visit_element_type(params.dtype, [&]<typename T>() {
            if (params.out_dtype == DType::float32) {
                dequantize<Code, T, float>(params);
            } else {
                dequantize<Code, T, T>(params);
            }
        });
    });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::lora
