// Launchers of the ops that emit the rank-r product of their rows.
#include "norm_shrink.cuh"

#include <initializer_list>

namespace warploom::lora {
namespace {

// Calls visit.template operator()<ShrinkTraits<T, kWhole>>(), whole where all rows may be moved 16
// bytes at a time.
template <typename Params, typename Visit>
void dispatch_traits(const char* op, const Params& params,
                     std::initializer_list<const void*> pointers,
                     std::initializer_list<std::int64_t> row_strides, Visit&& visit) {
    norm::check_columns(op, params.columns);
    if (params.rows == 0) {
        return;
    }
    norm::dispatch_element(params.dtype, [&]<typename T>() {
        if (are_vectors<T>(params.columns, pointers, row_strides)) {
            visit.template operator()<ShrinkTraits<T, true>>();
        } else {
            visit.template operator()<ShrinkTraits<T, false>>();
        }
    });
}

template <typename Traits, typename Params>
void launch(void (*kernel)(Params), const Params& params, Stream stream) {
    device::launch(kernel,
                   {.grid = dim3(static_cast<unsigned>(ceil_divide(params.rows, Traits::kRows))),
                    .threads = Traits::kThreads,
                    .shared_bytes = sizeof(ShrinkPlan<Traits>)},
                   stream, params);
}

}  // namespace

void rms_norm_shrink_cuda(const RmsNormShrinkParams& params, Stream stream) {
    dispatch_traits(
        "rms_norm_shrink", params,
        {params.x, params.residual, params.weight, params.lora_a, params.out, params.sum},
        {params.x_row_stride, params.residual_row_stride}, [&]<typename Traits>() {
            launch<Traits>(&rms_norm_shrink_kernel<Traits>, params, stream);
        });
}

void gated_shrink_cuda(const GatedShrinkParams& params, Stream stream) {
    dispatch_traits(
        "gated_activation_shrink", params, {params.gate, params.up, params.lora_a, params.out},
        {params.gate_row_stride, params.up_row_stride},
        [&]<typename Traits>() { launch<Traits>(&gated_shrink_kernel<Traits>, params, stream); });
}

}  // namespace warploom::lora
