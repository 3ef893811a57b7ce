// The seam's tools: with *_ops.cpp and parallel.cpp, the only code that sees torch, and of torch
// only the stable ABI, so that one binary serves every supported version.
//
// A seam function is a template over Backend. The extension _C instantiates it for kCpu and, where
// it has CUDA kernels, for kCuda; _simt and _simt_instrumented compile the same text for kSimt.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "launch.h"
#include "output_pool.h"

#if defined(WARPLOOM_SIMT)
#include "device/simt/memory.h"
#endif

// The stream of a device; bound only where torch has CUDA, null on CPU builds of torch.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(std::int32_t device_index,
                                                             void** ret_stream)
    __attribute__((weak));

namespace warploom {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Backend { kCpu, kCuda, kSimt };

// The macro that torch's own headers use for this has changed its name between versions.
inline void check_shim(AOTITorchError code, const char* what) {
    if (code != AOTI_TORCH_SUCCESS) {
        throw std::runtime_error(std::string(what) + " failed inside torch");
    }
}

inline std::string shape_of(const Tensor& tensor) {
    std::ostringstream text;
    text << "(";
    for (std::int64_t dim = 0; dim < tensor.dim(); ++dim) {
        text << (dim ? ", " : "") << tensor.size(dim);
    }
    text << ")";
    return text.str();
}

// A tensor [..., columns] as `count` rows, `stride` elements apart; a copy where it has no such
// view. Without columns there are no rows either.
struct Rows {
    Tensor tensor;
    std::int64_t count;
    std::int64_t columns;
    std::int64_t stride;
};

// One call of one op: names it in errors, guards the device, and hands pointers to kernels.
template <Backend backend>
class Call {
  public:
    Call(const char* op, const Tensor& first) : op_(op), first_(first) {
        check_device(first, "the first tensor");
        if constexpr (backend == Backend::kCuda) {
            guard_.emplace(first.get_device_index());
        }
    }

    [[noreturn]] void fail(const char* argument, const std::string& expected,
                           const std::string& got) const {
        throw std::runtime_error(std::string(op_) + ": " + argument + ": expected " + expected +
                                 ", got " + got);
    }

    void check_shape(const Tensor& tensor, const char* argument,
                     const std::vector<std::int64_t>& shape) const {
        bool same = tensor.dim() == static_cast<std::int64_t>(shape.size());
        for (std::size_t dim = 0; same && dim < shape.size(); ++dim) {
            same = tensor.size(static_cast<std::int64_t>(dim)) == shape[dim];
        }
        if (!same) {
            std::ostringstream expected;
            expected << "shape (";
            for (std::size_t dim = 0; dim < shape.size(); ++dim) {
                expected << (dim ? ", " : "") << shape[dim];
            }
            expected << ")";
            fail(argument, expected.str(), shape_of(tensor));
        }
    }

    void check_dim(const Tensor& tensor, const char* argument, std::int64_t dim) const {
        if (tensor.dim() != dim) {
            fail(argument, std::to_string(dim) + " dimensions", shape_of(tensor));
        }
    }

    void check(bool holds, const char* argument, const std::string& expected,
               const std::string& got) const {
        if (!holds) {
            fail(argument, expected, got);
        }
    }

    // The element type; float64 exists on the CPU backend alone.
    DType dtype(const Tensor& tensor, const char* argument) const {
        switch (tensor.scalar_type()) {
            case ScalarType::Float:
                return DType::float32;
            case ScalarType::Half:
                return DType::float16;
            case ScalarType::BFloat16:
                return DType::bfloat16;
            case ScalarType::Double:
                if (backend == Backend::kCpu) {
                    return DType::float64;
                }
                [[fallthrough]];
            default:
                fail(argument, "dtype float32, float16 or bfloat16",
                     torch::headeronly::toString(tensor.scalar_type()));
        }
    }

    void check_dtype(const Tensor& tensor, const char* argument, DType expected) const {
        const DType got = dtype(tensor, argument);
        check(got == expected, argument, std::string("dtype ") + name_of(expected), name_of(got));
    }

