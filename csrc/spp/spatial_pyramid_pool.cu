// Launchers of spatial pyramid pooling.
#include <algorithm>
#include <cstdint>

#include "spatial_pyramid_pool_backward.cuh"

namespace warploom::spp {

namespace {

template <typename Visit>
void dispatch_element(DType dtype, Visit&& visit) {
    dispatch_dtype<TypeCase<DType::float32, float>, TypeCase<DType::float16, half>,
                   TypeCase<DType::bfloat16, bfloat16>>(dtype, visit);
}

unsigned blocks_of(std::int64_t planes_of, const PyramidParams& params) {
    return static_cast<unsigned>(planes_of * ceil_divide(params.channels, kWarpSize));
}

}  // namespace

void spatial_pyramid_pool_cuda(const SpatialPyramidPoolParams& params, Stream stream) {
    const auto run = [&]<typename Traits>() {
        const std::int64_t bins = params.out_stride / params.channels;
        launch(&spatial_pyramid_pool_kernel<Traits>,
               {.grid = dim3(blocks_of(params.count, params),
                             static_cast<unsigned>(ceil_divide(bins, Traits::kBins))),
                .threads = Traits::kThreads,
                .shared_bytes = sizeof(PyramidPlan<Traits>)},
               stream, params);
    };
    const auto run_layout = [&]<typename T, bool kAverage>() {
        if (params.pixel_stride == 1) {
            run.template operator()<PyramidTraits<T, kAverage, true>>();
        } else {
            run.template operator()<PyramidTraits<T, kAverage, false>>();
        }
    };
    dispatch_element(params.dtype, [&]<typename T>() {
        if (params.is_average) {
            run_layout.template operator()<T, true>();
        } else {
            run_layout.template operator()<T, false>();
        }
    });
}

void spatial_pyramid_pool_backward_cuda(const SpatialPyramidPoolBackwardParams& params,
                                        Stream stream) {
    constexpr std::int64_t kMostBlocks = 65535;
    // Of packed images the sizes are on the device: blocks take further tiles by a stride.
    const std::int64_t pixels = params.offsets == nullptr
                                    ? static_cast<std::int64_t>(params.height) * params.width
                                    : kGradientTile * kGradientWarps * std::int64_t{8};
    const std::int64_t blocks =
        std::min(ceil_divide(pixels, kGradientTile * kGradientWarps), kMostBlocks);
    dispatch_element(params.dtype, [&]<typename T>() {
        launch(&spatial_pyramid_pool_backward_kernel<T>,
               {.grid = dim3(blocks_of(params.images, params), static_cast<unsigned>(blocks)),
                .threads = kGradientWarps * kWarpSize,
                .shared_bytes = sizeof(PyramidBackwardPlan)},
               stream, params);
    });
}

}  // namespace warploom::spp
