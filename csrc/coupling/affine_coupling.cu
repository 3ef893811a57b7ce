// Launches the forward of affine couplings.
#include "coupling/affine_coupling.cuh"

#include "coupling/coupling_center.h"
#include "coupling/coupling_launch.cuh"

namespace warploom::coupling {

std::int64_t affine_coupling_parts_cuda(const CouplingOptions& options) {
    return options.center == CouplingCenter::none ? tiles_of(options) : center_floats(options);
}

void affine_coupling_cuda(const AffineCouplingParams& params, Stream stream) {
    const CouplingOptions& options = params.options;
    if (options.batch == 0) {
        return;
    }
    coupling_center_cuda({.shift = params.shift,
                          .raw_scale = params.raw_scale,
                          .grad_z = {},
                          .source = {},
                          .means = params.partials,
                          .from_output = false,
                          .options = options},
                         stream);
    dispatch_element(options.dtype, [&]<typename T>() {
        const auto launch = [&]<typename Traits>() {
            const AffineCouplingTask task{params, grid_of(options, Traits::kThreads)};
            device::launch(&affine_coupling_kernel<Traits>,
                           {.grid = blocks_of<Traits>(options, task.grid),
                            .threads = Traits::kThreads,
                            .shared_bytes = sizeof(AffineCouplingPlan<Traits>)},
                           stream, task);
            if (options.center == CouplingCenter::none && task.grid.tiles > 1) {
                constexpr int kThreads = 128;
                constexpr int kWarps = kThreads / device::kWarpSize;
                device::launch(
                    &sum_tiles_kernel<kThreads>,
                    {.grid = dim3(static_cast<unsigned>(ceil_divide(options.batch, kWarps))),
                     .threads = kThreads},
                    stream, task);
            }
        };
        if (allows_vectors<T>(options) && has_vectors<T>(params.x, options.channels_last, 1) &&
            has_vectors<T>(params.z, options.channels_last, 1) &&
            have_vectors<T>(params.shift, params.raw_scale, options.channels_last)) {
            launch.template
            operator()<CouplingTraits<T, kVectorElements<T>, sizeof(T) == 4 ? 4 : 3>>();
        } else {
            launch.template operator()<CouplingTraits<T, 1, 3>>();
        }
    });
}

}  // namespace warploom::coupling
