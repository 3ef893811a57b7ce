// Affine coupling on the CPU: one pass over x and the parameters, part by part of a sample; a mean
// that is taken off the logarithms is found in a pass before, whose data are still in the cache.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/parallel.h"
#include "coupling/lines_cpu.h"
#include "coupling/scale_cpu.h"

namespace warploom::coupling {
namespace WARPLOOM_CPU_ISA {
namespace {

// What a line is beside elements with parameters of their own: means are taken off its logarithms,
// or some of it pass.
enum class LineKind { plain, centred, masked };

template <typename W>
struct ForwardLine {
    const W* x;
    const W* shift;
    const W* raw_scale;
    const W* weight;            // of tanh
    const W* mean;              // where centred
    const std::uint8_t* moved;  // where masked
    W* z;
};

template <typename W>
struct BackwardLine {
    const W* grad_z;
    const W* source;
    const W* shift;
    const W* raw_scale;
    const W* weight;
    const W* mean;
    const W* grad_mean;         // of grad_log, where centred
    const std::uint8_t* moved;  // where masked
    W* grad_x;
    W* grad_shift;
    W* grad_raw_scale;
    W* grad_weight;  // terms of it, of tanh
    W grad_log_det;
};

template <typename Scale, typename W>
inline LogScale<W> weighted_log(W u, const W* weight, std::int64_t i, const Constants<W>& c) {
    LogScale<W> log = Scale::log(u, c);
    if constexpr (std::is_same_v<Scale, TanhScale>) {
        log.value *= weight[i];
        log.slope *= weight[i];
    }
    return log;
}

// z of a line; returns the sum of L. Here and below, a copy of the constants tells the compiler
// that what is written does not change them, and a loop is vectorised only with every call in line
// and without a branch.
template <typename Scale, LineKind kind, bool add_first, typename W>
[[gnu::flatten]] W forward_line(std::int64_t count, const ForwardLine<W>& line,
                                const Constants<W>& constants) {
    const auto [x, shift, raw_scale, weight, mean, moved, z] = line;
    const Constants<W> c = constants;
    constexpr bool centred = kind == LineKind::centred;
    W sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < count; ++i) {
        const W u = c.params_scale * raw_scale[i];
        const W t = c.shift_scale * shift[i];
        const W log_scale = weighted_log<Scale>(u, weight, i, c).value;
        const bool moves = kind != LineKind::masked || moved[i] != 0;
        sum += moves ? log_scale : W{0};
        const W factor = factor_of<Scale, centred>(u, centred ? log_scale - mean[i] : log_scale, c);
        const W value = add_first ? factor * (x[i] + t) : fused_multiply_add(factor, x[i], t);
        z[i] = moves ? value : x[i];
    }
    return sum;
}

template <typename Scale, typename W>
[[gnu::flatten]] void log_line(std::int64_t count, const W* raw_scale, const W* weight,
                               const Constants<W>& constants, W* log_scale) {
    const Constants<W> c = constants;
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
        log_scale[i] = weighted_log<Scale>(c.params_scale * raw_scale[i], weight, i, c).value;
    }
}

// The gradient of L without that of log_det.
template <bool add_first, bool from_output, typename W>
inline W grad_log(W grad_z, W source, W t, W factor, W log_sign) {
    if constexpr (from_output) {
        return log_sign * grad_z * (add_first ? source : source - t);
    } else {
        return log_sign * grad_z * factor * (add_first ? source + t : source);
    }
}

template <typename Scale, bool add_first, bool from_output, typename W>
[[gnu::flatten]] void grad_log_line(std::int64_t count, const BackwardLine<W>& values,
                                    const Constants<W>& constants, W* out) {
    const W *grad_z = values.grad_z, *source = values.source, *shift = values.shift;
    const W *raw_scale = values.raw_scale, *weight = values.weight, *mean = values.mean;
    const Constants<W> c = constants;
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
        const W u = c.params_scale * raw_scale[i];
        const W log_scale = weighted_log<Scale>(u, weight, i, c).value;
        const W factor = factor_of<Scale, true>(u, log_scale - mean[i], c);
        out[i] = grad_log<add_first, from_output>(grad_z[i], source[i], c.shift_scale * shift[i],
                                                  factor, c.log_sign);
    }
}

