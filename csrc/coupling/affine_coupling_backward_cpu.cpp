// The backward of affine coupling on the CPU: one pass over grad_z, z or x, and the parameters, and
// passes before it for the means of L and of its gradient where the logarithms are centred.
#include <algorithm>
#include <cstdint>

#include "coupling/affine_coupling_cpu.h"

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
    const W* mean;
    const W* grad_mean;         // of grad_log, where centred
    const std::uint8_t* moved;  // where masked
    W* grad_x;
    W* grad_shift;
    W* grad_raw_scale;
    W* grad_weight;  // terms of it, of tanh
    W grad_log_det;
    std::int64_t next_x;  // from an element to that of the next line
    std::int64_t next_params;
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
    W *grad_x = values.grad_x, *grad_shift = values.grad_shift;
    W *grad_raw_scale = values.grad_raw_scale, *grad_weight = values.grad_weight;
    const W grad_log_det = values.grad_log_det;
    const std::int64_t next_x = values.next_x, next_params = values.next_params;
    const Constants<W> c = constants;
    constexpr bool centred = kind == LineKind::centred;
    for_each_in_line(
        count,
        [=](std::int64_t first) {
            prefetch(grad_z + first + next_x, kBlockElements);
            prefetch(source + first + next_x, kBlockElements);
            prefetch(grad_x + first + next_x, kBlockElements);
            prefetch(shift + first + next_params, kBlockElements);
            prefetch(raw_scale + first + next_params, kBlockElements);
            prefetch(grad_shift + first + next_params, kBlockElements);
            prefetch(grad_raw_scale + first + next_params, kBlockElements);
        },
        [=](std::int64_t i, std::int64_t) {
            const W u = c.params_scale * raw_scale[i];
            const LogScale<W> log = weighted_log<Scale>(u, weight, i, c);
            const W factor =
                factor_of<Scale, centred>(u, centred ? log.value - mean[i] : log.value, c);
            const W upstream = grad_z[i];
            W grad = grad_log<add_first, from_output>(upstream, source[i], c.shift_scale * shift[i],
                                                      factor, c.log_sign);
            grad += centred ? -grad_mean[i] : c.log_sign * grad_log_det;
            const bool moves = kind != LineKind::masked || moved[i] != 0;
            const W grad_in = upstream * factor;
            grad_x[i] = moves ? grad_in : upstream;
            grad_shift[i] = moves ? c.shift_scale * (add_first ? grad_in : upstream) : W{0};
            grad_raw_scale[i] = moves ? c.params_scale * grad * log.slope : W{0};
            if constexpr (std::is_same_v<Scale, WeightedTanhScale>) {
                grad_weight[i] = moves ? grad * Scale::log(u, c).value : W{0};
            }
        });
}

// What is compiled per scale, so that reading and writing need not be.
template <typename W>
struct Functions {
    void (*backward)(std::int64_t, const BackwardLine<W>&, const Constants<W>&);
    void (*grad_log)(std::int64_t, const BackwardLine<W>&, const Constants<W>&, W*);
};

template <typename W>
Functions<W> functions_of(const CouplingOptions& options, bool from_output) {
    return visit_line(options, [&]<typename Scale, LineKind kind, bool add_first>() {
        return from_output ? Functions<W>{backward_line<Scale, kind, add_first, true, W>,
                                          grad_log_line<Scale, add_first, true, W>}
                           : Functions<W>{backward_line<Scale, kind, add_first, false, W>,
                                          grad_log_line<Scale, add_first, false, W>};
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
          functions_(
              functions_of<W>(options_, params.from_output || params.grad_z.data == nullptr)),
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
        values.grad_x = line_target(sample_of<T>(params_.grad_x, sample), line, scratch.out[0]);
        values.grad_shift =
            params_target(sample_of<T>(params_.grad_shift, sample), line, scratch.out[1]);
        values.grad_raw_scale =
            params_target(sample_of<T>(params_.grad_raw_scale, sample), line, scratch.out[2]);
        values.grad_weight = scratch.terms;
        values.grad_log_det = grad_log_det == nullptr ? W{0} : grad_log_det[sample];
        values.next_x = next_x<T, W>(line);
        values.next_params = next_params<T, W>(line);
        return values;
    }

    double grad_log_sums(std::int64_t sample, std::int64_t part, W mean,
                         Scratch<W>& scratch) const {
        return reader_.sums(part, scratch, scratch.pixel_grad_mean, [&](const Line& line) {
            functions_.grad_log(line.count, read(sample, mean, W{0}, scratch), reader_.constants,
                                scratch.terms);
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
            const BackwardLine<W> values = read(sample, mean, grad_mean, scratch);
            functions_.backward(line.count, values, reader_.constants);
            if (params_.grad_z.data == nullptr) {  // it is 0, also where s is infinite
                fill_run(W{0}, line.count, values.grad_x);
                fill_run(W{0}, line.count, values.grad_shift);
            }
            write_line(values.grad_x, line, grad_x);
            write_params(values.grad_shift, line, grad_shift);
            if (grad_raw_scale != nullptr) {
                write_params(values.grad_raw_scale, line, grad_raw_scale);
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
    const Functions<W> functions_;
    const std::int64_t count_;
};

}  // namespace

void affine_coupling_backward_cpu(const AffineCouplingBackwardParams& params) {
    visit_element_type(params.options.dtype, [&]<typename T>() { Backward<T>(params).run(); });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::coupling
