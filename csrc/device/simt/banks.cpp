#include "banks.h"

#include <algorithm>
#include <unordered_map>

namespace warploom::device::simt {

namespace {

constexpr std::uint32_t kBanks = 32;
constexpr std::uint32_t kBankBytes = 4;

// The words that one phase asks for, at most one of each.
class Phase {
  public:
    void ask(std::uint32_t word) {
        const std::uint32_t bank = word % kBanks;
        auto& words = words_[bank];
        int& count = counts_[bank];
        if (std::find(words.begin(), words.begin() + count, word) == words.begin() + count) {
            words[static_cast<std::size_t>(count++)] = word;
            most_ = std::max(most_, count);
        }
    }
    // Turns of the banks beyond the first.
    std::uint64_t conflicts() const {
        return most_ > 1 ? static_cast<std::uint64_t>(most_ - 1) : 0;
    }

  private:
    // A lane asks for at most two words of one bank (an unaligned access), all lanes for 64.
    std::array<std::array<std::uint32_t, 2 * kWarpSize>, kBanks> words_;
    std::array<int, kBanks> counts_{};
    int most_ = 0;
};

}  // namespace

BankCounter::BankCounter(int threads) : logs_(static_cast<std::size_t>(threads)) {}

void BankCounter::count_access(const Entry* const* lanes) {
    std::uint32_t widest = 1;
    Site site;
    for (int lane = 0; lane < kWarpSize; ++lane) {
        if (lanes[lane] != nullptr) {
            widest = std::max(widest, lanes[lane]->bytes);
            site = lanes[lane]->site;
        }
    }
    // 32 lanes of 4 bytes, 16 of 8 or 8 of 16 make a phase.
    const int lanes_of_phase = widest <= 4 ? 32 : widest <= 8 ? 16 : 8;
    Tally& tally = tallies_[site.code()];
    tally.site = site;
    for (int first = 0; first < kWarpSize; first += lanes_of_phase) {
        Phase phase;
        bool used = false;
        for (int lane = first; lane < first + lanes_of_phase; ++lane) {
            if (lanes[lane] == nullptr) {
                continue;
            }
            used = true;
            const std::uint32_t begin = lanes[lane]->offset / kBankBytes;
            const std::uint32_t bytes = std::min(lanes[lane]->bytes, 16u);
            const std::uint32_t last = (lanes[lane]->offset + bytes - 1) / kBankBytes;
            for (std::uint32_t word = begin; word <= last; ++word) {
                phase.ask(word);
            }
        }
        tally.accesses += used ? 1 : 0;
        tally.conflicts += phase.conflicts();
    }
}

void BankCounter::count(int warp) {
    const std::size_t first = static_cast<std::size_t>(warp) * kWarpSize;
    const std::size_t end = std::min(first + kWarpSize, logs_.size());
    std::size_t longest = 0;
    std::size_t reference = first;
    for (std::size_t thread = first; thread < end; ++thread) {
        if (logs_[thread].size() > longest) {
            longest = logs_[thread].size();
            reference = thread;
        }
    }
    if (longest == 0) {
        return;
    }
    const std::vector<Entry>& order = logs_[reference];
    bool uniform = true;
    for (std::size_t thread = first; thread < end && uniform; ++thread) {
        const std::vector<Entry>& log = logs_[thread];
        for (std::size_t index = 0; index < log.size() && uniform; ++index) {
            uniform = log.size() == longest && log[index].site == order[index].site;
        }
    }
    std::array<const Entry*, kWarpSize> lanes;
    if (uniform) {
        for (std::size_t index = 0; index < longest; ++index) {
            lanes.fill(nullptr);
            for (std::size_t thread = first; thread < end; ++thread) {
                if (!logs_[thread].empty()) {
                    lanes[thread - first] = &logs_[thread][index];
                }
            }
            count_access(lanes.data());
        }
    } else {
        // By site and number of execution; lanes that took other ways do not disturb the match.
        std::unordered_map<std::uint64_t, std::array<const Entry*, kWarpSize>> groups;
        for (std::size_t thread = first; thread < end; ++thread) {
            std::unordered_map<std::uint32_t, std::uint32_t> executions;
            for (const Entry& entry : logs_[thread]) {
                const std::uint64_t turn = executions[entry.site.code()]++;
                groups[turn << 32 | entry.site.code()][thread - first] = &entry;
            }
        }
        for (const auto& [key, group] : groups) {
            count_access(group.data());
        }
    }
    for (std::size_t thread = first; thread < end; ++thread) {
        logs_[thread].clear();
    }
}

void BankCounter::count_matrix_load(const std::size_t* offsets, int matrices, Site site) {
    constexpr int kRows = 8;
    Tally& tally = tallies_[site.code()];
    tally.site = site;
    for (int matrix = 0; matrix < matrices; ++matrix) {
        Phase phase;
        for (int row = 0; row < kRows; ++row) {
            const auto word =
                static_cast<std::uint32_t>(offsets[matrix * kRows + row] / kBankBytes);
            for (std::uint32_t index = 0; index < 4; ++index) {
                phase.ask(word + index);
            }
        }
        ++tally.accesses;
        tally.conflicts += phase.conflicts();
    }
}

void BankCounter::summarize(Report& report) const {
    std::vector<Tally> costly;
    for (const auto& [code, tally] : tallies_) {
        report.bank_conflicts += tally.conflicts;
        if (tally.conflicts > 0) {
            costly.push_back(tally);
        }
    }
    std::sort(costly.begin(), costly.end(),
              [](const Tally& a, const Tally& b) { return a.conflicts > b.conflicts; });
    for (const Tally& tally : costly) {
        report.conflict_sites.push_back({tally.site, tally.accesses, tally.conflicts});
    }
}

}  // namespace warploom::device::simt
