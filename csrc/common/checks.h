// Checks that the seams of several families share. For *_ops.cpp only: it sees torch.
#pragma once

#include <limits>
#include <string>
#include <vector>

#include "torch.h"

namespace warploom {

// The kernels count in int.
template <Backend backend>
int narrow_size(const Call<backend>& call, std::int64_t size, const char* argument) {
    constexpr std::int64_t kLargest = std::numeric_limits<int>::max();
    call.check(size >= 0 && size <= kLargest, argument, "sizes of at most 2^31 - 1",
               std::to_string(size));
    return static_cast<int>(size);
}

// The address of an argument that has to be contiguous, with its shape and type checked.
template <Backend backend>
const void* contiguous_input(Call<backend>& call, const Tensor& tensor, const char* argument,
                             const std::vector<std::int64_t>& shape, ScalarType type) {
    call.check_shape(tensor, argument, shape);
    call.check(tensor.scalar_type() == type, argument,
               std::string("dtype ") + torch::headeronly::toString(type),
               torch::headeronly::toString(tensor.scalar_type()));
    const Tensor dense = torch::stable::contiguous(tensor);
    return call.input(call.keep(dense), argument);
}

template <Backend backend>
const std::int32_t* int32_input(Call<backend>& call, const Tensor& tensor, const char* argument,
                                const std::vector<std::int64_t>& shape) {
    return static_cast<const std::int32_t*>(
        contiguous_input(call, tensor, argument, shape, ScalarType::Int));
}

struct BlockTable {
    const std::int32_t* entries;  // [batch, places]
    std::int64_t stride;
    std::int64_t places;
    int page_size;
};

template <Backend backend>
BlockTable check_block_table(Call<backend>& call, const Tensor& table, std::int64_t batch,
                             std::int64_t page_size) {
    constexpr std::int64_t kLargestPage = 256;
    call.check_dim(table, "block_table", 2);
    call.check(page_size >= 1 && page_size <= kLargestPage, "k", "pages of 1 to 256 rows",
               std::to_string(page_size));
    const std::int64_t places = table.size(1);
    return {int32_input(call, table, "block_table", {batch, places}), places, places,
            static_cast<int>(page_size)};
}

}  // namespace warploom
