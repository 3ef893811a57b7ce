// The seam of family vocab: checks -> Params -> launch.
#include <algorithm>

#include "common/checks.h"
#include "common/parallel.h"
#include "common/torch.h"
#include "vocab/cross_entropy_block_cpu.h"
#include "vocab/cross_entropy_rows.h"
#include "vocab/lcs_lengths.h"

namespace warploom::vocab {
namespace {

// Where the targets can be read: none may point outside the classes.
template <Backend backend>
void check_targets(const Call<backend>& call, const std::int64_t* targets, std::int64_t rows,
                   std::int64_t classes, std::int64_t ignore_index) {
    const auto is_outside = [&](std::int64_t target) {
        return (target < 0 || target >= classes) && target != ignore_index;
    };
    const std::int64_t* end = targets + rows;
    const std::int64_t* outside = std::find_if(targets, end, is_outside);
    if (outside != end) {
        call.fail("targets",
                  "numbers from 0 to " + std::to_string(classes - 1) + " or " +
                      std::to_string(ignore_index),
                  std::to_string(*outside));
    }
}

// What an op on rows of logits is given of them.
template <Backend backend, typename Params>
void take_rows(Call<backend>& call, const Tensor& logits, const Tensor& targets, Params& params) {
    call.check_dim(logits, "logits", 2);
    call.check(logits.is_contiguous() && logits.size(1) > 0, "logits",
               "contiguous rows of at least 1 column", shape_of(logits));
    params.dtype = call.dtype(logits, "logits");
    params.rows = logits.size(0);
    params.columns = narrow_size(call, logits.size(1), "logits");
    params.targets = static_cast<const std::int64_t*>(
        contiguous_input(call, targets, "targets", {params.rows}, ScalarType::Long));
    params.logits = call.output(logits, "logits");
}

template <Backend backend>
Tensor cross_entropy_rows(const Tensor& logits, const Tensor& targets,
                          const std::optional<Tensor>& row_scale, std::int64_t ignore_index,
                          double label_smoothing, double z_loss, double softcap, bool gradients) {
    Call<backend> call("cross_entropy_rows", logits);
    CrossEntropyRowsParams params{};
    take_rows(call, logits, targets, params);
    const ScalarType statistics = call.statistics_type(params.dtype);
    Tensor loss = call.empty({params.rows}, statistics);
    if (row_scale.has_value()) {
        params.row_scale =
            contiguous_input(call, *row_scale, "row_scale", {params.rows}, statistics);
    }
    params.loss = call.output(loss, "loss");
    params.ignore_index = ignore_index;
    params.label_smoothing = label_smoothing;
    params.z_loss = z_loss;
    params.softcap = softcap;
    params.gradients = gradients;
    if constexpr (backend == Backend::kCpu) {
        check_targets(call, params.targets, params.rows, params.columns, ignore_index);
    }
    WARPLOOM_RUN(backend, call, cross_entropy_rows, params)
    return loss;
}

template <Backend backend>
Tensor cross_entropy_block(const Tensor& logits, const Tensor& state, const Tensor& targets,
                           std::int64_t first, std::int64_t classes, std::int64_t ignore_index,
                           double softcap, bool gradients) {
    Call<backend> call("cross_entropy_block", logits);
    CrossEntropyBlockParams params{};
    take_rows(call, logits, targets, params);
    call.check(first >= 0 && first + params.columns <= classes, "first",
               "columns among " + std::to_string(classes) + " classes", std::to_string(first));
    const ScalarType statistics = call.statistics_type(params.dtype);
    call.check_shape(state, "state", {params.rows, 4});
    call.check(state.is_contiguous() && state.scalar_type() == statistics, "state",
               std::string("contiguous ") + torch::headeronly::toString(statistics),
               torch::headeronly::toString(state.scalar_type()));
    Tensor factor = call.empty({params.rows}, statistics);
    check_targets(call, params.targets, params.rows, classes, ignore_index);
    params.state = call.output(state, "state");
    params.factor = call.output(factor, "factor");
    params.first = first;
    params.classes = classes;
    params.ignore_index = ignore_index;
    params.softcap = softcap;
    params.gradients = gradients;
    cross_entropy_block_cpu(params);
    return factor;
}

template <Backend backend>
Tensor lcs_lengths(const Tensor& tokens, const Tensor& others, const Tensor& cu_seqlens) {
    Call<backend> call("lcs_lengths", tokens);
    call.check_dim(tokens, "tokens", 1);
    call.check_dim(others, "others", 1);
    call.check_dim(cu_seqlens, "cu_seqlens", 1);
    call.check(cu_seqlens.size(0) >= 1, "cu_seqlens", "at least 1 number", "none");
    constexpr std::int64_t kWordBits = 64;
    LcsLengthsParams params{};
    params.length = narrow_size(call, tokens.size(0), "tokens");
    params.words = ceil_divide(params.length, kWordBits);
    params.sequences = cu_seqlens.size(0) - 1;
    params.parts = std::min<std::int64_t>(params.sequences, 8 * thread_count());
    params.slot_bits = 1;
    while ((std::int64_t{1} << params.slot_bits) < 2 * params.length) {
        ++params.slot_bits;
    }
    const std::int64_t slots = std::int64_t{1} << params.slot_bits;
    const auto long_input = [&](const Tensor& tensor, const char* argument) {
        return static_cast<const std::int64_t*>(
            contiguous_input(call, tensor, argument, {tensor.size(0)}, ScalarType::Long));
    };
    params.tokens = long_input(tokens, "tokens");
    params.others = long_input(others, "others");
    params.cu_seqlens = int32_input(call, cu_seqlens, "cu_seqlens", {params.sequences + 1});
    const std::int32_t* bounds = params.cu_seqlens;
    call.check(bounds[0] == 0 && bounds[params.sequences] <= others.size(0) &&
                   std::is_sorted(bounds, bounds + params.sequences + 1),
               "cu_seqlens",
               "offsets that rise from 0 to at most " + std::to_string(others.size(0)),
               std::to_string(bounds[0]) + " to " + std::to_string(bounds[params.sequences]));
    Tensor lengths = call.empty({params.sequences}, ScalarType::Int);
    const auto workspace = [&](std::int64_t elements, ScalarType type) {
        return call.output(call.keep(call.empty({elements}, type)), "workspace");
    };
    params.lengths = static_cast<std::int32_t*>(call.output(lengths, "lengths"));
    params.slot_tokens = static_cast<std::int64_t*>(workspace(slots, ScalarType::Long));
    params.slot_symbols = static_cast<std::int32_t*>(workspace(slots, ScalarType::Int));
    params.masks =
        static_cast<std::uint64_t*>(workspace(params.length * params.words, ScalarType::Long));
    params.states =
        static_cast<std::uint64_t*>(workspace(params.parts * params.words, ScalarType::Long));
    lcs_lengths_cpu(params);
    return lengths;
}

template <Backend backend, typename Library>
void register_vocab(Library& library) {
    WARPLOOM_IMPL(library, backend, cross_entropy_rows);
    if constexpr (backend == Backend::kCpu) {
        WARPLOOM_IMPL(library, backend, cross_entropy_block);
        WARPLOOM_IMPL(library, backend, lcs_lengths);
    }
}

WARPLOOM_REGISTER(register_vocab)

}  // namespace
}  // namespace warploom::vocab
