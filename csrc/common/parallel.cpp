#include "parallel.h"

#include <torch/csrc/stable/ops.h>

namespace warploom {

void parallel_ranges(std::int64_t size, std::int64_t grain,
                     void (*body)(void* context, std::int64_t begin, std::int64_t end),
                     void* context) {
    torch::stable::parallel_for(
        0, size, grain, [&](std::int64_t begin, std::int64_t end) { body(context, begin, end); });
}

int thread_count() {
    return static_cast<int>(torch::stable::get_num_threads());
}

}  // namespace warploom
