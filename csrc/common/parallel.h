// Threads for CPU kernels: PyTorch's own pool, behind an interface that needs no torch header.
#pragma once

#include <cstdint>
#include <type_traits>

namespace warploom {

// Runs body(context, begin, end) over disjoint ranges that cover [0, size), on PyTorch's threads;
// ranges are at least `grain` long. An exception thrown by `body` reaches the caller.
void parallel_ranges(std::int64_t size, std::int64_t grain,
                     void (*body)(void* context, std::int64_t begin, std::int64_t end),
                     void* context);

// How many threads parallel_for may use.
int thread_count();

// body(begin, end) over disjoint ranges that cover [0, size).
template <typename Body>
void parallel_for(std::int64_t size, std::int64_t grain, Body&& body) {
    using Callable = std::remove_reference_t<Body>;
    parallel_ranges(
        size, grain,
        [](void* context, std::int64_t begin, std::int64_t end) {
            (*static_cast<Callable*>(context))(begin, end);
        },
        const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace warploom