template <typename Scale, LineKind kind, bool add_first, bool from_output, typename W>
[[gnu::flatten]] void backward_line(std::int64_t count, const BackwardLine<W>& values,
                                    const Constants<W>& constants) {
    const W *grad_z = values.grad_z, *source = values.source, *shift = values.shift;
    const W *raw_scale = values.raw_scale, *weight = values.weight;
    const W *mean = values.mean, *grad_mean = values.grad_mean;
    const std::uint8_t* moved = values.moved;
    constexpr bool centred = kind == LineKind::centred;
    W *grad_x = values.grad_x, *grad_shift = values.grad_shift;
    W *grad_raw_scale = values.grad_raw_scale, *grad_weight = values.grad_weight;
    const W grad_log_det = values.grad_log_det;
    const Constants<W> c = constants;
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
        const W u = c.params_scale * raw_scale[i];
        const LogScale<W> log = weighted_log<Scale>(u, weight, i, c);
        const W factor = factor_of<Scale, centred>(u, centred ? log.value - mean[i] : log.value, c);
        const W upstream = grad_z[i];
        W grad = grad_log<add_first, from_output>(upstream, source[i], c.shift_scale * shift[i],
                                                  factor, c.log_sign);
        grad += centred ? -grad_mean[i] : c.log_sign * grad_log_det;
        const bool moves = kind != LineKind::masked || moved[i] != 0;
        const W grad_in = upstream * factor;
        grad_x[i] = moves ? grad_in : upstream;
        grad_shift[i] = moves ? c.shift_scale * (add_first ? grad_in : upstream) : W{0};
        grad_raw_scale[i] = moves ? c.params_scale * grad * log.slope : W{0};
        if constexpr (std::is_same_v<Scale, TanhScale>) {
            grad_weight[i] = moves ? grad * Scale::log(u, c).value : W{0};
        }
    }
}

// What is compiled per scale, so that reading and writing need not be.
template <typename W>
struct Functions {
    W (*forward)(std::int64_t, const ForwardLine<W>&, const Constants<W>&);
    void (*backward)(std::int64_t, const BackwardLine<W>&, const Constants<W>&);
    void (*log)(std::int64_t, const W*, const W*, const Constants<W>&, W*);
    void (*grad_log)(std::int64_t, const BackwardLine<W>&, const Constants<W>&, W*);
};

template <typename Scale, bool add_first, bool from_output, typename W>
Functions<W> functions_of(LineKind kind) {
    const auto of_kind = []<LineKind known>() -> Functions<W> {
        return {forward_line<Scale, known, add_first, W>,
                backward_line<Scale, known, add_first, from_output, W>, log_line<Scale, W>,
                grad_log_line<Scale, add_first, from_output, W>};
    };
    switch (kind) {
        case LineKind::centred:
            return of_kind.template operator()<LineKind::centred>();
        case LineKind::masked:
            return of_kind.template operator()<LineKind::masked>();
        default:
            return of_kind.template operator()<LineKind::plain>();
    }
}

template <typename Scale, typename W>
Functions<W> functions_of(LineKind kind, bool add_first, bool from_output) {
    if (from_output) {
        return add_first ? functions_of<Scale, true, true, W>(kind)
                         : functions_of<Scale, false, true, W>(kind);
    }
    return add_first ? functions_of<Scale, true, false, W>(kind)
                     : functions_of<Scale, false, false, W>(kind);
}

template <typename W>
Functions<W> functions_of(const CouplingOptions& options, bool from_output) {
    const LineKind kind = options.center != CouplingCenter::none ? LineKind::centred
                          : is_masked(options)                   ? LineKind::masked
                                                                 : LineKind::plain;
    switch (options.scale) {
        case CouplingScale::exp:
            return functions_of<ExpScale, W>(kind, options.add_first, from_output);
        case CouplingScale::tanh:
            return functions_of<TanhScale, W>(kind, options.add_first, from_output);
        case CouplingScale::atan:
            return functions_of<AtanScale, W>(kind, options.add_first, from_output);
        case CouplingScale::centered_sigmoid:
            return functions_of<CenteredSigmoidScale, W>(kind, options.add_first, from_output);
        case CouplingScale::sigmoid:
            return options.eps == 0
                       ? functions_of<SigmoidScale, W>(kind, options.add_first, from_output)
                       : functions_of<RaisedSigmoidScale, W>(kind, options.add_first, from_output);
        case CouplingScale::softclip:
            return functions_of<SoftclipScale, W>(kind, options.add_first, from_output);
        default:
            return functions_of<AdditiveScale, W>(kind, options.add_first, from_output);
    }
}

