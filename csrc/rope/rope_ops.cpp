// The seam of family rope: checks -> Params -> launch.
#include "common/torch.h"
#include "rope/rotary.h"

namespace warploom::rope {
namespace {

// On the CPU every position is read before the kernel runs: an index outside the tables is an
// error.
template <typename Index, Backend backend>
void check_positions(const Call<backend>& call, const RotaryParams& params) {
    const auto* positions = static_cast<const Index*>(params.positions);
    for (std::int64_t token = 0; token < params.batch * params.sequence; ++token) {
        const std::int64_t position = positions[token];
        call.check(position >= 0 && position < params.table_rows, "positions",
                   "values from 0 to " + std::to_string(params.table_rows - 1),
                   std::to_string(position));
    }
}

template <Backend backend>
Tensor apply_rotary(const Tensor& x, const Tensor& cos, const Tensor& sin,
                    const std::optional<Tensor>& positions, bool interleaved, bool conjugate) {
    Call<backend> call("apply_rotary", x);
    call.check_dim(x, "x", 4);
    call.check_dim(cos, "cos", 2);
    call.check_shape(sin, "sin", {cos.size(0), cos.size(1)});
    RotaryParams params{};
    params.dtype = call.dtype(x, "x");
    const DType table_dtype = params.dtype == DType::float64 ? DType::float64 : DType::float32;
    call.check_dtype(cos, "cos", table_dtype);
    call.check_dtype(sin, "sin", table_dtype);
    params.batch = x.size(0);
    params.sequence = x.size(1);
    params.heads = x.size(2);
    params.head_dim = x.size(3);
    params.rotary_dim = 2 * cos.size(1);
    params.table_rows = cos.size(0);
    params.interleaved = interleaved;
    params.conjugate = conjugate;
    call.check(params.rotary_dim <= params.head_dim, "cos",
               "at most " + std::to_string(params.head_dim / 2) + " columns", shape_of(cos));
    const Tensor dense_x = call.dense_last(x);
    const Tensor dense_cos = call.dense_last(cos);
    const Tensor dense_sin = call.dense_last(sin);
    Tensor dense_positions = x;  // kept alive beside the address that params holds
    if (positions.has_value()) {
        call.check_shape(*positions, "positions", {params.batch, params.sequence});
        const ScalarType type = positions->scalar_type();
        call.check(type == ScalarType::Long || type == ScalarType::Int, "positions",
                   "dtype int64 or int32", torch::headeronly::toString(type));
        dense_positions = torch::stable::contiguous(*positions);
        params.positions = call.input(dense_positions, "positions");
        params.positions_are_int32 = type == ScalarType::Int;
        if constexpr (backend != Backend::kCuda) {
            params.positions_are_int32 ? check_positions<std::int32_t>(call, params)
                                       : check_positions<std::int64_t>(call, params);
        }
    } else {
        call.check(params.table_rows >= params.sequence, "cos",
                   "at least " + std::to_string(params.sequence) + " rows", shape_of(cos));
    }
    Tensor out = call.empty_like(x);
    params.x = call.input(dense_x, "x");
    params.cos = call.input(dense_cos, "cos");
    params.sin = call.input(dense_sin, "sin");
    params.out = call.output(out, "out");
    params.x_batch_stride = dense_x.stride(0);
    params.x_sequence_stride = dense_x.stride(1);
    params.x_head_stride = dense_x.stride(2);
    params.cos_row_stride = dense_cos.stride(0);
    params.sin_row_stride = dense_sin.stride(0);
    WARPLOOM_RUN(backend, call, apply_rotary, params)
    return out;
}

template <Backend backend, typename Library>
void register_rope(Library& library) {
    WARPLOOM_IMPL(library, backend, apply_rotary);
}

WARPLOOM_REGISTER(register_rope)

}  // namespace
}  // namespace warploom::rope
