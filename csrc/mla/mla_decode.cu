// Launches decoding: the schedule where there is one, the pieces, and where a sequence may have
// several their merge.
#include "mla/mla_decode.cuh"

#include <algorithm>
#include <climits>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/copy_bytes.h"
#include "mla/mla_decode_combine.cuh"

namespace warploom::mla {
namespace {

constexpr int kStep = 16;  // What an mma takes of a row.

void check(const MlaDecodeParams& params) {
    if (params.d_latent % kStep != 0 || params.d_rope % kStep != 0 || params.d_latent < kStep ||
        params.d_latent > kMaxLatent || params.d_rope > kMaxRope) {
        throw std::invalid_argument(
            "mla_decode: d_latent: expected multiples of 16, latents up to 512 and rotary keys up "
            "to 256, got " +
            std::to_string(params.d_latent) + " and " + std::to_string(params.d_rope));
    }
    if (params.cache.capacity >= attention::kMaxLength) {
        throw std::invalid_argument(
            "mla_decode: kv_cache: expected fewer than " + std::to_string(attention::kMaxLength) +
            " tokens a sequence, got " + std::to_string(params.cache.capacity));
    }
}

// Columns of the sizes in use, latents of 512 with rotary keys of 64 and the like.
constexpr int kUsualColumns = 576;

// Few rows, which fit the 99 KiB that every device gives a block: 2 stages of 32 tokens.
template <typename T>
using FewRows = DecodeTraits<T, 16, 32, kUsualColumns>;
// Many rows: 2 stages of 64 tokens take the whole of an sm_90's multiprocessor, of 32 an sm_80's.
// Without either the cache is read again for each few rows, from L2.
template <typename T>
using ManyRows = DecodeTraits<T, 64, 64, kUsualColumns>;
template <typename T>
using ManyRowsFewKeys = DecodeTraits<T, 64, 32, kUsualColumns>;
template <typename T>
using WideRows = DecodeTraits<T, 16, 16, kMaxLatent + kMaxRope>;
// Without tensor cores 8 rows are what the reads of shared memory keep up with.
using Float32Rows = DecodeTraits<float, 8, 16, kMaxLatent + kMaxRope>;

template <typename Traits>
constexpr std::size_t shared_bytes = sizeof(typename Traits::SharedPlan);

template <typename T, typename Visit>
void choose_traits(const MlaDecodeParams& params, const Visit& visit) {
    if constexpr (std::is_same_v<T, float>) {
        visit.template operator()<Float32Rows>();
    } else {
        const std::int64_t rows = static_cast<std::int64_t>(params.query_length) * params.heads;
        const std::size_t limit = device::shared_memory_limit();
        if (params.d_latent + params.d_rope > kUsualColumns) {
            visit.template operator()<WideRows<T>>();
        } else if (rows > FewRows<T>::kRows && limit >= shared_bytes<ManyRows<T>>) {
            visit.template operator()<ManyRows<T>>();
        } else if (rows > FewRows<T>::kRows && limit >= shared_bytes<ManyRowsFewKeys<T>>) {
            visit.template operator()<ManyRowsFewKeys<T>>();
        } else {
            visit.template operator()<FewRows<T>>();
        }
    }
}

int narrow(std::int64_t value, const char* what) {
    if (value > INT_MAX) {
        throw std::invalid_argument(std::string("mla_decode: q: expected at most 2147483647 ") +
                                    what + ", got " + std::to_string(value));
    }
    return static_cast<int>(value);
}

// Parts are shared by the sequences where a wave of the device has room for several of each row
// tile; more rows keep it busy without cutting any sequence.
template <typename Traits>
DecodeCut cut_of(const MlaDecodeParams& params) {
    const std::int64_t rows = static_cast<std::int64_t>(params.query_length) * params.heads;
    DecodeCut cut{};
    cut.row_tiles = narrow(ceil_divide(rows, Traits::kRows), "row tiles");
    cut.tile_keys = Traits::kKeys;
    if (params.split_size > 0) {
        cut.split_tiles = params.split_size / Traits::kKeys;
        cut.splits = static_cast<int>(
            std::max<std::int64_t>(ceil_divide(params.cache.capacity, params.split_size), 1));
    } else if (params.num_splits > 0) {
        cut.splits = params.num_splits;
    } else {
        const std::size_t blocks = device::shared_memory_limit() / shared_bytes<Traits>;
        const int wave = device::multiprocessor_count() * std::max(static_cast<int>(blocks), 1);
        const int shared = wave / std::max(cut.row_tiles, 1);
        cut.parts = shared;
        cut.splits = shared > 1 ? 0 : 1;
    }
    if (cut.splits > 0) {
        cut.parts = narrow(static_cast<std::int64_t>(params.batch) * cut.splits, "parts");
    }
    return cut;
}

// 16, 4, or the size of an element: what divides the address of every row and its length.
int unit_bytes(const void* tensor, std::int64_t strides, std::int64_t row_bytes,
               int element_bytes) {
    const std::uint64_t bits = reinterpret_cast<std::uintptr_t>(tensor) |
                               static_cast<std::uint64_t>(strides) * element_bytes |
                               static_cast<std::uint64_t>(row_bytes);
    return coarse_copy_unit(bits, element_bytes);
}

DecodeWork work_of(const MlaDecodeParams& params, const DecodeCut& cut) {
    const bool dense = params.cache.format == CacheFormat::dense;
    const int bytes = element_size(params.dtype);
    const int columns = params.d_latent + params.d_rope;
    return {.decode = params,
            .cut = cut,
            .scale = static_cast<float>(params.softmax_scale) * attention::kLog2E,
            .cache_bytes = unit_bytes(
                params.kv_cache, params.cache.batch_stride | params.cache.row_stride,
                dense ? columns * bytes : compressed_row_bytes(params.d_latent, params.d_rope),
                dense ? bytes : 1),
            .q_bytes = unit_bytes(
                params.q, params.q_batch_stride | params.q_sequence_stride | params.q_head_stride,
                columns * bytes, bytes)};
}

template <typename T, typename Traits>
void launch_decode(const MlaDecodeParams& params, Stream stream) {
    const DecodeCut cut = cut_of<Traits>(params);
    const DecodeWork work = work_of(params, cut);
    if (cut.splits == 0) {
        device::launch(mla_decode_schedule_kernel<device::kWarpSize>,
                       {.grid = dim3(1), .threads = device::kWarpSize}, stream, work);
    }
    const std::int64_t blocks = static_cast<std::int64_t>(cut.parts) * cut.row_tiles;
    device::launch(mla_decode_kernel<Traits>,
                   {.grid = dim3(static_cast<unsigned>(narrow(blocks, "blocks"))),
                    .threads = Traits::kThreads,
                    .shared_bytes = shared_bytes<Traits>},
                   stream, work);
    if (cut.splits != 1) {
        const std::int64_t rows = static_cast<std::int64_t>(params.batch) * params.query_length *
                                  static_cast<std::int64_t>(params.heads);
        device::launch(mla_decode_combine_kernel<T>,
                       {.grid = dim3(static_cast<unsigned>(narrow(rows, "rows"))),
                        .threads = Combine::kThreads,
                        .shared_bytes = sizeof(Combine::SharedPlan)},
                       stream, work);
    }
}

// Calls visit.template operator()<T, Traits>().
template <typename Visit>
void choose_kernel(const MlaDecodeParams& params, const Visit& visit) {
    dispatch_dtype<TypeCase<DType::float32, float>, TypeCase<DType::float16, device::half>,
                   TypeCase<DType::bfloat16, device::bfloat16>>(params.dtype, [&]<typename T>() {
        choose_traits<T>(params,
                         [&]<typename Traits>() { visit.template operator()<T, Traits>(); });
    });
}

}  // namespace

MlaDecodeWorkspace mla_decode_workspace(const MlaDecodeParams& params) {
    MlaDecodeWorkspace workspace{};
    choose_kernel(params, [&]<typename T, typename Traits>() {
        const DecodeCut cut = cut_of<Traits>(params);
        if (cut.splits == 0) {
            workspace = {static_cast<std::int64_t>(cut.parts) + params.batch,
                         Schedule::size(params.batch, cut.parts)};
        } else if (cut.splits > 1) {
            workspace.parts = cut.parts;
        }
    });
    return workspace;
}

void mla_decode_cuda(const MlaDecodeParams& params, Stream stream) {
    check(params);
    if (params.batch == 0 || params.heads == 0 || params.query_length == 0) {
        return;
    }
    choose_kernel(params,
                  [&]<typename T, typename Traits>() { launch_decode<T, Traits>(params, stream); });
}

}  // namespace warploom::mla
