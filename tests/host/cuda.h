// CUDA's words, as far as the kernels use them, for a C++17 compiler.
#pragma once

#include <array>

#include "engine.h"

#define __global__
#define __device__
#define __grid_constant__
#define __shared__ static

using __half = host::half;
using __nv_bfloat16 = host::bfloat;
using std::fabs;
using std::sqrt;

struct dim3 {
  unsigned x, y, z;
};
#define threadIdx (dim3{host::self->index, 0, 0})
#define blockIdx (dim3{host::self->group, 0, 0})
#define blockDim (dim3{host::self->threads, 1, 1})

inline void __syncthreads() { host::self->barrier->wait(); }

inline float __shfl_xor_sync(unsigned, float x, int mask) {
  return host::self->shuffle_xor(x, mask);
}

// As MLX has them, in front of every kernel.
using Shape = std::array<int32_t, 8>;
using Strides = std::array<int64_t, 8>;
