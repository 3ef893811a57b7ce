// The backward of affine coupling on the CPU: one pass over grad_z, z or x, and the parameters, and
// passes before it for the means of L and of its gradient where the logarithms are centred.
#include <algorithm>
#include <cstdint>

#include "coupling/params_reader_cpu.h"

namespace warploom::coupling {
namespace WARPLOOM_CPU_ISA {
namespace {

template <typename W>
struct BackwardLine {
    const W* grad_z;
    const W* source;
    const W* shift;
    const W* raw_scale;
    const W* weight;
    const W* mean;              // of `centred`
    const std::uint8_t* moved;  // where masked: elements that do not pass
    W* centred;                 // L, then its gradient
    W* sums;                    // of that
    W* grad_x;
    W* grad_shift;
    W* grad_raw_scale;
    W* grad_weight;  // terms of it, of tanh
    W grad_log_det;
    Beside<7> beside;
};

// The gradient of L without that of log_det.
template <bool add_first, bool from_output, typename W>
inline W grad_log(W grad_z, W source, W t, W factor, W log_sign) {
    if constexpr (from_output) {
        return log_sign * grad_z * (add_first ? source : source - t);
    } else {
        return log_sign * grad_z * factor * (add_first ? source + t : source);
    }
}

template <typename Scale, bool masked, bool add_first, bool from_output, typename W>
[[gnu::flatten]] void backward_line(std::int64_t count, const BackwardLine<W>& values,
                                    const Constants<W>& constants) {
    const W *grad_z = values.grad_z, *source = values.source, *shift = values.shift;
    const W *raw_scale = values.raw_scale, *weight = values.weight;
    const std::uint8_t* moved = values.moved;
    W *grad_x = values.grad_x, *grad_shift = values.grad_shift;
    W *grad_raw_scale = values.grad_raw_scale, *grad_weight = values.grad_weight;
    const W grad_log_det = values.grad_log_det;
    const Constants<W> c = constants;
    const Beside<7> beside = values.beside;
    for_each_in_line(
        count, [=](std::int64_t first) __attribute__((always_inline)) { do_beside(beside, first); },
        [=](std::int64_t i, std::int64_t) __attribute__((always_inline)) {
            const W u = c.params_scale * raw_scale[i];
            const LogScale<W> log = weighted_log<Scale>(u, weight, i, c);
            const W factor = factor_of<Scale>(u, log.value, c);
            const W upstream = grad_z[i];
            const W grad = grad_log<add_first, from_output>(
                               upstream, source[i], c.shift_scale * shift[i], factor, c.log_sign) +
                           c.log_sign * grad_log_det;
            const bool moves = !masked || moved[i] != 0;
            const W grad_in = upstream * factor;
            grad_x[i] = moves ? grad_in : upstream;
            grad_shift[i] = moves ? c.shift_scale * (add_first ? grad_in : upstream) : W{0};
            grad_raw_scale[i] = moves ? c.params_scale * grad * log.slope : W{0};
            if constexpr (std::is_same_v<Scale, WeightedTanhScale>) {
                grad_weight[i] = moves ? grad * Scale::log(u, c).value : W{0};
            }
        });
}

// Of a line whose L are centred: all but the gradient of the raw scale, and that of L.
template <bool add_first, bool from_output, typename W>
[[gnu::flatten]] void centred_line(std::int64_t count, const BackwardLine<W>& values,
                                   const Constants<W>& constants) {
    const W *grad_z = values.grad_z, *source = values.source, *shift = values.shift;
    const W* mean = values.mean;
    W *centred = values.centred, *sums = values.sums;
    W *grad_x = values.grad_x, *grad_shift = values.grad_shift;
    const Constants<W> c = constants;
    const Beside<7> beside = values.beside;
    for_each_in_line(
        count, [=](std::int64_t first) __attribute__((always_inline)) { do_beside(beside, first); },
        [=](std::int64_t i, std::int64_t) __attribute__((always_inline)) {
            const W factor = exponential(c.log_sign * (centred[i] - mean[i]));
            const W upstream = grad_z[i];
            const W grad_in = upstream * factor;
            const W grad = grad_log<add_first, from_output>(
                upstream, source[i], c.shift_scale * shift[i], factor, c.log_sign);
            centred[i] = grad;
            sums[i] += grad;
            grad_x[i] = grad_in;
            grad_shift[i] = c.shift_scale * (add_first ? grad_in : upstream);
        });
}

// The gradient of the raw scale, from that of L and its mean.
template <typename Scale, typename W>
[[gnu::flatten]] void slope_line(std::int64_t count, const BackwardLine<W>& values,
                                 const Constants<W>& constants) {
    const W *raw_scale = values.raw_scale, *weight = values.weight;
    const W *centred = values.centred, *mean = values.mean;
    W *grad_raw_scale = values.grad_raw_scale, *grad_weight = values.grad_weight;
    const Constants<W> c = constants;
    const Beside<7> beside = values.beside;
    for_each_in_line(
        count, [=](std::int64_t first) __attribute__((always_inline)) { do_beside(beside, first); },
        [=](std::int64_t i, std::int64_t) __attribute__((always_inline)) {
            const W u = c.params_scale * raw_scale[i];
            const W grad = centred[i] - mean[i];
            grad_raw_scale[i] = c.params_scale * grad * weighted_log<Scale>(u, weight, i, c).slope;
            if constexpr (std::is_same_v<Scale, WeightedTanhScale>) {
                grad_weight[i] = grad * Scale::log(u, c).value;
            }
        });
}

template <typename W>
using LineFunction = void (*)(std::int64_t, const BackwardLine<W>&, const Constants<W>&);

template <typename W>
LineFunction<W> line_function(const CouplingOptions& options, bool from_output) {
    if (options.center != CouplingCenter::none) {
        if (from_output) {
            return options.add_first ? centred_line<true, true, W> : centred_line<false, true, W>;
        }
        return options.add_first ? centred_line<true, false, W> : centred_line<false, false, W>;
    }
    return visit_line(options, [&]<typename Scale, bool masked, bool add_first>() {
        return from_output ? backward_line<Scale, masked, add_first, true, W>
                           : backward_line<Scale, masked, add_first, false, W>;
    });
}

template <typename W>
LineFunction<W> slope_function(const CouplingOptions& options) {
    return visit_line(options, []<typename Scale, bool, bool>() -> LineFunction<W> {
        return slope_line<Scale, W>;
    });
}

template <typename T>
class Backward {
  public:
    using W = Wide<T>;

