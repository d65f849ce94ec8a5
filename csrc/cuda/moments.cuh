// How a thread gathers count, mean and sum of squared deviations (m2) of what streams past it.
#pragma once

#include "cuda/common.cuh"

namespace ldm_fused {

__device__ __forceinline__ float reciprocal_of_count(float count) { return reciprocal_approximate(count); }
__device__ __forceinline__ double reciprocal_of_count(double count) { return 1.0 / count; }

// Moments of kChannels channels of which a thread has seen equally much, relative to a shift that is an element of
// each: the subtraction of neighbours is nearly exact, so that a large mean costs no digits.
template <class A, int kChannels>
struct ChannelMoments {
  A count, mean[kChannels], m2[kChannels];

  __device__ __forceinline__ Moments<A> of(int c) const { return {count, mean[c], m2[c]}; }

  // Merges N vectors as a whole: it computes their mean first, then the deviations from it. 16-bit numbers are
  // centered by their mean, not by the shift: they have few digits, so that the mean of some is as good without.
  template <class X, int V, int N>
  __device__ __forceinline__ void add(const Vec<X, V> (&v)[N], const A (&shift)[kChannels]) {
    constexpr int kCount = N * V / kChannels;  // values of a channel
    constexpr bool kCentered = sizeof(X) > 2;
    constexpr int kChains = kChannels == 1 ? 4 : 1;  // sums side by side, where one would be a long chain
    A values[N][V], sum[kChannels][kChains]{};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      widen(v[i], values[i]);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const int c = kChannels == 1 ? 0 : e;
        if constexpr (kCentered) values[i][e] -= shift[c];
        sum[c][e % kChains] += values[i][e] * (A(1) / kCount);
      }
    }
    const A total = count + kCount, part = kCount * reciprocal_of_count(total), weight = part * count;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      A average = sum[c][0], squares[kChains]{};
#pragma unroll
      for (int k = 1; k < kChains; ++k) average += sum[c][k];
      squares[0] = m2[c];
#pragma unroll
      for (int i = 0; i < N; ++i) {
#pragma unroll
        for (int e = kChannels == 1 ? 0 : c; e < V; e += kChannels) {
          const A deviation = values[i][e] - average;
          squares[e % kChains] += deviation * deviation;
        }
      }
      const A delta = (kCentered ? average : average - shift[c]) - mean[c];
      mean[c] += delta * part;
      m2[c] = squares[0];
#pragma unroll
      for (int k = 1; k < kChains; ++k) m2[c] += squares[k];
      m2[c] += delta * weight * delta;
    }
    count = total;
  }

  __device__ __forceinline__ void merge(const ChannelMoments& other) {
    if (other.count == 0) return;
    const A total = count + other.count, part = other.count * reciprocal_of_count(total), weight = part * count;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const A delta = other.mean[c] - mean[c];
      mean[c] += delta * part;
      m2[c] += other.m2[c] + delta * weight * delta;
    }
    count = total;
  }
};

}  // namespace ldm_fused
