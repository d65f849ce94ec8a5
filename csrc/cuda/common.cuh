// What all kernels share: vector accesses, activation, reductions and launching.
#pragma once

#include <cuda_runtime.h>

#include "cuda/params.h"
#include "cuda/ptx.cuh"

// Where each block keeps a T of its own; the emulator has another way.
#ifndef LDM_FUSED_SHARED
#define LDM_FUSED_SHARED(T, name) __shared__ T name
#define LDM_FUSED_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char ldm_fused_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(ldm_fused_dynamic_shared)
#endif

namespace ldm_fused {

// ---- Memory ---------------------------------------------------------------------------------------------------

// V consecutive elements, moved in accesses of 16 bytes.
template <class T, int V>
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Vec {
  T e[V];
};

template <class T, int V>
__device__ __forceinline__ Vec<T, V> load(const T* from) {
  return *reinterpret_cast<const Vec<T, V>*>(from);
}

template <class T, int V>
__device__ __forceinline__ void store(T* to, const Vec<T, V>& v) {
  if constexpr (sizeof(v) % 16 == 0) {
    uint4 words[sizeof(v) / 16];
    memcpy(words, &v, sizeof(v));
#pragma unroll
    for (int i = 0; i < int(sizeof(v) / 16); ++i) store_16_bytes(reinterpret_cast<uint4*>(to) + i, words[i]);
  } else {
    *reinterpret_cast<Vec<T, V>*>(to) = v;
  }
}

// V elements in the arithmetic's type. Two of 16 bits lie in one word: their bits are moved once.
template <class T, int V>
__device__ __forceinline__ void widen(const Vec<T, V>& v, Accumulate<T> (&values)[V]) {
  if constexpr (sizeof(T) == 2 && V % 2 == 0) {
    uint32_t words[V / 2];
    memcpy(words, &v, sizeof v);
#pragma unroll
    for (int i = 0; i < V / 2; ++i) widen_pair<T>(words[i], values[2 * i], values[2 * i + 1]);
  } else {
#pragma unroll
    for (int e = 0; e < V; ++e) values[e] = widen(v.e[e]);
  }
}

template <class T, int V>
__device__ __forceinline__ Vec<T, V> narrow(const Accumulate<T> (&values)[V]) {
  Vec<T, V> v;
  if constexpr (sizeof(T) == 2 && V % 2 == 0) {
    uint32_t words[V / 2];
#pragma unroll
    for (int i = 0; i < V / 2; ++i) words[i] = narrow_pair<T>(values[2 * i], values[2 * i + 1]);
    memcpy(&v, words, sizeof v);
  } else {
#pragma unroll
    for (int e = 0; e < V; ++e) v.e[e] = narrow<T>(values[e]);
  }
  return v;
}

// ---- Activation -----------------------------------------------------------------------------------------------

template <class T>
constexpr bool kFast = sizeof(T) == 2;

// Fast: the approximate exponential and reciprocal err by a few units in the last place of float, below the rounding of
// 16 bits. Otherwise a Newton step makes the reciprocal accurate; a division would branch.
template <bool Fast>
__device__ __forceinline__ float sigmoid(float u) {
  if constexpr (Fast) return reciprocal_approximate(1.0f + exp2_approximate(-1.44269504f * u));
  const float divisor = fminf(1.0f + expf(-u), 3.402823466e38f);  // infinity times its reciprocal would be NaN
  const float estimate = reciprocal_approximate(divisor);
  return fmaf(estimate, fmaf(-divisor, estimate, 1.0f), estimate);
}

template <bool Fast>
__device__ __forceinline__ double sigmoid(double u) {
  return 1.0 / (1.0 + exp(-u));
}

// One branch for all values: their exponentials run side by side.
template <bool Fast, int V, class A>
__device__ __forceinline__ void activate(A (&u)[V], bool silu) {
  if (!silu) return;
#pragma unroll
  for (int e = 0; e < V; ++e) u[e] *= sigmoid<Fast>(u[e]);
}

// Multiplies the gradients of the activation's results by its derivative at u, s + s u (1 - s) with s = sigmoid(u).
template <bool Fast, int V, class A>
__device__ __forceinline__ void multiply_by_slope(A (&gradients)[V], const A (&u)[V], bool silu) {
  if (!silu) return;
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const A s = sigmoid<Fast>(u[e]);
    gradients[e] *= s + s * (u[e] - s * u[e]);
  }
}

// ---- Dropout --------------------------------------------------------------------------------------------------

// What dropout keeps, for a thread that has read the seed.
template <class A>
class Mask {
 public:
  __device__ __forceinline__ explicit Mask(const Dropout& dropout)
      : is_on_(dropout.seed != nullptr),
        keep_below_(dropout.keep_below),
        seed_(is_on_ ? uint64_t(*dropout.seed) : 0),
        scale_(dropout.scale_as<A>()) {}

  // Multiplies V consecutive values by their factors; the place of the first in the tensor's memory is a multiple of V.
  template <int V>
  __device__ __forceinline__ void apply(A (&values)[V], int64_t first) const {
    if (!is_on_) return;
    static_assert(V <= kElementsPerCounter, "a vector's random bits come from one counter");
    const RandomBits bits = random_bits(seed_, uint64_t(first) / kElementsPerCounter);
    const int offset = V == kElementsPerCounter ? 0 : int(first % kElementsPerCounter);
#pragma unroll
    for (int e = 0; e < V; ++e) values[e] *= bits.of(offset + e) < keep_below_ ? scale_ : A(0);
  }

 private:
  bool is_on_;
  uint32_t keep_below_;
  uint64_t seed_;
  A scale_;
};

// What is stored of V consecutive elements that the activation takes.
template <class Y, int V, class A>
__device__ __forceinline__ Vec<Y, V> activated(const Mask<A>& mask, int64_t first, bool silu, A (&u)[V]) {
  activate<kFast<Y>>(u, silu);
  mask.apply(u, first);
  return narrow<Y, V>(u);
}

// ---- Reductions -----------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ T shuffle_down(const T& value, int offset, int width) {
  constexpr int kWords = sizeof(T) / 4;
  uint32_t words[kWords];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_down_sync(0xffffffffu, words[i], offset, width);
  T result;
  memcpy(&result, words, sizeof(T));
  return result;
}

// Merges the values of neighbouring lanes, a power of two of them, in a fixed order; the result is the first one's. All
// lanes of the warp must call it.
template <class T>
__device__ __forceinline__ T lanes_reduce(T value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) value.merge(shuffle_down(value, offset, lanes));
  return value;
}

// ---- Launching ------------------------------------------------------------------------------------------------

// Of four kernels that do the same, the one that walks columns or rows, and does it the one way or the other.
template <class Kernel>
Kernel* choose(bool columns, bool other, Kernel* rows, Kernel* other_rows, Kernel* of_columns, Kernel* other_columns) {
  return columns ? (other ? other_columns : of_columns) : (other ? other_rows : rows);
}

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, cudaStream_t stream, const Params& params,
                   size_t shared_bytes = 0) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace ldm_fused