template <typename W>
Constants<W> constants_of(const CouplingOptions& options) {
    return {static_cast<W>(options.clamp),
            static_cast<W>(options.eps),
            static_cast<W>(1.0 / std::fabs(std::log(options.clamp))),
            static_cast<W>(options.params_scale),
            static_cast<W>(options.shift_sign * options.params_scale),
            static_cast<W>(options.log_sign),
            options.add_first};
}

template <typename W>
struct alignas(64) Scratch {
    W x[kLine];
    W grad_z[kLine];
    W shift[kLine];
    W raw_scale[kLine];
    W weight[kLine];
    W mean[kLine];
    W grad_mean[kLine];
    W out[3][kLine];
    W terms[kLine];
    W pixel_mean[kCouplingCentredPixels];
    W pixel_grad_mean[kCouplingCentredPixels];
    Line line;
};

// Elements of part `part` of a sample that pass, or where some of a range are transformed all of
// it: `to` = `from`, or 0 where that is null.
template <typename T>
void copy_range(const T* from, T* to, std::int64_t begin, std::int64_t end) {
    if (from != nullptr) {
        __builtin_memcpy(to + begin, from + begin, (end - begin) * sizeof(T));
    } else {
        __builtin_memset(to + begin, 0, (end - begin) * sizeof(T));
    }
}

template <typename T>
void copy_passing(const CouplingOptions& options, const CouplingParts& parts, std::int64_t part,
                  const T* from, T* to) {
    const std::int64_t range = parts.channel_parts ? part % parts.ranges : part;
    const std::int64_t begin = range * parts.pixels;
    const std::int64_t end = std::min(options.pixels, begin + parts.pixels);
    const std::int64_t channels = options.channels;
    if (options.channels_last) {
        if (options.mask != CouplingMask::range) {
            copy_range(from, to, begin * channels, end * channels);
            return;
        }
        const std::int64_t after = options.first + options.count;
        for (std::int64_t pixel = begin; pixel < end; ++pixel) {
            copy_range(from, to, pixel * channels, pixel * channels + options.first);
            copy_range(from, to, pixel * channels + after, (pixel + 1) * channels);
        }
        return;
    }
    const bool over_channels =
        options.mask == CouplingMask::range || options.mask == CouplingMask::slots;
    const std::int64_t first = parts.channel_parts ? part / parts.ranges : 0;
    const std::int64_t last = parts.channel_parts ? first + 1 : channels;
    for (std::int64_t c = first; c < last; ++c) {
        if (!over_channels || slot_of(options, c) < 0) {
            copy_range(from, to, c * options.pixels + begin, c * options.pixels + end);
        }
    }
}

// Gradients of parameters at the pixels of a part, some of which pass; channels are innermost.
template <typename T>
void clear_params(const CouplingOptions& options, const CouplingParts& parts, ParamsStrides strides,
                  std::int64_t part, T* to) {
    const std::int64_t begin = part * parts.pixels;
    const std::int64_t end = std::min(options.pixels, begin + parts.pixels);
    for (std::int64_t pixel = begin; pixel < end; ++pixel) {
        T* elements = to + pixel * strides.pixel;
        for (std::int64_t c = 0; c < options.count; ++c) {
            elements[c * strides.channel] = T{};
        }
    }
}

inline std::int64_t grain_of(const CouplingOptions& options, std::int64_t count) {
    const std::int64_t elements =
        options.channels * options.pixels / std::max<std::int64_t>(1, count);
    return std::max<std::int64_t>(1, kCouplingPartElements / std::max<std::int64_t>(1, elements));
}

// Calls body(sample, part) for every part on all threads.
template <typename Body>
void for_each_part(const CouplingOptions& options, std::int64_t count, Body body) {
    parallel_for(options.batch * count, grain_of(options, count),
                 [&](std::int64_t begin, std::int64_t end) {
                     for (std::int64_t item = begin; item < end; ++item) {
                         body(item / count, item % count);
                     }
                 });
}

template <typename T>
const T* sample_of(const CouplingView& view, std::int64_t sample) {
    return view.data == nullptr ? nullptr
                                : static_cast<const T*>(view.data) + sample * view.batch_stride;
}
template <typename T>
T* sample_of(const CouplingOutput& view, std::int64_t sample) {
    return view.data == nullptr ? nullptr : static_cast<T*>(view.data) + sample * view.batch_stride;
}

