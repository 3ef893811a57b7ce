#include "shadow.h"

#include <algorithm>

namespace warploom::device::simt {

Shadow::Page& Shadow::page_of(std::uintptr_t place) {
    const std::uintptr_t number = place / kPageBytes;
    if (number != last_number_) {
        std::unique_ptr<Page>& page = pages_[number];
        if (page == nullptr) {
            page = std::make_unique<Page>();
        }
        last_number_ = number;
        last_page_ = page.get();
    }
    return *last_page_;
}

// Calls `visit` on every cell of the bytes until it returns false. `merge`: the visit leaves equal
// cells, so that a whole word needs only one again.
template <typename Visit>
bool Shadow::for_each_cell(std::uintptr_t place, std::size_t bytes, bool merge, Visit&& visit) {
    const std::uintptr_t end = place + bytes;
    while (place < end) {
        Page& page = page_of(place);
        const std::size_t word = place % kPageBytes / kWordBytes;
        const std::size_t first = place % kWordBytes;
        const std::size_t count = std::min<std::size_t>(kWordBytes - first, end - place);
        place += count;
        if (count == kWordBytes && !page.split[word]) {
            if (!visit(page.words[word])) {
                return false;
            }
            continue;
        }
        if (page.bytes == nullptr) {
            page.bytes = std::make_unique<std::array<Cell, kPageBytes>>();
        }
        Cell* cells = page.bytes->data() + word * kWordBytes;
        if (!page.split[word]) {
            std::fill(cells, cells + kWordBytes, page.words[word]);
            page.split[word] = true;
        }
        for (std::size_t index = first; index < first + count; ++index) {
            if (!visit(cells[index])) {
                return false;
            }
        }
        if (merge && count == kWordBytes) {
            page.words[word] = cells[0];
            page.split[word] = false;
        }
    }
    return true;
}

struct Shadow::Visitor {
    const Clocks& clocks;
    Stamp now;
    int thread;
    bool private_memory;
    Finding finding;

    using Problem = Finding::Problem;

    bool exists(const Stamp& stamp) const {
        return private_memory ? stamp.block == now.block : stamp.block != 0;
    }
    bool ordered(const Stamp& stamp) const {
        return stamp.block == now.block && clocks.ordered(stamp.epoch, thread);
    }
    bool refuse(Problem problem, const Stamp& other) {
        finding = {problem, other};
        return false;
    }

    bool check_write_before(const Cell& cell, bool atomic) {
        if (!exists(cell.write)) {
            return true;
        }
        if (cell.pending) {
            return refuse(Problem::unfinished, cell.write);
        }
        if (!ordered(cell.write) && !(atomic && cell.atomic)) {
            return refuse(Problem::write_before, cell.write);
        }
        return true;
    }

    void remember(Cell& cell) const {
        for (Stamp& read : cell.reads) {
            if (!exists(read) || ordered(read)) {
                read = now;
                return;
            }
        }
        const auto same_warp = [](const Stamp& a, const Stamp& b) {
            return a.block == b.block &&
                   a.epoch.thread() / kWarpSize == b.epoch.thread() / kWarpSize;
        };
        if (same_warp(cell.reads[0], cell.reads[1]) && !same_warp(cell.reads[0], now)) {
            cell.reads[1] = now;
        }
    }

    bool read(Cell& cell) {
        if (private_memory && !exists(cell.write)) {
            return refuse(Problem::uninitialized, {});
        }
        if (!check_write_before(cell, false)) {
            return false;
        }
        remember(cell);
        return true;
    }

    bool write(Cell& cell, bool atomic) {
        if (atomic && private_memory && !exists(cell.write)) {
            return refuse(Problem::uninitialized, {});
        }
        if (!check_write_before(cell, atomic)) {
            return false;
        }
        for (Stamp& read : cell.reads) {
            if (exists(read) && !ordered(read)) {
                return refuse(Problem::read_before, read);
            }
            read = Stamp{};
        }
        cell.write = now;
        cell.pending = false;
        cell.atomic = atomic;
        return true;
    }
};

Finding Shadow::access(std::uintptr_t place, std::size_t bytes, AccessKind kind,
                       const Clocks& clocks, std::uint32_t block, int thread, Site site) {
    Visitor visitor{clocks,
                    Stamp{block, clocks.now(thread), site},
                    thread,
                    sharing_ == Sharing::within_block,
                    {}};
    if (kind == AccessKind::read) {
        for_each_cell(place, bytes, false, [&](Cell& cell) { return visitor.read(cell); });
    } else {
        const bool atomic = kind == AccessKind::atomic;
        for_each_cell(place, bytes, true, [&](Cell& cell) { return visitor.write(cell, atomic); });
    }
    return visitor.finding;
}

void Shadow::set_pending(std::uintptr_t place, std::size_t bytes) {
    for_each_cell(place, bytes, true, [](Cell& cell) {
        cell.pending = true;
        return true;
    });
}

void Shadow::finish_pending(std::uintptr_t place, std::size_t bytes, Epoch epoch, Site site) {
    for_each_cell(place, bytes, true, [&](Cell& cell) {
        cell.pending = false;
        cell.write.epoch = epoch;
        cell.write.site = site;
        return true;
    });
}

}  // namespace warploom::device::simt
