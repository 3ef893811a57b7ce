// Device buffers and error reports for C entry points, for a GPU and for the host executor.
#pragma once

#include <cstddef>
#include <cstdio>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <string_view>

#include "../../csrc/device/device.cuh"

#if defined(__CUDACC__)
#include <cuda_runtime_api.h>
#else
#include "../../csrc/device/simt/memory.h"
#endif

// An entry point of a test library, called from Python through ctypes.
#define WARPLOOM_TEST_ENTRY extern "C" __attribute__((visibility("default")))

namespace warploom::harness {

#if defined(__CUDACC__)

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
    }
}

// Device memory with a copy of `bytes` bytes of host memory.
class Buffer {
  public:
    Buffer(const void* host, std::size_t bytes) : bytes_(bytes) {
        check(cudaMalloc(&data_, bytes == 0 ? 1 : bytes), "cudaMalloc");
        check(cudaMemcpy(data_, host, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
    }
    ~Buffer() { cudaFree(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    void* data() const { return data_; }
    void copy_to(void* host) const {
        check(cudaMemcpy(host, data_, bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy");
    }

  private:
    void* data_ = nullptr;
    std::size_t bytes_;
};

inline void synchronise() {
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

#else

// The executor's memory: `bytes` bytes that end at a page which faults.
class Buffer {
  public:
    Buffer(const void* host, std::size_t bytes)
        : data_(device::simt::allocate(bytes)), bytes_(bytes) {
        std::memcpy(data_, host, bytes);
    }
    ~Buffer() { device::simt::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    void* data() const { return data_; }
    void copy_to(void* host) const { std::memcpy(host, data_, bytes_); }

  private:
    void* data_;
    std::size_t bytes_;
};

inline void synchronise() {}

#endif

// Calls `body`; an exception becomes its text in `error` and the return value 1.
template <typename Body>
int report_errors(char* error, std::size_t error_bytes, const Body& body) {
    try {
        body();
        return 0;
    } catch (const std::exception& exception) {
        std::snprintf(error, error_bytes, "%s", exception.what());
        return 1;
    }
}

}  // namespace warploom::harness
