// Turns a memory fault of a kernel into an error of its launch.
#pragma once

#include <csignal>

namespace warploom::device::simt {

// While one lives, a fault of a kernel on this operating-system thread calls `report(address,
// program_counter)` on a stack of its own; `report` must not return. Faults of other code go to
// whoever handled them before. Does nothing on machines other than x86-64.
class FaultGuard {
  public:
    using Report = void (*)(const void* address, const void* program_counter);

    explicit FaultGuard(Report report);
    ~FaultGuard();
    FaultGuard(const FaultGuard&) = delete;
    FaultGuard& operator=(const FaultGuard&) = delete;

  private:
    struct sigaction previous_segment_;
    struct sigaction previous_bus_;
    stack_t previous_stack_;
};

}  // namespace warploom::device::simt
