// The transformed elements of a coupling as lines: up to kLine of them, gathered from runs in
// memory into arrays of the type that arithmetic happens in, and scattered back. Included by
// <op>_cpu.cpp only (see common/cpu.h on namespaces).
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/cpu_float.h"
#include "coupling/affine_coupling.h"

namespace warploom::coupling {
namespace WARPLOOM_CPU_ISA {

using namespace ::warploom::WARPLOOM_CPU_ISA;

constexpr std::int64_t kLine = 512;

// Elements that follow each other in x and in the parameters.
struct Run {
    std::int64_t x;       // the first one's place in a sample of x
    std::int64_t params;  // in one of shift
    std::int64_t grads;   // in one of grad_shift
    std::int64_t length;
    std::int64_t index;  // where the line has indices: of the first one's
    std::int64_t slot;   // the parameters' channel of the first element
    std::int64_t pixel;  // within its part
};

struct Line {
    Run runs[kLine];
    std::int64_t run_count;
    std::int64_t count;           // of elements in all runs
    const std::int32_t* indices;  // null, or element i of a run of x is at x + indices[index + i]
    bool masked;                  // passing elements are in it, too: `moved` tells
    bool joined_params;           // the runs have their parameters one behind the other
    std::uint8_t moved[kLine];
    bool along_channels;  // a run has one pixel and many channels, else the reverse
    std::int64_t x_step;
    std::int64_t params_step;
    std::int64_t grads_step;
};

inline bool is_checkerboard(const CouplingOptions& options) {
    return options.mask == CouplingMask::checkerboard ||
           options.mask == CouplingMask::checkerboard_packed;
}

// Whether lines hold what passes, too, so that they are whole pieces of memory.
inline bool is_masked(const CouplingOptions& options) {
    return options.mask == CouplingMask::free ||
           (options.mask == CouplingMask::checkerboard && !options.channels_last);
}

// Whether parameters stand at places that are in no line.
inline bool has_unused_params(const CouplingOptions& options) {
    return options.mask == CouplingMask::checkerboard && options.channels_last;
}

// The slot of a channel, -1 where it passes; for the masks over channels.
inline std::int64_t slot_of(const CouplingOptions& options, std::int64_t channel) {
    const std::int64_t slot =
        options.slots != nullptr ? options.slots[channel] : channel - options.first;
    return slot < options.count ? slot : -1;
}

// Strides of the parameters and of their gradients.
struct ParamsStrides {
    std::int64_t channel;
    std::int64_t pixel;
};

// Puts runs together to lines, and calls body(line) for each.
template <typename Body>
class LineMaker {
  public:
    LineMaker(Line& line, const Body& body) : line_(line), body_(body) { clear(); }

    // `run`, in pieces where the line is too short for it.
    void add(Run run) {
        while (run.length > 0) {
            const std::int64_t taken = std::min(run.length, kLine - line_.count);
            Run& piece = line_.runs[line_.run_count++];
            piece = run;
            piece.length = taken;
            line_.count += taken;
            run.length -= taken;
            if (line_.indices != nullptr) {
                run.index += taken;
            } else {
                run.x += taken * line_.x_step;
            }
            run.params += taken * line_.params_step;
            run.grads += taken * line_.grads_step;
            run.slot += line_.along_channels ? taken : 0;
            run.pixel += line_.along_channels ? 0 : taken;
            if (line_.count == kLine) {
                flush();
            }
        }
    }

    void flush() {
        if (line_.count > 0) {
            body_(line_);
        }
        clear();
    }

  private:
    void clear() {
        line_.run_count = 0;
        line_.count = 0;
    }

