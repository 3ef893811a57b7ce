// How tensors [B, C, *spatial] lie in memory, and as what kernels see them. For *_ops.cpp only: it
// sees torch.
#pragma once

#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/torch.h"
#include "coupling/affine_coupling.h"

namespace warploom::coupling {

// As ops/_fakes.py has it.
inline bool is_channels_last(const Tensor& x) {
    return x.dim() > 2 && x.stride(1) == 1 && x.stride(x.dim() - 1) != 1;
}

inline std::vector<std::int64_t> shape_vector(const Tensor& tensor) {
    return {tensor.sizes().begin(), tensor.sizes().end()};
}

// [B, C, *spatial] with its channels moved to the end, or back from there.
inline Tensor channels_to_end(Tensor tensor) {
    for (std::int64_t dim = 1; dim + 1 < tensor.dim(); ++dim) {
        tensor = torch::stable::transpose(tensor, dim, dim + 1);
    }
    return tensor;
}
inline Tensor channels_from_end(Tensor tensor) {
    for (std::int64_t dim = tensor.dim() - 1; dim > 1; --dim) {
        tensor = torch::stable::transpose(tensor, dim - 1, dim);
    }
    return tensor;
}

// A contiguous output of that shape, or a dense one with channels last.
template <Backend backend>
Tensor empty_in_layout(const Call<backend>& call, const std::vector<std::int64_t>& shape,
                       ScalarType type, bool channels_last) {
    if (!channels_last) {
        return call.empty(shape, type);
    }
    std::vector<std::int64_t> moved(shape);
    moved.erase(moved.begin() + 1);
    moved.push_back(shape[1]);
    return channels_from_end(call.empty(moved, type));
}

// What one call knows of its layout.
struct Layout {
    bool channels_last;       // of the tensors
    bool channels_innermost;  // of what kernels see: also where there is one pixel
    std::int64_t pixels;
};

inline Layout layout_of(const Tensor& x) {
    const std::int64_t pixels = [&] {
        std::int64_t product = 1;
        for (std::int64_t dim = 2; dim < x.dim(); ++dim) {
            product *= x.size(dim);
        }
        return product;
    }();
    const bool last = is_channels_last(x);
    return {last, last || pixels == 1, pixels};
}

// Strides of a tensor [B, C, *spatial] as [batch, channels, pixels], if its spatial dimensions are
// one and the innermost dimension is dense.
inline std::optional<CouplingView> strides_of(const Tensor& tensor, bool channels_innermost) {
    CouplingView view{nullptr, tensor.stride(0), tensor.stride(1), 1};
    std::int64_t pixels = 1;
    std::int64_t pixel_stride = 0;
    for (std::int64_t dim = tensor.dim() - 1; dim >= 2; --dim) {
        const std::int64_t size = tensor.size(dim);
        if (size == 1) {
            continue;
        }
        if (pixels == 1) {
            pixel_stride = tensor.stride(dim);
        } else if (tensor.stride(dim) != pixel_stride * pixels) {
            return std::nullopt;
        }
        pixels *= size;
    }
    const std::int64_t channels = tensor.size(1);
    if (channels_innermost) {
        if (channels > 1 && view.channel_stride != 1) {
            return std::nullopt;
        }
        view.channel_stride = 1;
        view.pixel_stride = pixels == 1 ? channels : pixel_stride;
        return view.pixel_stride >= channels ? std::optional(view) : std::nullopt;
    }
    if (pixels > 1 && pixel_stride != 1) {
        return std::nullopt;
    }
    if (channels == 1) {
        view.channel_stride = pixels;
    }
    return view.channel_stride >= pixels ? std::optional(view) : std::nullopt;
}

inline bool is_dense(const CouplingView& view, const Tensor& tensor, const Layout& layout,
                     std::int64_t pixels) {
    return tensor.numel() == 0 || (layout.channels_innermost ? view.pixel_stride == tensor.size(1)
                                                             : view.channel_stride == pixels);
}

// `tensor`, or a copy in the layout of the call.
template <Backend backend>
Tensor in_layout(Call<backend>& call, const Tensor& tensor, const Layout& layout) {
    if (layout.channels_last) {
        return call.keep(channels_from_end(torch::stable::contiguous(channels_to_end(tensor))));
    }
    return call.keep(torch::stable::contiguous(tensor));
}

// An input like x, whose samples are dense; copied where they are not.
template <Backend backend>
CouplingView sample_input(Call<backend>& call, const Tensor& tensor, const char* argument,
                          const Layout& layout) {
    Tensor dense = tensor;
    std::optional<CouplingView> view = strides_of(dense, layout.channels_innermost);
    if (!view || !is_dense(*view, dense, layout, layout.pixels)) {
        dense = in_layout(call, tensor, layout);
        view = strides_of(dense, layout.channels_innermost);
    }
    view->data = call.input(dense, argument);
    return *view;
}

}  // namespace warploom::coupling
