// Products whose sums of a row are the same in any batch. Groups of a few rows, as when decoding,
// are bound by reading the weights, which cross memory once and are widened in registers. Where
// PyTorch's product is faster and may be taken, grouped_linear_ops.cpp takes it.
#include <algorithm>
#include <bit>

#include "common/cpu_float.h"
#include "common/parallel.h"
#include "grouped_linear/grouped_linear.h"

namespace warploom::grouped_linear {
namespace WARPLOOM_CPU_ISA {
namespace {

using namespace ::warploom::WARPLOOM_CPU_ISA;

// Rows of x and of the weight whose products are summed at the same time, in half the registers.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRows = 4;
#else
constexpr int kVectorBytes = 32;
constexpr int kRows = 2;
#endif
constexpr int kColumns = 4;

typedef float Vector __attribute__((vector_size(kVectorBytes)));
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(float));

// Terms of a sum that are taken at once, of any two rows in the same order: of bfloat16 the even
// ones, which take a shift only, and the odd ones, which take a mask.
constexpr int kTerms = 2 * kLanes;
struct Terms {
    Vector first;
    Vector second;
};

inline Terms load_terms(const float* from) {
    Terms terms;
    __builtin_memcpy(&terms, from, sizeof(terms));
    return terms;
}
inline Terms load_terms(const BFloat16* from) {
    typedef std::uint32_t Words __attribute__((vector_size(kVectorBytes)));
    Words words;
    __builtin_memcpy(&words, from, sizeof(words));
    const Words even = words << 16;
    const Words odd = words & 0xffff0000u;
    return {std::bit_cast<Vector>(even), std::bit_cast<Vector>(odd)};
}

float sum_of_lanes(Vector vector) {
    float sum = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) {
        sum += vector[lane];
    }
    return sum;
}

// Columns of one task: enough to be worth a thread's attention, few enough that all have some.
constexpr std::int64_t kTaskColumns = 64;

// Rows of x that all columns of a task are multiplied with before the next ones: few enough to stay
// in the L2 cache beside some rows of the weight.
constexpr std::int64_t kBlockRows = 32;

// The rows of one group.
template <typename T>
struct Group {
    const T* x;  // [rows, in_features], rows x_stride apart
    std::int64_t x_stride;
    const T* weight;  // [out_features, in_features]
    T* out;           // [rows, out_features]
    int rows;
    std::int64_t in_features;
    std::int64_t out_features;
};

// out[row + m, column + n] = x[row + m] weight[column + n]^T for kXRows x kWeightRows products.
template <int kXRows, int kWeightRows, typename T>
inline void multiply_rows(const Group<T>& group, std::int64_t row, std::int64_t column) {
    const T* x = group.x + row * group.x_stride;
    const T* weight = group.weight + column * group.in_features;
    T* out = group.out + row * group.out_features + column;
    Vector sums[kXRows][kWeightRows] = {};
    std::int64_t i = 0;
    for (; i + kTerms <= group.in_features; i += kTerms) {
        Terms factors[kWeightRows];
        for (int n = 0; n < kWeightRows; ++n) {
            factors[n] = load_terms(weight + n * group.in_features + i);
        }
        for (int m = 0; m < kXRows; ++m) {
            const Terms terms = load_terms(x + m * group.x_stride + i);
            for (int n = 0; n < kWeightRows; ++n) {
                sums[m][n] += terms.first * factors[n].first;
                sums[m][n] += terms.second * factors[n].second;
            }
        }
    }
    for (int m = 0; m < kXRows; ++m) {
        for (int n = 0; n < kWeightRows; ++n) {
            float sum = sum_of_lanes(sums[m][n]);
            for (std::int64_t rest = i; rest < group.in_features; ++rest) {
                sum += widen(x[m * group.x_stride + rest]) *
                       widen(weight[n * group.in_features + rest]);
            }
            out[m * group.out_features + n] = narrow<T>(sum);
        }
    }
}

// Rows [row, end) by kWeightRows columns.
template <int kWeightRows, int kXRows = kRows, typename T>
inline void multiply_columns(const Group<T>& group, std::int64_t column, std::int64_t row,
                             std::int64_t end) {
    for (; row + kXRows <= end; row += kXRows) {
        multiply_rows<kXRows, kWeightRows>(group, row, column);
    }
    if constexpr (kXRows > 1) {
        multiply_columns<kWeightRows, kXRows / 2>(group, column, row, end);
    }
}

template <typename T>
Group<T> group_of(const GroupedLinearParams& params, std::int64_t index) {
    const std::int64_t first = params.group_offsets[index];
    const std::int64_t weights =
        static_cast<std::int64_t>(params.out_features) * params.in_features;
    return {static_cast<const T*>(params.x) + first * params.x_row_stride,
            params.x_row_stride,
            static_cast<const T*>(params.weight) + index * weights,
            static_cast<T*>(params.out) + first * params.out_features,
            static_cast<int>(params.group_offsets[index + 1] - first),
            params.in_features,
            params.out_features};
}

template <typename T>
void multiply_small_groups(const GroupedLinearParams& params) {
    const std::int64_t group_tasks = ceil_divide(params.out_features, kTaskColumns);
    parallel_for(params.groups * group_tasks, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t task = begin; task < end; ++task) {
            const Group<T> group = group_of<T>(params, task / group_tasks);
            if (group.rows > most_cpu_rows(params.dtype, params.batch_invariant)) {
                continue;
            }
            const std::int64_t first = task % group_tasks * kTaskColumns;
            const std::int64_t end_column = std::min(first + kTaskColumns, group.out_features);
            for (std::int64_t row = 0; row < group.rows; row += kBlockRows) {
                const std::int64_t end_row = std::min<std::int64_t>(row + kBlockRows, group.rows);
                std::int64_t column = first;
                for (; column + kColumns <= end_column; column += kColumns) {
                    multiply_columns<kColumns>(group, column, row, end_row);
                }
                for (; column < end_column; ++column) {
                    multiply_columns<1>(group, column, row, end_row);
                }
            }
        }
    });
}

}  // namespace

void grouped_linear_cpu(const GroupedLinearParams& params) {
    if (params.dtype == DType::float32) {
        multiply_small_groups<float>(params);
    } else if (params.dtype == DType::bfloat16) {
        multiply_small_groups<BFloat16>(params);
    }
}

}  // namespace WARPLOOM_CPU_ISA
}  // namespace warploom::grouped_linear
