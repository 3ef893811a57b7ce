// Host twin of ../ptx/launch.cuh.
#pragma once

#include "primitives.h"

namespace warploom::device {

namespace detail {

#if defined(__SANITIZE_THREAD__)
inline constexpr bool kInstrumented = true;
#else
inline constexpr bool kInstrumented = false;
#endif

// Not instrumented: it reads the launcher's copy of the arguments, which no kernel may.
template <typename Params>
__attribute__((no_sanitize("thread"))) void enter(const void* kernel, const void* arguments) {
    reinterpret_cast<void (*)(Params)>(const_cast<void*>(kernel))(
        *static_cast<const Params*>(arguments));
}

}  // namespace detail

// Runs the grid to its end before it returns; the stream is ignored. Throws simt::KernelError (a
// std::runtime_error).
template <typename Params>
void launch(void (*kernel)(Params), const LaunchShape& shape, Stream, const Params& params,
            Where where = Where::current()) {
    static_assert(std::is_trivially_copyable_v<Params>, "launch: Params must be a POD struct");
    static_assert(sizeof(Params) <= 4096, "launch: Params exceeds 4096 bytes");
    simt::run_grid(shape, &detail::enter<Params>, reinterpret_cast<const void*>(kernel), &params,
                   detail::kInstrumented, where);
}

// A few, so that launchers which fill the device make small grids here.
inline int multiprocessor_count() {
    return 4;
}

inline std::size_t shared_memory_limit() {
    return simt::shared_memory_limit();
}

}  // namespace warploom::device
