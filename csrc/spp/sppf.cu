// Launchers of the cascade of max pools.
#include "sppf.cuh"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace warploom::spp {
namespace {

// Halves of the tile that is the whole plane until it fits into `numbers` of shared memory with its
// halo, `row_radii` and `column_radii` at each side. A tile of no cells: none does.
SppfTiling tiling_of(const SppfShape& shape, int lanes, int numbers, int row_radii,
                     int column_radii) {
    std::int64_t height = shape.height;
    std::int64_t width = shape.width;
    const auto held = [&] {
        const std::int64_t rows = height + std::int64_t{2} * row_radii * shape.radius;
        const std::int64_t columns = width + std::int64_t{2} * column_radii * shape.radius;
        return lanes * std::min<std::int64_t>(shape.height, rows) *
               std::min<std::int64_t>(shape.width, columns);
    };
    while (held() > numbers) {
        if (height == 1 && width == 1) {
            return {};
        }
        std::int64_t& longer = height > width ? height : width;
        longer = ceil_divide(longer, 2);
    }
    return {static_cast<int>(height), static_cast<int>(width),
            static_cast<int>(ceil_divide(shape.height, height)),
            static_cast<int>(ceil_divide(shape.width, width)),
            static_cast<int>(ceil_divide(shape.channels, lanes))};
}

// Several lanes where their tile is not lost in its halo.
bool takes_lanes(const SppfShape& shape, const SppfTiling& tiling) {
    const int least = 2 * shape.radius;
    return shape.channels_last && tiling.height >= std::min(shape.height, least) &&
           tiling.width >= std::min(shape.width, least);
}

template <typename Plan, typename Kernel, typename Params>
void launch_tiles(Kernel kernel, int threads, const Params& params, const SppfTiling& tiling,
                  Stream stream) {
    if (tiling.height == 0) {
        throw std::runtime_error("sppf: kernel_size: expected at most 19, got " +
                                 std::to_string(2 * params.shape.radius + 1));
    }
    const std::int64_t blocks =
        params.shape.batch * tiling.groups * tiling.tile_rows * tiling.tile_columns;
    if (blocks > std::numeric_limits<std::int32_t>::max()) {
        throw std::runtime_error("sppf: x: expected at most 2^31 - 1 tiles, got " +
                                 std::to_string(blocks));
    }
    device::launch(kernel,
                   {.grid = dim3(static_cast<unsigned>(blocks)),
                    .threads = threads,
                    .shared_bytes = sizeof(Plan)},
                   stream, Tiled<Params>{params, tiling});
}

// Calls visit.template operator()<Traits>(tiling of a plane of Traits::kLanes channels).
template <typename Visit>
void dispatch_traits(const SppfShape& shape, bool backward, Visit&& visit) {
    constexpr int kLanes = 4;
    dispatch_dtype<TypeCase<DType::float32, float>, TypeCase<DType::float16, device::half>,
                   TypeCase<DType::bfloat16, device::bfloat16>>(shape.dtype, [&]<typename T>() {
        using Traits = SppfTraits<T, kLanes>;
        const auto tiling = [&](int lanes) {
            return backward
                       ? tiling_of(shape, lanes, Traits::kBackwardNumbers, kSppfStages + 1,
                                   kSppfStages)
                       : tiling_of(shape, lanes, Traits::kForwardNumbers, kSppfStages, kSppfStages);
        };
        const SppfTiling wide = tiling(kLanes);
        if (takes_lanes(shape, wide)) {
            visit.template operator()<Traits>(wide);
        } else {
            visit.template operator()<SppfTraits<T, 1>>(tiling(1));
        }
    });
}

}  // namespace

void sppf_cuda(const SppfParams& params, Stream stream) {
    dispatch_traits(params.shape, false, [&]<typename Traits>(const SppfTiling& tiling) {
        launch_tiles<SppfPlan<Traits>>(&sppf_kernel<Traits>, Traits::kThreads, params, tiling,
                                       stream);
    });
}

void sppf_backward_cuda(const SppfBackwardParams& params, Stream stream) {
    dispatch_traits(params.shape, true, [&]<typename Traits>(const SppfTiling& tiling) {
        launch_tiles<SppfBackwardPlan<Traits>>(&sppf_backward_kernel<Traits>, Traits::kThreads,
                                               params, tiling, stream);
    });
}

}  // namespace warploom::spp
