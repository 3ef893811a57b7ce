// What every <op>_cpu.cpp is built on: one source compiled once per instruction set, chosen at
// load.
//
// A CPU unit is compiled with WARPLOOM_CPU_ISA=v3 (AVX2, FMA, F16C), again with v4 (AVX-512) and,
// where setup.py lists it among BF16_UNITS, with v4_bf16 (AVX512-BF16, products of bfloat16).
// All code of such a unit, this header's included, lives in the inline namespace of that name: an
// inline function with one name in both units would be merged by the linker, and an AVX-512 body
// could then run on a machine without it. For the same reason a CPU unit uses no standard
// containers.
#pragma once

#include <cstdint>

#define WARPLOOM_DECLARE_CPU_IN(isa, function, Params) \
    namespace isa {                                    \
    void function(const Params& params);               \
    }

// Declares `function` for each instruction set, and the dispatcher that callers use. With _BF16:
// of a unit that is compiled with v4_bf16, too.
#if defined(WARPLOOM_CPU_SINGLE)
#define WARPLOOM_DECLARE_CPU(function, Params)    \
    WARPLOOM_DECLARE_CPU_IN(v3, function, Params) \
    inline void function(const Params& params) {  \
        v3::function(params);                     \
    }
#define WARPLOOM_DECLARE_CPU_BF16(function, Params) WARPLOOM_DECLARE_CPU(function, Params)
#else
#define WARPLOOM_DECLARE_CPU(function, Params)    \
    WARPLOOM_DECLARE_CPU_IN(v3, function, Params) \
    WARPLOOM_DECLARE_CPU_IN(v4, function, Params) \
    inline void function(const Params& params) {  \
        if (::warploom::cpu_has_avx512()) {       \
            v4::function(params);                 \
        } else {                                  \
            v3::function(params);                 \
        }                                         \
    }
#define WARPLOOM_DECLARE_CPU_BF16(function, Params)    \
    WARPLOOM_DECLARE_CPU_IN(v3, function, Params)      \
    WARPLOOM_DECLARE_CPU_IN(v4, function, Params)      \
    WARPLOOM_DECLARE_CPU_IN(v4_bf16, function, Params) \
    inline void function(const Params& params) {       \
        if (::warploom::cpu_has_avx512_bf16()) {       \
            v4_bf16::function(params);                 \
        } else if (::warploom::cpu_has_avx512()) {     \
            v4::function(params);                      \
        } else {                                       \
            v3::function(params);                      \
        }                                              \
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

inline bool cpu_has_avx512_bf16() {
    static const bool found = cpu_has_avx512() && __builtin_cpu_supports("avx512bf16");
    return found;
}

}  // namespace warploom
#endif
