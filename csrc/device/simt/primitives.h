// What the dialect's primitives call: the interface between kernel units and the executor. Operands
// travel in registers, so that a kernel's fragments and accumulators never have their address
// taken.
#pragma once

#include "types.h"

namespace warploom::device::simt {

using Float4 = float __attribute__((vector_size(16)));
using Word4 = std::uint32_t __attribute__((vector_size(16)));

enum class ShuffleMode { index, exclusive_or, up, down };
enum class Element { bfloat16, half };
enum class AtomicOperation { add, maximum, exchange, compare_and_swap };

// Collectives of a warp: all lanes of `mask` meet at one source line.
std::uint64_t shuffle_bits(std::uint64_t bits, ShuffleMode mode, int argument, std::uint32_t mask,
                           Where where);
std::uint32_t vote(bool predicate, std::uint32_t mask, Where where);
void synchronize_warp(std::uint32_t mask, Where where);
Word4 load_matrix(const void* row, int matrices, bool transposed, Where where);
Float4 multiply_16_8_16(Float4 accumulator, Word4 a, std::uint64_t b, Element element, Where where);
Float4 multiply_16_8_8(Float4 accumulator, Word4 a, std::uint64_t b, Where where);

void synchronize_block(Where where);
void synchronize_named(int barrier, int threads, Where where);
void arrive_named(int barrier, int threads, Where where);

void issue_copy(void* destination, const void* source, std::uint32_t bytes, bool valid,
                Where where);
void commit_copies(Where where);
void wait_copies(int pending_groups, Where where);

// `address` may be read (written): it is aligned, in shared memory, on the thread's own stack or in
// a registered range. Seen by the race detection as one access of `bytes`.
void check_load(const void* address, std::uint32_t bytes, bool readonly, Where where);
void check_store(void* address, std::uint32_t bytes, Where where);

std::uint32_t update_atomically(void* address, AtomicOperation operation, bool is_float,
                                bool is_signed, std::uint32_t operand, std::uint32_t expected,
                                Where where);
void fence(Where where);

// The block's dynamic shared memory; an error where the launch gave less than `bytes`.
void* shared_bytes(std::size_t bytes, Where where);

// What a launch may ask for at most.
std::size_t shared_memory_limit();

// Runs `entry(arguments)` as every thread of the grid. Throws KernelError.
void run_grid(const LaunchShape& shape, void (*entry)(const void* kernel, const void* arguments),
              const void* kernel, const void* arguments, bool instrumented, Where where);

}  // namespace warploom::device::simt
