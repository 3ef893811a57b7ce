// Launchers of spatial pyramid pooling.
#include <algorithm>
#include <cstdint>

#include "spatial_pyramid_pool_backward.cuh"
#include "spatial_pyramid_pool_means.cuh"

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

// Whether shared memory holds what `planes` planes of any image get, whatever the cuts.
bool have_room(const PyramidParams& params, int planes) {
    std::int64_t rows = 1;
    std::int64_t columns = 1;
    for (int place = 0; place < params.level_count; ++place) {
        rows += 2 * params.levels[place].rows;
        columns += 2 * params.levels[place].columns;
    }
    return planes * rows * columns <= kMeansCells &&
           planes * params.out_stride <= kMeansBins * params.channels;
}

void launch_means(const SpatialPyramidPoolBackwardParams& params, Stream stream) {
    const auto run = [&]<typename Traits>() {
        const std::int64_t groups = ceil_divide(params.channels, Traits::kPlanes);
        const std::int64_t elements =
            Traits::kPlanes * static_cast<std::int64_t>(params.height) * params.width;
        const std::int64_t parts =
            std::min<std::int64_t>({ceil_divide(elements, kMeansElements), params.height, 65535});
        launch(&spread_means_kernel<Traits>,
               {.grid = dim3(static_cast<unsigned>(params.images * groups),
                             static_cast<unsigned>(parts)),
                .threads = Traits::kThreads,
                .shared_bytes = sizeof(MeansPlan)},
               stream, params);
    };
    dispatch_element(params.dtype, [&]<typename T>() {
        constexpr int kVector = kVectorElements<T>;
        if (params.pixel_stride == 1 && are_vectors<T>(params.width, {params.grad_x}, {})) {
            run.template operator()<MeansTraits<T, kVector, true>>();
        } else if (params.pixel_stride == 1) {
            run.template operator()<MeansTraits<T, 1, true>>();
        } else if (are_vectors<T>(params.channels, {params.grad_x}, {}) &&
                   have_room(params, kVector)) {
            run.template operator()<MeansTraits<T, kVector, false>>();
        } else {
            run.template operator()<MeansTraits<T, 1, false>>();
        }
    });
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
    if (params.is_average && !params.has_regions) {
        launch_means(params, stream);
        return;
    }
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
