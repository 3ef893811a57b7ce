// Index arithmetic of kernels over more elements than 32 bits can number.
#pragma once

#include <cstdint>

#include "../device/device.cuh"

namespace warploom {

struct Division {
    std::int64_t quotient;
    std::int64_t remainder;
};

// `value` >= 0 by `by` > 0: in 32 bits, which is several times cheaper, wherever both fit.
WARPLOOM_DEVICE Division divide(std::int64_t value, std::int64_t by) {
    constexpr std::int64_t kSmall = std::int64_t{1} << 32;
    if (value < kSmall && by < kSmall) {
        const auto small_value = static_cast<std::uint32_t>(value);
        const auto small_by = static_cast<std::uint32_t>(by);
        const std::uint32_t quotient = small_value / small_by;
        return {quotient, small_value - quotient * small_by};
    }
    const std::int64_t quotient = value / by;
    return {quotient, value - quotient * by};
}

}  // namespace warploom
