#include "report.h"

#include <mutex>

namespace warploom::device::simt {

namespace {

std::mutex guard;

Report& latest() {
    static Report* report = new Report;
    return *report;
}

}  // namespace

Report last_report() {
    const std::lock_guard lock(guard);
    return latest();
}

void publish(const Report& report) {
    const std::lock_guard lock(guard);
    latest() = report;
}

void reset_report() {
    publish(Report{});
}

}  // namespace warploom::device::simt
