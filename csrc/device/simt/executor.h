// Runs a grid: blocks one after another, every thread of a block as a fibre, with the meetings of
// warps and blocks between.
#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <string>

#include "controls.h"
#include "deferred.h"
#include "fibre.h"
#include "hazards.h"
#include "memory.h"
#include "primitives.h"
#include "report.h"
#include "site.h"

namespace warploom::device::simt {

inline constexpr int kMaxThreads = 1024;
inline constexpr int kMaxWarps = kMaxThreads / kWarpSize;
inline constexpr int kBarriers = 16;
// Shared memory lies between stretches of address space that fault, of this size too.
inline constexpr std::size_t kSharedRoom = 256 * 1024;

class Executor;

struct Thread {
    enum class State { running, waiting, exited };

    Executor* executor;
    Fibre fibre;
    Stack stack;
    int number;  // in its block
    int lane;
    int warp;
    State state;
    bool inside;           // in the executor: what is loaded and stored there is not the kernel's
    Site site;             // of the wait
    const char* waits_at;  // the primitive of the wait
    DeferredQueue copies;
};

// Lanes of one warp that meet at one primitive. The last to arrive runs `body` for all.
struct Collective {
    using Body = void (*)(Executor&, Collective&);

    Body body;
    const char* name;
    Site site;
    int warp;
    std::uint32_t mask;
    std::uint32_t arrived;
    std::array<void*, kWarpSize> operands;  // by lane, on the lanes' stacks
};

struct Warp {
    std::uint32_t existing;
    std::uint32_t ready;
    std::uint32_t exited;
    std::uint32_t open;  // bits of collectives in use
    std::array<Collective, kWarpSize> collectives;
};

// One of the 16 hardware barriers.
struct Barrier {
    int expected = 0;  // threads; 0 when idle
    int count = 0;
    Site first_site;
    int first_thread = 0;
    std::array<std::uint32_t, kMaxWarps> arrived{};  // by warp, in this phase
    std::array<std::uint32_t, kMaxWarps> waiting{};
    std::array<Site, kMaxWarps> warp_site{};
    SyncClock clock;
};

class Executor {
  public:
    Executor();

    // Throws KernelError; the next launch starts afresh.
    void run(const LaunchShape& shape, void (*entry)(const void*, const void*), const void* kernel,
             const void* arguments, bool instrumented, Site site);

    // Ends the launch with an error of the running thread at `site`. Not for destructors: the
    // fibres are abandoned as they stand.
    [[noreturn]] void fail(Site site, const std::string& what);
    // The same for a load or store that faulted.
    [[noreturn]] void fail_at_fault(const void* address, const void* program_counter);

    // Blocks the running thread until every lane of `mask` has come to the same line with the same
    // `body`.
    void meet(Collective::Body body, const char* name, void* operand, std::uint32_t mask,
              Site site);

    void synchronize_block(Site site);
    void synchronize_named(int id, int threads, bool waits, Site site);

    void check(const void* address, std::size_t bytes, std::size_t alignment, AccessKind kind,
               const char* operation, Site site);
    void check_shared(const void* address, std::size_t bytes, std::size_t alignment,
                      const char* operation, Site site);
    void issue_copy(void* destination, const void* source, std::uint32_t bytes, bool valid,
                    Site site);
    void commit_copies();
    void wait_copies(int pending_groups);

    bool in_shared(const void* address, std::size_t bytes) const {
        const auto offset = reinterpret_cast<std::uintptr_t>(address) - shared_begin_;
        return offset < shared_bytes_ && offset + bytes <= shared_bytes_;
    }
    bool in_own_stack(const void* address) const { return running_->stack.contains(address); }
    void* shared_begin() const { return reinterpret_cast<void*>(shared_begin_); }
    std::size_t shared_size() const { return shared_bytes_; }

    const Thread& running() const { return *running_; }
    Thread& thread(int warp, int lane) { return threads_[warp * kWarpSize + lane]; }
    Hazards* hazards() { return hazards_.get(); }
    Report& report() { return report_; }
    uint3 block_index() const { return block_index_; }
    uint3 block_dimensions() const { return {static_cast<unsigned>(thread_count_), 1, 1}; }
    uint3 grid_dimensions() const { return {grid_.x, grid_.y, grid_.z}; }

  private:
    struct Abandoned {
        std::string what;
        Site site;
        int thread;
        std::string location;
        std::string callers;  // a line for each
    };

    static void fibre_main();
    void require_shape(const LaunchShape& shape, Site site) const;
    void run_block();
    void leave();
    void wait_at(const char* primitive, Site site);
    void switch_to_next();
    Thread* pick();
    Thread* pick_in(int warp);
    void make_ready(int warp, std::uint32_t lanes);
    void finish(Warp& warp, Collective& collective);
    void require_named_lanes(const Collective& collective, Site site);
    void complete(Barrier& barrier);
    void check_exit();
    std::string waits() const;
    [[noreturn]] void raise();

    dim3 grid_;
    int thread_count_ = 0;
    int warp_count_ = 0;
    uint3 block_index_{};
    void (*entry_)(const void*, const void*) = nullptr;
    const void* kernel_ = nullptr;
    const void* arguments_ = nullptr;

    std::unique_ptr<Thread[]> threads_;
    std::unique_ptr<Warp[]> warps_;
    std::array<Barrier, kBarriers> barriers_;
    std::uint32_t ready_warps_ = 0;
    int current_warp_ = 0;
    int live_ = 0;
    Thread* running_ = nullptr;
    Fibre scheduler_;
    StackPool stacks_;

    std::uintptr_t shared_begin_ = 0;
    std::size_t shared_bytes_ = 0;
    std::byte* shared_mapping_ = nullptr;
    GlobalMemory global_;

    Controls controls_;
    Random random_;
    std::unique_ptr<Hazards> hazards_;
    Report report_;
    std::unique_ptr<Abandoned> error_;
};

// The thread that runs on this operating-system thread, null outside kernels. Fibres stay on the
// thread that launched them.
extern thread_local __attribute__((tls_model("initial-exec"))) Thread* current_thread;

// A stay of the running thread in the executor; every primitive makes one. Throws std::logic_error
// outside kernels.
class Stay {
  public:
    Stay();
    ~Stay() { thread_->inside = false; }
    Stay(const Stay&) = delete;
    Stay& operator=(const Stay&) = delete;
    Executor* operator->() const { return thread_->executor; }
    Executor& operator*() const { return *thread_->executor; }

  private:
    Thread* thread_;
};

}  // namespace warploom::device::simt
