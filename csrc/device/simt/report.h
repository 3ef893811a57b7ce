// What the last launch did.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "site.h"

namespace warploom::device::simt {

struct BankConflicts {
    Site site;
    std::uint64_t accesses;   // of whole warps, in phases of at most 128 bytes
    std::uint64_t conflicts;  // further phases that conflicts cost
};

struct Report {
    const void* kernel_address = nullptr;  // function_name() gives its name
    bool instrumented = false;
    std::uint64_t blocks = 0;
    int threads = 0;  // of a block
    std::size_t shared_bytes = 0;
    std::uint64_t collectives = 0;  // of a warp: shuffles, votes, matrix loads and products
    std::uint64_t products = 0;     // those that are matrix products
    std::uint64_t barriers = 0;     // block and named barriers passed
    std::uint64_t async_copies = 0;
    // Instrumented mode only:
    std::uint64_t checked_accesses = 0;
    std::uint64_t races = 0;
    std::uint64_t bank_conflicts = 0;
    std::vector<BankConflicts> conflict_sites;  // most costly first
    std::string error;                          // empty where the launch succeeded
};

// A copy of the last launch's report.
Report last_report();
void publish(const Report& report);
void reset_report();

}  // namespace warploom::device::simt
