// Atomic updates of global or shared memory, relaxed, device scope. Each returns the value before
// the update.
#pragma once

#include "index.cuh"

namespace warploom::device {

// PTX ISA, Parallel Synchronization and Communication Instructions: atom.add
WARPLOOM_DEVICE float atomic_add(float* address, float value) {
    return atomicAdd(address, value);
}
WARPLOOM_DEVICE int atomic_add(int* address, int value) {
    return atomicAdd(address, value);
}
WARPLOOM_DEVICE unsigned atomic_add(unsigned* address, unsigned value) {
    return atomicAdd(address, value);
}

// PTX ISA, Parallel Synchronization and Communication Instructions: atom.max
WARPLOOM_DEVICE int atomic_max(int* address, int value) {
    return atomicMax(address, value);
}

// PTX ISA, Parallel Synchronization and Communication Instructions: atom.cas
WARPLOOM_DEVICE unsigned atomic_compare_and_swap(unsigned* address, unsigned expected,
                                                 unsigned desired) {
    return atomicCAS(address, expected, desired);
}

// PTX ISA, Parallel Synchronization and Communication Instructions: atom.exch
WARPLOOM_DEVICE unsigned atomic_exchange(unsigned* address, unsigned value) {
    return atomicExch(address, value);
}
WARPLOOM_DEVICE int atomic_exchange(int* address, int value) {
    return atomicExch(address, value);
}
WARPLOOM_DEVICE float atomic_exchange(float* address, float value) {
    return atomicExch(address, value);
}

}  // namespace warploom::device