    // A parameter may have the input's dtype or the wide one (float32; float64 beside float64).
    DType parameter_dtype(const Tensor& tensor, const char* argument, DType input) const {
        const DType got = dtype(tensor, argument);
        check(got == input || got == DType::float32, argument,
              std::string("dtype ") + name_of(input) + " or float32", name_of(got));
        return got;
    }

    // Where row statistics are kept: float32, float64 beside float64 inputs.
    static ScalarType statistics_type(DType input) {
        return input == DType::float64 ? ScalarType::Double : ScalarType::Float;
    }

    // `tensor` itself when its last dimension is dense, else a contiguous copy.
    Tensor dense_last(const Tensor& tensor) const {
        const std::int64_t last = tensor.dim() - 1;
        const bool dense = tensor.size(last) == 1 || tensor.stride(last) == 1;
        return dense ? tensor : torch::stable::contiguous(tensor);
    }

    // `tensor` seen as a matrix; see Rows.
    Rows rows(const Tensor& tensor) const {
        const std::int64_t last = tensor.dim() - 1;
        Rows view{dense_last(tensor), 1, tensor.size(last), tensor.size(last)};
        if (view.columns == 0) {
            view.count = 0;
            return view;
        }
        std::int64_t stride = 0;  // between rows, once a dimension of more than one row was seen
        for (std::int64_t dim = last - 1; dim >= 0; --dim) {
            const std::int64_t size = view.tensor.size(dim);
            if (size != 1) {
                if (view.count > 1 && view.tensor.stride(dim) != stride * view.count) {
                    view.tensor = torch::stable::contiguous(view.tensor);
                    view.stride = view.columns;
                    view.count = tensor.numel() / view.columns;
                    return view;
                }
                if (view.count == 1) {
                    stride = view.tensor.stride(dim);
                    view.stride = stride;
                }
            }
            view.count *= size;
        }
        return view;
    }

    // An output or a workspace, contiguous. On the CPU a large one has its memory from the output
    // pool, and returns it there with its last reference.
    Tensor empty(const std::vector<std::int64_t>& shape, ScalarType type) const {
        if constexpr (backend == Backend::kCpu) {
            if (std::optional<Tensor> pooled = pooled_empty(shape, type)) {
                return *std::move(pooled);
            }
        }
        return torch::stable::new_empty(first_, shape, type);
    }

    Tensor empty_like(const Tensor& tensor) const {
        return empty({tensor.sizes().begin(), tensor.sizes().end()}, tensor.scalar_type());
    }

    // A copy that has to outlive the launch.
    const Tensor& keep(Tensor tensor) {
        kept_.push_back(std::move(tensor));
        return kept_.back();
    }

    // The address of an argument that the kernel reads; all tensors of a call share one device.
    const void* input(const Tensor& tensor, const char* argument) {
        check_device(tensor, argument);
        return share(tensor, argument, false);
    }

    void* output(const Tensor& tensor, const char* argument) {
        return share(tensor, argument, true);
    }

    void* stream() const {
        void* stream = nullptr;
        if constexpr (backend == Backend::kCuda) {
            if (aoti_torch_get_current_cuda_stream == nullptr) {
                throw std::runtime_error(std::string(op_) + ": this build of torch has no CUDA");
            }
            check_shim(aoti_torch_get_current_cuda_stream(first_.get_device_index(), &stream),
                       "reading the current CUDA stream");
        }
        return stream;
    }

  private:
    void check_device(const Tensor& tensor, const char* argument) const {
        constexpr bool wants_cuda = backend == Backend::kCuda;
        const bool right =
            wants_cuda ? tensor.is_cuda() && tensor.get_device_index() == first_.get_device_index()
                       : tensor.is_cpu();
        check(right, argument,
              wants_cuda ? "a tensor on the first one's CUDA device" : "a CPU tensor",
              tensor.is_cuda() ? "one on another device" : "one that is not there");
    }

    // Of the types that kernels write; 0 of others, whose memory is the allocator's.
    static std::size_t element_bytes(ScalarType type) {
        switch (type) {
            case ScalarType::Double:
                return 8;
            case ScalarType::Float:
                return 4;
            case ScalarType::Half:
            case ScalarType::BFloat16:
                return 2;
            default:
                return 0;
        }
    }

