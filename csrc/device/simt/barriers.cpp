// Meetings of a block: sync_threads and the named barriers.
#include <bit>

#include "executor.h"

namespace warploom::device::simt {

void Executor::synchronize_block(Site site) {
    Barrier& barrier = barriers_[0];
    if (barrier.count == 0) {
        if (live_ < thread_count_) {
            fail(site,
                 "sync_threads: a thread of this block has exited; expected every thread of "
                 "the block at the barrier\n" +
                     waits());
        }
        barrier.expected = thread_count_;
        barrier.first_site = site;
        barrier.first_thread = running_->number;
    } else if (!barrier.first_site.same_line(site)) {
        fail(site, "divergent barrier: this thread is at sync_threads here, thread " +
                       std::to_string(barrier.first_thread) + " waits at sync_threads (" +
                       describe(barrier.first_site) +
                       "); expected every thread of the block at one line");
    }
    ++barrier.count;
    barrier.waiting[running_->warp] |= 1u << running_->lane;
    if (barrier.count < barrier.expected) {
        wait_at("sync_threads", site);
        return;
    }
    if (hazards_ != nullptr) {
        hazards_->join_block();
    }
    complete(barrier);
}

void Executor::synchronize_named(int id, int threads, bool waits_here, Site site) {
    const char* name = waits_here ? "named_barrier_sync" : "named_barrier_arrive";
    const auto refuse = [&](const std::string& what) { fail(site, name + (": " + what)); };
    if (id < 1 || id >= kBarriers) {
        refuse("id: expected 1 to 15 (0 is sync_threads), got " + std::to_string(id));
    }
    if (threads < kWarpSize || threads % kWarpSize != 0 || threads > warp_count_ * kWarpSize) {
        refuse("threads: expected a multiple of 32 up to the block's " +
               std::to_string(thread_count_) + ", got " + std::to_string(threads));
    }
    Barrier& barrier = barriers_[id];
    const int warp = running_->warp;
    const std::uint32_t own = 1u << running_->lane;
    if (barrier.count == 0) {
        barrier.expected = threads;
        barrier.first_site = site;
        barrier.first_thread = running_->number;
    }
    if (barrier.expected != threads) {
        refuse("barrier " + std::to_string(id) + " expects " + std::to_string(threads) +
               " threads here and " + std::to_string(barrier.expected) + " at thread " +
               std::to_string(barrier.first_thread) + " (" + describe(barrier.first_site) +
               "); expected one number");
    }
    if ((barrier.arrived[warp] & own) != 0) {
        refuse("this thread arrives twice at barrier " + std::to_string(id) +
               " before it completes; " + std::to_string(barrier.count) + " of " +
               std::to_string(threads) + " threads have arrived");
    }
    if (barrier.arrived[warp] != 0 && !barrier.warp_site[warp].same_line(site)) {
        refuse("divergent warp: lane " + std::to_string(running_->lane) + " is here, lane " +
               std::to_string(std::countr_zero(barrier.arrived[warp])) + " at " +
               describe(barrier.warp_site[warp]) + "; expected a whole warp at one line");
    }
    barrier.warp_site[warp] = site;
    barrier.arrived[warp] |= own;
    ++barrier.count;
    if (hazards_ != nullptr) {
        hazards_->release(running_->number, barrier.clock);
    }
    if (waits_here) {
        barrier.waiting[warp] |= own;
    }
    if (barrier.count < barrier.expected) {
        if (waits_here) {
            wait_at(name, site);
        }
        return;
    }
    for (int index = 0; index < warp_count_; ++index) {
        if (barrier.arrived[index] != 0 && barrier.arrived[index] != warps_[index].existing) {
            refuse("barrier " + std::to_string(id) + " is complete with only some lanes of warp " +
                   std::to_string(index) + "; expected whole warps");
        }
    }
    complete(barrier);
}

// Lets every waiting thread go on. The last to arrive goes on in its turn, if it waits.
void Executor::complete(Barrier& barrier) {
    ++report_.barriers;
    const bool named = &barrier != &barriers_[0];
    const bool self_waits = (barrier.waiting[running_->warp] >> running_->lane & 1u) != 0;
    for (int index = 0; index < warp_count_; ++index) {
        if (hazards_ != nullptr) {
            for (std::uint32_t left = barrier.waiting[index]; named && left != 0;
                 left &= left - 1) {
                hazards_->acquire(index * kWarpSize + std::countr_zero(left), barrier.clock);
            }
            if (barrier.waiting[index] != 0) {
                hazards_->count_bank_conflicts(index);
            }
        }
        make_ready(index, barrier.waiting[index]);
    }
    barrier = Barrier{};
    if (self_waits) {
        if (controls_.lane_order != LaneOrder::random) {
            current_warp_ = controls_.lane_order == LaneOrder::forward ? 0 : warp_count_ - 1;
        }
        switch_to_next();
    }
}

void synchronize_block(Where where) {
    const Stay stay;
    stay->synchronize_block(Site(where));
}

void synchronize_named(int barrier, int threads, Where where) {
    const Stay stay;
    stay->synchronize_named(barrier, threads, true, Site(where));
}

void arrive_named(int barrier, int threads, Where where) {
    const Stay stay;
    stay->synchronize_named(barrier, threads, false, Site(where));
}

}  // namespace warploom::device::simt
