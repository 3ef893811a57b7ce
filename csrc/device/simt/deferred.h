// Asynchronous operations that take effect later than the call that issues them, and the groups
// that a thread commits and waits for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "controls.h"
#include "site.h"

namespace warploom::device::simt {

// One operation. `perform` gives it its effect; what it means is the issuer's business, so that
// other engines than cp.async share the queue.
struct DeferredOperation {
    void (*perform)(const DeferredOperation&);
    std::byte* destination;
    const std::byte* source;  // null: writes zeros
    std::uint32_t bytes;
    Site site;
    bool performed = false;
};

// The operations of one thread in the order of their issue.
class DeferredQueue {
  public:
    void reset();
    void issue(const DeferredOperation& operation) { operations_.push_back(operation); }
    // Closes the group of the operations since the last commit.
    void commit() { group_ends_.push_back(operations_.size()); }
    // Performs, one time in four, each operation that has not been.
    void stir(Random& random);

    // Performs all but the newest `pending_groups` closed groups and hands each operation to
    // `complete`.
    template <typename Complete>
    void wait(int pending_groups, Complete&& complete) {
        const std::size_t closed = group_ends_.size() - first_group_;
        if (closed <= static_cast<std::size_t>(pending_groups)) {
            return;
        }
        first_group_ += closed - static_cast<std::size_t>(pending_groups);
        const std::size_t end = group_ends_[first_group_ - 1];
        for (; first_operation_ < end; ++first_operation_) {
            DeferredOperation& operation = operations_[first_operation_];
            perform(operation);
            complete(operation);
        }
        if (first_operation_ == operations_.size() && first_group_ == group_ends_.size()) {
            reset();
        }
    }

    // The oldest operation that no wait has completed, or null.
    const DeferredOperation* unfinished() const {
        return first_operation_ < operations_.size() ? &operations_[first_operation_] : nullptr;
    }

    static void perform(DeferredOperation& operation) {
        if (!operation.performed) {
            operation.perform(operation);
            operation.performed = true;
        }
    }

  private:
    std::vector<DeferredOperation> operations_;
    std::vector<std::size_t> group_ends_;
    std::size_t first_operation_ = 0;  // oldest that is not completed
    std::size_t first_group_ = 0;      // oldest closed group that is not completed
};

}  // namespace warploom::device::simt
