// Some columns of the rows of a vocabulary, of which others went before or come after: on the CPU
// alone, where blocks of logits stay in a cache.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dispatch.h"

namespace warploom::vocab {

struct CrossEntropyBlockParams {
    void* logits;                 // [rows, columns] contiguous; replaced where `gradients`
    void* state;                  // [rows, 4] as factor; see `reference/vocab.py`
    const std::int64_t* targets;  // [rows], in [0, classes) or ignore_index
    void* factor;                 // [rows] float32 (float64 for float64 logits)
    std::int64_t rows;
    std::int64_t first;  // of the columns, among the classes
    std::int64_t classes;
    std::int64_t ignore_index;
    int columns;
    double softcap;  // 0: none
    bool gradients;
    DType dtype;  // of logits
};

WARPLOOM_DECLARE_CPU(cross_entropy_block_cpu, CrossEntropyBlockParams)

}  // namespace warploom::vocab
