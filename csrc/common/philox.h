// Counter-based random numbers: Philox 4x32 with 10 rounds (Salmon et al. 2011, "Parallel random
// numbers: as easy as 1, 2, 3"). A number depends on its key and counter alone, so that every
// backend draws the same ones whatever its tiling. tl.philox is the same function.
#pragma once

#include <cstdint>

namespace warploom {

struct PhiloxNumbers {
    std::uint32_t values[4];
};

// `static`: a CPU unit compiled for one instruction set must not lend its copy to another
// (common/cpu.h). constexpr: nvcc then compiles them for the device too.
static constexpr PhiloxNumbers philox(std::uint64_t key, std::uint32_t counter0,
                                      std::uint32_t counter1, std::uint32_t counter2,
                                      std::uint32_t counter3) {
    constexpr std::uint64_t kMultiplier0 = 0xD2511F53;
    constexpr std::uint64_t kMultiplier1 = 0xCD9E8D57;
    constexpr std::uint32_t kWeyl0 = 0x9E3779B9;  // What each round adds to the key.
    constexpr std::uint32_t kWeyl1 = 0xBB67AE85;
    auto key0 = static_cast<std::uint32_t>(key);
    auto key1 = static_cast<std::uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t product0 = kMultiplier0 * counter0;
        const std::uint64_t product1 = kMultiplier1 * counter2;
        counter0 = static_cast<std::uint32_t>(product1 >> 32) ^ counter1 ^ key0;
        counter1 = static_cast<std::uint32_t>(product1);
        counter2 = static_cast<std::uint32_t>(product0 >> 32) ^ counter3 ^ key1;
        counter3 = static_cast<std::uint32_t>(product0);
        key0 += kWeyl0;
        key1 += kWeyl1;
    }
    return {{counter0, counter1, counter2, counter3}};
}

// A number below this one drops its element, with probability dropout_p in [0, 1).
static constexpr std::uint32_t dropout_threshold(double dropout_p) {
    return static_cast<std::uint32_t>(dropout_p * 4294967296.0);
}

}  // namespace warploom
