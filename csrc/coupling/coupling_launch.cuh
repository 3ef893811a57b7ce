// What the launchers of affine couplings share: whether vectors may move, and blocks for samples.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "common/vec.cuh"
#include "coupling/coupling_places.cuh"

namespace warploom::coupling {

template <typename Visit>
void dispatch_element(DType dtype, Visit&& visit) {
    dispatch_dtype<TypeCase<DType::float32, float>, TypeCase<DType::float16, device::half>,
                   TypeCase<DType::bfloat16, device::bfloat16>>(dtype, visit);
}

// Whether every line of the view begins on a vector's boundary, with elements `line_stride` apart.
template <typename T, typename View>
bool has_vectors(const View& view, bool channels_last, std::int64_t line_stride) {
    const std::int64_t stride = channels_last ? view.channel_stride : view.pixel_stride;
    const std::int64_t other = channels_last ? view.pixel_stride : view.channel_stride;
    return stride == line_stride && are_vectors<T>(0, {view.data}, {view.batch_stride, other});
}

// The same of shift and raw scale, which may alternate along a line of channels.
template <typename T, typename View>
bool have_vectors(const View& shift, const View& raw_scale, bool channels_last) {
    if (has_vectors<T>(shift, channels_last, 1)) {
        return raw_scale.data == nullptr || has_vectors<T>(raw_scale, channels_last, 1);
    }
    return channels_last && has_vectors<T>(shift, channels_last, 2) &&
           static_cast<const T*>(raw_scale.data) == static_cast<const T*>(shift.data) + 1 &&
           raw_scale.channel_stride == 2 && raw_scale.batch_stride == shift.batch_stride &&
           raw_scale.pixel_stride == shift.pixel_stride;
}

// Whether all of a vector's elements have neighbouring parameters, wherever it begins.
template <typename T>
bool allows_vectors(const CouplingOptions& options) {
    constexpr int kVector = kVectorElements<T>;
    const std::int64_t line = options.channels_last ? options.channels : options.pixels;
    if (line % kVector != 0 || options.mask == CouplingMask::checkerboard_packed) {
        return false;
    }
    switch (options.mask) {
        case CouplingMask::range:
            return !options.channels_last ||
                   (options.first % kVector == 0 && options.count % kVector == 0);
        case CouplingMask::slots:
            return !options.channels_last;
        default:
            return true;
    }
}

template <typename Traits>
dim3 blocks_of(const CouplingOptions& options, const CouplingGrid& grid) {
    const int samples = Traits::kThreads / grid.sample_threads;
    return dim3(static_cast<unsigned>(ceil_divide(options.batch, samples) * grid.tiles));
}

}  // namespace warploom::coupling
