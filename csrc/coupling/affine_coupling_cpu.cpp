// Affine coupling on the CPU: one pass over x and the parameters, part by part of a sample; a mean
// that is taken off the logarithms is found in a pass before, whose data are still in the cache.
#include <algorithm>
#include <cstdint>

#include "coupling/affine_coupling_cpu.h"

namespace warploom::coupling {
namespace WARPLOOM_CPU_ISA {
namespace {

template <typename W>
struct ForwardLine {
    const W* x;
    const W* shift;
    const W* raw_scale;
    const W* weight;            // of tanh
    const W* mean;              // where centred
    const std::uint8_t* moved;  // where masked
    W* z;
    std::int64_t next_x;  // from an element to that of the next line
    std::int64_t next_params;
};

// z of a line; returns the sum of L. Here and below, a copy of the constants tells the compiler
// that what is written does not change them.
template <typename Scale, LineKind kind, bool add_first, typename W>
[[gnu::flatten]] double forward_line(std::int64_t count, const ForwardLine<W>& line,
                                     const Constants<W>& constants) {
    const W *x = line.x, *shift = line.shift, *raw_scale = line.raw_scale;
    const W *weight = line.weight, *mean = line.mean;
    const std::uint8_t* moved = line.moved;
    W* z = line.z;
    const std::int64_t next_x = line.next_x, next_params = line.next_params;
    const Constants<W> c = constants;
    constexpr bool centred = kind == LineKind::centred;
    W sums[kBlockElements] = {};
    for_each_in_line(
        count,
        [=](std::int64_t first) {
            prefetch(x + first + next_x, kBlockElements);
            prefetch(z + first + next_x, kBlockElements);
            prefetch(shift + first + next_params, kBlockElements);
            prefetch(raw_scale + first + next_params, kBlockElements);
        },
        [=, &sums](std::int64_t i, std::int64_t lane) {
            const W u = c.params_scale * raw_scale[i];
            const W t = c.shift_scale * shift[i];
            const W log_scale = weighted_log<Scale>(u, weight, i, c).value;
            const bool moves = kind != LineKind::masked || moved[i] != 0;
            sums[lane] += moves ? log_scale : W{0};
            const W factor =
                factor_of<Scale, centred>(u, centred ? log_scale - mean[i] : log_scale, c);
            const W value = add_first ? factor * (x[i] + t) : fused_multiply_add(factor, x[i], t);
            z[i] = moves ? value : x[i];
        });
    return sum_of_lanes(sums);
}

template <typename T>
void forward(const AffineCouplingParams& params) {
    using W = Wide<T>;
    const CouplingOptions& options = params.options;
    const Reader<T> reader(options, params.shift, params.raw_scale, {0, 0});
    const auto compute = visit_line(options, []<typename Scale, LineKind kind, bool add_first>() {
        return forward_line<Scale, kind, add_first, W>;
    });
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
            W* target = line_target(z, line, scratch.out[0]);
            sum += compute(line.count,
                           {read_line(x, line, scratch.x), reader.shift(sample, scratch),
                            reader.raw_scale(sample, scratch), reader.weight(scratch),
                            reader.mean(scratch, scratch.pixel_mean, mean, scratch.mean),
                            line.moved, target, next_x<T, W>(line), next_params<T, W>(line)},
                           reader.constants);
            write_line(target, line, z);
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

}  // namespace

void affine_coupling_cpu(const AffineCouplingParams& params) {
    visit_element_type(params.options.dtype, [&]<typename T>() { forward<T>(params); });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::coupling
