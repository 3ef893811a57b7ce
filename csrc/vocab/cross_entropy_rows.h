// Cross-entropy of rows of logits, which are replaced by their gradients: what the seam hands to
// the code that computes it. `reference/vocab.py` has the formulas.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dispatch.h"
#include "common/launch.h"

namespace warploom::vocab {

struct CrossEntropyRowsParams {
    void* logits;                 // [rows, columns] contiguous; replaced where `gradients`
    const std::int64_t* targets;  // [rows], in [0, columns) or ignore_index; on a GPU, where nobody
                                  // has looked, others make the loss NaN
    const void* row_scale;        // as loss, or null: 1
    void* loss;                   // [rows] float32 (float64 for float64 logits)
    std::int64_t rows;
    std::int64_t ignore_index;
    int columns;
    double label_smoothing;
    double z_loss;
    double softcap;  // 0: none
    bool gradients;
    DType dtype;  // of logits
};

WARPLOOM_DECLARE_CPU(cross_entropy_rows_cpu, CrossEntropyRowsParams)
void cross_entropy_rows_cuda(const CrossEntropyRowsParams& params, Stream stream);

}  // namespace warploom::vocab
