// The bins of some planes, from vectors of planes to the output. Included by <op>_cpu.cpp only (see
// common/cpu.h on namespaces).
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "spp/held_cpu.h"
#include "spp/pyramid_cpu.h"
#include "spp/spatial_pyramid_pool.h"

namespace warploom::spp {
namespace WARPLOOM_CPU_ISA {

template <typename T, typename Row, typename Element>
inline void write_vector(const Row& row, Element* to) {
    constexpr int kBlock = kSide<Wide<T>>;
    if constexpr (std::is_integral_v<Element>) {
        typedef Element Elements __attribute__((vector_size(kBlock * sizeof(Element))));
        const Elements elements = __builtin_convertvector(row, Elements);
        __builtin_memcpy(to, &elements, sizeof(elements));
    } else {
        Wide<T> numbers[kBlock];
        __builtin_memcpy(numbers, &row, sizeof(row));
#pragma omp simd
        for (int i = 0; i < kBlock; ++i) {
            to[i] = narrow<T>(numbers[i]);
        }
    }
}

// What is held of a level's bins, vectors_of(bin), to out[lane * channel_stride + bin]. Where a
// plane has fewer bins than a vector numbers, vectors overlap: what is written too much is written
// again.
template <typename T, typename Vectors, typename Element, typename W = Wide<T>>
[[gnu::flatten]] void write_level(const PyramidLevel& level, int lanes, Vectors vectors_of,
                                  Element* out) {
    constexpr int kBlock = kSide<W>;
    const int bins = level.rows * level.columns;
    const bool overlaps = bins < kBlock && level.channel_stride == bins;
    for (int first = 0; first < lanes; first += kBlock, out += kBlock * level.channel_stride) {
        const int count = std::min(lanes - first, kBlock);
        if (overlaps && bins == 1 && count == kBlock) {
            write_vector<T>(vectors_of(0)[first / kBlock], out);
            continue;
        }
        Element numbers[kBlock * kBlock];
        for (int bin = 0; bin < bins; bin += kBlock) {
            const int width = std::min(bins - bin, kBlock);
            std::remove_cvref_t<decltype(vectors_of(0)[0])> rows[kBlock];
#pragma GCC unroll 16
            for (int i = 0; i < kBlock; ++i) {
                rows[i] = vectors_of(bin + (i < width ? i : 0))[first / kBlock];
            }
            transpose<W>(rows);
            for (int lane = 0; lane < count; ++lane) {
                Element* const to = out + lane * level.channel_stride + bin;
                if (width == kBlock) {
                    write_vector<T>(rows[lane], to);
                } else if (overlaps) {
                    write_vector<T>(rows[lane], numbers + lane * bins);
                } else {
                    write_vector<T>(rows[lane], numbers);
                    std::copy_n(numbers, width, to);
                }
            }
        }
        if (overlaps) {
            std::copy_n(numbers, count * bins, out);
        }
    }
}

// A level's bins of all planes to the output, of which `to` is the first.
template <Reduction kReduction, typename T, int kLanes, typename W = Wide<T>>
void write_bins(const SpatialPyramidPoolParams& params, const Grid& grid, const PyramidLevel& level,
                const LevelPlace& first, int lanes, std::int64_t to, Held<W, kLanes>* bins) {
    Held<W, kLanes>* bin = bins;
    for (int row = 0; row < level.rows; ++row) {
        const PoolWindow& down = grid.rows.windows[first.row + row];
        for (int column = 0; column < level.columns; ++column, ++bin) {
            const PoolWindow& across = grid.columns.windows[first.column + column];
            const W area = static_cast<W>(down.span) * static_cast<W>(across.span);
            if (down.begin >= down.end || across.begin >= across.end) {
                std::fill_n(bin->values, bin->kVectors, Vector<W>{});
                std::fill_n(bin->places, bin->kVectors, Indices<W>{} - 1);
            } else if constexpr (kReduction == Reduction::sum) {
                for (Vector<W>& values : bin->values) {
                    values /= area;
                }
            }
        }
    }
    const auto write = [&](auto* out, auto vectors_of) {
        write_level<T>(level, lanes, vectors_of, out + to);
    };
    write(static_cast<T*>(params.out), [=](int bin) { return bins[bin].values; });
    if constexpr (kReduction == Reduction::indexed_max) {
        const auto places_of = [=](int bin) { return bins[bin].places; };
        if (params.is_narrow_index) {
            write(static_cast<std::int16_t*>(params.argmax), places_of);
        } else {
            write(static_cast<std::int32_t*>(params.argmax), places_of);
        }
    }
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::spp
