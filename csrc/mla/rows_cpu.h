// The query rows of a sequence and the keys that they see, on CPUs. Included by <op>_cpu.cpp only
// (see common/cpu.h on namespaces).
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/scoring_cpu.h"

namespace warploom::mla {
namespace WARPLOOM_CPU_ISA {

using namespace attention::WARPLOOM_CPU_ISA;

// Row r of a sequence is query r / heads of head r % heads.
class Rows {
  public:
    Rows(const std::int32_t* lengths, std::int64_t capacity, std::int64_t query_length,
         std::int64_t heads, double softmax_scale, bool causal)
        : lengths_(lengths), capacity_(capacity), query_length_(query_length), heads_(heads) {
        scoring_.softmax_scale = softmax_scale;
        scoring_.window_left = -1;
        scoring_.window_right = causal ? 0 : -1;
    }

    const attention::Scoring& scoring() const { return scoring_; }

    // Of each sequence.
    std::int64_t count() const { return query_length_ * heads_; }

    std::int64_t length(std::int64_t batch) const {
        return std::clamp<std::int64_t>(lengths_[batch], 0, capacity_);
    }

    RowPlace place(std::int64_t batch, std::int64_t row) const {
        const std::int64_t head = row % heads_;
        const std::int64_t query = row / heads_;
        return {batch, head, batch * heads_ + head, query, query + length(batch) - query_length_};
    }

    // Where the keys end that a row sees; those before it see no more.
    std::int64_t keys_end(std::int64_t batch, std::int64_t row) const {
        const std::int64_t keys = length(batch);
        return std::clamp<std::int64_t>(seen_keys(scoring_, place(batch, row).diagonal, keys).end,
                                        0, keys);
    }

    // In lse.
    std::int64_t statistic(const RowPlace& at) const {
        return at.batch_head * query_length_ + at.query;
    }

  private:
    const std::int32_t* lengths_;
    std::int64_t capacity_;
    std::int64_t query_length_;
    std::int64_t heads_;
    attention::Scoring scoring_{};
};

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::mla
