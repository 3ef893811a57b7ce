#include "faults.h"

#include <ucontext.h>

#include <cstddef>
#include <cstdint>

#include "executor.h"

namespace warploom::device::simt {

#if defined(__x86_64__)

namespace {

// Launches run one at a time, so one of each is enough.
alignas(16) std::byte handler_stack[64 * 1024];
alignas(16) std::byte report_stack[256 * 1024];
FaultGuard::Report report_fault = nullptr;
const void* fault_address = nullptr;
const void* fault_counter = nullptr;
struct sigaction previous_segment;
struct sigaction previous_bus;

[[noreturn]] void continue_with_report() {
    report_fault(fault_address, fault_counter);
    __builtin_unreachable();
}

void handle(int signal, siginfo_t* information, void* opaque) {
    if (current_thread == nullptr) {
        // Not a kernel's: the instruction faults again, under the previous handler.
        sigaction(signal, signal == SIGBUS ? &previous_bus : &previous_segment, nullptr);
        return;
    }
    auto* context = static_cast<ucontext_t*>(opaque);
    greg_t* registers = context->uc_mcontext.gregs;
    fault_address = information->si_addr;
    fault_counter = reinterpret_cast<const void*>(registers[REG_RIP]);
    // Entered as if by a call: a return address below a 16-byte boundary.
    const auto top = reinterpret_cast<std::uintptr_t>(report_stack + sizeof(report_stack));
    registers[REG_RSP] = static_cast<greg_t>(top - 8);
    registers[REG_RIP] = reinterpret_cast<greg_t>(&continue_with_report);
}

}  // namespace

FaultGuard::FaultGuard(Report report) {
    report_fault = report;
    stack_t stack{};
    stack.ss_sp = handler_stack;
    stack.ss_size = sizeof(handler_stack);
    sigaltstack(&stack, &previous_stack_);
    struct sigaction action{};
    action.sa_sigaction = &handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(SIGSEGV, &action, &previous_segment_);
    sigaction(SIGBUS, &action, &previous_bus_);
    previous_segment = previous_segment_;
    previous_bus = previous_bus_;
}

FaultGuard::~FaultGuard() {
    sigaction(SIGSEGV, &previous_segment_, nullptr);
    sigaction(SIGBUS, &previous_bus_, nullptr);
    sigaltstack(&previous_stack_, nullptr);
}

#else

FaultGuard::FaultGuard(Report) {}
FaultGuard::~FaultGuard() = default;

#endif

}  // namespace warploom::device::simt
