// The kernels for x86-64 processors with AVX-512 (F, BW, DQ and VL).
#if defined(__x86_64__)

// Headers come before the target, so that the inline functions they share with other files stay runnable anywhere.
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own intrinsics
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#define LDM_FUSED_VECTOR_BYTES 64

namespace ldm_fused {
namespace cpu {
namespace avx512 {
#include "cpu/kernels.inl"
}  // namespace avx512
}  // namespace cpu
}  // namespace ldm_fused

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // defined(__x86_64__)
