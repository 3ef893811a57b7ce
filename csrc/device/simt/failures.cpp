// How a launch fails: what is refused, and how the error reads.
#include <bit>

#include "errors.h"
#include "executor.h"

namespace warploom::device::simt {

namespace {

std::string text_of(uint3 index) {
    return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
           std::to_string(index.z) + ")";
}

}  // namespace

void Executor::require_shape(const LaunchShape& shape, Site site) const {
    const auto refuse = [&](const std::string& what) {
        const std::string name = function_name(kernel_);
        throw KernelError(name, -1, describe(site),
                          name + ": launched at " + describe(site) + ": " + what);
    };
    if (shape.threads < 1 || shape.threads > kMaxThreads) {
        refuse("threads: expected 1 to 1024, got " + std::to_string(shape.threads));
    }
    if (shape.grid.x < 1 || shape.grid.x > 0x7fffffffu || shape.grid.y < 1 ||
        shape.grid.y > 0xffffu || shape.grid.z < 1 || shape.grid.z > 0xffffu) {
        refuse("grid: expected 1 to 2147483647 by 1 to 65535 by 1 to 65535, got " +
               text_of({shape.grid.x, shape.grid.y, shape.grid.z}));
    }
    const std::size_t limit = shared_memory_limit();
    if (shape.shared_bytes > limit) {
        refuse("shared_bytes: expected at most " + std::to_string(limit) + " (" +
               std::to_string(limit / 1024) + " KiB), got " + std::to_string(shape.shared_bytes));
    }
}

void Executor::check_exit() {
    if (const DeferredOperation* copy = running_->copies.unfinished()) {
        fail(copy->site,
             "the thread exits while this asynchronous copy is unfinished; expected "
             "copy_async_commit and copy_async_wait before the end of the kernel");
    }
    const Warp& warp = warps_[running_->warp];
    for (std::uint32_t open = warp.open; open != 0; open &= open - 1) {
        const Collective& collective = warp.collectives[std::countr_zero(open)];
        if ((collective.mask >> running_->lane & 1u) != 0) {
            fail(collective.site, std::string("lane ") + std::to_string(running_->lane) +
                                      " exits while other lanes wait for it at " + collective.name +
                                      " (" + describe(collective.site) +
                                      "); expected every lane that the mask names");
        }
    }
    const Barrier& barrier = barriers_[0];
    if (barrier.count > 0) {
        fail(barrier.first_site,
             "the thread exits while thread " + std::to_string(barrier.first_thread) +
                 " waits for it at sync_threads (" + describe(barrier.first_site) +
                 "); expected every thread of the block at the barrier");
    }
}

void Executor::fail(Site site, const std::string& what) {
    {
        auto error = std::make_unique<Abandoned>();
        error->what = what;
        error->site = site;
        error->thread = running_->number;
        error->location = site.known() ? describe(site) : "";
        error->callers = describe_callers(error->location);
        error_ = std::move(error);
    }
    Thread& from = *running_;
    current_thread = nullptr;
    switch_fibre(from.fibre, scheduler_);
    __builtin_unreachable();
}

void Executor::fail_at_fault(const void* address, const void* program_counter) {
    running_->inside = true;
    // As a return address would have it: one past the instruction's start.
    const Site site = Site::of_program_counter(static_cast<const char*>(program_counter) + 1);
    const auto place = reinterpret_cast<std::uintptr_t>(address);
    const auto* byte = static_cast<const std::byte*>(address);
    // A large frame may step over the guard page.
    constexpr std::ptrdiff_t kStep = 1024 * 1024;
    if (byte < running_->stack.low && byte >= running_->stack.low - kStep) {
        fail(site, "the thread's stack overflows: expected at most 256 KiB of local variables");
    }
    if (byte >= shared_mapping_ - kSharedRoom && byte < shared_mapping_ + 2 * kSharedRoom) {
        fail(site, "a load or store at offset " +
                       std::to_string(static_cast<std::intptr_t>(place - shared_begin_)) +
                       " of shared memory; expected to lie within its " +
                       std::to_string(shared_bytes_) + " bytes");
    }
    if (address == nullptr) {
        fail(site, "a load or store through a null or misaligned pointer");
    }
    fail(site, "a load or store faults: " + global_.explain(place, 1, false));
}

void Executor::raise() {
    const Abandoned& error = *error_;
    const std::string name = function_name(kernel_);
    std::string text = name + ": block " + text_of(block_index_);
    if (error.thread >= 0) {
        text += ", thread " + std::to_string(error.thread) + " (warp " +
                std::to_string(error.thread / kWarpSize) + ", lane " +
                std::to_string(error.thread % kWarpSize) + ")";
    }
    if (!error.location.empty()) {
        text += ", at " + error.location;
    }
    text += ": " + error.what + error.callers;
    report_.error = text;
    if (hazards_ != nullptr) {
        hazards_->summarize(report_);
    }
    publish(report_);
    throw KernelError(name, error.thread, error.location, text);
}

// One line for each group of threads that waits at one place.
std::string Executor::waits() const {
    struct Group {
        std::string place;
        std::string threads;
        int first;
        int last;
    };
    std::vector<Group> groups;
    for (int number = 0; number < thread_count_; ++number) {
        const Thread& thread = threads_[number];
        const std::string place =
            thread.state == Thread::State::exited
                ? std::string("exited")
                : std::string("wait at ") + thread.waits_at + " (" + describe(thread.site) + ")";
        Group* group = nullptr;
        for (Group& candidate : groups) {
            if (candidate.place == place) {
                group = &candidate;
            }
        }
        if (group == nullptr) {
            groups.push_back({place, std::to_string(number), number, number});
            continue;
        }
        if (number == group->last + 1) {
            group->last = number;
            continue;
        }
        if (group->last > group->first) {
            group->threads += "-" + std::to_string(group->last);
        }
        group->threads += "," + std::to_string(number);
        group->first = group->last = number;
    }
    std::string text;
    for (Group& group : groups) {
        if (group.last > group.first) {
            group.threads += "-" + std::to_string(group.last);
        }
        text += (text.empty() ? "  threads " : "\n  threads ") + group.threads + " " + group.place;
    }
    return text;
}

}  // namespace warploom::device::simt