    Line& line_;
    const Body& body_;
};

// The lines of pixels [begin, end) of channel `channel`, lines along pixels.
template <typename Maker>
void add_channel(const CouplingOptions& options, ParamsStrides params, ParamsStrides grads,
                 std::int64_t channel, std::int64_t begin, std::int64_t end, Maker& maker) {
    const std::int64_t x = channel * options.pixels;
    if (options.mask == CouplingMask::checkerboard_packed) {
        const std::int64_t width = options.width;
        for (std::int64_t pixel = begin; pixel < end; pixel += width) {
            const std::int64_t start = (pixel / width + options.first) & 1;
            maker.add({x + pixel + start, channel * params.channel + pixel / 2,
                       channel * grads.channel + pixel / 2, width / 2, 0, channel, pixel - begin});
        }
        return;
    }
    const std::int64_t slot = is_masked(options) ? channel : slot_of(options, channel);
    if (slot >= 0) {
        maker.add({x + begin, slot * params.channel + begin, slot * grads.channel + begin,
                   end - begin, 0, slot, 0});
    }
}

// The run of one pixel, lines along channels.
template <typename Maker>
void add_pixel(const CouplingOptions& options, ParamsStrides params, ParamsStrides grads,
               std::int64_t pixel, std::int64_t begin, Maker& maker) {
    const std::int64_t x = pixel * options.channels;
    std::int64_t at = pixel;
    if (is_checkerboard(options)) {
        const std::int64_t row = pixel / options.width;
        const std::int64_t column = pixel % options.width;
        if (((row + column) & 1) != options.first) {
            return;
        }
        if (options.mask == CouplingMask::checkerboard_packed) {
            at = row * (options.width / 2) + column / 2;
        }
    }
    const std::int64_t first = options.mask == CouplingMask::range ? options.first : 0;
    maker.add({x + first, at * params.pixel, at * grads.pixel, options.count, 0, 0, pixel - begin});
}

struct AlternatingBytes {
    std::uint8_t bytes[kLine + 1] = {};  // 0, 1, 0, 1, ...

    constexpr AlternatingBytes() {
        for (std::int64_t i = 0; i <= kLine; ++i) {
            bytes[i] = static_cast<std::uint8_t>(i & 1);
        }
    }
};
inline constexpr AlternatingBytes kAlternating;

// Which elements of a masked line are transformed; its part begins at pixel `begin`.
inline void mark_moved(const CouplingOptions& options, std::int64_t begin, Line& line) {
    std::uint8_t* moved = line.moved;
    for (std::int64_t r = 0; r < line.run_count; ++r) {
        const Run& run = line.runs[r];
        const std::int64_t first = begin + run.pixel;
        if (options.mask == CouplingMask::free) {
            __builtin_memcpy(moved,
                             options.free_mask + run.slot * options.mask_channel_stride +
                                 first * options.mask_pixel_stride,
                             run.length);
        } else {
            std::int64_t row = first / options.width;
            std::int64_t column = first % options.width;
            for (std::int64_t i = 0; i < run.length; ++row) {
                const std::int64_t count = std::min(run.length - i, options.width - column);
                const std::int64_t start = (row + column + options.first + 1) & 1;
                __builtin_memcpy(moved + i, kAlternating.bytes + start, count);
                i += count;
                column = 0;
            }
        }
        moved += run.length;
    }
}

// Calls body(line) for lines that hold the transformed elements of part `part` of a sample.
template <typename Body>
void for_each_line(const CouplingOptions& options, const CouplingParts& parts, ParamsStrides params,
                   ParamsStrides grads, std::int64_t part, Line& line, const Body& body) {
    line.along_channels = options.channels_last;
    line.masked = is_masked(options);
    line.joined_params =
        options.mask == CouplingMask::checkerboard_packed && !options.channels_last;
    line.indices = options.channels_last ? options.slot_channels : nullptr;
    line.x_step = line.joined_params ? 2 : 1;
    line.params_step = options.channels_last ? params.channel : 1;
    line.grads_step = options.channels_last ? grads.channel : 1;
    const std::int64_t range = parts.channel_parts ? part % parts.ranges : part;
    const std::int64_t begin = range * parts.pixels;
    const std::int64_t end = std::min(options.pixels, begin + parts.pixels);
    const auto marked_body = [&](Line& full) {
        if (full.masked) {
            mark_moved(options, begin, full);
        }
        body(full);
    };
    LineMaker<decltype(marked_body)> maker(line, marked_body);
    if (options.channels_last) {
        for (std::int64_t pixel = begin; pixel < end; ++pixel) {
            add_pixel(options, params, grads, pixel, begin, maker);
        }
        maker.flush();
        return;
    }
    const std::int64_t channel = parts.channel_parts ? part / parts.ranges : 0;
    const std::int64_t last = parts.channel_parts ? channel + 1 : options.channels;
    for (std::int64_t c = channel; c < last; ++c) {
        add_channel(options, params, grads, c, begin, end, maker);
        maker.flush();  // a line has one channel
    }
}

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

// The elements of a line of a sample of x, in `buffer` [kLine] or where they are.
template <typename T, typename W>
inline const W* read_line(const T* sample, const Line& line, W* buffer) {
    if constexpr (std::is_same_v<T, W>) {
        if (line.run_count == 1 && line.x_step == 1 && line.indices == nullptr) {
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
        if ((line.run_count == 1 || line.joined_params) && line.params_step == 1) {
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

template <typename T, typename W>
inline void write_line(const W* from, const Line& line, T* sample) {
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
