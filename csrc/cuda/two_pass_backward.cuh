// GroupNorm and activation, backward: sums, merge, input gradient, parameter gradients.
//
// Memory passes: x and dy twice, dx once (5 B, where 3 B is the limit; the second pass starts on what L2 still holds),
// and the shortcut's gradient, if there is one, once.
// Nothing of the tensor's size was kept by the forward pass but x itself: the activation is computed again.
//
// Three sums a channel (GradientSums) give dx and the gradients of all parameters. For a tensor that is cut in parts
// they are launched apart from what follows of them.
#pragma once

#include "cuda/gradients.cuh"
#include "cuda/two_pass.cuh"

namespace ldm_fused {

template <class A>
__device__ __forceinline__ ChannelGradient<A> load_channel(const BackwardParams& p, int64_t n, int64_t c) {
  return {load_affine<A>(p, n, c), static_cast<const Projection<A>*>(p.projections)[p.shape.group(n, c)]};
}

template <class A>
__device__ __forceinline__ A* partial_sums(const BackwardParams& p, int64_t index) {
  return static_cast<A*>(p.partials) + index * p.sums;
}

// Reads x and dy once; writes the sums of a channel and chunk. With no number of blocks given, ptxas aims at 64
// registers in float64 on sm_110, and spills.
template <class X, class Y, int V>
__global__ void __launch_bounds__(kThreads, sizeof(X) == 8 ? 1 : 0) sums_rows(BackwardParams p) {
  using A = Accumulate<X>;
  const Unit unit = row_unit(p.shape, p.reduce);
  GradientSums<A> sums[1]{};
  if (unit.exists) {
    const X* x = static_cast<const X*>(p.x) + unit.first;
    const Y* dy = static_cast<const Y*>(p.dy) + unit.first;
    const ChannelAffine<A> affine[1] = {load_affine<A>(p, unit.n, unit.c)};
    const Mask<A> mask(p.dropout);
    stream<V>(unit, 1, x, dy, [&](int64_t at, const Vec<X, V>& vx, const Vec<Y, V>& vdy) {
      A dz[V];
      add_vector<kFast<X>>(sums, mask, unit.first + at, p.silu, p.sums == 3, affine, vx, vdy, dz);
    });
  }
  const GradientSums<A> chunk = team_reduce(sums[0], p.reduce.team);
  if (unit.exists && threadIdx.x % p.reduce.team == 0) {
    store_sums(partial_sums<A>(p, partial_index(p.shape, p.reduce, unit.n, unit.c, unit.chunk)), 1, p.sums, chunk);
  }
}

// Reads x and dy once; writes the sums of a channel and chunk.
template <class X, class Y, int V>
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast) sums_columns(BackwardParams p) {
  using A = Accumulate<X>;
  const Unit unit = column_unit(p.shape, p.reduce);
  const X* x = static_cast<const X*>(p.x) + unit.first;
  const Y* dy = static_cast<const Y*>(p.dy) + unit.first;
  ChannelAffine<A> affine[V];
  GradientSums<A> sums[V]{};
  share_columns(p.shape, affine, [&](int64_t c) { return load_affine<A>(p, unit.n, c); });
  const Mask<A> mask(p.dropout);
  stream<V>(unit, p.shape.channels, x, dy, [&](int64_t at, const Vec<X, V>& vx, const Vec<Y, V>& vdy) {
    A dz[V];
    add_vector<kFast<X>>(sums, mask, unit.first + at, p.silu, p.sums == 3, affine, vx, vdy, dz);
  });

  using SumRows = BlockValues<GradientSums<A>, V>;
  LDM_FUSED_SHARED(SumRows, rows);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int e = 0; e < V; ++e) rows[e][thread] = sums[e];
  merge_rows(rows);
  if (unit.exists && threadIdx.y == 0) {
    const int64_t first = partial_index(p.shape, p.reduce, unit.n, unit.c, unit.chunk);
#pragma unroll
    for (int e = 0; e < V; ++e) store_sums(partial_sums<A>(p, first + e), 1, p.sums, rows[e][thread]);
  }
}

// A small kernel: a block a group. A warp adds up the chunks of a channel, and the block adds up its channels. It
// writes the totals of each channel and the group's k1 and k2.
template <class A>
__global__ void __launch_bounds__(kThreads) merge_sums(BackwardParams p) {
  const uint32_t n = blockIdx.x / uint32_t(p.shape.groups), g = blockIdx.x % uint32_t(p.shape.groups);
  const int64_t channels = p.shape.channels_per_group();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  GradientSums<A> group{};
  for (int64_t i = warp; i < channels; i += kThreads / 32) {
    const int64_t c = g * channels + i;
    GradientSums<A> channel{};
    for (int64_t k = lane; k < p.reduce.chunks; k += 32) {
      channel.merge(load_sums<A>(partial_sums<A>(p, partial_index(p.shape, p.reduce, n, c, k)), 1, p.sums));
    }
    channel = team_reduce(channel, 32);
    if (lane == 0) {
      store_sums(static_cast<A*>(p.totals) + n * p.shape.channels + c, p.shape.rows(), p.sums, channel);
      const A gain = p.affine.weight.load<A>(n, c, 1) * (A(1) + p.affine.scale.load<A>(n, c, 0));
      group.merge({gain * channel.dz, gain * channel.dz_x, A(0)});
    }
  }
  group = team_reduce(group, kThreads);
  if (threadIdx.x == 0) {
    const A rstd = static_cast<const A*>(p.rstd)[blockIdx.x];
    const A count = A(channels) * A(p.shape.spatial);
    static_cast<Projection<A>*>(p.projections)[blockIdx.x] = {rstd * (group.dz / count),
                                                              (group.dz_x / count) * rstd * rstd * rstd};
  }
}