// Reads the parameters of lines, and finds the means of their logarithms.
template <typename T>
class Reader {
  public:
    using W = Wide<T>;

    Reader(const CouplingOptions& options, const CouplingView& shift, const CouplingView& raw_scale,
           ParamsStrides grads, bool from_output)
        : options(options),
          parts(coupling_parts_cpu(options)),
          functions(functions_of<W>(options, from_output)),
          constants(constants_of<W>(options)),
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
        if (options.scale == CouplingScale::tanh) {
            if (options.scale_weight == nullptr) {
                fill_run(W{1}, scratch.line.count, scratch.weight);
            } else {
                read_slots(static_cast<const W*>(options.scale_weight), scratch.line,
                           scratch.weight);
            }
        }
        return scratch.weight;
    }

    // to[i] = the mean of element i of the line, per pixel or of the whole sample.
    const W* mean(const Scratch<W>& scratch, const W* per_pixel, W of_sample, W* to) const {
        if (options.center == CouplingCenter::channel) {
            read_pixels(per_pixel, scratch.line, to);
        } else if (options.center == CouplingCenter::sample) {
            fill_run(of_sample, scratch.line.count, to);
        }
        return to;
    }

    // Means over the transformed channels of each pixel of a part of what values(scratch) gives for
    // a line, or returned the sum of all of it.
    template <typename Values>
    double sums(std::int64_t part, Scratch<W>& scratch, W* per_pixel, const Values& values) const {
        const bool of_pixels = options.center == CouplingCenter::channel;
        if (of_pixels) {
            fill_run(W{0}, kCouplingCentredPixels, per_pixel);
        }
        double total = 0;
        for_lines(part, scratch, [&](const Line& line) {
            const W* terms = values(line);
            if (of_pixels) {
                add_to_pixels(terms, line, per_pixel);
            } else {
                W sum = 0;
#pragma omp simd reduction(+ : sum)
                for (std::int64_t i = 0; i < line.count; ++i) {
                    sum += terms[i];
                }
                total += sum;
            }
        });
        if (of_pixels) {
            for (std::int64_t i = 0; i < kCouplingCentredPixels; ++i) {
                per_pixel[i] /= static_cast<W>(std::max(1, options.count));
            }
        }
        return total;
    }

    double log_sums(std::int64_t sample, std::int64_t part, Scratch<W>& scratch) const {
        return sums(part, scratch, scratch.pixel_mean, [&](const Line& line) {
            functions.log(line.count, raw_scale(sample, scratch), weight(scratch), constants,
                          scratch.terms);
            return scratch.terms;
        });
    }

    W mean_of(double total) const {
        return static_cast<W>(total / (static_cast<double>(options.count) * options.pixels));
    }

    const CouplingOptions& options;
    const CouplingParts parts;
    const Functions<W> functions;
    const Constants<W> constants;

  private:
    const CouplingView& shift_;
    const CouplingView& raw_scale_;
    const ParamsStrides params_;
    const ParamsStrides grads_;
};

