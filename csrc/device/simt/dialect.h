// The dialect on the host: the umbrella that device.cuh includes where the compiler is not nvcc.
// Each name has the meaning of its namesake in ../ptx; the executor behind it checks the use.
#pragma once

#include "types.h"

#include "dialect_barriers.h"
#include "dialect_launch.h"
#include "dialect_math.h"
#include "dialect_matrix.h"
#include "dialect_memory.h"
#include "dialect_shuffle.h"
