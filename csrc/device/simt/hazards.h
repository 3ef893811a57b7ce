// What the instrumented mode watches: races, uninitialised reads and bank conflicts.
#pragma once

#include <cstddef>
#include <cstdint>

#include "banks.h"
#include "clocks.h"
#include "memory.h"
#include "report.h"
#include "shadow.h"
#include "site.h"

namespace warploom::device::simt {

class Executor;

// Every member acts for the running thread unless it takes a thread. An error ends the launch.
class Hazards {
  public:
    explicit Hazards(int threads);

    void start_block();
    void finish_warp(int warp) { banks_.count(warp); }
    void summarize(Report& report) const;

    // Synchronisation.
    void join_block() { clocks_.join_block(); }
    void join_warp(int warp, std::uint32_t mask) { clocks_.join_warp(warp, mask); }
    void release(int thread, SyncClock& clock) { clocks_.release(thread, clock); }
    void acquire(int thread, const SyncClock& clock) { clocks_.acquire(thread, clock); }

    // Accesses, already known to be within bounds. `offset` counts from the start of shared memory.
    void access_shared(Executor& executor, std::size_t offset, std::size_t bytes, AccessKind kind,
                       const char* operation, Site site);
    void access_global(Executor& executor, const GlobalMemory::Range& range, std::uintptr_t place,
                       std::size_t bytes, AccessKind kind, const char* operation, Site site);
    // One row of a matrix load.
    void read_row(Executor& executor, std::size_t offset, Site site);

    // A write that some engine makes between the two calls; until the second nobody may use the
    // bytes, and from then on it counts as a write of the waiting thread.
    void begin_async_write(Executor& executor, std::size_t offset, std::size_t bytes,
                           const char* operation, Site site);
    void end_async_write(int thread, std::size_t offset, std::size_t bytes, Site site);

    // At a moment when all lanes of the warp stand at one place.
    void count_bank_conflicts(int warp) { banks_.count(warp); }
    void count_matrix_load(const std::size_t* offsets, int matrices, Site site) {
        banks_.count_matrix_load(offsets, matrices, site);
    }

  private:
    [[noreturn]] void complain(Executor& executor, const Finding& finding, AccessKind kind,
                               const std::string& memory, std::size_t offset, std::size_t bytes,
                               const char* operation, Site site);

    Clocks clocks_;
    Shadow shared_;
    Shadow global_;
    BankCounter banks_;
    std::uint32_t block_ = 0;  // running number, from 1
    std::uint64_t accesses_ = 0;
    std::uint64_t races_ = 0;
};

}  // namespace warploom::device::simt
