// What lines of a coupling are read from and written to: a run of contiguous numbers of the type
// that arithmetic happens in where it lies, any other by way of an array of that type. Included by
// <op>_cpu.cpp only (see common/cpu.h on namespaces).
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/cpu_float.h"
#include "common/cpu_loops.h"
#include "coupling/between_cpu.h"
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
inline void write_run(const W* from, std::int64_t length, T* to) {
#pragma omp simd
    for (std::int64_t i = 0; i < length; ++i) {
        to[i] = narrow<T>(from[i]);
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

// Where the next line likely has its elements, so that they can be asked for. Those of a packed
// checkerboard are asked for where they are moved.
inline constexpr char kNowhere = 0;
struct Ahead {
    const char* first = &kNowhere;
    std::int64_t step = 0;  // bytes from an element to the next
};

// After a line whose runs begin `span` apart from the first to the last one: as far apart as the
// line's elements are on average, `gap` beyond its end.
template <typename T>
inline Ahead after_line(const T* first, const Line& line, std::int64_t span, std::int64_t step,
                        std::int64_t gap) {
    const auto size = static_cast<std::int64_t>(sizeof(T));
    const std::int64_t before = line.count - line.runs[line.run_count - 1].length;
    const std::int64_t bytes = before == 0 ? step * size : span * size / before;
    return {reinterpret_cast<const char*>(first + gap) + bytes * line.count, bytes};
}
template <typename T>
inline Ahead next_line(const T* sample, const Line& line) {
    if (sample == nullptr || line.x_step != 1) {
        return {};
    }
    const Run& run = line.runs[0];
    return after_line(sample + run.x, line, line.runs[line.run_count - 1].x - run.x, line.x_step,
                      run.x_gap);
}
// `place`: of the first parameters of the line, or of their gradients, which lie like them.
template <typename T>
inline Ahead next_params(const T* sample, const Line& line, std::int64_t place, std::int64_t step) {
    if (sample == nullptr) {
        return {};
    }
    const Run& run = line.runs[0];
    return after_line(sample + place, line, line.runs[line.run_count - 1].params - run.params, step,
                      run.params_gap);
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
        } else if (line.x_step == 1) {
            read_run(sample + run.x, 1, run.length, to);
        } else {
            prefetch(sample + run.x + 2 * kLine, 2 * run.length);
            read_between(sample + run.x, (run.x & 1) != 0, run.length, to);
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

// What passes of the pixel whose first transformed element is at `place`. The same of the next line
// is asked for.
template <typename T>
inline void write_passing(const CouplingOptions& options, std::int64_t place, const T* passing,
                          T* sample) {
    const std::int64_t pixel = place - options.first;
    const std::int64_t after = place + options.count;
    prefetch(passing + pixel + 2 * kLine, options.channels);
    prefetch(sample + pixel + 2 * kLine, options.channels);
    if (passing != sample) {
        __builtin_memcpy(sample + pixel, passing + pixel, options.first * sizeof(T));
        __builtin_memcpy(sample + after, passing + after,
                         (pixel + options.channels - after) * sizeof(T));
    }
}

// `passing`: where what passes is found that is written with a line.
template <typename T, typename W>
inline void write_line(const W* from, const Line& line, T* sample, const T* passing) {
    if (line.whole_pixels != nullptr) {
        for (std::int64_t r = 0; r < line.run_count; ++r) {
            if (line.runs[r].slot == 0) {
                write_passing(*line.whole_pixels, line.runs[r].x, passing, sample);
            }
        }
    }
    if (is_run<T, W>(line)) {
        return;
    }
    for (std::int64_t r = 0; r < line.run_count; ++r) {
        const Run& run = line.runs[r];
        if (line.indices != nullptr) {
            write_indexed(from, line.indices + run.index, 1, run.length, sample + run.x);
        } else if (line.x_step == 1) {
            write_run(from, run.length, sample + run.x);
        } else {
            prefetch(sample + run.x + 2 * kLine, 2 * run.length);
            write_between(from, passing + run.x, (run.x & 1) != 0, run.length, sample + run.x);
        }
        from += run.length;
    }
}

// Interleaved parameters lie in pairs, the first of them at an even place: what a pair has of the
// others is kept.
template <typename T, typename W>
inline void write_params(const W* from, const Line& line, T* sample) {
    if (is_run_of_params<T, W>(line, line.grads_step)) {
        return;
    }
    if (line.joined_params) {
        write_run(from, line.count, sample + line.runs[0].grads);
        return;
    }
    for (std::int64_t r = 0; r < line.run_count; ++r) {
        const Run& run = line.runs[r];
        T* to = sample + run.grads;
        if (line.grads_step == 1) {
            write_run(from, run.length, to);
        } else {
            const bool odd = reinterpret_cast<std::uintptr_t>(to) / sizeof(T) % 2 != 0;
            write_between(from, to, odd, run.length, to);
        }
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

// to[i] = from[i], or from[0] where a run has one of them.
template <typename W>
inline void read_numbers(const W* from, bool has_one, std::int64_t length, W* to) {
    if (has_one) {
        fill_run(from[0], length, to);
    } else {
        read_run(from, 1, length, to);
    }
}

// to[i] += from[i], or to[0] += all of them where a run has one.
template <typename W>
inline void add_numbers(const W* from, bool has_one, std::int64_t length, W* to) {
    if (has_one) {
        W sum = 0;
#pragma omp simd reduction(+ : sum)
        for (std::int64_t i = 0; i < length; ++i) {
            sum += from[i];
        }
        to[0] += sum;
        return;
    }
#pragma omp simd
    for (std::int64_t i = 0; i < length; ++i) {
        to[i] += from[i];
    }
}

// to[i] = per_slot[slot of element i of the line]
template <typename W>
inline void read_slots(const W* per_slot, const Line& line, W* to) {
    for (std::int64_t r = 0; r < line.run_count; to += line.runs[r++].length) {
        const Run& run = line.runs[r];
        read_numbers(per_slot + run.slot, !line.along_channels, run.length, to);
    }
}

// per_slot[slot of element i] += from[i]
template <typename W>
inline void add_to_slots(const W* from, const Line& line, W* per_slot) {
    for (std::int64_t r = 0; r < line.run_count; from += line.runs[r++].length) {
        const Run& run = line.runs[r];
        add_numbers(from, !line.along_channels, run.length, per_slot + run.slot);
    }
}

// to[i] = per_pixel[pixel of element i of the line]
template <typename W>
inline void read_pixels(const W* per_pixel, const Line& line, W* to) {
    for (std::int64_t r = 0; r < line.run_count; to += line.runs[r++].length) {
        const Run& run = line.runs[r];
        read_numbers(per_pixel + run.pixel, line.along_channels, run.length, to);
    }
}

// per_pixel[pixel of element i] += from[i]
template <typename W>
inline void add_to_pixels(const W* from, const Line& line, W* per_pixel) {
    for (std::int64_t r = 0; r < line.run_count; from += line.runs[r++].length) {
        const Run& run = line.runs[r];
        add_numbers(from, line.along_channels, run.length, per_pixel + run.pixel);
    }
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::coupling
