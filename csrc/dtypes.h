// Storage types and their arithmetic type, the same on CPU, on CUDA and under the tests' emulator.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define LDM_FUSED_HD __host__ __device__ inline
#else
#define LDM_FUSED_HD inline
#endif

namespace ldm_fused {

enum class Dtype : int { float32, float16, bfloat16, float64 };

LDM_FUSED_HD int size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// 16-bit numbers as they lie in memory. All arithmetic is done in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;  // of sums, statistics and the arithmetic in between

// The pairs that the ops accept: the same dtype twice, or float32 with a 16-bit one.
inline bool is_pair(Dtype x, Dtype y) { return x == y || size_of(x) + size_of(y) == 6; }

// Calls f with a value of the storage type of each dtype. Only pairs that the ops accept are compiled.
template <class F>
auto dispatch_pair(Dtype x, Dtype y, F&& f) {
  if (x == y) {
    switch (x) {
      case Dtype::float64: return f(double{}, double{});
      case Dtype::float32: return f(float{}, float{});
      case Dtype::float16: return f(Half{}, Half{});
      case Dtype::bfloat16: return f(BFloat16{}, BFloat16{});
    }
  }
  if (x == Dtype::float16 && y == Dtype::float32) return f(Half{}, float{});
  if (x == Dtype::bfloat16 && y == Dtype::float32) return f(BFloat16{}, float{});
  if (x == Dtype::float32 && y == Dtype::float16) return f(float{}, Half{});
  if (x == Dtype::float32 && y == Dtype::bfloat16) return f(float{}, BFloat16{});
  throw std::invalid_argument("there is no kernel for this pair of dtypes");
}

LDM_FUSED_HD uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

LDM_FUSED_HD float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

LDM_FUSED_HD float widen(float value) { return value; }
LDM_FUSED_HD double widen(double value) { return value; }
LDM_FUSED_HD float widen(BFloat16 value) { return float_of(uint32_t(value.bits) << 16); }

LDM_FUSED_HD float widen(Half value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  // Shifted into a float's fields the exponent is 112 too small; multiplying by 2^112 mends that, and makes
  // subnormals normal on the way. Only infinity and NaN need their exponent filled up.
  const uint32_t magnitude = uint32_t(value.bits & 0x7fffu) << 13;
  float result = float_of(magnitude) * 0x1p112f;
  if (magnitude >= 0x7c00u << 13) result = float_of(magnitude | 0x7f800000u);
  return float_of(bits_of(result) | uint32_t(value.bits & 0x8000u) << 16);
#endif
}

// Rounds to nearest, ties to even, as the hardware's conversions do.
template <class T>
LDM_FUSED_HD T narrow(Accumulate<T> value);

template <>
LDM_FUSED_HD float narrow<float>(float value) {
  return value;
}
template <>
LDM_FUSED_HD double narrow<double>(double value) {
  return value;
}

template <>
LDM_FUSED_HD BFloat16 narrow<BFloat16>(float value) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = bits_of(value);
  if (value != value) return {uint16_t(bits >> 16 | 0x0040u)};
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}

template <>
LDM_FUSED_HD Half narrow<Half>(float value) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t sign = bits_of(value) >> 16 & 0x8000u;
  const uint32_t magnitude = bits_of(value) & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 lets the float adder round at the subnormal's last bit
    return {uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)))};
  }
  return {uint16_t(sign | (magnitude - (112u << 23) + 0x0fffu + (magnitude >> 13 & 1u)) >> 13)};
#endif
}

// The two numbers of a word, the first one in its lower half.
template <class T>
LDM_FUSED_HD void widen_pair(uint32_t word, float& first, float& second) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, BFloat16>) {
    first = float_of(word << 16);
    second = float_of(word & 0xffff0000u);
    return;
  }
#endif
  first = widen(T{uint16_t(word)});
  second = widen(T{uint16_t(word >> 16)});
}

template <class T>
LDM_FUSED_HD uint32_t narrow_pair(float first, float second) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    memcpy(&word, &pair, sizeof word);
  } else {
    const __half2 pair = __floats2half2_rn(first, second);
    memcpy(&word, &pair, sizeof word);
  }
  return word;
#else
  return narrow<T>(first).bits | uint32_t(narrow<T>(second).bits) << 16;
#endif
}

}  // namespace ldm_fused
