// Element types as a run-time value, and the visit that turns one into a template argument.
// Torch-free and CUDA-free: Params structs carry a DType.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace warploom {

enum class DType : int { float32, float16, bfloat16, float64 };

constexpr int element_size(DType dtype) {
    switch (dtype) {
        case DType::float64:
            return 8;
        case DType::float32:
            return 4;
        default:
            return 2;
    }
}

constexpr const char* name_of(DType dtype) {
    switch (dtype) {
        case DType::float32:
            return "float32";
        case DType::float16:
            return "float16";
        case DType::bfloat16:
            return "bfloat16";
        default:
            return "float64";
    }
}

// One entry of a visit: the run-time value and the type it stands for.
template <DType value_, typename Type_>
struct TypeCase {
    static constexpr DType value = value_;
    using Type = Type_;
};

// Calls visit.template operator()<Type>() for the case whose value is `dtype`; throws when none is.
template <typename... Cases, typename Visit>
void dispatch_dtype(DType dtype, Visit&& visit) {
    const bool found =
        ((Cases::value == dtype ? (visit.template operator()<typename Cases::Type>(), true)
                                : false) ||
         ...);
    if (!found) {
        throw std::runtime_error(std::string("no kernel for dtype ") + name_of(dtype));
    }
}

}  // namespace warploom
