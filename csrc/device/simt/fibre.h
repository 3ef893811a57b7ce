// Fibres: threads of control that switch only when told to, and the stacks that they run on.
#pragma once

#include <cstddef>
#include <vector>

#if !defined(__x86_64__) || defined(WARPLOOM_SIMT_PORTABLE_FIBRES)
#include <ucontext.h>
#endif

namespace warploom::device::simt {

struct Fibre {
#if defined(__x86_64__) && !defined(WARPLOOM_SIMT_PORTABLE_FIBRES)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
};

struct Stack {
    std::byte* low = nullptr;   // inclusive
    std::byte* high = nullptr;  // exclusive

    bool contains(const void* address) const { return address >= low && address < high; }
};

// Stacks with a guard page below each, made on demand and kept for the life of the process.
class StackPool {
  public:
    // Makes at least `count` stacks. Throws std::bad_alloc.
    void reserve(int count);
    Stack operator[](int index) const { return stacks_[static_cast<std::size_t>(index)]; }

  private:
    std::vector<Stack> stacks_;
};

// The next switch to `fibre` calls `entry` on `stack`; `entry` must not return. What the fibre did
// before is forgotten.
void prepare(Fibre& fibre, Stack stack, void (*entry)());

// Saves the running fibre in `from` and continues `to`; returns when something switches to `from`.
void switch_fibre(Fibre& from, Fibre& to);

}  // namespace warploom::device::simt
