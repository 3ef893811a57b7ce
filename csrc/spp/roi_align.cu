// Launchers of RoIAlign.
#include "roi_align.cuh"

#include <limits>
#include <stdexcept>

namespace warploom::spp {
namespace {

template <typename Visit>
void dispatch_traits(DType dtype, Visit&& visit) {
    dispatch_dtype<TypeCase<DType::float32, float>, TypeCase<DType::float16, device::half>,
                   TypeCase<DType::bfloat16, device::bfloat16>>(
        dtype, [&]<typename T>() { visit.template operator()<RoiAlignTraits<T>>(); });
}

dim3 grid_of(std::int64_t blocks) {
    if (blocks > std::numeric_limits<std::int32_t>::max()) {
        throw std::runtime_error("roi_align: x: expected at most 2^31 - 1 blocks, got " +
                                 std::to_string(blocks));
    }
    return dim3(static_cast<unsigned>(blocks));
}

}  // namespace

void roi_align_cuda(const RoiAlignParams& params, Stream stream) {
    const RoiAlignShape& shape = params.shape;
    dispatch_traits(shape.dtype, [&]<typename Traits>() {
        const std::int64_t blocks = shape.count * ceil_divide(shape.channels, Traits::kChannels);
        device::launch(&roi_align_kernel<Traits>,
                       {.grid = grid_of(blocks), .threads = Traits::kThreads}, stream, params);
    });
}

void roi_align_backward_cuda(const RoiAlignBackwardParams& params, Stream stream) {
    const RoiAlignShape& shape = params.shape;
    dispatch_traits(shape.dtype, [&]<typename Traits>() {
        if (shape.pooled_height > Traits::kMostBins || shape.pooled_width > Traits::kMostBins) {
            throw std::runtime_error("roi_align_backward: output_size: expected at most " +
                                     std::to_string(Traits::kMostBins));
        }
        const std::int64_t blocks =
            shape.batch * ceil_divide(shape.channels, Traits::kOwnedChannels) *
            ceil_divide(shape.height, Traits::kRows) * ceil_divide(shape.width, Traits::kColumns);
        device::launch(&roi_align_backward_kernel<Traits>,
                       {.grid = grid_of(blocks),
                        .threads = Traits::kThreads,
                        .shared_bytes = sizeof(RoiAlignBackwardPlan<Traits>)},
                       stream, params);
    });
}

}  // namespace warploom::spp
