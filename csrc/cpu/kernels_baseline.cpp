// The kernels for any processor that the compiler targets by default.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"

#define LDM_FUSED_VECTOR_BYTES 16

namespace ldm_fused {
namespace cpu {
namespace baseline {
#include "cpu/kernels.inl"
}  // namespace baseline
}  // namespace cpu
}  // namespace ldm_fused
