// Vectors of elements that move in one instruction, and their conversion to and from float.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "../device/device.cuh"

namespace warploom {

// The widest load or store of one thread.
inline constexpr int kVectorBytes = 16;

// Elements of T in such a load.
template <typename T>
inline constexpr int kVectorElements = kVectorBytes / static_cast<int>(sizeof(T));

// kCount neighbouring elements, held in registers.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Packed {
    static_assert(kCount == 1 || sizeof(T) * kCount == kVectorBytes,
                  "Packed: one element, or 16 bytes of them");
    T values[kCount];
};

// The same bits as pairs of 16-bit elements, the first in the low half.
template <int kPairs>
struct PackedWords {
    std::uint32_t pairs[kPairs];
};

// `address` is a multiple of sizeof(Packed<T, kCount>).
template <int kCount, typename T>
WARPLOOM_DEVICE Packed<T, kCount> load_packed(const T* address) {
    if constexpr (kCount == 1) {
        return Packed<T, 1>{{*address}};
    } else {
        return device::load_vector<Packed<T, kCount>>(address);
    }
}

template <typename T, int kCount>
WARPLOOM_DEVICE Packed<T, kCount> zero_packed() {
    Packed<T, kCount> packed;
    WARPLOOM_UNROLL
    for (int index = 0; index < kCount; ++index) {
        packed.values[index] = device::from_float<T>(0.0f);
    }
    return packed;
}

template <typename T, int kCount>
WARPLOOM_DEVICE void store_packed(T* address, const Packed<T, kCount>& packed) {
    if constexpr (kCount == 1) {
        *address = packed.values[0];
    } else {
        device::store_vector(address, packed);
    }
}

template <typename T, int kCount>
WARPLOOM_DEVICE void unpack(const Packed<T, kCount>& packed, float (&values)[kCount]) {
    if constexpr (std::is_same_v<T, device::bfloat16> && kCount > 1) {
        // A bfloat16 is the upper half of a float: one instruction an element, on whole words.
        const auto words = device::bit_cast<PackedWords<kCount / 2>>(packed);
        WARPLOOM_UNROLL
        for (int pair = 0; pair < kCount / 2; ++pair) {
            values[2 * pair] = device::bit_cast<float>(words.pairs[pair] << 16);
            values[2 * pair + 1] = device::bit_cast<float>(words.pairs[pair] & 0xffff0000u);
        }
    } else {
        WARPLOOM_UNROLL
        for (int index = 0; index < kCount; ++index) {
            values[index] = device::to_float(packed.values[index]);
        }
    }
}

// Rounds to nearest even, 16-bit types two at a time.
template <typename T, int kCount>
WARPLOOM_DEVICE Packed<T, kCount> pack_floats(const float (&values)[kCount]) {
    if constexpr (sizeof(T) == 2 && kCount > 1) {
        PackedWords<kCount / 2> words;
        WARPLOOM_UNROLL
        for (int pair = 0; pair < kCount / 2; ++pair) {
            words.pairs[pair] = device::pack<T>(values[2 * pair], values[2 * pair + 1]);
        }
        return device::bit_cast<Packed<T, kCount>>(words);
    } else {
        Packed<T, kCount> packed;
        WARPLOOM_UNROLL
        for (int index = 0; index < kCount; ++index) {
            packed.values[index] = device::from_float<T>(values[index]);
        }
        return packed;
    }
}

// kCount elements as floats, in as many loads as 16 bytes each need; `address` is a multiple of the
// smaller of 16 bytes and kCount elements.
template <int kCount, typename T>
WARPLOOM_DEVICE void load_floats(const T* address, float (&values)[kCount]) {
    constexpr int kPart = kCount < kVectorElements<T> ? kCount : kVectorElements<T>;
    static_assert(kCount % kPart == 0, "load_floats: whole vectors");
    WARPLOOM_UNROLL
    for (int first = 0; first < kCount; first += kPart) {
        float part[kPart];
        unpack(load_packed<kPart>(address + first), part);
        WARPLOOM_UNROLL
        for (int index = 0; index < kPart; ++index) {
            values[first + index] = part[index];
        }
    }
}

// kCount floats to `address`, a multiple of the smaller of 16 bytes and kCount floats.
template <int kCount>
WARPLOOM_DEVICE void store_floats(float* address, const float (&values)[kCount]) {
    constexpr int kPart = kCount < kVectorElements<float> ? kCount : kVectorElements<float>;
    WARPLOOM_UNROLL
    for (int first = 0; first < kCount; first += kPart) {
        Packed<float, kPart> packed;
        WARPLOOM_UNROLL
        for (int index = 0; index < kPart; ++index) {
            packed.values[index] = values[first + index];
        }
        store_packed(address + first, packed);
    }
}

// For launchers: true where rows of `columns` elements of T that begin at `pointers`, `row_strides`
// elements apart, may be moved in vectors of 16 bytes. Null pointers count as aligned.
template <typename T>
bool are_vectors(std::int64_t columns, std::initializer_list<const void*> pointers,
                 std::initializer_list<std::int64_t> row_strides) {
    const auto is_aligned = [](const void* pointer) {
        return reinterpret_cast<std::uintptr_t>(pointer) % kVectorBytes == 0;
    };
    const auto is_whole = [](std::int64_t elements) { return elements % kVectorElements<T> == 0; };
    return is_whole(columns) && std::all_of(row_strides.begin(), row_strides.end(), is_whole) &&
           std::all_of(pointers.begin(), pointers.end(), is_aligned);
}

}  // namespace warploom
