// Launches the three products of a linear map per group of rows.
#include "grouped_linear/grouped_linear.h"

#include "common/product_launch.cuh"
#include "grouped_linear/grouped_linear.cuh"

namespace warploom::grouped_linear {
namespace {

// A matrix in memory, its rows `stride` elements apart.
struct Matrix {
    const void* first;
    std::int64_t stride;
    int columns;
};

template <typename T, Product kProduct>
void launch_product(const Matrix& left, const Matrix& right, void* out, ProductParams params,
                    Stream stream) {
    using Traits = ProductTraits<T, kProduct>;
    params.left = left.first;
    params.left_stride = left.stride;
    params.left_copy_bytes = row_copy_unit<T>(left.first, left.stride, left.columns);
    params.right = right.first;
    params.right_stride = right.stride;
    params.right_copy_bytes = row_copy_unit<T>(right.first, right.stride, right.columns);
    params.out = out;
    params.out_copy_bytes = row_copy_unit<T>(out, params.out_columns, params.out_columns);
    params.out_column_tiles = static_cast<int>(ceil_divide(params.out_columns, Traits::kColumns));
    std::int64_t row_tiles = std::int64_t{params.rows} / Traits::kRows + params.groups + 1;
    if (kProduct == Product::grad_weight) {
        params.out_row_tiles = static_cast<int>(ceil_divide(params.out_rows, Traits::kRows));
        row_tiles = std::int64_t{params.groups} * params.out_row_tiles;
    }
    launch_tiles<Traits>("grouped_linear", grouped_product_kernel<Traits>,
                         row_tiles * params.out_column_tiles, stream, params);
}

template <typename Params>
ProductParams product_params(const Params& params) {
    ProductParams product{};
    product.group_offsets = params.group_offsets;
    product.rows = params.rows;
    product.groups = params.groups;
    return product;
}

template <typename Visit>
void dispatch(DType dtype, const Visit& visit) {
    dispatch_dtype<TypeCase<DType::float32, float>, TypeCase<DType::float16, device::half>,
                   TypeCase<DType::bfloat16, device::bfloat16>>(dtype, visit);
}

}  // namespace

void grouped_linear_cuda(const GroupedLinearParams& params, Stream stream) {
    const Matrix x = {params.x, params.x_row_stride, params.in_features};
    const Matrix weight = {params.weight, params.in_features, params.in_features};
    ProductParams product = product_params(params);
    product.terms = params.in_features;
    product.out_columns = params.out_features;
    dispatch(params.dtype, [&]<typename T>() {
        launch_product<T, Product::output>(x, weight, params.out, product, stream);
    });
}

void grouped_linear_backward_cuda(const GroupedLinearBackwardParams& params, Stream stream) {
    const Matrix grad_out = {params.grad_out, params.grad_out_row_stride, params.out_features};
    const Matrix x = {params.x, params.x_row_stride, params.in_features};
    const Matrix weight = {params.weight, params.in_features, params.in_features};
    ProductParams product = product_params(params);
    product.terms = params.out_features;
    product.out_rows = params.out_features;
    product.out_columns = params.in_features;
    dispatch(params.dtype, [&]<typename T>() {
        if (params.grad_x != nullptr) {
            launch_product<T, Product::grad_x>(grad_out, weight, params.grad_x, product, stream);
        }
        if (params.grad_weight != nullptr) {
            launch_product<T, Product::grad_weight>(grad_out, x, params.grad_weight, product,
                                                    stream);
        }
    });
}

}  // namespace warploom::grouped_linear