    // None where the tensor is small or the pool has no memory.
    static std::optional<Tensor> pooled_empty(const std::vector<std::int64_t>& shape,
                                              ScalarType type) {
        std::vector<std::int64_t> strides(shape.size());
        std::int64_t elements = 1;
        for (std::size_t dim = shape.size(); dim-- > 0;) {
            strides[dim] = elements;
            elements *= shape[dim];
        }
        const std::size_t bytes = static_cast<std::size_t>(elements) * element_bytes(type);
        if (bytes < kLeastPooledBytes) {
            return std::nullopt;
        }
        void* const block = acquire_output(bytes);
        if (block == nullptr) {
            return std::nullopt;
        }
        return torch::stable::from_blob(block, shape, strides,
                                        torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                        type, [bytes](void* data) { release_output(data, bytes); });
    }

    void* share(const Tensor& tensor, const char* argument, bool writable) {
        void* address = tensor.data_ptr();
#if defined(WARPLOOM_SIMT)
        ranges_.emplace_back(address, extent_bytes(tensor), argument, writable);
#else
        (void)argument;
        (void)writable;
#endif
        return address;
    }

    // Bytes from the first element to the end of the last one, strides considered.
    static std::size_t extent_bytes(const Tensor& tensor) {
        std::int64_t elements = 1;
        for (std::int64_t dim = 0; dim < tensor.dim(); ++dim) {
            if (tensor.size(dim) == 0) {
                return 0;
            }
            elements += (tensor.size(dim) - 1) * tensor.stride(dim);
        }
        return static_cast<std::size_t>(elements) * tensor.element_size();
    }

    const char* op_;
    const Tensor& first_;
    std::vector<Tensor> kept_;
    std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#if defined(WARPLOOM_SIMT)
    std::vector<device::simt::RegisteredRange> ranges_;  // what this call's kernels may touch
#endif
};

// Runs `function`_cpu or `function`_cuda, whichever the seam is instantiated for.
#define WARPLOOM_RUN(backend, call, function, params)                              \
    if constexpr (backend == ::warploom::Backend::kCpu) {                          \
        function##_cpu(params);                                                    \
    } else {                                                                       \
        function##_cuda(params, static_cast<::warploom::Stream>((call).stream())); \
    }

// Registers the seam function `function` as the overload of this instantiation's backend.
#define WARPLOOM_IMPL(library, backend, function)                                           \
    (library).impl((std::string(#function) + ::warploom::overload_suffix(backend)).c_str(), \
                   TORCH_BOX(&function<backend>))

constexpr const char* overload_suffix(Backend backend) {
#if defined(WARPLOOM_SIMT_INSTRUMENTED)
    constexpr const char* kSimtSuffix = ".simt_instrumented";
#else
    constexpr const char* kSimtSuffix = ".simt";
#endif
    return backend == Backend::kCpu ? ".cpu" : backend == Backend::kCuda ? ".cuda" : kSimtSuffix;
}

// Calls register_family<backend>(library) for every backend that this module holds.
#if defined(WARPLOOM_SIMT)
#define WARPLOOM_REGISTER(register_family)                    \
    STABLE_TORCH_LIBRARY_IMPL(warploom, CPU, library) {       \
        register_family<::warploom::Backend::kSimt>(library); \
    }
#elif defined(WARPLOOM_WITH_CUDA)
#define WARPLOOM_REGISTER(register_family)                    \
    STABLE_TORCH_LIBRARY_IMPL(warploom, CPU, library) {       \
        register_family<::warploom::Backend::kCpu>(library);  \
    }                                                         \
    STABLE_TORCH_LIBRARY_IMPL(warploom, CUDA, library) {      \
        register_family<::warploom::Backend::kCuda>(library); \
    }
#else
#define WARPLOOM_REGISTER(register_family)                   \
    STABLE_TORCH_LIBRARY_IMPL(warploom, CPU, library) {      \
        register_family<::warploom::Backend::kCpu>(library); \
    }
#endif

}  // namespace warploom
