// Checks that the seams of this family share. For *_ops.cpp only: it sees torch.
#pragma once

#include <limits>
#include <string>
#include <vector>

#include "common/checks.h"

namespace warploom::attention {

template <Backend backend>
int window_side(const Call<backend>& call, std::int64_t side, const char* argument) {
    call.check(side >= -1, argument, "-1 or more", std::to_string(side));
    // A window wider than any sequence is none.
    constexpr std::int64_t kLargest = std::numeric_limits<int>::max() / 2;
    return side > kLargest ? -1 : static_cast<int>(side);
}

// q and k have one head dim, k and v all but theirs, one dtype; k's heads divide q's.
template <Backend backend>
DType check_heads(const Call<backend>& call, const Tensor& q, const Tensor& k, const Tensor& v,
                  const char* k_name, const char* v_name) {
    std::vector<std::int64_t> v_shape(k.sizes().begin(), k.sizes().end());
    call.check_dim(v, v_name, k.dim());
    v_shape.back() = v.size(-1);
    call.check_shape(v, v_name, v_shape);
    call.check(k.size(-1) == q.size(-1), k_name, "q's head dim " + std::to_string(q.size(-1)),
               shape_of(k));
    call.check(k.size(-2) > 0 && q.size(-2) % k.size(-2) == 0, k_name,
               "a head count that divides q's " + std::to_string(q.size(-2)),
               std::to_string(k.size(-2)));
    call.check(q.size(-1) > 0 && v.size(-1) > 0, "q", "head dims of at least 1", shape_of(q));
    const DType dtype = call.dtype(q, "q");
    call.check_dtype(k, k_name, dtype);
    call.check_dtype(v, v_name, dtype);
    return dtype;
}

}  // namespace warploom::attention
