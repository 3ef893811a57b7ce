// Loads, stores, atomics and asynchronous copies: what each checks, and what it does.
#include <cstring>

#include "executor.h"

namespace warploom::device::simt {

namespace {

const char* verb(AccessKind kind) {
    switch (kind) {
        case AccessKind::read:
            return "reads";
        case AccessKind::write:
            return "writes";
        case AccessKind::atomic:
            return "updates";
    }
    return "uses";
}

std::string opening(const char* operation, AccessKind kind, std::size_t bytes) {
    return std::string(operation) + " " + verb(kind) + " " + std::to_string(bytes) + " bytes";
}

void copy_bytes(const DeferredOperation& copy) {
    if (copy.source == nullptr) {
        std::memset(copy.destination, 0, copy.bytes);
    } else {
        std::memcpy(copy.destination, copy.source, copy.bytes);
    }
}

}  // namespace

void Executor::check(const void* address, std::size_t bytes, std::size_t alignment, AccessKind kind,
                     const char* operation, Site site) {
    const auto place = reinterpret_cast<std::uintptr_t>(address);
    if (in_shared(address, bytes)) {
        if (place % alignment != 0) {
            check_shared(address, bytes, alignment, operation, site);
        }
        if (hazards_ != nullptr) {
            hazards_->access_shared(*this, place - shared_begin_, bytes, kind, operation, site);
        }
        return;
    }
    if (in_own_stack(address)) {
        return;
    }
    if (place - reinterpret_cast<std::uintptr_t>(shared_mapping_) + kMaxSharedBytes <
        3 * kMaxSharedBytes) {
        check_shared(address, bytes, alignment, operation, site);
    }
    if (place % alignment != 0) {
        fail(site, opening(operation, kind, bytes) + " at an address that is " +
                       std::to_string(place % alignment) + " modulo " + std::to_string(alignment) +
                       "; expected a multiple of " + std::to_string(alignment));
    }
    if (global_.empty()) {
        return;
    }
    const bool write = kind != AccessKind::read;
    const GlobalMemory::Range* range = global_.find(place, bytes, write);
    if (range == nullptr) {
        fail(site, opening(operation, kind, bytes) +
                       " out of bounds: " + global_.explain(place, bytes, write));
    }
    if (hazards_ != nullptr && range->overlaps_writable) {
        hazards_->access_global(*this, *range, place, bytes, kind, operation, site);
    }
}

void Executor::check_shared(const void* address, std::size_t bytes, std::size_t alignment,
                            const char* operation, Site site) {
    const auto offset =
        static_cast<std::ptrdiff_t>(reinterpret_cast<std::uintptr_t>(address) - shared_begin_);
    if (!in_shared(address, bytes)) {
        const bool near = offset >= -static_cast<std::ptrdiff_t>(kMaxSharedBytes) &&
                          offset < static_cast<std::ptrdiff_t>(2 * kMaxSharedBytes);
        fail(site, std::string(operation) + ": " + std::to_string(bytes) + " bytes" +
                       (near ? " at offset " + std::to_string(offset) + " of shared memory"
                             : " that are not in shared memory") +
                       "; expected to lie within its " + std::to_string(shared_bytes_) + " bytes");
    }
    if (offset % static_cast<std::ptrdiff_t>(alignment) != 0) {
        fail(site, std::string(operation) + ": misaligned: " + std::to_string(bytes) +
                       " bytes at offset " + std::to_string(offset) +
                       " of shared memory; expected a multiple of " + std::to_string(alignment));
    }
}

void Executor::issue_copy(void* destination, const void* source, std::uint32_t bytes, bool valid,
                          Site site) {
    ++report_.async_copies;
    check_shared(destination, bytes, bytes, "copy_async: destination", site);
    if (valid) {
        if (in_shared(source, bytes) || in_own_stack(source)) {
            fail(site, "copy_async: source: expected an address in global memory");
        }
        check(source, bytes, bytes, AccessKind::read, "copy_async", site);
    }
    const auto offset = reinterpret_cast<std::uintptr_t>(destination) - shared_begin_;
    if (hazards_ != nullptr) {
        hazards_->begin_async_write(*this, offset, bytes, "copy_async", site);
    }
    DeferredOperation copy{&copy_bytes, static_cast<std::byte*>(destination),
                           valid ? static_cast<const std::byte*>(source) : nullptr, bytes, site};
    const bool at_once = controls_.async_policy == AsyncPolicy::early ||
                         (controls_.async_policy == AsyncPolicy::random && random_.below(4) == 0);
    if (at_once) {
        DeferredQueue::perform(copy);
    } else {
        std::memset(destination, 0xff, bytes);
    }
    running_->copies.issue(copy);
}

void Executor::commit_copies() {
    running_->copies.commit();
    if (controls_.async_policy == AsyncPolicy::random) {
        running_->copies.stir(random_);
    }
}

void Executor::wait_copies(int pending_groups) {
    running_->copies.wait(pending_groups, [&](const DeferredOperation& copy) {
        if (hazards_ != nullptr) {
            const auto offset = reinterpret_cast<std::uintptr_t>(copy.destination) - shared_begin_;
            hazards_->end_async_write(running_->number, offset, copy.bytes, copy.site);
        }
    });
}

void issue_copy(void* destination, const void* source, std::uint32_t bytes, bool valid,
                Where where) {
    const Stay stay;
    stay->issue_copy(destination, source, bytes, valid, Site(where));
}

void commit_copies(Where) {
    const Stay stay;
    stay->commit_copies();
}

void wait_copies(int pending_groups, Where) {
    const Stay stay;
    stay->wait_copies(pending_groups);
}

void check_load(const void* address, std::uint32_t bytes, bool readonly, Where where) {
    const Stay stay;
    Executor& executor = *stay;
    const char* name = readonly ? "load_readonly" : "load_vector";
    if (readonly && executor.in_shared(address, bytes)) {
        executor.fail(Site(where), "load_readonly: expected an address in global memory");
    }
    executor.check(address, bytes, bytes, AccessKind::read, name, Site(where));
}

void check_store(void* address, std::uint32_t bytes, Where where) {
    const Stay stay;
    stay->check(address, bytes, bytes, AccessKind::write, "store_vector", Site(where));
}

std::uint32_t update_atomically(void* address, AtomicOperation operation, bool is_float,
                                bool is_signed, std::uint32_t operand, std::uint32_t expected,
                                Where where) {
    const Stay stay;
    stay->check(address, 4, 4, AccessKind::atomic, "atomic", Site(where));
    std::uint32_t old;
    std::memcpy(&old, address, sizeof(old));
    std::uint32_t updated = operand;
    switch (operation) {
        case AtomicOperation::add:
            updated = is_float ? std::bit_cast<std::uint32_t>(std::bit_cast<float>(old) +
                                                              std::bit_cast<float>(operand))
                               : old + operand;
            break;
        case AtomicOperation::maximum: {
            const bool keep =
                is_signed ? static_cast<std::int32_t>(old) >= static_cast<std::int32_t>(operand)
                          : old >= operand;
            updated = keep ? old : operand;
            break;
        }
        case AtomicOperation::exchange:
            break;
        case AtomicOperation::compare_and_swap:
            updated = old == expected ? operand : old;
            break;
    }
    std::memcpy(address, &updated, sizeof(updated));
    return old;
}

// Threads run one at a time: what it orders between blocks has no meaning here.
void fence(Where) {
    const Stay stay;
}

void* shared_bytes(std::size_t bytes, Where where) {
    const Stay stay;
    Executor& executor = *stay;
    if (bytes > executor.shared_size()) {
        executor.fail(Site(where), "shared_memory: the plan has " + std::to_string(bytes) +
                                       " bytes, the launch gave " +
                                       std::to_string(executor.shared_size()) +
                                       "; expected LaunchShape::shared_bytes = sizeof(Plan)");
    }
    return executor.shared_begin();
}

}  // namespace warploom::device::simt
