// What the forward and the backward of an affine coupling on the CPU share: the parts of a sample,
// what passes, and the parameters of lines. Included by <op>_cpu.cpp only (see common/cpu.h on
// namespaces).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/cpu_loops.h"
#include "common/parallel.h"
#include "coupling/coupling_parts_cpu.h"
#include "coupling/line_access_cpu.h"
#include "coupling/lines_cpu.h"
#include "coupling/passing_cpu.h"
#include "coupling/scale_cpu.h"

namespace warploom::coupling {
namespace WARPLOOM_CPU_ISA {

// Calls visit.template operator()<Scale, masked, add_first>() with what the options stand for.
template <typename Scale, typename Visit>
auto visit_kind(const CouplingOptions& options, const Visit& visit) {
    if (is_masked(options)) {
        return options.add_first ? visit.template operator()<Scale, true, true>()
                                 : visit.template operator()<Scale, true, false>();
    }
    return options.add_first ? visit.template operator()<Scale, false, true>()
                             : visit.template operator()<Scale, false, false>();
}

template <bool reciprocal, typename Visit>
auto visit_sigmoid(const CouplingOptions& options, const Visit& visit) {
    return options.eps == 0 ? visit_kind<SigmoidScale<reciprocal>>(options, visit)
                            : visit_kind<RaisedSigmoidScale<reciprocal>>(options, visit);
}

template <typename Visit>
auto visit_line(const CouplingOptions& options, const Visit& visit) {
    switch (options.scale) {
        case CouplingScale::exp:
            return visit_kind<ExpScale>(options, visit);
        case CouplingScale::tanh:
            return options.scale_weight != nullptr ? visit_kind<WeightedTanhScale>(options, visit)
                                                   : visit_kind<TanhScale>(options, visit);
        case CouplingScale::atan:
            return visit_kind<AtanScale>(options, visit);
        case CouplingScale::centered_sigmoid:
            return visit_kind<CenteredSigmoidScale>(options, visit);
        case CouplingScale::sigmoid:
            return options.log_sign > 0 ? visit_sigmoid<false>(options, visit)
                                        : visit_sigmoid<true>(options, visit);
        case CouplingScale::softclip:
            return visit_kind<SoftclipScale>(options, visit);
        default:
            return visit_kind<AdditiveScale>(options, visit);
    }
}

template <typename Scale, typename W>
[[gnu::always_inline]] inline LogScale<W> weighted_log(W u, const W* weight, std::int64_t i,
                                                       const Constants<W>& c) {
    LogScale<W> log = Scale::log(u, c);
    if constexpr (std::is_same_v<Scale, WeightedTanhScale>) {
        log.value *= weight[i];
        log.slope *= weight[i];
    }
    return log;
}

// Calls body(i, lane), lane < kBlockElements, for the elements of a line, and before some of them
// prepare(first): asking for what is needed a line later, it keeps the memory busy while a line is
// computed. A loop is vectorised only with every call in line and without a branch.
template <typename Prepare, typename Body>
[[gnu::always_inline]] inline void for_each_in_line(std::int64_t count, const Prepare& prepare,
                                                    const Body& body) {
    std::int64_t first = 0;
    for (; first + kBlockElements <= count; first += kBlockElements) {
        prepare(first);
#pragma omp simd
        for (std::int64_t lane = 0; lane < kBlockElements; ++lane) {
            body(first + lane, lane);
        }
    }
#pragma omp simd
    for (std::int64_t i = first; i < count; ++i) {
        body(i, i - first);
    }
}

// Two requests a block: they are 64 bytes apart for float32.
[[gnu::always_inline]] inline void ask_for(const Ahead& ahead, std::int64_t first) {
    __builtin_prefetch(ahead.first + first * ahead.step, 0, 3);
    __builtin_prefetch(ahead.first + (first + kBlockElements / 2) * ahead.step, 0, 3);
}

// What is done beside a line: the data of the next one are asked for, some of what passes is
// copied.
template <int count>
struct Beside {
    Ahead next[count];
    Copy copy;
};
template <int count>
[[gnu::always_inline]] inline void do_beside(const Beside<count>& beside, std::int64_t first) {
    for (const Ahead& ahead : beside.next) {
        ask_for(ahead, first);
    }
    const std::int64_t at = first / kBlockElements * kCopyBytes;
    if (at < beside.copy.bytes) {
        beside.copy.make_block(at);
    }
}

template <typename W, int count>
[[gnu::always_inline]] inline double sum_of_lanes(const W (&sums)[count]) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int lane = 0; lane < count; ++lane) {
        sum += static_cast<double>(sums[lane]);
    }
    return sum;
}

template <typename W>
inline Constants<W> constants_of(const CouplingOptions& options) {
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
    W out[3][kLine];
    W grad_weight[kLine];
    W pixel_mean[kCouplingCentredPixels];
    Line line;
};

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

// Calls body(sample, part) for every part that is run, on all threads.
template <typename Body>
void for_each_part(const CouplingOptions& options, const CouplingParts& parts, Body body) {
    const PartRange run = run_parts(options, parts);
    parallel_for(options.batch * run.count(), grain_of(options, run.count()),
                 [&](std::int64_t begin, std::int64_t end) {
                     for (std::int64_t item = begin; item < end; ++item) {
                         body(item / run.count(), run.begin + item % run.count());
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

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::coupling
