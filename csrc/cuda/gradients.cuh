// The gradients of one element and of the parameters, which one read and two passes compute alike.
#pragma once

#include "cuda/common.cuh"

namespace ldm_fused {

// GradientSums lie in memory as two or three sums, `stride` elements apart.
template <class A>
__device__ __forceinline__ GradientSums<A> load_sums(const A* at, int64_t stride, int sums) {
  return {at[0], at[stride], sums == 3 ? at[2 * stride] : A(0)};
}

template <class A>
__device__ __forceinline__ void store_sums(A* at, int64_t stride, int sums, const GradientSums<A>& value) {
  at[0] = value.dz;
  at[stride] = value.dz_x;
  if (sums == 3) at[2 * stride] = value.x;
}

// What the input gradient needs to know of a channel.
template <class A>
struct ChannelGradient : ChannelAffine<A> {
  Projection<A> projection;
};

// Computes dz, the gradient of the activation's input: dropout's gradient of dy, times the activation's derivative at
// u, which is affine in x - center. There is one channel for all elements (rows), or one for each (columns).
template <bool Fast, class Y, int V, class Channel, int kChannels, class A>
__device__ __forceinline__ void activation_gradient(const Mask<A>& mask, int64_t first, bool silu, const Vec<Y, V>& dy,
                                                    const Channel (&channel)[kChannels], const A (&centered)[V],
                                                    A (&dz)[V]) {
  widen(dy, dz);
  mask.apply(dz, first);
  A u[V];
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const Channel& own = channel[kChannels == 1 ? 0 : e];
    u[e] = centered[e] * own.slope + own.offset;
  }
  multiply_by_slope<Fast>(dz, u, silu);
}

// x - center of V elements.
template <class X, int V, class Channel, int kChannels, class A>
__device__ __forceinline__ void center(const Vec<X, V>& x, const Channel (&channel)[kChannels], A (&values)[V]) {
  widen(x, values);
#pragma unroll
  for (int e = 0; e < V; ++e) values[e] -= channel[kChannels == 1 ? 0 : e].center;
}

// Adds V elements to the sums. Few callers want the third one.
template <int V, int kSums, class A>
__device__ __forceinline__ void accumulate(GradientSums<A> (&sums)[kSums], const A (&centered)[V], const A (&dz)[V],
                                           bool of_x) {
#pragma unroll
  for (int e = 0; e < V; ++e) {
    sums[e % kSums].dz += dz[e];
    sums[e % kSums].dz_x += dz[e] * centered[e];
  }
  if (!of_x) return;
#pragma unroll
  for (int e = 0; e < V; ++e) sums[e % kSums].x += centered[e];
}

// Adds a vector to the sums, and leaves the gradient of the activation's input in dz.
template <bool Fast, class X, class Y, int V, class Channel, int kChannels, int kSums, class A>
__device__ __forceinline__ void add_vector(GradientSums<A> (&sums)[kSums], const Mask<A>& mask, int64_t first,
                                           bool silu, bool of_x, const Channel (&channel)[kChannels],
                                           const Vec<X, V>& x, const Vec<Y, V>& dy, A (&dz)[V]) {
  A centered[V];
  center(x, channel, centered);
  activation_gradient<Fast>(mask, first, silu, dy, channel, centered, dz);
  accumulate(sums, centered, dz, of_x);
}

// dx = slope * dz - k1 - k2 * (x - center), plus the shortcut's gradient if there is one.
template <class X, int V, int kChannels, class A>
__device__ __forceinline__ Vec<X, V> input_gradient(const ChannelGradient<A> (&channel)[kChannels],
                                                    const A (&centered)[V], const A (&dz)[V], const Vec<X, V>& shortcut,
                                                    bool has_shortcut) {
  A dx[V];
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const ChannelGradient<A>& own = channel[kChannels == 1 ? 0 : e];
    dx[e] = own.slope * dz[e] - own.projection.k1 - own.projection.k2 * centered[e];
  }
  if (has_shortcut) {
    A other[V];
    widen(shortcut, other);
#pragma unroll
    for (int e = 0; e < V; ++e) dx[e] += other[e];
  }
  return narrow<X, V>(dx);
}

template <class X, class Y, int V, int kChannels, class A>
__device__ __forceinline__ Vec<X, V> input_gradient(const Mask<A>& mask, int64_t first, bool silu,
                                                    const ChannelGradient<A> (&channel)[kChannels], const Vec<X, V>& x,
                                                    const Vec<Y, V>& dy, const Vec<X, V>& shortcut, bool has_shortcut) {
  A centered[V], dz[V];
  center(x, channel, centered);
  activation_gradient<kFast<X>>(mask, first, silu, dy, channel, centered, dz);
  return input_gradient(channel, centered, dz, shortcut, has_shortcut);
}

constexpr int kChannelsAbreast = 32, kSamplesAbreast = 8;  // threads of a block

// A small kernel: a row of threads walks every kSamplesAbreast-th sample, a thread a channel; then the rows are added
// up in their order.
template <class A>
__global__ void __launch_bounds__(kChannelsAbreast* kSamplesAbreast) parameter_gradients(BackwardParams p) {
  const int64_t c = int64_t(blockIdx.x) * kChannelsAbreast + threadIdx.x;
  ParameterGradients<A> sum{};
  for (int64_t n = threadIdx.y; n < p.shape.batch && c < p.shape.channels; n += kSamplesAbreast) {
    const int64_t group = p.shape.group(n, c);
    Projection<A> projection{};
    if (p.gradients.pre_bias.data) projection = static_cast<const Projection<A>*>(p.projections)[group];
    sum.add(p.affine, p.gradients, p.shape, n, c, static_cast<const A*>(p.rstd)[group], projection,
            load_sums(static_cast<const A*>(p.totals) + n * p.shape.channels + c, p.shape.rows(), p.sums));
  }
  using Sums = ParameterGradients<A>[kSamplesAbreast][kChannelsAbreast];
  LDM_FUSED_SHARED(Sums, sums);
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && c < p.shape.channels) {
    for (int row = 1; row < kSamplesAbreast; ++row) sum.merge(sums[row][threadIdx.x]);
    sum.store(p.gradients, c);
  }
}

template <class A>
cudaError_t launch_parameter_gradients(const BackwardParams& p, cudaStream_t stream) {
  if (!p.gradients.any()) return cudaSuccess;
  const dim3 grid(unsigned(ceil_div(p.shape.channels, kChannelsAbreast)));
  return launch(parameter_gradients<A>, grid, dim3(kChannelsAbreast, kSamplesAbreast), stream, p);
}

}  // namespace ldm_fused
