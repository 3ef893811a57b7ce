// Host twins of ../ptx/memory.cuh, ../ptx/copy_async.cuh and ../ptx/atomic.cuh.
#pragma once

#include <cstring>

#include "primitives.h"

namespace warploom::device {

// The block's dynamic shared memory, which the one struct `Plan` describes; NaN bytes at the start
// of a block.
template <typename Plan>
WARPLOOM_DEVICE Plan& shared_memory(Where where = Where::current()) {
    static_assert(sizeof(Plan) <= simt::kMaxSharedBytes, "shared_memory: the plan exceeds 227 KiB");
    static_assert(alignof(Plan) <= 128, "shared_memory: the plan's alignment exceeds 128 bytes");
    return *static_cast<Plan*>(simt::shared_bytes(sizeof(Plan), where));
}

namespace detail {

template <typename V>
constexpr void require_vector() {
    static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16,
                  "vector: the type must have 4, 8 or 16 bytes");
    static_assert(std::is_trivially_copyable_v<V>, "vector: the type must be trivially copyable");
}

// The copy itself: the check has already told the race detection about it.
template <typename V>
__attribute__((no_sanitize("thread"))) inline V copy_of(const void* address) {
    V value;
    std::memcpy(&value, address, sizeof(V));
    return value;
}

template <typename V>
__attribute__((no_sanitize("thread"))) inline void copy_to(void* address, V value) {
    std::memcpy(address, &value, sizeof(V));
}

}  // namespace detail

template <typename V>
WARPLOOM_DEVICE V load_vector(const void* address, Where where = Where::current()) {
    detail::require_vector<V>();
    simt::check_load(address, sizeof(V), false, where);
    return detail::copy_of<V>(address);
}

template <typename V>
WARPLOOM_DEVICE V load_readonly(const void* address, Where where = Where::current()) {
    detail::require_vector<V>();
    simt::check_load(address, sizeof(V), true, where);
    return detail::copy_of<V>(address);
}

template <typename V>
WARPLOOM_DEVICE void store_vector(void* address, const V& value, Where where = Where::current()) {
    detail::require_vector<V>();
    simt::check_store(address, sizeof(V), where);
    detail::copy_to<V>(address, value);
}

template <int kBytes>
WARPLOOM_DEVICE void copy_async(void* shared, const void* global, bool valid = true,
                                Where where = Where::current()) {
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "copy_async: 4, 8 or 16 bytes");
    simt::issue_copy(shared, global, kBytes, valid, where);
}

WARPLOOM_DEVICE void copy_async_commit(Where where = Where::current()) {
    simt::commit_copies(where);
}

template <int kPending>
WARPLOOM_DEVICE void copy_async_wait(Where where = Where::current()) {
    static_assert(kPending >= 0 && kPending <= 7, "copy_async_wait: 0 to 7 pending groups");
    simt::wait_copies(kPending, where);
}

namespace detail {

template <typename T>
WARPLOOM_DEVICE T atomic(T* address, simt::AtomicOperation operation, T operand, T expected,
                         Where where) {
    return bit_cast<T>(simt::update_atomically(
        address, operation, std::is_floating_point_v<T>, std::is_signed_v<T>,
        bit_cast<std::uint32_t>(operand), bit_cast<std::uint32_t>(expected), where));
}

}  // namespace detail

WARPLOOM_DEVICE float atomic_add(float* address, float value, Where where = Where::current()) {
    return detail::atomic(address, simt::AtomicOperation::add, value, 0.0f, where);
}
WARPLOOM_DEVICE int atomic_add(int* address, int value, Where where = Where::current()) {
    return detail::atomic(address, simt::AtomicOperation::add, value, 0, where);
}
WARPLOOM_DEVICE unsigned atomic_add(unsigned* address, unsigned value,
                                    Where where = Where::current()) {
    return detail::atomic(address, simt::AtomicOperation::add, value, 0u, where);
}

WARPLOOM_DEVICE int atomic_max(int* address, int value, Where where = Where::current()) {
    return detail::atomic(address, simt::AtomicOperation::maximum, value, 0, where);
}

WARPLOOM_DEVICE unsigned atomic_compare_and_swap(unsigned* address, unsigned expected,
                                                 unsigned desired, Where where = Where::current()) {
    return detail::atomic(address, simt::AtomicOperation::compare_and_swap, desired, expected,
                          where);
}

WARPLOOM_DEVICE unsigned atomic_exchange(unsigned* address, unsigned value,
                                         Where where = Where::current()) {
    return detail::atomic(address, simt::AtomicOperation::exchange, value, 0u, where);
}
WARPLOOM_DEVICE int atomic_exchange(int* address, int value, Where where = Where::current()) {
    return detail::atomic(address, simt::AtomicOperation::exchange, value, 0, where);
}
WARPLOOM_DEVICE float atomic_exchange(float* address, float value, Where where = Where::current()) {
    return detail::atomic(address, simt::AtomicOperation::exchange, value, 0.0f, where);
}

}  // namespace warploom::device
