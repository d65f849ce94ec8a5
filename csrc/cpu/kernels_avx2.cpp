// The kernels for x86-64 processors with AVX2, FMA and F16C.
#if defined(__x86_64__)

// Headers come before the target, so that the inline functions they share with other files stay runnable anywhere.
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define LDM_FUSED_VECTOR_BYTES 32

namespace ldm_fused {
namespace cpu {
namespace avx2 {
#include "cpu/kernels.inl"
}  // namespace avx2
}  // namespace cpu
}  // namespace ldm_fused

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // defined(__x86_64__)
