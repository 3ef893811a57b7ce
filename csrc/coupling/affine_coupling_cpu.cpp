// Affine coupling on the CPU: one pass over x and the parameters, part by part of a sample; a mean
// that is taken off the logarithms is found in a pass before, whose data are still in the cache.
#include <algorithm>
#include <cstdint>

#include "coupling/params_reader_cpu.h"

namespace warploom::coupling {
namespace WARPLOOM_CPU_ISA {
namespace {

template <typename W>
struct ForwardLine {
    const W* x;
    const W* shift;
    const W* raw_scale;
    const W* weight;            // of tanh
    const W* log_scale;         // where centred
    const W* mean;              // where centred
    const std::uint8_t* moved;  // where masked: elements that do not pass
    W* z;
    Beside<4> beside;
};

// z of a line; returns the sum of L. Here and below, a copy of the constants tells the compiler
// that what is written does not change them.
template <typename Scale, bool masked, bool add_first, typename W>
[[gnu::flatten]] double forward_line(std::int64_t count, const ForwardLine<W>& line,
                                     const Constants<W>& constants) {
    const W *x = line.x, *shift = line.shift, *raw_scale = line.raw_scale, *weight = line.weight;
    const std::uint8_t* moved = line.moved;
    W* z = line.z;
    const Constants<W> c = constants;
    const Beside<4> beside = line.beside;
    W sums[kBlockElements] = {};
    for_each_in_line(
        count, [=](std::int64_t first) __attribute__((always_inline)) { do_beside(beside, first); },
        [=, &sums](std::int64_t i, std::int64_t lane) __attribute__((always_inline)) {
            const W u = c.params_scale * raw_scale[i];
            const W t = c.shift_scale * shift[i];
            const W log_scale = weighted_log<Scale>(u, weight, i, c).value;
            const bool moves = !masked || moved[i] != 0;
            sums[lane] += moves ? log_scale : W{0};
            const W factor = factor_of<Scale>(u, log_scale, c);
            const W value = add_first ? factor * (x[i] + t) : fused_multiply_add(factor, x[i], t);
            z[i] = moves ? value : x[i];
        });
    return sum_of_lanes(sums);
}

// z of a line whose L were found before, and then their mean.
template <bool add_first, typename W>
[[gnu::flatten]] double centred_line(std::int64_t count, const ForwardLine<W>& line,
                                     const Constants<W>& constants) {
    const W *x = line.x, *shift = line.shift, *log_scale = line.log_scale, *mean = line.mean;
    W* z = line.z;
    const Constants<W> c = constants;
    const Beside<4> beside = line.beside;
    for_each_in_line(
        count, [=](std::int64_t first) __attribute__((always_inline)) { do_beside(beside, first); },
        [=](std::int64_t i, std::int64_t) __attribute__((always_inline)) {
            const W t = c.shift_scale * shift[i];
            const W factor = exponential(c.log_sign * (log_scale[i] - mean[i]));
            z[i] = add_first ? factor * (x[i] + t) : fused_multiply_add(factor, x[i], t);
        });
    return 0;
}

template <typename W>
auto line_function(const CouplingOptions& options) {
    if (options.center != CouplingCenter::none) {
        return options.add_first ? centred_line<true, W> : centred_line<false, W>;
    }
    return visit_line(options, []<typename Scale, bool masked, bool add_first>() {
        return forward_line<Scale, masked, add_first, W>;
    });
}

template <typename T>
void forward(const AffineCouplingParams& params) {
    using W = Wide<T>;
    const CouplingOptions& options = params.options;
    const Reader<T> reader(options, params.shift, params.raw_scale, {0, 0});
    const auto compute = line_function<W>(options);
    const std::int64_t count = reader.parts.count;
    W* partials = static_cast<W*>(params.partials);
    const bool copies = params.z.data != params.x.data && !lines_write_all(options);

    const auto passing = [&](std::int64_t sample, std::int64_t part) {
        return copies ? copy_passing(options, reader.parts, part, sample_of<T>(params.x, sample),
                                     sample_of<T>(params.z, sample))
                      : Copy{};
    };
    // `logs`: where centred, L of the part's elements.
    const auto run = [&](std::int64_t sample, std::int64_t part, Copy copy, Scratch<W>& scratch,
                         W mean, const W*& logs) {
        const T* x = sample_of<T>(params.x, sample);
        T* z = sample_of<T>(params.z, sample);
        double sum = 0;
        reader.for_lines(part, scratch, [&](const Line& line) {
            ForwardLine<W> values{};
            values.x = read_line(x, line, scratch.x);
            values.shift = reader.shift(sample, scratch);
            values.moved = line.moved;
            values.z = line_target(z, line, scratch.out[0]);
            values.beside.next[0] = next_line<T>(x, line);
            values.beside.next[1] = next_line<T>(z, line);
            values.beside.next[2] = reader.next_shift(sample, line);
            values.beside.copy = copy.take(line.count);
            if (logs != nullptr) {
                values.log_scale = logs;
                values.mean = reader.mean(scratch, mean);
                logs += line.count;
            } else {
                values.raw_scale = reader.raw_scale(sample, scratch);
                values.weight = reader.weight(scratch);
                values.beside.next[3] = reader.next_raw_scale(sample, line);
            }
            sum += compute(line.count, values, reader.constants);
            write_line(values.z, line, z, x);
        });
        copy.make();
        partials[sample * count + part] = static_cast<W>(sum);
    };

    if (options.center == CouplingCenter::none) {
        for_each_part(options, reader.parts, [&](std::int64_t sample, std::int64_t part) {
            Scratch<W> scratch;
            const W* logs = nullptr;
            run(sample, part, passing(sample, part), scratch, W{0}, logs);
        });
    } else {
        reader.for_centred_parts([&](std::int64_t sample, std::int64_t begin, std::int64_t end,
                                     Scratch<W>& scratch, W* centred) {
            W* found = centred;
            double total = 0;
            for (std::int64_t part = begin; part < end; ++part) {
                total += reader.log_sums(sample, part, passing(sample, part), scratch, found);
            }
            const W* logs = centred;
            for (std::int64_t part = begin; part < end; ++part) {
                run(sample, part, Copy{}, scratch, reader.mean_of(total), logs);
            }
        });
    }

    // A centred coupling has a log_det of 0.
    const PartRange summed =
        options.center == CouplingCenter::none ? run_parts(options, reader.parts) : PartRange{0, 0};
    const W* log_det_in = static_cast<const W*>(params.log_det_in);
    W* log_det = static_cast<W*>(params.log_det);
    for (std::int64_t sample = 0; sample < options.batch; ++sample) {
        double total = 0;
        for (std::int64_t part = summed.begin; part < summed.end; ++part) {
            total += partials[sample * count + part];
        }
        total *= options.log_sign;
        log_det[sample] =
            static_cast<W>(log_det_in == nullptr ? total : total + log_det_in[sample]);
    }
}

}  // namespace

void affine_coupling_cpu(const AffineCouplingParams& params) {
    visit_element_type(params.options.dtype, [&]<typename T>() { forward<T>(params); });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::coupling
