// The functions that -fsanitize=thread makes a kernel unit call: every plain load and store of a
// kernel comes by here. No sanitizer library is linked.
#include <cstdint>
#include <cstring>

#include "executor.h"

namespace {

using warploom::device::simt::AccessKind;
using warploom::device::simt::current_thread;
using warploom::device::simt::Site;
using warploom::device::simt::Thread;

// A thread's own stack holds its registers, in effect: not watched.
inline void watch(const void* address, std::size_t bytes, std::size_t alignment, AccessKind kind,
                  const void* program_counter) {
    Thread* thread = current_thread;
    if (thread == nullptr || thread->inside || bytes == 0 || thread->stack.contains(address)) {
        return;
    }
    thread->inside = true;
    thread->executor->check(address, bytes, alignment, kind,
                            kind == AccessKind::read ? "load" : "store",
                            Site::of_program_counter(program_counter));
    thread->inside = false;
}

}  // namespace

#define WARPLOOM_HOOK extern "C" __attribute__((visibility("hidden")))

#define WARPLOOM_WATCH(name, bytes, alignment, kind)                                     \
    WARPLOOM_HOOK void __tsan_##name(void* address) {                                    \
        watch(address, bytes, alignment, AccessKind::kind, __builtin_return_address(0)); \
    }

#define WARPLOOM_WATCH_SIZE(bytes)                             \
    WARPLOOM_WATCH(read##bytes, bytes, bytes, read)            \
    WARPLOOM_WATCH(write##bytes, bytes, bytes, write)          \
    WARPLOOM_WATCH(volatile_read##bytes, bytes, bytes, read)   \
    WARPLOOM_WATCH(volatile_write##bytes, bytes, bytes, write) \
    WARPLOOM_WATCH(unaligned_read##bytes, bytes, 1, read)      \
    WARPLOOM_WATCH(unaligned_write##bytes, bytes, 1, write)

WARPLOOM_WATCH_SIZE(1)
WARPLOOM_WATCH_SIZE(2)
WARPLOOM_WATCH_SIZE(4)
WARPLOOM_WATCH_SIZE(8)
WARPLOOM_WATCH_SIZE(16)

WARPLOOM_HOOK void __tsan_read_range(void* address, std::size_t bytes) {
    watch(address, bytes, 1, AccessKind::read, __builtin_return_address(0));
}

WARPLOOM_HOOK void __tsan_write_range(void* address, std::size_t bytes) {
    watch(address, bytes, 1, AccessKind::write, __builtin_return_address(0));
}

WARPLOOM_HOOK void __tsan_vptr_read(void**) {}
WARPLOOM_HOOK void __tsan_vptr_update(void**, void*) {}
WARPLOOM_HOOK void __tsan_init() {}
WARPLOOM_HOOK void __tsan_func_entry(void*) {}
WARPLOOM_HOOK void __tsan_func_exit() {}
WARPLOOM_HOOK void __tsan_ignore_thread_begin() {}
WARPLOOM_HOOK void __tsan_ignore_thread_end() {}

// Atomic operations of host code in a kernel unit (launchers: the guard of a function's static
// variable, say). Kernels have the dialect's.
#define WARPLOOM_ATOMIC_UPDATE(bits, operation)                                    \
    WARPLOOM_HOOK std::uint##bits##_t __tsan_atomic##bits##_##operation(           \
        volatile std::uint##bits##_t* address, std::uint##bits##_t operand, int) { \
        return __atomic_##operation(address, operand, __ATOMIC_SEQ_CST);           \
    }

#define WARPLOOM_ATOMIC_SWAP(bits, strength, weak)                                             \
    WARPLOOM_HOOK bool __tsan_atomic##bits##_compare_exchange_##strength(                      \
        volatile std::uint##bits##_t* address, std::uint##bits##_t* expected,                  \
        std::uint##bits##_t desired, int, int) {                                               \
        return __atomic_compare_exchange_n(address, expected, desired, weak, __ATOMIC_SEQ_CST, \
                                           __ATOMIC_SEQ_CST);                                  \
    }

#define WARPLOOM_ATOMIC_SIZE(bits)                                                        \
    WARPLOOM_HOOK std::uint##bits##_t __tsan_atomic##bits##_load(                         \
        const volatile std::uint##bits##_t* address, int) {                               \
        return __atomic_load_n(address, __ATOMIC_SEQ_CST);                                \
    }                                                                                     \
    WARPLOOM_HOOK void __tsan_atomic##bits##_store(volatile std::uint##bits##_t* address, \
                                                   std::uint##bits##_t value, int) {      \
        __atomic_store_n(address, value, __ATOMIC_SEQ_CST);                               \
    }                                                                                     \
    WARPLOOM_HOOK std::uint##bits##_t __tsan_atomic##bits##_exchange(                     \
        volatile std::uint##bits##_t* address, std::uint##bits##_t value, int) {          \
        return __atomic_exchange_n(address, value, __ATOMIC_SEQ_CST);                     \
    }                                                                                     \
    WARPLOOM_ATOMIC_SWAP(bits, strong, false)                                             \
    WARPLOOM_ATOMIC_SWAP(bits, weak, true)                                                \
    WARPLOOM_ATOMIC_UPDATE(bits, fetch_add)                                               \
    WARPLOOM_ATOMIC_UPDATE(bits, fetch_sub)                                               \
    WARPLOOM_ATOMIC_UPDATE(bits, fetch_and)                                               \
    WARPLOOM_ATOMIC_UPDATE(bits, fetch_or)                                                \
    WARPLOOM_ATOMIC_UPDATE(bits, fetch_xor)

WARPLOOM_ATOMIC_SIZE(8)
WARPLOOM_ATOMIC_SIZE(16)
WARPLOOM_ATOMIC_SIZE(32)
WARPLOOM_ATOMIC_SIZE(64)

WARPLOOM_HOOK void __tsan_atomic_thread_fence(int) {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
WARPLOOM_HOOK void __tsan_atomic_signal_fence(int) {
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

// A compiler that replaces the C library's functions calls these.
WARPLOOM_HOOK void* __tsan_memcpy(void* destination, const void* source, std::size_t bytes) {
    watch(source, bytes, 1, AccessKind::read, __builtin_return_address(0));
    watch(destination, bytes, 1, AccessKind::write, __builtin_return_address(0));
    return std::memcpy(destination, source, bytes);
}

WARPLOOM_HOOK void* __tsan_memmove(void* destination, const void* source, std::size_t bytes) {
    watch(source, bytes, 1, AccessKind::read, __builtin_return_address(0));
    watch(destination, bytes, 1, AccessKind::write, __builtin_return_address(0));
    return std::memmove(destination, source, bytes);
}

WARPLOOM_HOOK void* __tsan_memset(void* destination, int value, std::size_t bytes) {
    watch(destination, bytes, 1, AccessKind::write, __builtin_return_address(0));
    return std::memset(destination, value, bytes);
}
