#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>
#include <utility>

namespace warploom::device::simt {

namespace {

constexpr std::size_t kPage = 4096;

struct Allocation {
    void* mapping;
    std::size_t mapped_bytes;
    RegisteredRange range;
};

struct Registry {
    std::mutex guard;
    std::map<std::uint64_t, GlobalMemory::Range> ranges;
    std::uint64_t next_identity = 1;
    std::map<void*, Allocation> allocations;
};

// Never destroyed: ranges may outlive static objects.
Registry& registry() {
    static Registry* instance = new Registry;
    return *instance;
}

}  // namespace

RegisteredRange::RegisteredRange(const void* pointer, std::size_t bytes, std::string name,
                                 bool writable) {
    const auto begin = reinterpret_cast<std::uintptr_t>(pointer);
    Registry& all = registry();
    const std::lock_guard lock(all.guard);
    identity_ = all.next_identity++;
    all.ranges[identity_] = {begin, begin + bytes, writable, writable, std::move(name)};
}

RegisteredRange::~RegisteredRange() {
    if (identity_ != 0) {
        Registry& all = registry();
        const std::lock_guard lock(all.guard);
        all.ranges.erase(identity_);
    }
}

RegisteredRange::RegisteredRange(RegisteredRange&& other) noexcept
    : identity_(std::exchange(other.identity_, 0)) {}

RegisteredRange& RegisteredRange::operator=(RegisteredRange&& other) noexcept {
    std::swap(identity_, other.identity_);
    return *this;
}

void* allocate(std::size_t bytes, const std::string& name) {
    const std::size_t pages = (bytes + kPage - 1) / kPage;
    const std::size_t mapped_bytes = (pages + 1) * kPage;
    void* mapping =
        mmap(nullptr, mapped_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) {
        throw std::bad_alloc();
    }
    std::byte* guard_page = static_cast<std::byte*>(mapping) + pages * kPage;
    std::memset(mapping, 0xff, pages * kPage);
    if (mprotect(guard_page, kPage, PROT_NONE) != 0) {
        munmap(mapping, mapped_bytes);
        throw std::bad_alloc();
    }
    void* pointer = guard_page - bytes;
    Allocation allocation{mapping, mapped_bytes, RegisteredRange(pointer, bytes, name, true)};
    Registry& all = registry();
    const std::lock_guard lock(all.guard);
    all.allocations.emplace(pointer, std::move(allocation));
    return pointer;
}

void free(void* pointer) {
    if (pointer == nullptr) {
        return;
    }
    Registry& all = registry();
    std::unique_lock lock(all.guard);
    auto node = all.allocations.extract(pointer);
    lock.unlock();
    if (node.empty()) {
        throw std::invalid_argument("simt::free: the pointer did not come from simt::allocate");
    }
    munmap(node.mapped().mapping, node.mapped().mapped_bytes);
}

void GlobalMemory::capture() {
    ranges_.clear();
    last_ = 0;
    Registry& all = registry();
    const std::lock_guard lock(all.guard);
    for (const auto& [identity, range] : all.ranges) {
        ranges_.push_back(range);
    }
    for (Range& range : ranges_) {
        range.overlaps_writable =
            std::any_of(ranges_.begin(), ranges_.end(), [&](const Range& other) {
                return other.writable && other.begin < range.end && range.begin < other.end;
            });
    }
}

std::string GlobalMemory::explain(std::uintptr_t address, std::size_t bytes, bool write) const {
    const Range* nearest = nullptr;
    std::uintptr_t least = kPage;
    for (const Range& range : ranges_) {
        if (address >= range.begin && address + bytes <= range.end) {
            return "'" + range.name + "' is read-only here; expected a writable range";
        }
        const std::uintptr_t distance = address < range.begin ? range.begin - address
                                        : address < range.end ? 0
                                                              : address - range.end;
        if (distance < least) {
            least = distance;
            nearest = &range;
        }
    }
    if (nearest == nullptr) {
        return std::string(
                   "the address is in no memory that the caller passed; expected one of "
                   "the tensors") +
               (write ? " that may be written" : "");
    }
    const std::string size = std::to_string(nearest->end - nearest->begin) + " bytes";
    if (address < nearest->begin) {
        return std::to_string(nearest->begin - address) + " bytes before the start of '" +
               nearest->name + "' (" + size + ")";
    }
    return "bytes " + std::to_string(address - nearest->begin) + " to " +
           std::to_string(address - nearest->begin + bytes - 1) + " of '" + nearest->name +
           "', which has " + size;
}

}  // namespace warploom::device::simt
