// What lines of a coupling are read from and written to: a run of contiguous numbers of the type
// that arithmetic happens in where it lies, any other by way of an array of that type. Included by
// <op>_cpu.cpp only (see common/cpu.h on namespaces).
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/cpu_float.h"
#include "coupling/lines_cpu.h"

namespace warploom::coupling {
namespace WARPLOOM_CPU_ISA {

using namespace ::warploom::WARPLOOM_CPU_ISA;

template <typename T, typename W>
inline void read_run(const T* from, std::int64_t step, std::int64_t length, W* to) {
    if (step == 1) {
#pragma omp simd
        for (std::int64_t i = 0; i < length; ++i) {
            to[i] = static_cast<W>(widen(from[i]));
        }
    } else {
#pragma omp simd
        for (std::int64_t i = 0; i < length; ++i) {
            to[i] = static_cast<W>(widen(from[2 * i]));
        }
    }
}

template <typename T, typename W>
inline void read_indexed(const T* from, const std::int32_t* indices, std::int64_t step,
                         std::int64_t length, W* to) {
    for (std::int64_t i = 0; i < length; ++i) {
        to[i] = static_cast<W>(widen(from[step * indices[i]]));
    }
}

template <typename T, typename W>
inline void write_run(const W* from, std::int64_t step, std::int64_t length, T* to) {
    if (step == 1) {
#pragma omp simd
        for (std::int64_t i = 0; i < length; ++i) {
            to[i] = narrow<T>(from[i]);
        }
    } else {
        // What lies between is written, too, as it is: then whole vectors are.
#pragma omp simd
        for (std::int64_t i = 0; i < length - 1; ++i) {
            const T between = to[2 * i + 1];
            to[2 * i] = narrow<T>(from[i]);
            to[2 * i + 1] = between;
        }
        to[2 * (length - 1)] = narrow<T>(from[length - 1]);
    }
}

template <typename T, typename W>
inline void write_indexed(const W* from, const std::int32_t* indices, std::int64_t step,
                          std::int64_t length, T* to) {
    for (std::int64_t i = 0; i < length; ++i) {
        to[step * indices[i]] = narrow<T>(from[i]);
    }
}

// Whether the elements of a line of x, or its parameters, are a run of W in memory.
template <typename T, typename W>
inline bool is_run(const Line& line) {
    return std::is_same_v<T, W> && line.run_count == 1 && line.x_step == 1 &&
           line.indices == nullptr;
}
template <typename T, typename W>
inline bool is_run_of_params(const Line& line, std::int64_t step) {
    return std::is_same_v<T, W> && (line.run_count == 1 || line.joined_params) && step == 1;
}

// How far behind an element of a line, or its parameters, the next line has its own.
template <typename T, typename W>
inline std::int64_t next_x(const Line& line) {
    return is_run<T, W>(line) ? line.count + line.runs[0].x_gap : 0;
}
template <typename T, typename W>
inline std::int64_t next_params(const Line& line) {
    return is_run_of_params<T, W>(line, line.params_step) ? line.count + line.runs[0].params_gap
                                                          : 0;
}

// The elements of a line of a sample of x, in `buffer` [kLine] or where they are.
template <typename T, typename W>
inline const W* read_line(const T* sample, const Line& line, W* buffer) {
    if constexpr (std::is_same_v<T, W>) {
        if (is_run<T, W>(line)) {
            return sample + line.runs[0].x;
        }
    }
    W* to = buffer;
    for (std::int64_t r = 0; r < line.run_count; ++r) {
        const Run& run = line.runs[r];
        if (line.indices != nullptr) {
            read_indexed(sample + run.x, line.indices + run.index, 1, run.length, to);
        } else {
            read_run(sample + run.x, line.x_step, run.length, to);
        }
        to += run.length;
    }
    return buffer;
}

template <typename T, typename W>
inline const W* read_params(const T* sample, const Line& line, W* buffer) {
    if constexpr (std::is_same_v<T, W>) {
        if (is_run_of_params<T, W>(line, line.params_step)) {
            return sample + line.runs[0].params;
        }
    }
    if (line.joined_params) {
        read_run(sample + line.runs[0].params, 1, line.count, buffer);
        return buffer;
    }
    W* to = buffer;
    for (std::int64_t r = 0; r < line.run_count; ++r) {
        const Run& run = line.runs[r];
        read_run(sample + run.params, line.params_step, run.length, to);
        to += run.length;
    }
    return buffer;
}

// Where a line is computed that write_line, or write_params, is given next: where it belongs, or
// `buffer`.
template <typename T, typename W>
inline W* line_target(T* sample, const Line& line, W* buffer) {
    if constexpr (std::is_same_v<T, W>) {
        if (is_run<T, W>(line)) {
            return sample + line.runs[0].x;
        }
    }
    return buffer;
}
template <typename T, typename W>
inline W* params_target(T* sample, const Line& line, W* buffer) {
    if constexpr (std::is_same_v<T, W>) {
        if (sample != nullptr && is_run_of_params<T, W>(line, line.grads_step)) {
            return sample + line.runs[0].grads;
        }
    }
    return buffer;
}

template <typename T, typename W>
inline void write_line(const W* from, const Line& line, T* sample) {
    if (is_run<T, W>(line)) {
        return;
    }
    for (std::int64_t r = 0; r < line.run_count; ++r) {
        const Run& run = line.runs[r];
        if (line.indices != nullptr) {
            write_indexed(from, line.indices + run.index, 1, run.length, sample + run.x);
        } else {
            write_run(from, line.x_step, run.length, sample + run.x);
        }
        from += run.length;
    }
}

template <typename T, typename W>
inline void write_params(const W* from, const Line& line, T* sample) {
    if (is_run_of_params<T, W>(line, line.grads_step)) {
        return;
    }
    if (line.joined_params) {
        write_run(from, 1, line.count, sample + line.runs[0].grads);
        return;
    }
    for (std::int64_t r = 0; r < line.run_count; ++r) {
        const Run& run = line.runs[r];
        write_run(from, line.grads_step, run.length, sample + run.grads);
        from += run.length;
    }
}

template <typename W>
inline void fill_run(W value, std::int64_t length, W* to) {
#pragma omp simd
    for (std::int64_t i = 0; i < length; ++i) {
        to[i] = value;
    }
}

// to[i] = per_slot[slot of element i of the line]
template <typename W>
inline void read_slots(const W* per_slot, const Line& line, W* to) {
    for (std::int64_t r = 0; r < line.run_count; ++r) {
        const Run& run = line.runs[r];
        const W* from = per_slot + run.slot;
        if (!line.along_channels) {
            fill_run(from[0], run.length, to);
        } else {
            read_run(from, 1, run.length, to);
        }
        to += run.length;
    }
}

// per_slot[slot of element i] += from[i]
template <typename W>
inline void add_to_slots(const W* from, const Line& line, W* per_slot) {
    for (std::int64_t r = 0; r < line.run_count; ++r) {
        const Run& run = line.runs[r];
        W* to = per_slot + run.slot;
        if (!line.along_channels) {
            W sum = 0;
#pragma omp simd reduction(+ : sum)
            for (std::int64_t i = 0; i < run.length; ++i) {
                sum += from[i];
            }
            to[0] += sum;
        } else {
            for (std::int64_t i = 0; i < run.length; ++i) {
                to[i] += from[i];
            }
        }
        from += run.length;
    }
}

// to[i] = per_pixel[pixel of element i of the line]
template <typename W>
inline void read_pixels(const W* per_pixel, const Line& line, W* to) {
    for (std::int64_t r = 0; r < line.run_count; ++r) {
        const Run& run = line.runs[r];
        if (line.along_channels) {
            fill_run(per_pixel[run.pixel], run.length, to);
        } else {
            read_run(per_pixel + run.pixel, 1, run.length, to);
        }
        to += run.length;
    }
}

template <typename W>
inline void add_to_pixels(const W* from, const Line& line, W* per_pixel) {
    for (std::int64_t r = 0; r < line.run_count; ++r) {
        const Run& run = line.runs[r];
        W* to = per_pixel + run.pixel;
        if (line.along_channels) {
            W sum = 0;
#pragma omp simd reduction(+ : sum)
            for (std::int64_t i = 0; i < run.length; ++i) {
                sum += from[i];
            }
            to[0] += sum;
        } else {
#pragma omp simd
            for (std::int64_t i = 0; i < run.length; ++i) {
                to[i] += from[i];
            }
        }
        from += run.length;
    }
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::coupling
