// What passes through an affine coupling on the CPU. A copy waits for the memory and needs nothing
// else, so that it is made beside the arithmetic of lines where it can be. Included by <op>_cpu.cpp
// only (see common/cpu.h on namespaces).
#pragma once

#include <algorithm>
#include <cstdint>

#include "coupling/affine_coupling.h"
#include "coupling/lines_cpu.h"

namespace warploom::coupling {
namespace WARPLOOM_CPU_ISA {

// Elements of a line between two requests for data of the next one, and the bytes that are copied
// then.
constexpr std::int64_t kBlockElements = 32;
constexpr std::int64_t kCopyBytes = 128;

struct Copy {
    const char* from = nullptr;
    char* to = nullptr;
    std::int64_t bytes = 0;

    [[gnu::always_inline]] void make_block(std::int64_t at) const {
        constexpr std::int64_t kAhead = 2048;
        for (std::int64_t line = 0; line < kCopyBytes; line += 64) {
            __builtin_prefetch(from + at + kAhead + line, 0, 2);
            __builtin_prefetch(to + at + kAhead + line, 0, 2);
        }
        __builtin_memcpy(to + at, from + at, kCopyBytes);
    }

    void make() const {
        std::int64_t at = 0;
        for (; at + kCopyBytes <= bytes; at += kCopyBytes) {
            make_block(at);
        }
        __builtin_memcpy(to + at, from + at, bytes - at);
    }

    // What of it is made beside a line of `count` elements; it is left without that.
    Copy take(std::int64_t count) {
        const std::int64_t blocks = std::min(count / kBlockElements, bytes / kCopyBytes);
        const Copy taken{from, to, blocks * kCopyBytes};
        from += taken.bytes;
        to += taken.bytes;
        bytes -= taken.bytes;
        return taken;
    }
};

// Elements [begin, end) of `from`; where that is null, `to` is 0 at once.
template <typename T>
Copy copy_of(const T* from, T* to, std::int64_t begin, std::int64_t end) {
    if (begin >= end) {
        return {};
    }
    const std::int64_t bytes = (end - begin) * static_cast<std::int64_t>(sizeof(T));
    if (from == nullptr) {
        __builtin_memset(to + begin, 0, bytes);
        return {};
    }
    return {reinterpret_cast<const char*>(from + begin), reinterpret_cast<char*>(to + begin),
            bytes};
}

// The parts of a sample that are run: without those of a range's passing channels, which the others
// share.
struct PartRange {
    std::int64_t begin;
    std::int64_t end;

    std::int64_t count() const { return end - begin; }
};
inline PartRange run_parts(const CouplingOptions& options, const CouplingParts& parts) {
    if (!parts.channel_parts || options.mask != CouplingMask::range || options.count == 0) {
        return {0, parts.count};
    }
    return {options.first * parts.ranges, (options.first + options.count) * parts.ranges};
}

// Copies what passes of part `part` of a sample, or where some elements of a range are transformed
// all of it, but for what it returns: that is left to be made beside its lines.
template <typename T>
Copy copy_passing(const CouplingOptions& options, const CouplingParts& parts, std::int64_t part,
                  const T* from, T* to) {
    const std::int64_t range = parts.channel_parts ? part % parts.ranges : part;
    const std::int64_t begin = range * parts.pixels;
    const std::int64_t end = std::min(options.pixels, begin + parts.pixels);
    const std::int64_t channels = options.channels;
    if (options.channels_last) {  // of a range lines write what is transformed over it
        copy_of(from, to, begin * channels, end * channels).make();
        return {};
    }
    if (options.mask == CouplingMask::range) {  // a share of the channels before and after
        const std::int64_t before = options.first * options.pixels;
        const std::int64_t moved = options.count * options.pixels;
        const std::int64_t passing = channels * options.pixels - moved;
        const PartRange run = run_parts(options, parts);
        const std::int64_t first = passing * (part - run.begin) / run.count();
        const std::int64_t last = passing * (part - run.begin + 1) / run.count();
        const Copy low = copy_of(from, to, first, std::min(last, before));
        const Copy high = copy_of(from, to, std::max(first, before) + moved, last + moved);
        (low.bytes < high.bytes ? low : high).make();
        return low.bytes < high.bytes ? high : low;
    }
    const std::int64_t channel = parts.channel_parts ? part / parts.ranges : 0;
    const std::int64_t last = parts.channel_parts ? channel + 1 : channels;
    for (std::int64_t c = channel; c < last; ++c) {
        if (options.mask != CouplingMask::slots || slot_of(options, c) < 0) {
            copy_of(from, to, c * options.pixels + begin, c * options.pixels + end).make();
        }
    }
    return {};
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::coupling
