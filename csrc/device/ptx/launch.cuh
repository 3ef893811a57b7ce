// Launching a kernel from the host.
#pragma once

#include <cuda_runtime_api.h>
#include <cxxabi.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <typeinfo>

#include "index.cuh"

namespace warploom::device {

using Stream = cudaStream_t;

struct LaunchShape {
    dim3 grid;
    int threads;
    std::size_t shared_bytes = 0;
};

namespace detail {

// Dynamic shared memory that a kernel gets without asking for more.
inline constexpr std::size_t kDefaultSharedBytes = 48 * 1024;

inline std::string demangled(const char* symbol) {
    int status = 0;
    char* text = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
    std::string name = status == 0 ? text : symbol;
    std::free(text);
    return name;
}

inline void check_launch(cudaError_t error, const void* kernel, const std::type_info& params,
                         const LaunchShape& shape) {
    if (error == cudaSuccess) {
        return;
    }
    // Clear what is not sticky, so that the next launch does not report this one's failure.
    cudaGetLastError();
    const char* symbol = nullptr;
    const bool named = cudaFuncGetName(&symbol, kernel) == cudaSuccess && symbol != nullptr;
    const std::string name =
        named ? demangled(symbol) : "the kernel of " + demangled(params.name());
    cudaGetLastError();
    throw std::runtime_error("launch of " + name + " failed: " + cudaGetErrorString(error) + " (" +
                             cudaGetErrorName(error) + "); grid (" + std::to_string(shape.grid.x) +
                             ", " + std::to_string(shape.grid.y) + ", " +
                             std::to_string(shape.grid.z) + "), " + std::to_string(shape.threads) +
                             " threads, " + std::to_string(shape.shared_bytes) +
                             " bytes of shared memory");
}

}  // namespace detail

// Queues `kernel` on `stream`. Throws std::runtime_error that names the kernel, CUDA's reason and
// the shape; what goes wrong while the kernel runs shows at the next synchronisation.
template <typename Params>
void launch(void (*kernel)(Params), const LaunchShape& shape, Stream stream, const Params& params) {
    static_assert(std::is_trivially_copyable_v<Params>, "launch: Params must be a POD struct");
    static_assert(sizeof(Params) <= 4096, "launch: Params exceeds 4096 bytes");
    const void* function = reinterpret_cast<const void*>(kernel);
    if (shape.shared_bytes > detail::kDefaultSharedBytes) {
        detail::check_launch(
            cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shape.shared_bytes)),
            function, typeid(Params), shape);
    }
    void* arguments[] = {const_cast<Params*>(&params)};
    detail::check_launch(
        cudaLaunchKernel(function, shape.grid, dim3(static_cast<unsigned>(shape.threads)),
                         arguments, shape.shared_bytes, stream),
        function, typeid(Params), shape);
}

namespace detail {

// Of the current device; launchers may ask while a graph is captured.
inline int attribute_of_device(cudaDeviceAttr attribute, const char* name) {
    int device = 0;
    int value = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&value, attribute, device);
    }
    if (error != cudaSuccess) {
        cudaGetLastError();
        throw std::runtime_error(std::string("asking for the device's ") + name +
                                 " failed: " + cudaGetErrorString(error));
    }
    return value;
}

}  // namespace detail

inline int multiprocessor_count() {
    return detail::attribute_of_device(cudaDevAttrMultiProcessorCount, "multiprocessors");
}

// Shared memory that one block may have.
inline std::size_t shared_memory_limit() {
    return static_cast<std::size_t>(detail::attribute_of_device(
        cudaDevAttrMaxSharedMemoryPerBlockOptin, "shared memory of a block"));
}

}  // namespace warploom::device
