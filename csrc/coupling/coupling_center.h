// The means of centred couplings: what the kernels that take them are given.
#pragma once

#include "coupling/affine_coupling.h"

namespace warploom::coupling {

struct CouplingCenterParams {
    CouplingView shift;      // [batch, count, pixels]
    CouplingView raw_scale;  // [batch, count, pixels], absent for additive
    CouplingView grad_z;     // [batch, channels, pixels], absent: gradients of 0, as in a forward
    CouplingView source;     // as in AffineCouplingBackwardParams
    void* means;             // [batch, center_floats] float32
    bool from_output;
    CouplingOptions options;
};

void coupling_center_cuda(const CouplingCenterParams& params, Stream stream);

}  // namespace warploom::coupling
