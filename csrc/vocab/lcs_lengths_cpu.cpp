// Longest common subsequences, 64 columns of the dynamic programme at a time (Crochemore et al., A
// fast and practical bit-vector algorithm for the longest common subsequence problem, 2001; Hyyro,
// Bit-parallel LCS-length computation revisited, 2004).
//
// A row of the table rises by 0 or 1 from column to column. Bit j of the state is 0 where it rises
// at column j, so that the zeros of the last row are the length. A token whose columns are the bits
// of `mask` takes a row to the next by
//
//   state = (state + (state & mask)) | (state & ~mask)
//
// whose addition carries from word to word. Bits behind the last column stay 1.
#include <cstdint>

#include "common/parallel.h"
#include "vocab/lcs_lengths.h"

namespace warploom::vocab {
namespace WARPLOOM_CPU_ISA {
namespace {

constexpr std::int64_t kWordBits = 64;
constexpr std::int32_t kFree = -1;

// The slot of a token, or the free one where it would go.
inline std::int64_t find_slot(const LcsLengthsParams& params, std::int64_t token) {
    const std::int64_t last = (std::int64_t{1} << params.slot_bits) - 1;
    const std::uint64_t hash = static_cast<std::uint64_t>(token) * 0x9e3779b97f4a7c15u;
    std::int64_t slot = static_cast<std::int64_t>(hash >> (kWordBits - params.slot_bits));
    while (params.slot_symbols[slot] != kFree && params.slot_tokens[slot] != token) {
        slot = (slot + 1) & last;
    }
    return slot;
}

void fill_table(const LcsLengthsParams& params) {
    for (std::int64_t slot = 0; slot < std::int64_t{1} << params.slot_bits; ++slot) {
        params.slot_symbols[slot] = kFree;
    }
    std::int32_t symbols = 0;
    for (std::int64_t column = 0; column < params.length; ++column) {
        const std::int64_t slot = find_slot(params, params.tokens[column]);
        if (params.slot_symbols[slot] == kFree) {
            params.slot_tokens[slot] = params.tokens[column];
            params.slot_symbols[slot] = symbols;
            for (std::int64_t word = 0; word < params.words; ++word) {
                params.masks[symbols * params.words + word] = 0;
            }
            ++symbols;
        }
        params.masks[params.slot_symbols[slot] * params.words + column / kWordBits] |=
            std::uint64_t{1} << (column % kWordBits);
    }
}

inline void next_row(std::uint64_t* state, const std::uint64_t* mask, std::int64_t words) {
    std::uint64_t carry = 0;
    for (std::int64_t word = 0; word < words; ++word) {
        const std::uint64_t common = state[word] & mask[word];
        const std::uint64_t partial = state[word] + carry;
        const std::uint64_t sum = partial + common;
        carry =
            static_cast<std::uint64_t>(partial < carry) | static_cast<std::uint64_t>(sum < common);
        state[word] = sum | (state[word] & ~mask[word]);
    }
}

std::int32_t common_length(const LcsLengthsParams& params, std::int64_t sequence,
                           std::uint64_t* state) {
    for (std::int64_t word = 0; word < params.words; ++word) {
        state[word] = ~std::uint64_t{0};
    }
    const std::int64_t end = params.cu_seqlens[sequence + 1];
    for (std::int64_t place = params.cu_seqlens[sequence]; place < end; ++place) {
        const std::int32_t symbol = params.slot_symbols[find_slot(params, params.others[place])];
        if (symbol != kFree) {
            next_row(state, params.masks + symbol * params.words, params.words);
        }
    }
    std::int32_t zeros = 0;
    for (std::int64_t word = 0; word < params.words; ++word) {
        zeros += __builtin_popcountll(~state[word]);
    }
    return zeros;
}

}  // namespace

void lcs_lengths_cpu(const LcsLengthsParams& params) {
    fill_table(params);
    parallel_for(params.parts, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t part = begin; part < end; ++part) {
            const std::int64_t last = (part + 1) * params.sequences / params.parts;
            for (std::int64_t i = part * params.sequences / params.parts; i < last; ++i) {
                params.lengths[i] = common_length(params, i, params.states + part * params.words);
            }
        }
    });
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::vocab
