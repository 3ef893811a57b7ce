// Launches the means of centred couplings.
#include "coupling/coupling_center.cuh"

#include "coupling/coupling_launch.cuh"

namespace warploom::coupling {

void coupling_center_cuda(const CouplingCenterParams& params, Stream stream) {
    const CouplingOptions& options = params.options;
    const std::int64_t rows = options.batch * options.pixels;
    if (options.center == CouplingCenter::none || rows == 0 || options.count == 0) {
        return;
    }
    dispatch_element(options.dtype, [&]<typename T>() {
        device::launch(&center_pixels_kernel<T>,
                       {.grid = dim3(static_cast<unsigned>(ceil_divide(rows, kCenterThreads))),
                        .threads = kCenterThreads},
                       stream, params);
    });
    if (options.center == CouplingCenter::sample) {
        device::launch(&center_samples_kernel<kCenterThreads>,
                       {.grid = dim3(static_cast<unsigned>(options.batch)),
                        .threads = kCenterThreads,
                        .shared_bytes = sizeof(CenterPlan)},
                       stream, params);
    }
}

}  // namespace warploom::coupling
