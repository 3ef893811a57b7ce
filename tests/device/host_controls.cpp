// C entry points to the executor's controls and to its report.
#include "../../csrc/device/simt/controls.h"
#include "../../csrc/device/simt/report.h"
#include "harness.h"

WARPLOOM_TEST_ENTRY int set_controls(const char* lane_order, const char* async_policy,
                                     std::uint64_t seed, char* error, std::size_t error_bytes) {
    using namespace warploom;
    return harness::report_errors(error, error_bytes, [&] {
        device::simt::set_controls({.lane_order = device::simt::lane_order_from(lane_order),
                                    .async_policy = device::simt::async_policy_from(async_policy),
                                    .seed = seed});
    });
}

// The extra passes that bank conflicts cost the last launch (instrumented kernels alone).
WARPLOOM_TEST_ENTRY std::uint64_t bank_conflicts() {
    return warploom::device::simt::last_report().bank_conflicts;
}

// The block and named barriers that the last launch passed.
WARPLOOM_TEST_ENTRY std::uint64_t barriers_passed() {
    return warploom::device::simt::last_report().barriers;
}
