#include "site.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>
#include <unwind.h>

#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string_view>
#include <vector>

extern char** environ;

namespace warploom::device::simt {

namespace {

const char anchor = 0;

std::uint32_t encode(const void* address, bool program_counter) {
    const std::int64_t distance =
        reinterpret_cast<std::intptr_t>(address) - reinterpret_cast<std::intptr_t>(&anchor);
    if (distance * 2 != static_cast<std::int32_t>(distance * 2)) {
        return 0;
    }
    return static_cast<std::uint32_t>(distance) << 1 | (program_counter ? 1u : 0u);
}

const void* decode(std::uint32_t code) {
    const std::intptr_t distance = static_cast<std::int32_t>(code) >> 1;
    return reinterpret_cast<const void*>(reinterpret_cast<std::intptr_t>(&anchor) + distance);
}

// From "csrc/" or "tests/" on where a path has it: errors read the same on every machine.
std::string shortened(std::string_view path) {
    for (const std::string_view root : {"/csrc/", "/tests/"}) {
        if (const std::size_t start = path.rfind(root); start != std::string_view::npos) {
            return std::string(path.substr(start + 1));
        }
    }
    return std::string(path);
}

// The output of addr2line for addresses of a module, empty where the tool is missing.
std::string addr2line(const std::string& module, const std::vector<std::uintptr_t>& offsets) {
    std::vector<std::string> words = {"addr2line", "-i", "-f", "-C", "-e", module};
    for (const std::uintptr_t offset : offsets) {
        std::ostringstream word;
        word << "0x" << std::hex << offset;
        words.push_back(word.str());
    }
    std::vector<char*> arguments;
    for (std::string& word : words) {
        arguments.push_back(word.data());
    }
    arguments.push_back(nullptr);
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) {
        return "";
    }
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
    pid_t child = 0;
    const int failed =
        posix_spawnp(&child, arguments[0], &actions, nullptr, arguments.data(), environ);
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    std::string text;
    if (failed == 0) {
        char buffer[1024];
        for (ssize_t count; (count = read(ends[0], buffer, sizeof(buffer))) > 0;) {
            text.append(buffer, static_cast<std::size_t>(count));
        }
        int status = 0;
        waitpid(child, &status, 0);
    }
    close(ends[0]);
    return text;
}

struct Frame {
    std::string function;
    std::string place;  // "file:line"
};

// The functions at the addresses and those that they were inlined into, innermost first. Addresses
// outside the module of this code are passed over.
std::vector<Frame> frames_at(const std::vector<const void*>& addresses) {
    Dl_info own;
    if (dladdr(&anchor, &own) == 0) {
        return {};
    }
    std::vector<std::uintptr_t> offsets;
    for (const void* address : addresses) {
        Dl_info info;
        if (dladdr(address, &info) != 0 && info.dli_fbase == own.dli_fbase) {
            offsets.push_back(reinterpret_cast<std::uintptr_t>(address) -
                              reinterpret_cast<std::uintptr_t>(own.dli_fbase));
        }
    }
    if (offsets.empty()) {
        return {};
    }
    std::istringstream lines(addr2line(own.dli_fname, offsets));
    std::vector<Frame> frames;
    for (Frame frame; std::getline(lines, frame.function) && std::getline(lines, frame.place);) {
        if (const std::size_t note = frame.place.find(" ("); note != std::string::npos) {
            frame.place.resize(note);
        }
        frames.push_back(frame);
    }
    return frames;
}

// Whether a frame belongs to a kernel, not to the executor, the dialect or the C++ library. The
// function is asked too: of DWARF 5, addr2line 2.40 takes some files for others.
bool is_kernel_code(const Frame& frame) {
    return frame.function.find("warploom::device::detail::") == std::string::npos &&
           frame.function.find("warploom::device::simt::Executor") == std::string::npos &&
           frame.place.find("/device/simt/") == std::string::npos &&
           frame.place.find("/include/") == std::string::npos &&
           frame.place.find('?') == std::string::npos;
}

}  // namespace

Site::Site(std::source_location where) {
    static_assert(sizeof(where) == sizeof(void*));
    code_ = encode(std::bit_cast<const void*>(where), false);
}

Site Site::of_program_counter(const void* program_counter) {
    Site site;
    site.code_ = encode(program_counter, true);
    return site;
}

std::source_location Site::location() const {
    return std::bit_cast<std::source_location>(decode(code_));
}

const void* Site::program_counter() const {
    return decode(code_);
}

bool Site::same_line(Site other) const {
    if (code_ == other.code_) {
        return true;
    }
    if (!is_location() || !other.is_location()) {
        return false;
    }
    const std::source_location a = location();
    const std::source_location b = other.location();
    return a.line() == b.line() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

std::string describe(Site site) {
    if (!site.known()) {
        return "an unknown line";
    }
    if (site.is_location()) {
        const std::source_location where = site.location();
        return shortened(where.file_name()) + ":" + std::to_string(where.line());
    }
    // The counter is a return address: the byte before it belongs to the call.
    const void* call = static_cast<const char*>(site.program_counter()) - 1;
    const std::vector<Frame> frames = frames_at({call});
    for (const Frame& frame : frames) {
        if (is_kernel_code(frame)) {
            return shortened(frame.place);
        }
    }
    return frames.empty() ? "an unknown line" : "a line of " + frames.back().function;
}

std::string describe_callers(const std::string& known) {
    std::vector<const void*> calls;
    _Unwind_Backtrace(
        [](_Unwind_Context* context, void* list) {
            const auto address = static_cast<std::uintptr_t>(_Unwind_GetIP(context));
            if (address == 0) {
                return _URC_END_OF_STACK;
            }
            static_cast<std::vector<const void*>*>(list)->push_back(
                reinterpret_cast<const void*>(address - 1));
            return _URC_NO_REASON;
        },
        &calls);
    std::string text;
    for (const Frame& frame : frames_at(calls)) {
        const std::string place = shortened(frame.place);
        const bool repeats = known.size() >= 1 && place.ends_with(known);
        if (is_kernel_code(frame) && !repeats) {
            text += "\n  called from " + place;
        }
    }
    return text;
}

std::string function_name(const void* address) {
    const std::vector<Frame> frames = frames_at({address});
    if (frames.empty() || frames.back().function == "??") {
        return "a kernel";
    }
    const std::string& name = frames.back().function;
    // Without the leading return type of templates, parameters and namespaces' unnamed parts.
    const std::size_t parameters = name.rfind('(');
    std::string plain = name.substr(0, parameters);
    if (plain.rfind("void ", 0) == 0) {
        plain.erase(0, 5);
    }
    return plain;
}

}  // namespace warploom::device::simt
