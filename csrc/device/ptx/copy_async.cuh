// Asynchronous copies from global to shared memory, in groups that a thread commits and waits for.
#pragma once

#include "memory.cuh"

namespace warploom::device {

// PTX ISA, Data Movement and Conversion Instructions: cp.async
// Both addresses are multiples of kBytes. `valid` false writes kBytes zeros and reads nothing.
// Copies of 16 bytes pass by the L1 cache (.cg), smaller ones exist only through it (.ca).
template <int kBytes>
WARPLOOM_DEVICE void copy_async(void* shared, const void* global, bool valid = true) {
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "copy_async: 4, 8 or 16 bytes");
    const std::uint32_t destination = detail::shared_address(shared);
    const std::size_t source = __cvta_generic_to_global(global);
    const int source_bytes = valid ? kBytes : 0;
    if constexpr (kBytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], %2, %3;"
                     :
                     : "r"(destination), "l"(source), "n"(kBytes), "r"(source_bytes)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :
                     : "r"(destination), "l"(source), "n"(kBytes), "r"(source_bytes)
                     : "memory");
    }
}

// PTX ISA, Data Movement and Conversion Instructions: cp.async.commit_group
// Closes the group of this thread's copies since the last commit; a group may be empty.
WARPLOOM_DEVICE void copy_async_commit() {
    asm volatile("cp.async.commit_group;" : : : "memory");
}

// PTX ISA, Data Movement and Conversion Instructions: cp.async.wait_group
// Waits until at most kPending of this thread's newest groups are unfinished. Other threads see
// what was copied only after a barrier that follows.
template <int kPending>
WARPLOOM_DEVICE void copy_async_wait() {
    static_assert(kPending >= 0 && kPending <= 7, "copy_async_wait: 0 to 7 pending groups");
    asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

}  // namespace warploom::device
