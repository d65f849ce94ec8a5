#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

namespace ldm_fused {
namespace cpu {
namespace {

constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

// The best set that the processor has. It has all sets before that one too.
Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
    }
    return Isa::avx2;
  }
#endif
  return Isa::baseline;
}

}  // namespace

// The best one, or a lesser one that LDM_FUSED_CPU_ISA names. (ldm_fused/ops.py refuses other names.)
Isa chosen_isa() {
  static const Isa chosen = [] {
    const char* wanted = std::getenv("LDM_FUSED_CPU_ISA");
    int isa = int(best_isa());
    while (wanted && isa > 0 && std::strcmp(wanted, kIsaNames[isa]) != 0) --isa;
    return wanted && *wanted ? Isa(isa) : best_isa();
  }();
  return chosen;
}

const char* isa() { return kIsaNames[int(chosen_isa())]; }

std::string isas() {
  std::string names;
  for (int isa = 0; isa <= int(best_isa()); ++isa) names += (isa ? ";" : "") + std::string(kIsaNames[isa]);
  return names;
}

}  // namespace cpu
}  // namespace ldm_fused
