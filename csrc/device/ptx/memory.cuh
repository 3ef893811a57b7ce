// Shared-memory plans, vector loads and stores, and address conversion.
#pragma once

#include "index.cuh"

namespace warploom::device {

namespace detail {

// The built-in type whose load and store is one instruction of `kBytes` bytes.
template <std::size_t kBytes>
struct VectorCarrier {
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16,
                  "vector: the type must have 4, 8 or 16 bytes");
    using type = std::conditional_t<kBytes == 4, unsigned int,
                                    std::conditional_t<kBytes == 8, uint2, uint4>>;
};

template <typename V>
using vector_carrier = typename VectorCarrier<sizeof(V)>::type;

// PTX ISA, Data Movement and Conversion Instructions: cvta.to.shared
WARPLOOM_DEVICE std::uint32_t shared_address(const void* pointer) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace detail

// The block's dynamic shared memory, which the one struct `Plan` describes; uninitialised, 128-byte
// aligned.
template <typename Plan>
WARPLOOM_DEVICE Plan& shared_memory() {
    static_assert(sizeof(Plan) <= 227 * 1024, "shared_memory: the plan exceeds 227 KiB");
    static_assert(alignof(Plan) <= 128, "shared_memory: the plan's alignment exceeds 128 bytes");
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    return *reinterpret_cast<Plan*>(shared_bytes);
}

// PTX ISA, Data Movement and Conversion Instructions: ld, ld.v2, ld.v4
// One load of sizeof(V) bytes from any memory; `address` is a multiple of sizeof(V).
template <typename V>
WARPLOOM_DEVICE V load_vector(const void* address) {
    using Carrier = detail::vector_carrier<V>;
    return bit_cast<V>(*static_cast<const Carrier*>(address));
}

// PTX ISA, Data Movement and Conversion Instructions: st, st.v2, st.v4
template <typename V>
WARPLOOM_DEVICE void store_vector(void* address, const V& value) {
    using Carrier = detail::vector_carrier<V>;
    *static_cast<Carrier*>(address) = bit_cast<Carrier>(value);
}

// PTX ISA, Data Movement and Conversion Instructions: ld.global.nc
// One load from global memory that nothing writes while the kernel runs.
template <typename V>
WARPLOOM_DEVICE V load_readonly(const void* address) {
    using Carrier = detail::vector_carrier<V>;
    return bit_cast<V>(__ldg(static_cast<const Carrier*>(address)));
}

}  // namespace warploom::device
