// The kernels for one of x86-64's instruction sets: a kernels_*.cpp defines its namespace, the compiler's name for it
// and the width of its vectors, and includes this.
#if defined(__x86_64__)

// Headers come before the target: inline functions that they share with other files must run on any processor.
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"

#define LDM_FUSED_PRAGMA_OF(text) _Pragma(#text)
#define LDM_FUSED_PRAGMA(text) LDM_FUSED_PRAGMA_OF(text)  // replaces the macros in it first

#if defined(__clang__)
LDM_FUSED_PRAGMA(clang attribute push(__attribute__((target(LDM_FUSED_TARGET))), apply_to = function))
#else
#if LDM_FUSED_VECTOR_BYTES == 64
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own intrinsics
#endif
#pragma GCC push_options
LDM_FUSED_PRAGMA(GCC target(LDM_FUSED_TARGET))
#endif

namespace ldm_fused {
namespace cpu {
namespace LDM_FUSED_ISA {
#include "cpu/kernels.inl"
}  // namespace LDM_FUSED_ISA
}  // namespace cpu
}  // namespace ldm_fused

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // defined(__x86_64__)