    explicit Backward(const AffineCouplingBackwardParams& params)
        : params_(params),
          options_(params.options),
          grads_{params.grad_shift.channel_stride, params.grad_shift.pixel_stride},
          reader_(options_, params.shift, params.raw_scale, grads_),
          compute_(line_function<W>(options_, params.from_output || params.grad_z.data == nullptr)),
          compute_slopes_(slope_function<W>(options_)) {}

    void run() const {
        if (options_.center == CouplingCenter::none) {
            for_each_part(options_, reader_.parts, [&](std::int64_t sample, std::int64_t part) {
                Scratch<W> scratch;
                run_part(sample, part, scratch);
            });
        } else {
            reader_.for_centred_parts(
                [&](std::int64_t sample, std::int64_t begin, std::int64_t end, Scratch<W>& scratch,
                    W* centred) { run_centred(sample, begin, end, scratch, centred); });
        }
        if (params_.grad_weight != nullptr) {
            add_partials();
        }
    }

  private:
    // L of the parts, then its gradient beside those of x and shift, then that of the raw scale.
    void run_centred(std::int64_t sample, std::int64_t begin, std::int64_t end, Scratch<W>& scratch,
                     W* centred) const {
        W* at = centred;
        double total = 0;
        for (std::int64_t part = begin; part < end; ++part) {
            total += reader_.log_sums(sample, part, write_passing(sample, part), scratch, at);
        }
        const W mean = reader_.mean_of(total);
        at = centred;
        total = 0;
        for (std::int64_t part = begin; part < end; ++part) {
            total += reader_.sums(part, scratch, [&](const Line& line, W* sums) {
                BackwardLine<W> values = read_upstream(sample, scratch);
                values.centred = at;
                values.mean = reader_.mean(scratch, mean);
                values.sums = sums;
                compute_(line.count, values, reader_.constants);
                write_upstream(sample, line, values);
                at += line.count;
                return values.centred;
            });
        }
        const W grad_mean = reader_.mean_of(total);
        at = centred;
        for (std::int64_t part = begin; part < end; ++part) {
            W* partials = clear_partials(sample, part);
            reader_.for_lines(part, scratch, [&](const Line& line) {
                BackwardLine<W> values{};
                read_scale(sample, scratch, values);
                values.centred = at;
                values.mean = reader_.mean(scratch, grad_mean);
                compute_slopes_(line.count, values, reader_.constants);
                write_scale(sample, line, values, partials);
                at += line.count;
            });
        }
    }

    void run_part(std::int64_t sample, std::int64_t part, Scratch<W>& scratch) const {
        Copy copy = write_passing(sample, part);
        W* partials = clear_partials(sample, part);
        reader_.for_lines(part, scratch, [&](const Line& line) {
            BackwardLine<W> values = read_upstream(sample, scratch);
            read_scale(sample, scratch, values);
            values.beside.copy = copy.take(line.count);
            compute_(line.count, values, reader_.constants);
            write_upstream(sample, line, values);
            write_scale(sample, line, values, partials);
        });
        copy.make();
    }

