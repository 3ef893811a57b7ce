// Launches squeezing.
#include "coupling/squeeze.cuh"

namespace warploom::coupling {
namespace {

// Whether lines and what they lie packed in consist of aligned vectors.
template <typename T>
bool have_vectors(const SqueezeParams& params) {
    const auto& packed = params.packed.strides;
    const auto& lines = params.lines.strides;
    return are_vectors<T>(params.length, {params.from, params.to},
                          {packed[0], packed[1], packed[2], packed[3], lines[0], lines[1], lines[2],
                           lines[3], params.block_row, params.block_column});
}

template <typename Traits>
void launch_squeeze(const SqueezeParams& params, Stream stream) {
    const std::int64_t items = params.sizes[0] * params.sizes[1] * params.sizes[2] *
                               params.sizes[3] * (params.length / Traits::kVector);
    device::launch(&squeeze_kernel<Traits>,
                   {.grid = dim3(static_cast<unsigned>(ceil_divide(items, Traits::kThreads))),
                    .threads = Traits::kThreads},
                   stream, params);
}

template <typename T>
void squeeze_of(const SqueezeParams& params, Stream stream) {
    constexpr int kVector = kVectorElements<T>;
    if (have_vectors<T>(params) && params.ways == 1) {
        launch_squeeze<SqueezeTraits<T, kVector, 1>>(params, stream);
    } else if (have_vectors<T>(params) && params.ways == 2) {
        launch_squeeze<SqueezeTraits<T, kVector, 2>>(params, stream);
    } else if (have_vectors<T>(params) && params.ways == 4) {
        launch_squeeze<SqueezeTraits<T, kVector, 4>>(params, stream);
    } else {
        launch_squeeze<SqueezeTraits<T, 1, 0>>(params, stream);
    }
}

}  // namespace

void squeeze_cuda(const SqueezeParams& params, Stream stream) {
    if (element_size(params.dtype) == 2) {
        squeeze_of<std::uint16_t>(params, stream);
    } else {
        squeeze_of<std::uint32_t>(params, stream);
    }
}

}  // namespace warploom::coupling
