// Stands in for the CUDA toolkit's header of this name, so that a host compiler builds kernels and their launches.
// Kernels run when they are launched, on the CPU; streams are ignored.
//
// Float atomics are missing on purpose: their order, and with it the result's last bits, would not be defined.
#pragma once

// The C and C++ libraries come first: their own attributes contain the word __noinline__.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <cmath>
#include <memory>
#include <type_traits>
#include <utility>

#include "machine.h"
#include "runtime.h"

// ---- Language -------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))

// Kernels declare shared memory by these: a static variable would not be a block's own.
#define LDM_FUSED_SHARED(T, name) \
  static char name##_variable;    \
  T& name = *static_cast<T*>(emulator::shared(&name##_variable, sizeof(T), alignof(T)))
#define LDM_FUSED_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(emulator::dynamic_shared())

inline const uint3& threadIdx = emulator::indices.thread;
inline const uint3& blockIdx = emulator::indices.block;
inline const dim3& blockDim = emulator::indices.block_dim;
inline const dim3& gridDim = emulator::indices.grid_dim;
inline constexpr int warpSize = emulator::kWarpSize;

[[noreturn]] inline void __trap() { emulator::fail("__trap()"); }

namespace emulator {

// The compiler's callbacks see a misaligned access too. Builds without them would not notice what faults on a GPU.
template <class T>
T* aligned(T* address) {
  check_alignment(address, alignof(T));
  return address;
}

}  // namespace emulator

// ---- Barriers, votes, shuffles ----------------------------------------------------------------------------------

inline void __syncthreads(emulator::Site site = emulator::Site::here()) { emulator::wait({"__syncthreads", site}); }
inline int __syncthreads_count(int predicate, emulator::Site site = emulator::Site::here()) {
  return int(emulator::wait({"__syncthreads_count", site, emulator::Scope::block, ~0u, uint64_t(predicate != 0)}));
}
inline int __syncthreads_or(int predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::wait({"__syncthreads_or", site, emulator::Scope::block, ~0u, uint64_t(predicate != 0)}) != 0;
}
inline int __syncthreads_and(int predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::wait({"__syncthreads_and", site, emulator::Scope::block, ~0u, uint64_t(predicate == 0)}) == 0;
}

namespace emulator {

// The aligned part of a warp that a shuffle stays in.
struct Segment {
  unsigned lane, first, last;

  explicit Segment(int width) : lane(emulator::lane()) {
    if (width < 1 || width > warpSize || (width & (width - 1))) fail("a shuffle's width is %d", width);
    first = lane & ~unsigned(width - 1);
    last = first + width - 1;
  }
};

inline uint64_t warp_wait(const char* name, Site site, unsigned mask, uint64_t value = 0,
                          unsigned source = Call::kNoSource) {
  if (mask == 0) fail("%s at %s:%d names no lane", name, site.file, site.line);
  return wait({name, site, Scope::warp, mask, value, source});
}

template <class T>
T shuffle(const char* name, Site site, unsigned mask, T value, unsigned source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = warp_wait(name, site, mask, bits, source);
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize, emulator::Site site = emulator::Site::here()) {
  const emulator::Segment s(width);
  return emulator::shuffle("__shfl_sync", site, mask, value, s.first + (lane & (width - 1)));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = warpSize,
                 emulator::Site site = emulator::Site::here()) {
  const emulator::Segment s(width);
  return emulator::shuffle("__shfl_up_sync", site, mask, value, s.lane - s.first < by ? s.lane : s.lane - by);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = warpSize,
                   emulator::Site site = emulator::Site::here()) {
  const emulator::Segment s(width);
  return emulator::shuffle("__shfl_down_sync", site, mask, value, s.last - s.lane < by ? s.lane : s.lane + by);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, int width = warpSize, emulator::Site site = emulator::Site::here()) {
  const emulator::Segment s(width);
  const unsigned source = s.lane ^ unsigned(by);  // an earlier segment may be read, a later one not
  return emulator::shuffle("__shfl_xor_sync", site, mask, value, source > s.last ? s.lane : source);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
  return unsigned(emulator::warp_wait("__ballot_sync", site, mask, predicate != 0));
}
inline int __any_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::warp_wait("__any_sync", site, mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
  return emulator::warp_wait("__all_sync", site, mask, predicate == 0) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, emulator::Site site = emulator::Site::here()) {
  emulator::warp_wait("__syncwarp", site, mask);
}
inline unsigned __activemask() { return emulator::living_lanes(); }

// ---- Memory ---------------------------------------------------------------------------------------------------

// Caches are not emulated.
template <class T>
T __ldg(const T* from) {
  return *emulator::aligned(from);
}
template <class T>
T __ldcg(const T* from) {
  return *emulator::aligned(from);
}
template <class T>
T __ldcs(const T* from) {
  return *emulator::aligned(from);
}
template <class T>  // T comes from the pointer alone: common_type_t<T> is not deduced
void __stcs(T* to, std::common_type_t<T> value) {
  *emulator::aligned(to) = value;
}

inline void __threadfence() { emulator::fence(); }
inline void __nanosleep(unsigned) { emulator::yield(); }

namespace emulator {

// All atomics: stores f(old) and returns old.
template <class T, class F>
__attribute__((no_sanitize("thread"))) T atomic(T* address, F f) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "atomics take 4 or 8 byte integers");
  atomic_access(address, sizeof(T));
  const T old = *address;
  *address = f(old);
  return old;
}

}  // namespace emulator

template <class T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  return emulator::atomic(address, [=](T old) { return T(uint64_t(old) + uint64_t(value)); });
}
template <class T>
T atomicExch(T* address, std::common_type_t<T> value) {
  return emulator::atomic(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, std::common_type_t<T> compare, std::common_type_t<T> value) {
  return emulator::atomic(address, [=](T old) { return old == compare ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return emulator::atomic(address, [=](unsigned old) { return old >= last ? 0 : old + 1; });
}

// ---- Mathematics ----------------------------------------------------------------------------------------------

// C linkage, because glibc declares some of these names (__expf, and rsqrt since 2.42) so. The fast functions keep
// what matters of the hardware's: __expf rounds x * log2(e), and __fdividef gives 0 for a large divisor.
extern "C" {
inline float __expf(float x) noexcept { return exp2f(x * 1.44269504f); }
inline float __fdividef(float x, float y) noexcept {
  const bool large = fabsf(y) > 0x1p126f && !isinf(y);
  return large ? x * 0.0f : x / y;
}
inline float __frcp_rn(float x) noexcept { return 1.0f / x; }
inline float rsqrtf(float x) noexcept { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) noexcept { return 1.0 / sqrt(x); }
}
inline float rsqrt(float x) { return rsqrtf(x); }

namespace emulator {

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace emulator

inline unsigned __float_as_uint(float x) { return emulator::bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits<float>(x); }
inline int __float_as_int(float x) { return emulator::bits<int>(x); }
inline float __int_as_float(int x) { return emulator::bits<float>(x); }

// They take numbers of any two types; of a NaN and a number they give the number.
template <class A, class B, class T = std::common_type_t<std::enable_if_t<std::is_arithmetic_v<A>, A>, B>>
T min(A a, B b) {
  if constexpr (std::is_floating_point_v<T>)
    return std::fmin(T(a), T(b));
  else
    return T(a) < T(b) ? T(a) : T(b);
}
template <class A, class B, class T = std::common_type_t<std::enable_if_t<std::is_arithmetic_v<A>, A>, B>>
T max(A a, B b) {
  if constexpr (std::is_floating_point_v<T>)
    return std::fmax(T(a), T(b));
  else
    return T(a) < T(b) ? T(b) : T(a);
}
