// Metal's words, as far as the kernels use them, for a C++17 compiler.
#pragma once

#include "engine.h"

#define device
#define constant
#define thread
// Threadgroups run one after the other, so what they share may be static.
#define threadgroup static

namespace metal {

using uint = unsigned;
struct uint3 {
  uint x, y, z;
};
using host::bfloat;
using host::half;
using std::fabs;
using std::sqrt;

enum class mem_flags { mem_none, mem_device, mem_threadgroup };

inline void threadgroup_barrier(mem_flags flags) {
  // It waits in any case, but orders threadgroup memory only if told so.
  if (flags != mem_flags::mem_threadgroup) host::fail("a barrier that orders no shared memory");
  host::self->barrier->wait();
}

inline float simd_sum(float x) { return host::self->sum(x); }

}  // namespace metal

// As MLX has them, in front of every kernel.
using namespace metal;
typedef half float16_t;
typedef bfloat bfloat16_t;