template <typename T>
void forward(const AffineCouplingParams& params) {
    using W = Wide<T>;
    const CouplingOptions& options = params.options;
    const Reader<T> reader(options, params.shift, params.raw_scale, {0, 0}, true);
    const std::int64_t count = reader.parts.count;
    W* partials = static_cast<W*>(params.partials);
    const bool in_place = params.z.data == params.x.data;

    const auto run = [&](std::int64_t sample, std::int64_t part, W mean, Scratch<W>& scratch) {
        const T* x = sample_of<T>(params.x, sample);
        T* z = sample_of<T>(params.z, sample);
        if (!in_place && !is_masked(options)) {
            copy_passing(options, reader.parts, part, x, z);
        }
        double sum = 0;
        reader.for_lines(part, scratch, [&](const Line& line) {
            sum += reader.functions.forward(
                line.count,
                {read_line(x, line, scratch.x), reader.shift(sample, scratch),
                 reader.raw_scale(sample, scratch), reader.weight(scratch),
                 reader.mean(scratch, scratch.pixel_mean, mean, scratch.mean), line.moved,
                 scratch.out[0]},
                reader.constants);
            write_line(scratch.out[0], line, z);
        });
        partials[sample * count + part] = static_cast<W>(sum);
    };

    if (options.center == CouplingCenter::sample) {
        parallel_for(options.batch, 1, [&](std::int64_t begin, std::int64_t end) {
            Scratch<W> scratch;
            for (std::int64_t sample = begin; sample < end; ++sample) {
                double total = 0;
                for (std::int64_t part = 0; part < count; ++part) {
                    total += reader.log_sums(sample, part, scratch);
                }
                for (std::int64_t part = 0; part < count; ++part) {
                    run(sample, part, reader.mean_of(total), scratch);
                }
            }
        });
    } else {
        for_each_part(options, count, [&](std::int64_t sample, std::int64_t part) {
            Scratch<W> scratch;
            if (options.center == CouplingCenter::channel) {
                reader.log_sums(sample, part, scratch);
            }
            run(sample, part, W{0}, scratch);
        });
    }

    const W* log_det_in = static_cast<const W*>(params.log_det_in);
    W* log_det = static_cast<W*>(params.log_det);
    for (std::int64_t sample = 0; sample < options.batch; ++sample) {
        double total = 0;
        for (std::int64_t part = 0; part < count && options.center == CouplingCenter::none;
             ++part) {
            total += partials[sample * count + part];
        }
        total *= options.log_sign;
        log_det[sample] =
            static_cast<W>(log_det_in == nullptr ? total : total + log_det_in[sample]);
    }
}

template <typename T>
class Backward {
  public:
    using W = Wide<T>;

    explicit Backward(const AffineCouplingBackwardParams& params)
        : params_(params),
          options_(params.options),
          grads_{params.grad_shift.channel_stride, params.grad_shift.pixel_stride},
          reader_(options_, params.shift, params.raw_scale, grads_,
                  params.from_output || params.grad_z.data == nullptr),
          count_(reader_.parts.count) {}

    void run() const {
        if (options_.center == CouplingCenter::sample) {
            parallel_for(options_.batch, 1, [&](std::int64_t begin, std::int64_t end) {
                Scratch<W> scratch;
                for (std::int64_t sample = begin; sample < end; ++sample) {
                    run_centred_sample(sample, scratch);
                }
            });
        } else {
            for_each_part(options_, count_, [&](std::int64_t sample, std::int64_t part) {
                Scratch<W> scratch;
                if (options_.center == CouplingCenter::channel) {
                    reader_.log_sums(sample, part, scratch);
                    grad_log_sums(sample, part, W{0}, scratch);
                }
                run_part(sample, part, W{0}, W{0}, scratch);
            });
        }
        if (params_.grad_weight != nullptr) {
            add_partials();
        }
    }

  private:
    void run_centred_sample(std::int64_t sample, Scratch<W>& scratch) const {
        double total = 0;
        for (std::int64_t part = 0; part < count_; ++part) {
            total += reader_.log_sums(sample, part, scratch);
        }
        const W mean = reader_.mean_of(total);
        total = 0;
        for (std::int64_t part = 0; part < count_; ++part) {
            total += grad_log_sums(sample, part, mean, scratch);
        }
        const W grad_mean = reader_.mean_of(total);
        for (std::int64_t part = 0; part < count_; ++part) {
            run_part(sample, part, mean, grad_mean, scratch);
        }
    }

    // The inputs of a line.
    BackwardLine<W> read(std::int64_t sample, W mean, W grad_mean, Scratch<W>& scratch) const {
        const Line& line = scratch.line;
        const bool has_grad_z = params_.grad_z.data != nullptr;
        const W* grad_log_det = static_cast<const W*>(params_.grad_log_det);
        BackwardLine<W> values{};
        if (has_grad_z) {
            values.grad_z = read_line(sample_of<T>(params_.grad_z, sample), line, scratch.grad_z);
            values.source = read_line(sample_of<T>(params_.source, sample), line, scratch.x);
            values.shift = reader_.shift(sample, scratch);
        } else {
            fill_run(W{0}, line.count, scratch.grad_z);
            values.grad_z = values.source = values.shift = scratch.grad_z;
        }
        values.raw_scale = reader_.raw_scale(sample, scratch);
        values.weight = reader_.weight(scratch);
        values.mean = reader_.mean(scratch, scratch.pixel_mean, mean, scratch.mean);
        values.grad_mean =
            reader_.mean(scratch, scratch.pixel_grad_mean, grad_mean, scratch.grad_mean);
        values.moved = line.moved;
        values.grad_x = scratch.out[0];
        values.grad_shift = scratch.out[1];
        values.grad_raw_scale = scratch.out[2];
        values.grad_weight = scratch.terms;
        values.grad_log_det = grad_log_det == nullptr ? W{0} : grad_log_det[sample];
        return values;
    }

