// What every <op>_cpu.cpp is built on: one source compiled once per instruction set, chosen at
// load.
//
// A CPU unit is compiled with WARPLOOM_CPU_ISA=v3 (AVX2, FMA, F16C) and again with v4 (AVX-512).
// All code of such a unit, this header's included, lives in the inline namespace of that name: an
// inline function with one name in both units would be merged by the linker, and an AVX-512 body
// could then run on a machine without it. For the same reason a CPU unit uses no standard
// containers.
#pragma once

#include <cstdint>

// Declares `function` for each instruction set, and the dispatcher that callers use.
#if defined(WARPLOOM_CPU_SINGLE)
#define WARPLOOM_DECLARE_CPU(function, Params)   \
    namespace v3 {                               \
    void function(const Params& params);         \
    }                                            \
    inline void function(const Params& params) { \
        v3::function(params);                    \
    }
#else
#define WARPLOOM_DECLARE_CPU(function, Params)   \
    namespace v3 {                               \
    void function(const Params& params);         \
    }                                            \
    namespace v4 {                               \
    void function(const Params& params);         \
    }                                            \
    inline void function(const Params& params) { \
        if (::warploom::cpu_has_avx512()) {      \
            v4::function(params);                \
        } else {                                 \
            v3::function(params);                \
        }                                        \
    }

namespace warploom {

// x86-64-v4, asked of the processor once.
inline bool cpu_has_avx512() {
    static const bool found =
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl");
    return found;
}

}  // namespace warploom
#endif
