// The transformed elements of a coupling as lines: up to kLine of them, in runs that lie in memory
// one behind the other. Included by <op>_cpu.cpp only (see common/cpu.h on namespaces).
#pragma once

#include <algorithm>
#include <cstdint>

#include "coupling/affine_coupling.h"
#include "coupling/coupling_parts_cpu.h"

namespace warploom::coupling {
namespace WARPLOOM_CPU_ISA {

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
    // What lies between its end and what is likely read next.
    std::int64_t x_gap;
    std::int64_t params_gap;
};

struct Line {
    Run runs[kLine];
    std::int64_t run_count;
    std::int64_t count;           // of elements in all runs
    const std::int32_t* indices;  // null, or element i of a run of x is at x + indices[index + i]
    bool masked;                  // passing elements are in it, too: `moved` tells
    bool joined_params;           // the runs have their parameters one behind the other
    // Null, or a pixel's first run stands for all of it: what passes of it is written then.
    const CouplingOptions* whole_pixels;
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

// Whether lines are of pixels of which some channels pass, a range of them not.
inline bool has_whole_pixels(const CouplingOptions& options) {
    return options.channels_last && options.mask == CouplingMask::range && options.count > 0;
}

// Whether what passes is written with the lines.
inline bool lines_write_all(const CouplingOptions& options) {
    return is_masked(options) || has_whole_pixels(options) ||
           (options.mask == CouplingMask::checkerboard_packed && !options.channels_last);
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

    // `run`, in pieces where the line is too short for it. A piece is put together from numbers: to
    // copy a run that was just written would wait for all stores before it.
    [[gnu::always_inline]] void add(const Run& run) {
        std::int64_t begin = 0;
        while (begin < run.length) {
            const std::int64_t length = std::min(run.length - begin, kLine - line_.count);
            const bool last = begin + length == run.length;
            const std::int64_t index = line_.indices != nullptr ? begin : 0;
            const std::int64_t channels = line_.along_channels ? begin : 0;
            line_.runs[line_.run_count++] = {run.x + (begin - index) * line_.x_step,
                                             run.params + begin * line_.params_step,
                                             run.grads + begin * line_.grads_step,
                                             length,
                                             run.index + index,
                                             run.slot + channels,
                                             run.pixel + begin - channels,
                                             last ? run.x_gap : 0,
                                             last ? run.params_gap : 0};
            line_.count += length;
            begin += length;
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
void add_channel(const CouplingOptions& options, const CouplingParts& parts, ParamsStrides params,
                 ParamsStrides grads, std::int64_t channel, std::int64_t begin, std::int64_t end,
                 Maker& maker) {
    const std::int64_t x = channel * options.pixels;
    if (options.mask == CouplingMask::checkerboard_packed) {
        const std::int64_t width = options.width;
        for (std::int64_t pixel = begin; pixel < end; pixel += width) {
            const std::int64_t start = (pixel / width + options.first) & 1;
            maker.add({x + pixel + start, channel * params.channel + pixel / 2,
                       channel * grads.channel + pixel / 2, width / 2, 0, channel, pixel - begin, 0,
                       0});
        }
        return;
    }
    const std::int64_t slot = is_masked(options) ? channel : slot_of(options, channel);
    if (slot >= 0) {
        const std::int64_t length = end - begin;
        const bool ends = !parts.channel_parts || end == options.pixels;
        maker.add({x + begin, slot * params.channel + begin, slot * grads.channel + begin, length,
                   0, slot, 0, parts.channel_parts ? 0 : options.pixels - length,
                   ends ? params.channel - (parts.channel_parts ? options.pixels : length) : 0});
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
    maker.add(
        {x + first, at * params.pixel, at * grads.pixel, options.count, 0, 0, pixel - begin, 0, 0});
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
    line.whole_pixels = has_whole_pixels(options) ? &options : nullptr;
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
        add_channel(options, parts, params, grads, c, begin, end, maker);
        maker.flush();  // a line has one channel
    }
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::coupling
