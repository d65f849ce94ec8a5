// Division by a number that is the same for all of a launch, by a multiplication. Plain C++.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace ldm_fused {

// Divides numbers below 2^31. A GPU's own integer division is some twenty instructions.
// Source: Granlund and Montgomery, "Division by invariant integers using multiplication", 1994.
struct Divisor {
  uint32_t divisor, multiplier;
  int shift;

  Divisor() = default;
  explicit Divisor(uint32_t divisor) : divisor(divisor), shift(0) {
    while ((uint64_t(1) << shift) < divisor) ++shift;
    multiplier = uint32_t((((uint64_t(1) << shift) - divisor) << 32) / divisor + 1);
  }

  LDM_FUSED_HD uint32_t quotient(uint32_t n) const {
#ifdef __CUDA_ARCH__
    const uint32_t high = __umulhi(n, multiplier);
#else
    const uint32_t high = uint32_t(uint64_t(n) * multiplier >> 32);
#endif
    return (high + n) >> shift;
  }

  LDM_FUSED_HD uint32_t remainder(uint32_t n) const { return n - quotient(n) * divisor; }
};

}  // namespace ldm_fused