    double grad_log_sums(std::int64_t sample, std::int64_t part, W mean,
                         Scratch<W>& scratch) const {
        return reader_.sums(part, scratch, scratch.pixel_grad_mean, [&](const Line& line) {
            reader_.functions.grad_log(line.count, read(sample, mean, W{0}, scratch),
                                       reader_.constants, scratch.terms);
            return scratch.terms;
        });
    }

    void run_part(std::int64_t sample, std::int64_t part, W mean, W grad_mean,
                  Scratch<W>& scratch) const {
        const CouplingParts& parts = reader_.parts;
        T* grad_x = sample_of<T>(params_.grad_x, sample);
        T* grad_shift = sample_of<T>(params_.grad_shift, sample);
        T* grad_raw_scale = sample_of<T>(params_.grad_raw_scale, sample);
        if (!is_masked(options_)) {
            copy_passing(options_, parts, part, sample_of<T>(params_.grad_z, sample), grad_x);
        }
        if (has_unused_params(options_)) {
            clear_params(options_, parts, grads_, part, grad_shift);
            if (grad_raw_scale != nullptr) {
                clear_params(options_, parts, grads_, part, grad_raw_scale);
            }
        }
        W* partials = clear_partials(sample, part);
        reader_.for_lines(part, scratch, [&](const Line& line) {
            reader_.functions.backward(line.count, read(sample, mean, grad_mean, scratch),
                                       reader_.constants);
            if (params_.grad_z.data == nullptr) {  // it is 0, also where s is infinite
                fill_run(W{0}, line.count, scratch.out[0]);
                fill_run(W{0}, line.count, scratch.out[1]);
            }
            write_line(scratch.out[0], line, grad_x);
            write_params(scratch.out[1], line, grad_shift);
            if (grad_raw_scale != nullptr) {
                write_params(scratch.out[2], line, grad_raw_scale);
            }
            if (partials != nullptr) {
                add_to_slots(scratch.terms, line, partials);
            }
        });
    }

    // Where a part adds its terms of grad_weight [count], or null: a part of one channel has one.
    W* clear_partials(std::int64_t sample, std::int64_t part) const {
        if (params_.grad_weight == nullptr) {
            return nullptr;
        }
        const CouplingParts& parts = reader_.parts;
        const std::int64_t range = parts.channel_parts ? part % parts.ranges : part;
        W* partials =
            static_cast<W*>(params_.partials) + (sample * params_.parts + range) * options_.count;
        if (!parts.channel_parts) {
            fill_run(W{0}, options_.count, partials);
        } else {
            const std::int64_t channel = part / parts.ranges;
            const bool over_channels =
                options_.mask == CouplingMask::range || options_.mask == CouplingMask::slots;
            const std::int64_t slot = over_channels ? slot_of(options_, channel) : channel;
            if (slot >= 0) {
                partials[slot] = 0;
            }
        }
        return partials;
    }

    void add_partials() const {
        W* grad_weight = static_cast<W*>(params_.grad_weight);
        const W* partials = static_cast<const W*>(params_.partials);
        for (std::int64_t sample = 0; sample < options_.batch; ++sample) {
            W* total = grad_weight + sample * options_.count;
            fill_run(W{0}, options_.count, total);
            for (std::int64_t part = 0; part < params_.parts; ++part) {
                const W* from = partials + (sample * params_.parts + part) * options_.count;
#pragma omp simd
                for (std::int64_t i = 0; i < options_.count; ++i) {
                    total[i] += from[i];
                }
            }
        }
    }

    const AffineCouplingBackwardParams& params_;
    const CouplingOptions& options_;
    const ParamsStrides grads_;
    const Reader<T> reader_;
    const std::int64_t count_;
};

}  // namespace

void affine_coupling_cpu(const AffineCouplingParams& params) {
    visit_element_type(params.options.dtype, [&]<typename T>() { forward<T>(params); });
}

void affine_coupling_backward_cpu(const AffineCouplingBackwardParams& params) {
    visit_element_type(params.options.dtype, [&]<typename T>() { Backward<T>(params).run(); });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::coupling
