#include "deferred.h"

namespace warploom::device::simt {

void DeferredQueue::reset() {
    operations_.clear();
    group_ends_.clear();
    first_operation_ = 0;
    first_group_ = 0;
}

void DeferredQueue::stir(Random& random) {
    for (std::size_t index = first_operation_; index < operations_.size(); ++index) {
        if (random.below(4) == 0) {
            perform(operations_[index]);
        }
    }
}

}  // namespace warploom::device::simt
