#include "fibre.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

namespace warploom::device::simt {

namespace {

constexpr std::size_t kPage = 4096;
// An odd number of pages, guard included, and a colour within the first: stacks that started at
// equal cache sets would evict one another at every switch.
constexpr std::size_t kSlotPages = 65;
constexpr std::size_t kColourBytes = 192;
constexpr int kChunk = 64;  // stacks of one mapping

}  // namespace

void StackPool::reserve(int count) {
    while (static_cast<int>(stacks_.size()) < count) {
        void* mapping = mmap(nullptr, kSlotPages * kPage * kChunk, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
        if (mapping == MAP_FAILED) {
            throw std::bad_alloc();
        }
        for (std::size_t index = 0; index < kChunk; ++index) {
            std::byte* slot = static_cast<std::byte*>(mapping) + index * kSlotPages * kPage;
            if (mprotect(slot, kPage, PROT_NONE) != 0) {
                throw std::bad_alloc();
            }
            const std::size_t colour = stacks_.size() * kColourBytes % kPage;
            stacks_.push_back({slot + kPage, slot + kSlotPages * kPage - colour});
        }
    }
}

#if defined(__x86_64__) && !defined(WARPLOOM_SIMT_PORTABLE_FIBRES)

// System V: rbx, rbp and r12 to r15 survive a call, all else is the caller's.
extern "C" __attribute__((visibility("hidden"))) void warploom_simt_switch(void** from, void* to);
asm(R"(
.text
.align 16
.hidden warploom_simt_switch
.globl warploom_simt_switch
.type warploom_simt_switch, @function
warploom_simt_switch:
    .cfi_startproc
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
    .cfi_endproc
.size warploom_simt_switch, .-warploom_simt_switch
)");

void prepare(Fibre& fibre, Stack stack, void (*entry)()) {
    constexpr int kSavedRegisters = 6;
    // `entry` is entered by the switch's `ret`, with a zero return address above it where a
    // backtrace ends, and the stack aligned as after a call.
    auto top = reinterpret_cast<std::uintptr_t>(stack.high) & ~std::uintptr_t{15};
    auto* words = reinterpret_cast<void**>(top) - 1;
    words[0] = nullptr;
    *--words = reinterpret_cast<void*>(entry);
    for (int index = 0; index < kSavedRegisters; ++index) {
        *--words = nullptr;
    }
    fibre.stack_pointer = words;
}

void switch_fibre(Fibre& from, Fibre& to) {
    warploom_simt_switch(&from.stack_pointer, to.stack_pointer);
}

#else

void prepare(Fibre& fibre, Stack stack, void (*entry)()) {
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = stack.low;
    fibre.context.uc_stack.ss_size = static_cast<std::size_t>(stack.high - stack.low);
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, entry, 0);
}

void switch_fibre(Fibre& from, Fibre& to) {
    swapcontext(&from.context, &to.context);
}

#endif

}  // namespace warploom::device::simt
