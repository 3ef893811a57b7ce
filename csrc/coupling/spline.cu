// Launchers of the rational-quadratic splines.
#include "spline.cuh"

#include <algorithm>
#include <limits>

namespace warploom::coupling {

namespace {

// Calls visit.template operator()<SplineTraits<T, kBins>>(): 8 bins, the usual number, are held in
// registers.
template <typename Visit>
void dispatch_spline(DType dtype, int bins, Visit&& visit) {
    dispatch_dtype<TypeCase<DType::float32, float>, TypeCase<DType::float16, device::half>,
                   TypeCase<DType::bfloat16, device::bfloat16>>(dtype, [&]<typename T>() {
        if (bins == 8) {
            visit.template operator()<SplineTraits<T, 8>>();
        } else {
            visit.template operator()<SplineTraits<T, 0>>();
        }
    });
}

template <typename Traits>
device::LaunchShape shape_of(const SplineLayout& layout) {
    const std::int64_t blocks =
        ceil_divide(layout.samples * layout.sample_stride, Traits::kThreads);
    return {.grid = dim3(static_cast<unsigned>(
                std::min<std::int64_t>(blocks, std::numeric_limits<std::int32_t>::max()))),
            .threads = Traits::kThreads};
}

}  // namespace

void spline_cuda(const SplineParams& params, Stream stream) {
    dispatch_spline(params.dtype, params.layout.num_bins, [&]<typename Traits>() {
        device::launch(&spline_kernel<Traits>, shape_of<Traits>(params.layout), stream, params);
    });
}

void spline_backward_cuda(const SplineBackwardParams& params, Stream stream) {
    dispatch_spline(params.dtype, params.layout.num_bins, [&]<typename Traits>() {
        device::launch(&spline_backward_kernel<Traits>, shape_of<Traits>(params.layout), stream,
                       params);
    });
}

}  // namespace warploom::coupling
