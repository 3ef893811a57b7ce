// Memory for the large outputs of the CPU backend, reused from one call to the next. An allocator
// maps a block of many megabytes afresh at every call, and the page faults of writing it for the
// first time cost more than the kernel that writes it.
#pragma once

#include <cstddef>

namespace warploom {

// Smaller outputs are the allocator's business: it reuses them itself.
constexpr std::size_t kLeastPooledBytes = std::size_t{1} << 20;

// A block of at least `bytes` bytes, aligned to 2 MiB, its contents undefined; null where the
// system has no memory. Blocks are kept by length, so that the outputs of a training step are found
// again at the next one. Any thread may call it, also in the child of a fork.
void* acquire_output(std::size_t bytes) noexcept;

// Takes back what acquire_output(bytes) returned, on any thread, and until the process ends. At
// most 1 GiB or a sixteenth of the machine's memory is kept; the least recently released blocks go
// first.
void release_output(void* block, std::size_t bytes) noexcept;

}  // namespace warploom
