// The backward pass of one element and of the parameters: what one read and two passes have in common.
#pragma once

#include "cuda/common.cuh"

namespace ldm_fused {

// GradientSums in memory, `stride` elements from one of the two or three sums to the next.
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
struct ChannelGradient {
  ChannelAffine<A> affine;
  Projection<A> projection;
};

// dy of V consecutive elements as it comes through dropout, in the arithmetic's type.
template <class A, int V>
struct OutputGradient {
  A e[V];

  template <class Y>
  __device__ __forceinline__ OutputGradient(const Mask<A>& mask, int64_t first, const Vec<Y, V>& dy) {
#pragma unroll
    for (int i = 0; i < V; ++i) e[i] = widen(dy.e[i]);
    mask.apply(e, first);
  }
};

// dy times the activation's derivative at x.
template <bool Fast, class A>
__device__ __forceinline__ A gradient_of_affine(const ChannelAffine<A>& affine, A x, A dy, bool silu) {
  return silu ? dy * silu_slope<Fast>(affine(x)) : dy;
}

template <bool Fast, class A>
__device__ __forceinline__ void accumulate(GradientSums<A>& sums, const ChannelAffine<A>& affine, A x, A dy,
                                           bool silu) {
  const A dz = gradient_of_affine<Fast>(affine, x, dy, silu);
  sums.dz += dz;
  sums.dz_x += dz * (x - affine.center);
  sums.x += x - affine.center;
}

// dx = slope * dz - k1 - k2 * (x - center), and what reaches x by another way
template <class X, class A>
__device__ __forceinline__ X input_gradient(const ChannelGradient<A>& channel, A x, A dy, A shortcut, bool silu) {
  const auto& [affine, projection] = channel;
  const A dz = gradient_of_affine<kFast<X>>(affine, x, dy, silu);
  return narrow<X>(affine.slope * dz - projection.k1 - projection.k2 * (x - affine.center) + shortcut);
}

constexpr int kChannelsAbreast = 32, kSamplesAbreast = 8;  // threads of a block

// Small: a row of threads walks every kSamplesAbreast-th sample, a thread a channel; then the rows are added up in
// their order.
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
