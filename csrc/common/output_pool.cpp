#include "output_pool.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <vector>

namespace warploom {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kLengthStep = std::size_t{1} << 16;  // lengths are multiples of it
constexpr std::size_t kMostKeptBytes = std::size_t{1} << 30;

std::size_t length_for(std::size_t bytes) {
    return (bytes + kLengthStep - 1) / kLengthStep * kLengthStep;
}

// `length` bytes at a multiple of 2 MiB, so that huge pages fit: the ends of a longer mapping are
// given back.
void* map_block(std::size_t length) {
    const std::size_t mapped_length = length + kHugePage;
    void* mapped =
        mmap(nullptr, mapped_length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) {
        return nullptr;
    }
    const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(mapped);
    const std::uintptr_t block = (begin + kHugePage - 1) / kHugePage * kHugePage;
    if (block > begin) {
        munmap(mapped, block - begin);
    }
    if (const std::size_t rest = begin + mapped_length - block - length; rest > 0) {
        munmap(reinterpret_cast<void*>(block + length), rest);
    }
    madvise(reinterpret_cast<void*>(block), length, MADV_HUGEPAGE);  // only advice
    return reinterpret_cast<void*>(block);
}

class OutputPool {
  public:
    OutputPool() {
        const std::size_t memory = static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) *
                                   static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
        most_kept_bytes_ = std::min(kMostKeptBytes, memory / 16);
        // As many as fit into the bound: releasing a block never allocates.
        kept_.reserve(most_kept_bytes_ / kLeastPooledBytes + 1);
    }

    void* acquire(std::size_t bytes) {
        const std::size_t length = length_for(bytes);
        {
            const std::lock_guard lock(mutex_);
            // The most recently released one may still be in the cache.
            const auto found =
                std::find_if(kept_.rbegin(), kept_.rend(),
                             [length](const Block& block) { return block.length == length; });
            if (found != kept_.rend()) {
                void* const data = found->data;
                kept_bytes_ -= length;
                kept_.erase(std::next(found).base());
                return data;
            }
        }
        if (void* const data = map_block(length)) {
            return data;
        }
        {
            const std::lock_guard lock(mutex_);
            drop_until(0);
        }
        return map_block(length);
    }

    void release(void* data, std::size_t bytes) {
        const std::size_t length = length_for(bytes);
        if (length > most_kept_bytes_) {
            munmap(data, length);
            return;
        }
        const std::lock_guard lock(mutex_);
        drop_until(most_kept_bytes_ - length);
        kept_.push_back({data, length});
        kept_bytes_ += length;
    }

    void lock() { mutex_.lock(); }
    void unlock() { mutex_.unlock(); }

  private:
    struct Block {
        void* data;
        std::size_t length;
    };

    // Gives blocks back to the system until no more than `bytes` are kept.
    void drop_until(std::size_t bytes) {
        auto next = kept_.begin();
        for (; kept_bytes_ > bytes; ++next) {
            munmap(next->data, next->length);
            kept_bytes_ -= next->length;
        }
        kept_.erase(kept_.begin(), next);
    }

    std::mutex mutex_;
    std::vector<Block> kept_;  // the least recently released first
    std::size_t kept_bytes_ = 0;
    std::size_t most_kept_bytes_ = 0;
};

// Never destroyed: tensors may outlive the module's static objects. No thread holds the lock while
// a process forks, so the child, which has but the forking thread, finds it free.
OutputPool& pool() {
    static OutputPool* const instance = [] {
        auto* const made = new OutputPool;
        pthread_atfork([] { pool().lock(); }, [] { pool().unlock(); }, [] { pool().unlock(); });
        return made;
    }();
    return *instance;
}

}  // namespace

void* acquire_output(std::size_t bytes) noexcept {
    return pool().acquire(bytes);
}

void release_output(void* block, std::size_t bytes) noexcept {
    pool().release(block, bytes);
}

}  // namespace warploom
