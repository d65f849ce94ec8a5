// Stand-ins for the AVX-512 instructions that the CPU's kernels name, for a processor that has AVX2 and lacks them.
// With -Itests/avx512 this is found before the compiler's own header. It makes code for AVX2 of kernels_avx512.cpp and
// kernels_avx512_bf16.cpp: the compiler takes vectors of 64 bytes apart by itself. Each stand-in does what Intel
// documents of the instruction, as far as the kernels ask for it.
#pragma once

#include_next <immintrin.h>

#if defined(LDM_FUSED_VECTOR_BYTES) && LDM_FUSED_VECTOR_BYTES == 64
#define LDM_FUSED_AVX512_STAND_INS
#undef LDM_FUSED_TARGET
#define LDM_FUSED_TARGET "avx2,fma,f16c"

#include <cmath>
#include <cstdint>
#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace stand_in {

#define STAND_IN static inline __attribute__((always_inline))

typedef uint16_t Shorts __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint64_t Longs __attribute__((vector_size(64)));

template <class To, class From>
STAND_IN To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

STAND_IN __m512i slli_epi32(const __m512i& v, int by) { return bits<__m512i>(bits<Ints>(v) << by); }
STAND_IN __m512i cvtepu16_epi32(const __m256i& v) {
  return bits<__m512i>(__builtin_convertvector(bits<Shorts>(v), Ints));
}
STAND_IN __m512 set1_ps(float value) { return __m512{} + value; }
STAND_IN __m512i set1_epi64(int64_t value) { return __m512i{} + value; }
STAND_IN __m512i mul_epu32(const __m512i& a, const __m512i& b) {
  return bits<__m512i>((bits<Longs>(a) & 0xffffffff) * (bits<Longs>(b) & 0xffffffff));
}

struct Halves {
  __m256 low, high;
};
STAND_IN __m512 cvtph_ps(const __m256i& v) {
  const __m128i low = _mm256_castsi256_si128(v), high = _mm256_extracti128_si256(v, 1);
  return bits<__m512>(Halves{_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)});
}
STAND_IN __m256i cvtps_ph(const __m512& v) {
  const Halves halves = bits<Halves>(v);
  const __m128i low = _mm256_cvtps_ph(halves.low, _MM_FROUND_TO_NEAREST_INT);
  const __m128i high = _mm256_cvtps_ph(halves.high, _MM_FROUND_TO_NEAREST_INT);
  return _mm256_set_m128i(high, low);
}

// To nearest, ties to even; a subnormal number counts as zero, and NaN stays NaN.
STAND_IN Shorts cvtneps_pbh(const __m512& v) {
  Shorts narrowed;
  for (int i = 0; i < 16; ++i) {
    uint32_t word = bits<uint32_t>(float(v[i]));
    if ((word & 0x7f800000) == 0) word &= 0x80000000;
    const bool nan = (word & 0x7fffffff) > 0x7f800000;
    narrowed[i] = uint16_t((nan ? word | 0x400000 : word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
  return narrowed;
}

STAND_IN __m512 mask_mov_ps(__m512 to, unsigned mask, const __m512& from) {
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) to[i] = from[i];
  }
  return to;
}
STAND_IN __m512 mask_loadu_ps(__m512 to, unsigned mask, const float* from) {
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) to[i] = from[i];
  }
  return to;
}
STAND_IN void mask_storeu_ps(float* to, unsigned mask, const __m512& from) {
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) to[i] = from[i];
  }
}
STAND_IN __m256i maskz_loadu_epi16(unsigned mask, const void* from) {
  Shorts to{};
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) memcpy(reinterpret_cast<char*>(&to) + 2 * i, static_cast<const char*>(from) + 2 * i, 2);
  }
  return bits<__m256i>(to);
}
STAND_IN void mask_storeu_epi16(void* to, unsigned mask, const __m256i& from) {
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) memcpy(static_cast<char*>(to) + 2 * i, reinterpret_cast<const char*>(&from) + 2 * i, 2);
  }
}

// The smaller magnitude, with the sign of a; b where a is NaN.
STAND_IN __m512 smaller_magnitude(const __m512& a, const __m512& b) {
  __m512 least;
  for (int i = 0; i < 16; ++i) least[i] = std::copysign(std::fmin(std::fabs(a[i]), std::fabs(b[i])), a[i]);
  return least;
}
STAND_IN __m512 permutexvar_ps(const __m512i& index, const __m512& table) {
  __m512 found;
  for (int i = 0; i < 16; ++i) found[i] = table[bits<Ints>(index)[i] & 15];
  return found;
}
STAND_IN __m512 scalef_ps(const __m512& v, const __m512& exponent) {
  __m512 scaled;
  for (int i = 0; i < 16; ++i) scaled[i] = std::ldexp(v[i], int(std::floor(exponent[i])));
  return scaled;
}

}  // namespace stand_in

#define _mm512_slli_epi32 stand_in::slli_epi32
#define _mm512_cvtepu16_epi32 stand_in::cvtepu16_epi32
#define _mm512_set1_ps stand_in::set1_ps
#define _mm512_set1_epi64 stand_in::set1_epi64
#define _mm512_mul_epu32 stand_in::mul_epu32
#define _mm512_cvtph_ps stand_in::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(v, rounding) stand_in::cvtps_ph(v)
#define _mm512_cvtneps_pbh stand_in::cvtneps_pbh
#define _mm512_mask_mov_ps stand_in::mask_mov_ps
#define _mm512_mask_loadu_ps stand_in::mask_loadu_ps
#define _mm512_mask_storeu_ps stand_in::mask_storeu_ps
#define _mm256_maskz_loadu_epi16 stand_in::maskz_loadu_epi16
#define _mm256_mask_storeu_epi16 stand_in::mask_storeu_epi16
#undef _mm512_range_ps
#define _mm512_range_ps(a, b, what) stand_in::smaller_magnitude(a, b)
#define _mm512_permutexvar_ps stand_in::permutexvar_ps
#define _mm512_scalef_ps stand_in::scalef_ps

#undef STAND_IN
#pragma GCC pop_options

#endif
