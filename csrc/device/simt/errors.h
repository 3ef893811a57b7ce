// The one exception that leaves a launch.
#pragma once

#include <stdexcept>
#include <string>

namespace warploom::device::simt {

// what() reads "KERNEL: block (x, y, z), thread T (warp W, lane L), at FILE:LINE: WHAT". The
// executor is ready for the next launch when it is thrown.
class KernelError : public std::runtime_error {
  public:
    KernelError(std::string kernel_name, int thread_number, std::string place,
                const std::string& text)
        : std::runtime_error(text),
          kernel(std::move(kernel_name)),
          thread(thread_number),
          location(std::move(place)) {}

    std::string kernel;
    int thread;            // in its block; -1 where the whole block is concerned
    std::string location;  // "file:line", empty where there is none
};

}  // namespace warploom::device::simt
