// Meetings of the lanes of a warp: shuffles, votes and warp barriers.
#include <bit>

#include "executor.h"

namespace warploom::device::simt {

namespace {

std::string hexadecimal(std::uint32_t mask) {
    constexpr char kDigits[] = "0123456789abcdef";
    std::string text = "0x";
    for (int shift = 28; shift >= 0; shift -= 4) {
        text += kDigits[mask >> shift & 15u];
    }
    return text;
}

struct ShuffleOperand {
    std::uint64_t bits;
    ShuffleMode mode;
    int argument;
    std::uint64_t result;
};

struct VoteOperand {
    bool predicate;
    std::uint32_t result;
};

int shuffle_source(const ShuffleOperand& operand, int lane) {
    switch (operand.mode) {
        case ShuffleMode::index:
            return operand.argument & (kWarpSize - 1);
        case ShuffleMode::exclusive_or: {
            const int source = lane ^ operand.argument;
            return source >= 0 && source < kWarpSize ? source : lane;
        }
        case ShuffleMode::up: {
            const int source = lane - operand.argument;
            return source >= 0 ? source : lane;
        }
        case ShuffleMode::down: {
            const int source = lane + operand.argument;
            return source < kWarpSize ? source : lane;
        }
    }
    return lane;
}

void exchange(Executor& executor, Collective& collective) {
    for (std::uint32_t left = collective.mask; left != 0; left &= left - 1) {
        const int lane = std::countr_zero(left);
        auto& operand = *static_cast<ShuffleOperand*>(collective.operands[lane]);
        const int source = shuffle_source(operand, lane);
        if ((collective.mask >> source & 1u) == 0) {
            executor.fail(collective.site, "shuffle: lane " + std::to_string(lane) +
                                               " reads lane " + std::to_string(source) +
                                               ", which the mask " + hexadecimal(collective.mask) +
                                               " does not name; expected a source in the mask");
        }
        operand.result = static_cast<ShuffleOperand*>(collective.operands[source])->bits;
    }
}

void count_votes(Executor&, Collective& collective) {
    std::uint32_t votes = 0;
    for (std::uint32_t left = collective.mask; left != 0; left &= left - 1) {
        const int lane = std::countr_zero(left);
        const auto& operand = *static_cast<const VoteOperand*>(collective.operands[lane]);
        votes |= static_cast<std::uint32_t>(operand.predicate) << lane;
    }
    for (std::uint32_t left = collective.mask; left != 0; left &= left - 1) {
        static_cast<VoteOperand*>(collective.operands[std::countr_zero(left)])->result = votes;
    }
}

void join_lanes(Executor& executor, Collective& collective) {
    if (executor.hazards() != nullptr) {
        executor.hazards()->join_warp(collective.warp, collective.mask);
    }
}

}  // namespace

void Executor::meet(Collective::Body body, const char* name, void* operand, std::uint32_t mask,
                    Site site) {
    Warp& warp = warps_[running_->warp];
    const std::uint32_t own = 1u << running_->lane;
    Collective* joined = nullptr;
    for (std::uint32_t open = warp.open; open != 0; open &= open - 1) {
        Collective& candidate = warp.collectives[std::countr_zero(open)];
        if (candidate.mask == mask && candidate.body == body && (candidate.arrived & own) == 0 &&
            candidate.site.same_line(site)) {
            joined = &candidate;
            break;
        }
        const bool waits_for_us = (candidate.mask & own) != 0;
        const bool awaited_by_us = (candidate.arrived & mask) != 0;
        if (waits_for_us && awaited_by_us) {
            const std::string other = std::to_string(std::countr_zero(candidate.arrived));
            fail(site, std::string(name) + ": lane " + std::to_string(running_->lane) +
                           " is here with mask " + hexadecimal(mask) + ", lane " + other +
                           " waits for it at " + candidate.name + " (" + describe(candidate.site) +
                           ") with mask " + hexadecimal(candidate.mask) +
                           "; expected every lane of the mask at one line with one mask");
        }
    }
    if (joined == nullptr) {
        const int slot = std::countr_one(warp.open);
        joined = &warp.collectives[slot];
        joined->body = body;
        joined->name = name;
        joined->site = site;
        joined->warp = running_->warp;
        joined->mask = mask;
        joined->arrived = 0;
        if ((mask & own) == 0 || (mask & ~warp.existing) != 0 || (mask & warp.exited) != 0) {
            require_named_lanes(*joined, site);
        }
        warp.open |= 1u << slot;
    }
    joined->operands[running_->lane] = operand;
    joined->arrived |= own;
    if (joined->arrived == mask) {
        finish(warp, *joined);
    } else {
        wait_at(name, site);
    }
}

void Executor::require_named_lanes(const Collective& collective, Site site) {
    const Warp& warp = warps_[running_->warp];
    const std::string mask = hexadecimal(collective.mask);
    const std::string prefix = std::string(collective.name) + ": the mask " + mask;
    if ((collective.mask >> running_->lane & 1u) == 0) {
        fail(site, prefix + " does not name lane " + std::to_string(running_->lane) +
                       ", which executes it; expected a mask of the lanes that come here");
    }
    if (const std::uint32_t missing = collective.mask & ~warp.existing; missing != 0) {
        fail(site, prefix + " names lane " + std::to_string(std::countr_zero(missing)) +
                       ", which this block of " + std::to_string(thread_count_) +
                       " threads does not have");
    }
    fail(site, prefix + " names lane " +
                   std::to_string(std::countr_zero(collective.mask & warp.exited)) +
                   ", which has exited; expected every named lane to come here");
}

void Executor::finish(Warp& warp, Collective& collective) {
    ++report_.collectives;
    const std::uint32_t lanes = collective.mask;
    const int index = collective.warp;
    collective.body(*this, collective);
    if (hazards_ != nullptr) {
        hazards_->count_bank_conflicts(index);
    }
    warp.open &= ~(1u << (&collective - warp.collectives.data()));
    if (controls_.async_policy == AsyncPolicy::random) {
        running_->copies.stir(random_);
    }
    if (lanes == 1u << running_->lane) {
        return;
    }
    // All go on in the order of the controls, this one too.
    make_ready(index, lanes);
    switch_to_next();
}

std::uint64_t shuffle_bits(std::uint64_t bits, ShuffleMode mode, int argument, std::uint32_t mask,
                           Where where) {
    ShuffleOperand operand{bits, mode, argument, 0};
    const Stay stay;
    stay->meet(&exchange, "shuffle", &operand, mask, Site(where));
    return operand.result;
}

std::uint32_t vote(bool predicate, std::uint32_t mask, Where where) {
    VoteOperand operand{predicate, 0};
    const Stay stay;
    stay->meet(&count_votes, "vote", &operand, mask, Site(where));
    return operand.result;
}

void synchronize_warp(std::uint32_t mask, Where where) {
    const Stay stay;
    stay->meet(&join_lanes, "sync_warp", nullptr, mask, Site(where));
}

}  // namespace warploom::device::simt
