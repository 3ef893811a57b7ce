// Numbers of 8 bits, e4m3: a sign, 4 bits of exponent with bias 7, 3 of mantissa; all but the sign
// set is NaN, and there is no infinity. By integer operations, so that every architecture has them.
#pragma once

#include <cstdint>
#include <limits>

#include "device/device.cuh"

namespace warploom {

// Placed at a float's exponent, of bias 127, the bits mean 2^-120 of the number, subnormals too.
WARPLOOM_DEVICE float decode_e4m3(std::uint32_t code) {
    const std::uint32_t magnitude = code & 0x7f;
    const float value = device::bit_cast<float>((code & 0x80) << 24 | magnitude << 20) * 0x1p120f;
    return magnitude == 0x7f ? std::numeric_limits<float>::quiet_NaN() : value;
}

// To nearest, ties to even; NaN from 464 on, which is half way to the number after the largest.
WARPLOOM_DEVICE std::uint32_t encode_e4m3(float value) {
    const auto bits = device::bit_cast<std::uint32_t>(value);
    const std::uint32_t sign = bits >> 24 & 0x80;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    constexpr float kLeastNormal = 0x1p-6f;
    constexpr float kSubnormalsOfOne = 0x1p9f;
    if (device::bit_cast<float>(magnitude) < kLeastNormal) {
        const float steps = rintf(device::bit_cast<float>(magnitude) * kSubnormalsOfOne);
        return sign | static_cast<std::uint32_t>(steps);
    }
    const std::uint32_t rounded = magnitude + 0x7ffff + (magnitude >> 20 & 1);
    const std::uint32_t code = (rounded >> 20) - (127 - 7) * 8;
    return sign | (code < 0x7f ? code : 0x7f);
}

}  // namespace warploom
