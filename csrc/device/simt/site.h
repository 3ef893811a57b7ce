// A place in a kernel: the source location that a primitive was called with, or the program counter
// of a plain load or store, in 32 bits so that the shadow memory can hold many.
#pragma once

#include <bit>
#include <cstdint>
#include <source_location>
#include <string>

namespace warploom::device::simt {

class Site {
  public:
    Site() = default;
    Site(std::source_location where);
    static Site of_program_counter(const void* program_counter);

    bool known() const { return code_ != 0; }
    bool is_location() const { return known() && (code_ & 1u) == 0; }
    std::source_location location() const;
    const void* program_counter() const;

    // The same line of the same file. Program counters are compared as they are.
    bool same_line(Site other) const;
    bool operator==(const Site& other) const = default;
    std::uint32_t code() const { return code_; }

  private:
    // Twice the distance from an anchor in this module, plus one for a program counter; 0 is
    // unknown. Locations and code live in the module of the kernels, near the anchor.
    std::uint32_t code_ = 0;
};

// "file:line" of a site. A program counter is looked up in the debug information by addr2line, so
// this is slow and belongs to the making of an error or a report.
std::string describe(Site site);

// Where the running function was called from, a line "\n  called from file:line" for each caller
// outside the executor, without those at `known`. Empty without debug information.
std::string describe_callers(const std::string& known);

// The name of the function at `address` (a kernel), demangled.
std::string function_name(const void* address);

}  // namespace warploom::device::simt
