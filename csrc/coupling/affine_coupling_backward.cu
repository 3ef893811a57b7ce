// Launches the backward of affine couplings.
#include "coupling/affine_coupling_backward.cuh"

#include "coupling/coupling_center.h"
#include "coupling/coupling_launch.cuh"

namespace warploom::coupling {
namespace {

template <typename T>
void launch_weight_gradient(const AffineCouplingBackwardParams& params, Stream stream) {
    const CouplingOptions& options = params.options;
    const int block_channels =
        options.channels_last ? device::kWarpSize : kWeightThreads / device::kWarpSize;
    const std::int64_t blocks = options.batch * ceil_divide(options.channels, block_channels);
    if (blocks > 0) {
        device::launch(&weight_gradient_kernel<T>,
                       {.grid = dim3(static_cast<unsigned>(blocks)),
                        .threads = kWeightThreads,
                        .shared_bytes = sizeof(WeightPlan)},
                       stream, params);
    }
}

}  // namespace

// The sums are taken whole; a centred coupling has its means in the workspace.
std::int64_t affine_coupling_weight_parts_cuda(const CouplingOptions& options) {
    return options.center == CouplingCenter::none
               ? 0
               : ceil_divide(center_floats(options), std::max(options.count, 1));
}

void affine_coupling_backward_cuda(const AffineCouplingBackwardParams& params, Stream stream) {
    const CouplingOptions& options = params.options;
    if (options.batch == 0) {
        return;
    }
    coupling_center_cuda({.shift = params.shift,
                          .raw_scale = params.raw_scale,
                          .grad_z = params.grad_z,
                          .source = params.source,
                          .means = params.partials,
                          .from_output = params.from_output,
                          .options = options},
                         stream);
    dispatch_element(options.dtype, [&]<typename T>() {
        const auto launch = [&]<typename Traits>() {
            const AffineCouplingBackwardTask task{params, grid_of(options, Traits::kThreads)};
            device::launch(
                &affine_coupling_backward_kernel<Traits>,
                {.grid = blocks_of<Traits>(options, task.grid), .threads = Traits::kThreads},
                stream, task);
        };
        const bool channels_last = options.channels_last;
        if (allows_vectors<T>(options) &&
            (params.grad_z.data == nullptr || has_vectors<T>(params.grad_z, channels_last, 1)) &&
            has_vectors<T>(params.source, channels_last, 1) &&
            has_vectors<T>(params.grad_x, channels_last, 1) &&
            have_vectors<T>(params.shift, params.raw_scale, channels_last) &&
            have_vectors<T>(params.grad_shift, params.grad_raw_scale, channels_last)) {
            launch.template
            operator()<CouplingTraits<T, kVectorElements<T>, sizeof(T) == 4 ? 5 : 4, 128>>();
        } else {
            launch.template operator()<CouplingTraits<T, 1, 3>>();
        }
        if (params.grad_weight != nullptr) {
            launch_weight_gradient<T>(params, stream);
        }
    });
}

}  // namespace warploom::coupling
