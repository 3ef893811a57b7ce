// The Python module of the executor: its controls and reports, never a tensor.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "controls.h"
#include "report.h"

namespace {

namespace simt = warploom::device::simt;
namespace py = pybind11;

void set_lane_order(const std::string& order) {
    simt::Controls controls = simt::controls();
    controls.lane_order = simt::lane_order_from(order);
    simt::set_controls(controls);
}

void set_async_policy(const std::string& policy) {
    simt::Controls controls = simt::controls();
    controls.async_policy = simt::async_policy_from(policy);
    simt::set_controls(controls);
}

void set_seed(std::uint64_t seed) {
    simt::Controls controls = simt::controls();
    controls.seed = seed;
    simt::set_controls(controls);
}

void set_shared_memory_limit(std::size_t bytes) {
    if (bytes > simt::kMaxSharedBytes) {
        throw std::invalid_argument("set_shared_memory_limit: expected at most " +
                                    std::to_string(simt::kMaxSharedBytes) + " bytes, got " +
                                    std::to_string(bytes));
    }
    simt::Controls controls = simt::controls();
    controls.shared_memory_limit = bytes;
    simt::set_controls(controls);
}

py::dict last_report() {
    const simt::Report report = simt::last_report();
    py::list sites;
    for (const simt::BankConflicts& site : report.conflict_sites) {
        py::dict entry;
        entry["location"] = simt::describe(site.site);
        entry["accesses"] = site.accesses;
        entry["conflicts"] = site.conflicts;
        sites.append(entry);
    }
    py::dict result;
    result["kernel"] =
        report.kernel_address == nullptr ? "" : simt::function_name(report.kernel_address);
    result["instrumented"] = report.instrumented;
    result["blocks"] = report.blocks;
    result["threads"] = report.threads;
    result["shared_bytes"] = report.shared_bytes;
    result["collectives"] = report.collectives;
    result["products"] = report.products;
    result["barriers"] = report.barriers;
    result["async_copies"] = report.async_copies;
    result["checked_accesses"] = report.checked_accesses;
    result["races"] = report.races;
    result["bank_conflicts"] = report.bank_conflicts;
    result["conflict_sites"] = sites;
    result["error"] = report.error;
    return result;
}

void reset() {
    simt::set_controls(simt::Controls{});
    simt::reset_report();
}

}  // namespace

PYBIND11_MODULE(WARPLOOM_SIMT_MODULE, module) {
    module.doc() = "Controls and reports of the executor that runs the CUDA kernels on a CPU.";
    module.def("set_lane_order", &set_lane_order, py::arg("order"),
               "The order in which threads run between two meetings: 'forward' (the default), "
               "'backward' or 'random'. In force from the next launch on.");
    module.def("set_async_policy", &set_async_policy, py::arg("policy"),
               "When an asynchronous copy takes effect: 'late' (at its wait, the default), 'early' "
               "(at its issue) or 'random'.");
    module.def("set_seed", &set_seed, py::arg("seed"), "The seed of both random choices.");
    module.def("set_shared_memory_limit", &set_shared_memory_limit, py::arg("bytes"),
               "What one block may have, 227 KiB unless told: launchers choose their tiles by it.");
    module.def("last_report", &last_report,
               "What the last launch did: kernel, blocks, threads, shared_bytes, collectives, "
               "products, barriers, async_copies; in the instrumented module also "
               "checked_accesses, races, bank_conflicts and conflict_sites; error.");
    module.def("reset", &reset, "Default controls, empty report.");
}
