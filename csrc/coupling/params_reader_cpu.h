// The parameters of the lines of an affine coupling on the CPU, and the means of their logarithms.
// Included by <op>_cpu.cpp only (see common/cpu.h on namespaces).
#pragma once

#include <algorithm>
#include <cstdint>

#include "coupling/affine_coupling_cpu.h"

namespace warploom::coupling {
namespace WARPLOOM_CPU_ISA {

// L of a line, which is added to `sums`, too.
template <typename Scale, typename W>
[[gnu::flatten]] void log_line(std::int64_t count, const W* raw_scale, const W* weight,
                               const Beside<1>& besides, const Constants<W>& constants,
                               W* log_scale, W* sums) {
    const Constants<W> c = constants;
    const Beside<1> beside = besides;
    for_each_in_line(
        count, [=](std::int64_t first) __attribute__((always_inline)) { do_beside(beside, first); },
        [=](std::int64_t i, std::int64_t) __attribute__((always_inline)) {
            const W found = weighted_log<Scale>(c.params_scale * raw_scale[i], weight, i, c).value;
            log_scale[i] = found;
            sums[i] += found;
        });
}

template <typename W>
auto log_line_of(const CouplingOptions& options) {
    return visit_line(options, []<typename Scale, bool, bool>() { return log_line<Scale, W>; });
}

// A number for each element that is centred; what it holds is undefined at first.
template <typename W>
class Centred {
  public:
    explicit Centred(std::int64_t count)
        : blocks_(new Block[ceil_divide(count, kBlockElements)]), values(blocks_->values) {}
    Centred(const Centred&) = delete;
    Centred& operator=(const Centred&) = delete;
    ~Centred() { delete[] blocks_; }

  private:
    struct alignas(64) Block {
        W values[kBlockElements];
    };
    Block* const blocks_;

  public:
    W* const values;
};

// Reads the parameters of lines, and finds the means of their logarithms.
template <typename T>
class Reader {
  public:
    using W = Wide<T>;

    Reader(const CouplingOptions& options, const CouplingView& shift, const CouplingView& raw_scale,
           ParamsStrides grads)
        : options(options),
          parts(coupling_parts_cpu(options)),
          constants(constants_of<W>(options)),
          log_(log_line_of<W>(options)),
          shift_(shift),
          raw_scale_(raw_scale),
          params_{shift.channel_stride, shift.pixel_stride},
          grads_(grads) {}

    template <typename Body>
    void for_lines(std::int64_t part, Scratch<W>& scratch, const Body& body) const {
        for_each_line(options, parts, params_, grads_, part, scratch.line, body);
    }

    const W* shift(std::int64_t sample, Scratch<W>& scratch) const {
        return read_params(sample_of<T>(shift_, sample), scratch.line, scratch.shift);
    }
    // An additive coupling has no scale, and looks at none.
    const W* raw_scale(std::int64_t sample, Scratch<W>& scratch) const {
        if (raw_scale_.data == nullptr) {
            return scratch.raw_scale;
        }
        return read_params(sample_of<T>(raw_scale_, sample), scratch.line, scratch.raw_scale);
    }
    const W* weight(Scratch<W>& scratch) const {
        if (options.scale_weight != nullptr) {
            read_slots(static_cast<const W*>(options.scale_weight), scratch.line, scratch.weight);
        }
        return scratch.weight;
    }

    // Where shift and raw scale of the next line are.
    Ahead next_shift(std::int64_t sample, const Line& line) const {
        return next_params(sample_of<T>(shift_, sample), line, line.runs[0].params,
                           line.params_step);
    }
    Ahead next_raw_scale(std::int64_t sample, const Line& line) const {
        return next_params(sample_of<T>(raw_scale_, sample), line, line.runs[0].params,
                           line.params_step);
    }

    // The mean of each element of the line, of its pixel or of the whole sample.
    const W* mean(Scratch<W>& scratch, W of_sample) const {
        const Line& line = scratch.line;
        if (options.center == CouplingCenter::sample) {
            fill_run(of_sample, line.count, scratch.mean);
        } else if (line.run_count == 1 && !line.along_channels) {
            return scratch.pixel_mean + line.runs[0].pixel;
        } else {
            read_pixels(scratch.pixel_mean, line, scratch.mean);
        }
        return scratch.mean;
    }

    // Of what values(line, sums) gives for the lines of a part and adds to sums [line.count]: the
    // means over the transformed channels of each pixel, or returned the sum of all of it.
    template <typename Values>
    double sums(std::int64_t part, Scratch<W>& scratch, const Values& values) const {
        const bool of_pixels = options.center == CouplingCenter::channel;
        const bool in_lines = of_pixels && !options.channels_last;
        alignas(64) W of_pixel[kCouplingCentredPixels];
        alignas(64) W of_place[kLine] = {};
        const std::int64_t pixels = of_pixels ? std::min(parts.pixels, options.pixels) : 0;
        fill_run(W{0}, pixels, of_pixel);
        for_lines(part, scratch, [&](const Line& line) {
            const W* terms = values(line, in_lines ? of_pixel + line.runs[0].pixel : of_place);
            if (of_pixels && !in_lines) {
                add_to_pixels(terms, line, of_pixel);
            }
        });
        for (std::int64_t i = 0; i < pixels; ++i) {
            scratch.pixel_mean[i] = of_pixel[i] / static_cast<W>(std::max(1, options.count));
        }
        return sum_of_lanes(of_place);
    }

    // Their L, which goes to `logs`, line after line; `copy` is made beside.
    double log_sums(std::int64_t sample, std::int64_t part, Copy copy, Scratch<W>& scratch,
                    W*& logs) const {
        const double total = sums(part, scratch, [&](const Line& line, W* sums_of_line) {
            W* found = logs;
            log_(line.count, raw_scale(sample, scratch), weight(scratch),
                 {{next_raw_scale(sample, line)}, copy.take(line.count)}, constants, found,
                 sums_of_line);
            logs += line.count;
            return found;
        });
        copy.make();
        return total;
    }

    // How many elements are centred by the same means, or at once.
    std::int64_t centred_elements() const {
        return options.count *
               (options.center == CouplingCenter::channel ? parts.pixels : options.pixels);
    }

    // Calls body(sample, begin, end, scratch, logs) for parts that are centred at once, with place
    // for their L.
    template <typename Body>
    void for_centred_parts(const Body& body) const {
        const PartRange run = run_parts(options, parts);
        const std::int64_t at_once = options.center == CouplingCenter::sample ? run.count() : 1;
        const std::int64_t count = run.count() / at_once;
        parallel_for(options.batch * count, grain_of(options, count),
                     [&](std::int64_t begin, std::int64_t end) {
                         Scratch<W> scratch;
                         const Centred<W> centred(centred_elements());
                         for (std::int64_t item = begin; item < end; ++item) {
                             const std::int64_t first = run.begin + item % count * at_once;
                             body(item / count, first, first + at_once, scratch, centred.values);
                         }
                     });
    }

    W mean_of(double total) const {
        return static_cast<W>(total / (static_cast<double>(options.count) * options.pixels));
    }

    const CouplingOptions& options;
    const CouplingParts parts;
    const Constants<W> constants;

  private:
    void (*const log_)(std::int64_t, const W*, const W*, const Beside<1>&, const Constants<W>&, W*,
                       W*);
    const CouplingView& shift_;
    const CouplingView& raw_scale_;
    const ParamsStrides params_;
    const ParamsStrides grads_;
};

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::coupling
