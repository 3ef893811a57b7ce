// One C entry point that runs any of the seeded-bug kernels, with its bug or without it.
#include "collectives.cuh"
#include "copies.cuh"
#include "memory.cuh"
#include "synchronisation.cuh"

namespace warploom::seeded {

const Case& find_case(std::string_view name) {
    const auto search = [&](const auto& cases) -> const Case* {
        for (const Case& entry : cases) {
            if (name == entry.name) {
                return &entry;
            }
        }
        return nullptr;
    };
    for (const Case* found : {search(kSynchronisationCases), search(kCollectiveCases),
                              search(kCopyCases), search(kMemoryCases)}) {
        if (found != nullptr) {
            return *found;
        }
    }
    throw std::runtime_error("no seeded bug is called " + std::string(name));
}

}  // namespace warploom::seeded

// Runs the case `name` on device copies of in and out (elements,) and copies out back.
// 0, or 1 with the reason in `error`.
WARPLOOM_TEST_ENTRY int run_seeded(const char* name, int seeded, const float* in, float* out,
                                   int elements, char* error, std::size_t error_bytes) {
    using namespace warploom;
    return harness::report_errors(error, error_bytes, [&] {
        const seeded::Case& entry = seeded::find_case(name);
        const std::size_t bytes = static_cast<std::size_t>(elements) * sizeof(float);
        harness::Buffer device_in(in, bytes);
        harness::Buffer device_out(out, bytes);
        const seeded::Arguments arguments{static_cast<const float*>(device_in.data()),
                                          static_cast<float*>(device_out.data()), in, elements};
        const auto kernel = seeded ? entry.seeded : entry.clean;
        const device::LaunchShape& shape = seeded ? entry.seeded_shape : entry.clean_shape;
        device::launch(kernel, shape, device::Stream{}, arguments);  // BUG
        harness::synchronise();
        device_out.copy_to(out);
    });
}