// Reads x, dy and the shortcut's gradient once, writes dx once.
template <class X, class Y, int V>
__global__ void __launch_bounds__(kThreads) input_gradient_rows(BackwardParams p) {
  using A = Accumulate<X>;
  const Unit unit = row_unit(p.shape, p.apply, /*reverse=*/true);
  if (!unit.exists) return;
  const X* x = static_cast<const X*>(p.x) + unit.first;
  const Y* dy = static_cast<const Y*>(p.dy) + unit.first;
  const X* shortcut = p.shortcut ? static_cast<const X*>(p.shortcut) + unit.first : nullptr;
  X* dx = static_cast<X*>(p.dx) + unit.first;
  const ChannelGradient<A> channel[1] = {load_channel<A>(p, unit.n, unit.c)};
  const Mask<A> mask(p.dropout);
  stream<V>(unit, 1, x, dy, shortcut, [&](int64_t at, const Vec<X, V>& vx, const Vec<Y, V>& vdy, const Vec<X, V>& add) {
    store(dx + at, input_gradient(mask, unit.first + at, p.silu, channel, vx, vdy, add, shortcut != nullptr));
  });
}

// Reads x, dy and the shortcut's gradient once, writes dx once.
template <class X, class Y, int V>
__global__ void __launch_bounds__(kThreads) input_gradient_columns(BackwardParams p) {
  using A = Accumulate<X>;
  const Unit unit = column_unit(p.shape, p.apply, /*reverse=*/true);
  const X* x = static_cast<const X*>(p.x) + unit.first;
  const Y* dy = static_cast<const Y*>(p.dy) + unit.first;
  const X* shortcut = p.shortcut ? static_cast<const X*>(p.shortcut) + unit.first : nullptr;
  X* dx = static_cast<X*>(p.dx) + unit.first;
  ChannelGradient<A> channel[V];
  share_columns(p.shape, channel, [&](int64_t c) { return load_channel<A>(p, unit.n, c); });
  const Mask<A> mask(p.dropout);
  stream<V>(unit, p.shape.channels, x, dy, shortcut,
            [&](int64_t at, const Vec<X, V>& vx, const Vec<Y, V>& vdy, const Vec<X, V>& add) {
              store(dx + at, input_gradient(mask, unit.first + at, p.silu, channel, vx, vdy, add, shortcut != nullptr));
            });
}

// ---- Launching ------------------------------------------------------------------------------------------------

// All for a tensor that is not empty, asynchronously on `stream`.

inline cudaError_t launch_sums(const BackwardParams& p, cudaStream_t stream) {
  return dispatch_pair(p.x_dtype, p.dy_dtype, [&](auto x_type, auto dy_type) {
    using X = decltype(x_type);
    using Y = decltype(dy_type);
    using A = Accumulate<X>;
    constexpr int V = vector_of(sizeof(X) < sizeof(Y) ? sizeof(X) : sizeof(Y));
    if (const cudaError_t error = launch_tiled(p.reduce, sizeof(ChannelAffine<A>), p, stream, sums_rows<X, Y, V>,
                                               sums_rows<X, Y, 1>, sums_columns<X, Y, V>, sums_columns<X, Y, 1>)) {
      return error;
    }
    const dim3 groups(unsigned(p.shape.batch * p.shape.groups));
    return launch(merge_sums<A>, groups, kThreads, stream, p);
  });
}

inline cudaError_t launch_gradients(const BackwardParams& p, cudaStream_t stream) {
  return dispatch_pair(p.x_dtype, p.dy_dtype, [&](auto x_type, auto dy_type) {
    using X = decltype(x_type);
    using Y = decltype(dy_type);
    using A = Accumulate<X>;
    constexpr int V = vector_of(sizeof(X) < sizeof(Y) ? sizeof(X) : sizeof(Y));
    if (const cudaError_t error = launch_parameter_gradients<A>(p, stream)) return error;
    if (p.dx == nullptr) return cudaSuccess;
    return launch_tiled(p.apply, sizeof(ChannelGradient<A>), p, stream, input_gradient_rows<X, Y, V>,
                        input_gradient_rows<X, Y, 1>, input_gradient_columns<X, Y, V>, input_gradient_columns<X, Y, 1>);
  });
}

inline cudaError_t launch_two_pass_backward(const BackwardParams& p, cudaStream_t stream) {
  const cudaError_t error = launch_sums(p, stream);
  return error ? error : launch_gradients(p, stream);
}

}  // namespace ldm_fused
