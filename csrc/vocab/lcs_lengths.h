// Lengths of the longest common subsequences of one sequence of tokens and of many others: what the
// seam hands to the CPU kernel. There is no kernel for GPUs.
#pragma once

#include <cstdint>

#include "common/cpu.h"

namespace warploom::vocab {

// Tokens are found by a hash table of 2^slot_bits slots, at most half of them taken, which the
// kernel fills: the n-th distinct token has the symbol n, and the columns where it stands are bits.
struct LcsLengthsParams {
    const std::int64_t* tokens;      // [length]
    const std::int64_t* others;      // sequence i at cu_seqlens[i], up to cu_seqlens[i + 1]
    const std::int32_t* cu_seqlens;  // [sequences + 1]
    std::int32_t* lengths;           // [sequences]
    std::int64_t* slot_tokens;       // workspace [2^slot_bits]
    std::int32_t* slot_symbols;      // workspace [2^slot_bits]
    std::uint64_t* masks;            // workspace [length, words]: (symbol, 64 columns)
    std::uint64_t* states;           // workspace [parts, words]
    std::int64_t length;
    std::int64_t words;  // ceil(length / 64)
    std::int64_t sequences;
    std::int64_t parts;  // that the sequences are dealt out to
    int slot_bits;
};

WARPLOOM_DECLARE_CPU(lcs_lengths_cpu, LcsLengthsParams)

}  // namespace warploom::vocab
