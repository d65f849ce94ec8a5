// Which instruction set's kernels an op calls: the best that the processor has, or a lesser one that LDM_FUSED_CPU_ISA
// names.
#pragma once

#include <string>
#include <type_traits>

#include "cpu/kernels.h"

namespace ldm_fused {
namespace cpu {

enum class Isa { baseline, avx2, avx512, avx512_bf16 };

Isa chosen_isa();
const char* isa();   // the name of the chosen one
std::string isas();  // the names of those that this processor has, with semicolons between them

template <class X, class Y>
Kernels<X, Y> kernels_of(Isa isa) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<X, BFloat16> || std::is_same_v<Y, BFloat16>) {
    if (isa == Isa::avx512_bf16) return avx512_bf16::kernels<X, Y>();
  }
  if (isa >= Isa::avx512) return avx512::kernels<X, Y>();
  if (isa == Isa::avx2) return avx2::kernels<X, Y>();
#endif
  return baseline::kernels<X, Y>();
}

template <class X, class Y>
const Kernels<X, Y>& kernels() {
  static const Kernels<X, Y> chosen = kernels_of<X, Y>(chosen_isa());
  return chosen;
}

}  // namespace cpu
}  // namespace ldm_fused
