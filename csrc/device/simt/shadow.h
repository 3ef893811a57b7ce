// What is remembered of each byte of memory: who wrote it last, who has read it since.
#pragma once

#include <array>
#include <bitset>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>

#include "clocks.h"
#include "site.h"

namespace warploom::device::simt {

enum class AccessKind { read, write, atomic };

// An access in the past. `block` is its block's running number, 0 for none.
struct Stamp {
    std::uint32_t block = 0;
    Epoch epoch;
    Site site;
};

struct Cell {
    Stamp write;
    // Two readers since the write, of different warps where there were such: enough to see a
    // missing barrier, though not every race of more readers.
    Stamp reads[2];
    bool pending = false;  // an asynchronous write that nobody has waited for
    bool atomic = false;   // the write was an atomic update
};

// Why an access is wrong.
struct Finding {
    enum class Problem { none, uninitialized, unfinished, write_before, read_before };

    Problem problem = Problem::none;
    Stamp other;
};

// The cells of a stretch of memory, made where they are touched. Four bytes share a cell until one
// of them is accessed alone.
class Shadow {
  public:
    // Blocks of private memory are strangers to one another: what an earlier block did is
    // forgotten, and bytes that this block has not written are uninitialised. Blocks of common
    // memory run at the same time.
    enum class Sharing { within_block, among_blocks };

    explicit Shadow(Sharing sharing) : sharing_(sharing) {}

    // Checks and records one access of `thread`.
    Finding access(std::uintptr_t place, std::size_t bytes, AccessKind kind, const Clocks& clocks,
                   std::uint32_t block, int thread, Site site);
    // After an access of kind write: marks the bytes as being written until `finish`.
    void set_pending(std::uintptr_t place, std::size_t bytes);
    void finish_pending(std::uintptr_t place, std::size_t bytes, Epoch epoch, Site site);

  private:
    static constexpr std::size_t kPageBytes = 4096;
    static constexpr std::size_t kWordBytes = 4;
    static constexpr std::size_t kPageWords = kPageBytes / kWordBytes;

    struct Page {
        std::array<Cell, kPageWords> words;
        std::unique_ptr<std::array<Cell, kPageBytes>> bytes;
        std::bitset<kPageWords> split;
    };

    struct Visitor;

    Page& page_of(std::uintptr_t place);
    template <typename Visit>
    bool for_each_cell(std::uintptr_t place, std::size_t bytes, bool merge, Visit&& visit);

    Sharing sharing_;
    std::unordered_map<std::uintptr_t, std::unique_ptr<Page>> pages_;
    std::uintptr_t last_number_ = ~std::uintptr_t{0};
    Page* last_page_ = nullptr;
};

}  // namespace warploom::device::simt
