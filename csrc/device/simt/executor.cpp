#include "executor.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <new>
#include <stdexcept>

#include "faults.h"

namespace warploom::device::simt {

thread_local Thread* current_thread = nullptr;

Stay::Stay() : thread_(current_thread) {
    if (thread_ == nullptr) {
        throw std::logic_error("a device primitive was called outside a kernel");
    }
    thread_->inside = true;
}

Executor::Executor() : threads_(new Thread[kMaxThreads]), warps_(new Warp[kMaxWarps]) {
    void* mapping = mmap(nullptr, 3 * kSharedRoom, PROT_NONE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) {
        throw std::bad_alloc();
    }
    shared_mapping_ = static_cast<std::byte*>(mapping) + kSharedRoom;
    if (mprotect(shared_mapping_, kSharedRoom, PROT_READ | PROT_WRITE) != 0) {
        throw std::bad_alloc();
    }
}

void Executor::run(const LaunchShape& shape, void (*entry)(const void*, const void*),
                   const void* kernel, const void* arguments, bool instrumented, Site site) {
    kernel_ = kernel;
    require_shape(shape, site);
    grid_ = shape.grid;
    thread_count_ = shape.threads;
    warp_count_ = (shape.threads + kWarpSize - 1) / kWarpSize;
    entry_ = entry;
    arguments_ = arguments;
    controls_ = controls();
    random_ = Random(controls_.seed);
    stacks_.reserve(thread_count_);
    global_.capture();
    error_.reset();

    // The last byte of shared memory lies as near to the room's faulting end as 128 allows.
    shared_bytes_ = shape.shared_bytes;
    const std::size_t aligned_bytes = (shared_bytes_ + 127) / 128 * 128;
    shared_begin_ = reinterpret_cast<std::uintptr_t>(shared_mapping_) + kSharedRoom - aligned_bytes;

    report_ = Report{};
    report_.kernel_address = kernel;
    report_.instrumented = instrumented;
    report_.shared_bytes = shared_bytes_;
    report_.threads = thread_count_;
    hazards_.reset();
    if (instrumented) {
        hazards_ = std::make_unique<Hazards>(thread_count_);
    }

    const FaultGuard faults([](const void* address, const void* program_counter) {
        current_thread->executor->fail_at_fault(address, program_counter);
    });
    for (unsigned z = 0; z < grid_.z; ++z) {
        for (unsigned y = 0; y < grid_.y; ++y) {
            for (unsigned x = 0; x < grid_.x; ++x) {
                block_index_ = {x, y, z};
                ++report_.blocks;
                run_block();
            }
        }
    }
    if (hazards_ != nullptr) {
        hazards_->summarize(report_);
    }
    publish(report_);
}

void Executor::run_block() {
    std::memset(shared_begin(), 0xff, shared_bytes_);
    for (Barrier& barrier : barriers_) {
        barrier = Barrier{};
    }
    if (hazards_ != nullptr) {
        hazards_->start_block();
    }
    ready_warps_ = 0;
    live_ = thread_count_;
    for (int number = 0; number < thread_count_; ++number) {
        Thread& thread = threads_[number];
        thread.executor = this;
        thread.stack = stacks_[number];
        thread.number = number;
        thread.lane = number % kWarpSize;
        thread.warp = number / kWarpSize;
        thread.state = Thread::State::running;
        thread.inside = false;
        thread.copies.reset();
        prepare(thread.fibre, thread.stack, &Executor::fibre_main);
    }
    for (int index = 0; index < warp_count_; ++index) {
        Warp& warp = warps_[index];
        const int lanes = std::min(kWarpSize, thread_count_ - index * kWarpSize);
        warp.existing = lanes == kWarpSize ? kFullMask : (1u << lanes) - 1;
        warp.ready = 0;
        warp.exited = 0;
        warp.open = 0;
        make_ready(index, warp.existing);
    }
    current_warp_ = controls_.lane_order == LaneOrder::backward ? warp_count_ - 1 : 0;

    running_ = pick();
    current_thread = running_;
    switch_fibre(scheduler_, running_->fibre);
    current_thread = nullptr;

    if (error_ == nullptr && live_ > 0) {
        error_ = std::make_unique<Abandoned>();
        error_->thread = -1;
        error_->what = "deadlock: no thread can go on\n" + waits();
    }
    running_ = nullptr;
    if (error_ != nullptr) {
        raise();
    }
}

void Executor::fibre_main() {
    Executor& executor = *current_thread->executor;
    try {
        executor.entry_(executor.kernel_, executor.arguments_);
    } catch (const std::exception& error) {
        current_thread->inside = true;
        executor.fail(Site(), std::string("the kernel threw: ") + error.what());
    }
    current_thread->inside = true;
    executor.leave();
}

void Executor::leave() {
    check_exit();
    Thread& thread = *running_;
    Warp& warp = warps_[thread.warp];
    thread.state = Thread::State::exited;
    warp.exited |= 1u << thread.lane;
    --live_;
    if (hazards_ != nullptr && warp.exited == warp.existing) {
        hazards_->finish_warp(thread.warp);
    }
    switch_to_next();
    __builtin_unreachable();
}

void Executor::wait_at(const char* primitive, Site site) {
    running_->state = Thread::State::waiting;
    running_->waits_at = primitive;
    running_->site = site;
    switch_to_next();
}

void Executor::switch_to_next() {
    Thread& from = *running_;
    Thread* next = pick();
    if (next == &from) {
        return;
    }
    running_ = next;
    current_thread = next;
    switch_fibre(from.fibre, next != nullptr ? next->fibre : scheduler_);
}

// The next thread to run, no longer marked ready; null where none is. One warp goes on until all
// its lanes wait; in random order it may be left at any meeting.
Thread* Executor::pick() {
    if (ready_warps_ == 0) {
        return nullptr;
    }
    const bool stay = (ready_warps_ >> current_warp_ & 1u) != 0 &&
                      (controls_.lane_order != LaneOrder::random || random_.below(8) != 0);
    if (!stay) {
        switch (controls_.lane_order) {
            case LaneOrder::forward:
                current_warp_ = std::countr_zero(ready_warps_);
                break;
            case LaneOrder::backward:
                current_warp_ = 31 - std::countl_zero(ready_warps_);
                break;
            case LaneOrder::random: {
                std::uint32_t left = ready_warps_;
                for (std::uint32_t skip = random_.below(std::popcount(left)); skip > 0; --skip) {
                    left &= left - 1;
                }
                current_warp_ = std::countr_zero(left);
                break;
            }
        }
    }
    return pick_in(current_warp_);
}

Thread* Executor::pick_in(int index) {
    Warp& warp = warps_[index];
    int lane = 0;
    switch (controls_.lane_order) {
        case LaneOrder::forward:
            lane = std::countr_zero(warp.ready);
            break;
        case LaneOrder::backward:
            lane = 31 - std::countl_zero(warp.ready);
            break;
        case LaneOrder::random: {
            const int turn = static_cast<int>(random_.below(kWarpSize));
            lane = (std::countr_zero(std::rotr(warp.ready, turn)) + turn) % kWarpSize;
            break;
        }
    }
    warp.ready &= ~(1u << lane);
    if (warp.ready == 0) {
        ready_warps_ &= ~(1u << index);
    }
    Thread& chosen = thread(index, lane);
    chosen.state = Thread::State::running;
    return &chosen;
}

void Executor::make_ready(int warp, std::uint32_t lanes) {
    warps_[warp].ready |= lanes;
    if (lanes != 0) {
        ready_warps_ |= 1u << warp;
    }
}

void run_grid(const LaunchShape& shape, void (*entry)(const void*, const void*), const void* kernel,
              const void* arguments, bool instrumented, Where where) {
    if (current_thread != nullptr) {
        throw std::logic_error("launch: called inside a kernel");
    }
    static std::mutex one_launch_at_a_time;
    static Executor* executor = new Executor;
    const std::lock_guard lock(one_launch_at_a_time);
    executor->run(shape, entry, kernel, arguments, instrumented, Site(where));
}

uint3 thread_index() noexcept {
    return {static_cast<unsigned>(current_thread->number), 0, 0};
}
uint3 block_index() noexcept {
    return current_thread->executor->block_index();
}
uint3 block_dimensions() noexcept {
    return current_thread->executor->block_dimensions();
}
uint3 grid_dimensions() noexcept {
    return current_thread->executor->grid_dimensions();
}

}  // namespace warploom::device::simt
