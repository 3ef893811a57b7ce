#include "hazards.h"

#include "executor.h"

namespace warploom::device::simt {

namespace {

std::string past(AccessKind kind) {
    return kind == AccessKind::read ? "read" : "write";
}

}  // namespace

Hazards::Hazards(int threads)
    : clocks_(threads),
      shared_(Shadow::Sharing::within_block),
      global_(Shadow::Sharing::among_blocks),
      banks_(threads) {}

void Hazards::start_block() {
    ++block_;
    clocks_.start_block();
}

void Hazards::summarize(Report& report) const {
    report.checked_accesses = accesses_;
    report.races = races_;
    banks_.summarize(report);
}

void Hazards::access_shared(Executor& executor, std::size_t offset, std::size_t bytes,
                            AccessKind kind, const char* operation, Site site) {
    ++accesses_;
    const int thread = executor.running().number;
    banks_.log(thread, offset, bytes, site);
    const Finding finding = shared_.access(offset, bytes, kind, clocks_, block_, thread, site);
    if (finding.problem != Finding::Problem::none) {
        complain(executor, finding, kind, "shared memory", offset, bytes, operation, site);
    }
}

void Hazards::access_global(Executor& executor, const GlobalMemory::Range& range,
                            std::uintptr_t place, std::size_t bytes, AccessKind kind,
                            const char* operation, Site site) {
    ++accesses_;
    const int thread = executor.running().number;
    const Finding finding = global_.access(place, bytes, kind, clocks_, block_, thread, site);
    if (finding.problem != Finding::Problem::none) {
        complain(executor, finding, kind, "'" + range.name + "'", place - range.begin, bytes,
                 operation, site);
    }
}

void Hazards::read_row(Executor& executor, std::size_t offset, Site site) {
    constexpr std::size_t kRowBytes = 16;
    ++accesses_;
    const Finding finding = shared_.access(offset, kRowBytes, AccessKind::read, clocks_, block_,
                                           executor.running().number, site);
    if (finding.problem != Finding::Problem::none) {
        complain(executor, finding, AccessKind::read, "shared memory", offset, kRowBytes,
                 "load_matrix", site);
    }
}

void Hazards::begin_async_write(Executor& executor, std::size_t offset, std::size_t bytes,
                                const char* operation, Site site) {
    ++accesses_;
    const Finding finding = shared_.access(offset, bytes, AccessKind::write, clocks_, block_,
                                           executor.running().number, site);
    if (finding.problem != Finding::Problem::none) {
        complain(executor, finding, AccessKind::write, "shared memory", offset, bytes, operation,
                 site);
    }
    shared_.set_pending(offset, bytes);
}

void Hazards::end_async_write(int thread, std::size_t offset, std::size_t bytes, Site site) {
    shared_.finish_pending(offset, bytes, clocks_.now(thread), site);
}

void Hazards::complain(Executor& executor, const Finding& finding, AccessKind kind,
                       const std::string& memory, std::size_t offset, std::size_t bytes,
                       const char* operation, Site site) {
    const std::string what = std::string(operation) + ": this " + past(kind) + " of bytes " +
                             std::to_string(offset) + " to " + std::to_string(offset + bytes - 1) +
                             " of " + memory;
    const Stamp& other = finding.other;
    const bool same_block = other.block == block_;
    const std::string who = "thread " + std::to_string(other.epoch.thread()) +
                            (same_block ? "" : " of another block") + " (" + describe(other.site) +
                            ")";
    const std::string expected =
        same_block ? "; expected a barrier between the two"
                   : "; expected no use of one byte by two blocks, for they run in any order";
    switch (finding.problem) {
        case Finding::Problem::uninitialized:
            executor.fail(site, what +
                                    " is uninitialised: nothing in this block has written it yet; "
                                    "expected a write before it, and a barrier between");
        case Finding::Problem::unfinished:
            executor.fail(site, what + " meets an unfinished asynchronous copy of " + who +
                                    "; expected a copy_async_wait and a barrier before");
        case Finding::Problem::write_before:
            ++races_;
            executor.fail(site,
                          "race: " + what + " is not ordered after the write by " + who + expected);
        case Finding::Problem::read_before:
            ++races_;
            executor.fail(site,
                          "race: " + what + " is not ordered after the read by " + who + expected);
        case Finding::Problem::none:
            break;
    }
    __builtin_unreachable();
}

}  // namespace warploom::device::simt