    // Returns what of it is left to be copied beside the part's lines.
    Copy write_passing(std::int64_t sample, std::int64_t part) const {
        const CouplingParts& parts = reader_.parts;
        const T* grad_z = sample_of<T>(params_.grad_z, sample);
        Copy copy;
        if (!lines_write_all(options_) || (grad_z == nullptr && !is_masked(options_))) {
            copy =
                copy_passing(options_, parts, part, grad_z, sample_of<T>(params_.grad_x, sample));
        }
        if (has_unused_params(options_)) {
            clear_params(options_, parts, grads_, part, sample_of<T>(params_.grad_shift, sample));
            T* grad_raw_scale = sample_of<T>(params_.grad_raw_scale, sample);
            if (grad_raw_scale != nullptr) {
                clear_params(options_, parts, grads_, part, grad_raw_scale);
            }
        }
        return copy;
    }

    BackwardLine<W> read_upstream(std::int64_t sample, Scratch<W>& scratch) const {
        const Line& line = scratch.line;
        const W* grad_log_det = static_cast<const W*>(params_.grad_log_det);
        BackwardLine<W> values{};
        if (params_.grad_z.data != nullptr) {
            const T* grad_z = sample_of<T>(params_.grad_z, sample);
            const T* source = sample_of<T>(params_.source, sample);
            values.grad_z = read_line(grad_z, line, scratch.grad_z);
            values.source = read_line(source, line, scratch.x);
            values.shift = reader_.shift(sample, scratch);
            values.beside.next[0] = next_line(grad_z, line);
            values.beside.next[1] = next_line(source, line);
            values.beside.next[2] = reader_.next_shift(sample, line);
        } else {
            fill_run(W{0}, line.count, scratch.grad_z);
            values.grad_z = values.source = values.shift = scratch.grad_z;
        }
        values.moved = line.moved;
        values.grad_log_det = grad_log_det == nullptr ? W{0} : grad_log_det[sample];
        T* grad_x = sample_of<T>(params_.grad_x, sample);
        T* grad_shift = sample_of<T>(params_.grad_shift, sample);
        values.grad_x = line_target(grad_x, line, scratch.out[0]);
        values.grad_shift = params_target(grad_shift, line, scratch.out[1]);
        values.beside.next[3] = next_line<T>(grad_x, line);
        values.beside.next[4] = next_grads(grad_shift, line);
        return values;
    }

    void read_scale(std::int64_t sample, Scratch<W>& scratch, BackwardLine<W>& values) const {
        const Line& line = scratch.line;
        T* grad_raw_scale = sample_of<T>(params_.grad_raw_scale, sample);
        values.raw_scale = reader_.raw_scale(sample, scratch);
        values.weight = reader_.weight(scratch);
        values.grad_raw_scale = params_target(grad_raw_scale, line, scratch.out[2]);
        values.grad_weight = scratch.grad_weight;
        values.beside.next[5] = reader_.next_raw_scale(sample, line);
        values.beside.next[6] = next_grads(grad_raw_scale, line);
    }

    Ahead next_grads(const T* sample, const Line& line) const {
        return next_params(sample, line, line.runs[0].grads, line.grads_step);
    }

    void write_upstream(std::int64_t sample, const Line& line,
                        const BackwardLine<W>& values) const {
        T* grad_x = sample_of<T>(params_.grad_x, sample);
        const T* passing = sample_of<T>(params_.grad_z, sample);
        if (passing == nullptr) {  // the gradients are 0, also where s is infinite
            fill_run(W{0}, line.count, values.grad_x);
            fill_run(W{0}, line.count, values.grad_shift);
            passing = grad_x;
        }
        write_line(values.grad_x, line, grad_x, passing);
        write_params(values.grad_shift, line, sample_of<T>(params_.grad_shift, sample));
    }

    void write_scale(std::int64_t sample, const Line& line, const BackwardLine<W>& values,
                     W* partials) const {
        if (T* grad_raw_scale = sample_of<T>(params_.grad_raw_scale, sample)) {
            write_params(values.grad_raw_scale, line, grad_raw_scale);
        }
        if (partials != nullptr) {
            add_to_slots(values.grad_weight, line, partials);
        }
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
    const LineFunction<W> compute_;
    const LineFunction<W> compute_slopes_;
};

}  // namespace

void affine_coupling_backward_cpu(const AffineCouplingBackwardParams& params) {
    visit_element_type(params.options.dtype, [&]<typename T>() { Backward<T>(params).run(); });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::coupling
