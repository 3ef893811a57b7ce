// Counts bank conflicts of shared memory: 32 banks of 4 bytes, phases of at most 128 bytes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#include "report.h"
#include "site.h"
#include "types.h"

namespace warploom::device::simt {

class BankCounter {
  public:
    explicit BankCounter(int threads);

    // One access of one thread. Accesses of a warp's lanes are matched when the lanes meet: the
    // n-th execution of a site by one lane goes with the n-th of the others.
    void log(int thread, std::size_t offset, std::size_t bytes, Site site) {
        std::vector<Entry>& entries = logs_[static_cast<std::size_t>(thread)];
        if (entries.size() < kMaxEntries) {
            entries.push_back(
                {site, static_cast<std::uint32_t>(offset), static_cast<std::uint32_t>(bytes)});
        }
    }

    // All lanes of the warp stand at one place: matches and counts what they logged.
    void count(int warp);

    // A matrix load: eight rows of 16 bytes a phase.
    void count_matrix_load(const std::size_t* offsets, int matrices, Site site);

    void summarize(Report& report) const;

  private:
    // A thread that loads more than this between two meetings is counted in part.
    static constexpr std::size_t kMaxEntries = 4096;

    struct Entry {
        Site site;
        std::uint32_t offset;
        std::uint32_t bytes;
    };
    struct Tally {
        Site site;
        std::uint64_t accesses = 0;
        std::uint64_t conflicts = 0;
    };

    void count_access(const Entry* const* lanes);

    std::vector<std::vector<Entry>> logs_;  // by thread
    std::map<std::uint32_t, Tally> tallies_;
};

}  // namespace warploom::device::simt
