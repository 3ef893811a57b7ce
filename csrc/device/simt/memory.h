// Memory that kernels may use: the ranges that the caller registered, and guarded allocations for
// tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace warploom::device::simt {

// While one lives, kernels may read (and, where writable, write) `bytes` bytes at `pointer`. As
// soon as any range is registered, kernels may touch no other global memory. `name` appears in
// errors.
class RegisteredRange {
  public:
    RegisteredRange(const void* pointer, std::size_t bytes, std::string name, bool writable);
    ~RegisteredRange();
    RegisteredRange(RegisteredRange&& other) noexcept;
    RegisteredRange& operator=(RegisteredRange&& other) noexcept;
    RegisteredRange(const RegisteredRange&) = delete;
    RegisteredRange& operator=(const RegisteredRange&) = delete;

  private:
    std::uint64_t identity_ = 0;
};

// `bytes` bytes of NaN (0xFF) that end at a page which faults, aligned to 16 bytes where bytes is a
// multiple of 16; registered as writable under `name` until freed.
void* allocate(std::size_t bytes, const std::string& name = "allocation");
void free(void* pointer);

// The ranges at the start of a launch.
class GlobalMemory {
  public:
    struct Range {
        std::uintptr_t begin;
        std::uintptr_t end;
        bool writable;
        bool overlaps_writable;  // a read of it may race
        std::string name;
    };

    // Takes the ranges that are registered now.
    void capture();
    bool empty() const { return ranges_.empty(); }

    // The range that holds all `bytes` (a writable one where `write`), or null.
    const Range* find(std::uintptr_t address, std::size_t bytes, bool write) {
        const auto fits = [&](const Range& range) {
            return address >= range.begin && address + bytes <= range.end &&
                   (range.writable || !write);
        };
        if (last_ < ranges_.size() && fits(ranges_[last_])) {
            return &ranges_[last_];
        }
        for (std::size_t index = 0; index < ranges_.size(); ++index) {
            if (fits(ranges_[index])) {
                last_ = index;
                return &ranges_[index];
            }
        }
        return nullptr;
    }

    // What is wrong with an access for which find() gave null.
    std::string explain(std::uintptr_t address, std::size_t bytes, bool write) const;

  private:
    std::vector<Range> ranges_;
    std::size_t last_ = 0;
};

}  // namespace warploom::device::simt
