// What all kernels share: vector accesses, activation, reductions and launching.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "cuda/params.h"
#include "problem.h"

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

// Left to itself nvcc splits some vector stores into their elements: 16 bytes are stored by one instruction.
__device__ __forceinline__ void store_16_bytes(void* to, uint4 words) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words.x),
               "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
#else
  *static_cast<uint4*>(to) = words;
#endif
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

// ---- Activation -----------------------------------------------------------------------------------------------

// The fast exponential and division err by a few units in the last place of float: below the rounding of 16 bits, and
// for results kept in float32 the accurate ones are used.
template <bool Fast>
__device__ __forceinline__ float sigmoid(float u) {
  if constexpr (Fast) return __fdividef(1.0f, 1.0f + __expf(-u));
  return 1.0f / (1.0f + expf(-u));
}

template <bool Fast>
__device__ __forceinline__ double sigmoid(double u) {
  return 1.0 / (1.0 + exp(-u));
}

template <class T>
constexpr bool kFast = sizeof(T) == 2;

// d/du (u * sigmoid(u))
template <bool Fast, class A>
__device__ __forceinline__ A silu_slope(A u) {
  const A s = sigmoid<Fast>(u);
  return s * (A(1) + u * (A(1) - s));
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
        scale_(A(dropout.scale)) {}

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

// What is stored of V consecutive elements, of which u(e) is what the activation takes.
template <class Y, int V, class A, class F>
__device__ __forceinline__ Vec<Y, V> activated(const Mask<A>& mask, int64_t first, bool silu, F&& u) {
  A values[V];
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const A value = u(e);
    values[e] = silu ? value * sigmoid<kFast<Y>>(value) : value;
  }
  mask.apply(values, first);
  Vec<Y, V> out;
#pragma unroll
  for (int e = 0; e < V; ++e) out.e[e] = narrow<Y>(values[e]);
  return out;
}

// ---- Reductions -----------------------------------------------------------------------------------------------

// Count, mean and sum of squared deviations, merged as Chan, Golub and LeVeque (1979) do: no E[x^2] - E[x]^2 that
// would cancel, and no sum of x that would overflow before x does.
template <class A>
struct Moments {
  A count, mean, m2;

  __device__ void merge(const Moments& other) {
    if (other.count == A(0)) return;
    const A total = count + other.count;
    const A part = other.count / total;
    const A delta = other.mean - mean;
    mean += delta * part;
    m2 += other.m2 + (delta * part) * (delta * count);  // not delta^2: infinity times an empty count would be NaN
    count = total;
  }
};

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

// Calls f with a value of the storage type of each dtype; only the pairs that the ops accept are compiled: the same
// type twice, or float with a 16-bit type.
template <class F>
cudaError_t dispatch_pair(Dtype x, Dtype y, F&& f) {
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
  return cudaErrorInvalidValue;
}

}  // namespace ldm_fused
