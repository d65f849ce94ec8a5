// GroupNorm and activation, forward: statistics, merge, apply.
//
// Memory passes over x: two reads and one write (3 B, where 2 B is the limit; what L2 still holds of the first pass is
// read from there). Parallel over channels and chunks of them, so that batch 1 with 32 groups fills the chip.
//
// For a tensor that is cut in parts the two passes are launched apart: the first leaves the moments of each group, the
// second begins by merging those of all parts.
#pragma once

#include "cuda/moments.cuh"
#include "cuda/two_pass.cuh"

namespace ldm_fused {

// Reads x once; writes one pair a channel and chunk.
template <class X, int V>
__global__ void __launch_bounds__(kThreads) statistics_rows(ForwardParams p) {
  using A = Accumulate<X>;
  const Unit unit = row_unit(p.shape, p.reduce);
  ChannelMoments<A, 1> moments{};
  A shift[1]{};
  if (unit.exists) {
    const X* x = static_cast<const X*>(p.x) + unit.first;
    shift[0] = widen(x[unit.chunk * p.reduce.chunk]);
    int64_t i = unit.begin;
    for (; i + (kVectorsInFlight - 1) * unit.step < unit.end; i += kVectorsInFlight * unit.step) {
      Vec<X, V> v[kVectorsInFlight];
#pragma unroll
      for (int k = 0; k < kVectorsInFlight; ++k) v[k] = load<X, V>(x + i + k * unit.step);
      moments.add(v, shift);
    }
    for (; i < unit.end; i += unit.step) {
      const Vec<X, V> v[1] = {load<X, V>(x + i)};
      moments.add(v, shift);
    }
  }
  const Moments<A> chunk = team_reduce(moments.of(0), p.reduce.team);
  if (unit.exists && threadIdx.x % p.reduce.team == 0) {
    A* partial = static_cast<A*>(p.partials) + 2 * partial_index(p.shape, p.reduce, unit.n, unit.c, unit.chunk);
    partial[0] = chunk.mean + shift[0];
    partial[1] = chunk.m2;
  }
}

// Reads x once; writes one pair a channel and chunk.
template <class X, int V>
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast) statistics_columns(ForwardParams p) {
  using A = Accumulate<X>;
  constexpr int kInFlight = sizeof(A) == 8 ? kVectorsInFlight / 2 : kVectorsInFlight;  // double's division is a call
  const Unit unit = column_unit(p.shape, p.reduce);
  const X* x = static_cast<const X*>(p.x) + unit.first;
  A shift[V];
  const X* first = x - unit.c + unit.chunk * p.reduce.chunk * p.shape.channels;
  share_columns(p.shape, shift, [&](int64_t c) { return A(widen(first[c])); });
  ChannelMoments<A, V> moments{};
  int64_t pixel = unit.begin;
  for (; pixel + (kInFlight - 1) * unit.step < unit.end; pixel += kInFlight * unit.step) {
    Vec<X, V> v[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) v[k] = load<X, V>(x + (pixel + k * unit.step) * p.shape.channels);
    moments.add(v, shift);
  }
  for (; pixel < unit.end; pixel += unit.step) {
    const Vec<X, V> v[1] = {load<X, V>(x + pixel * p.shape.channels)};
    moments.add(v, shift);
  }

  using MomentRows = BlockValues<Moments<A>, V>;
  LDM_FUSED_SHARED(MomentRows, rows);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int e = 0; e < V; ++e) rows[e][thread] = moments.of(e);
  merge_rows(rows);
  if (unit.exists && threadIdx.y == 0) {
    A* partial = static_cast<A*>(p.partials) + 2 * partial_index(p.shape, p.reduce, unit.n, unit.c, unit.chunk);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      partial[2 * e] = rows[e][thread].mean + shift[e];
      partial[2 * e + 1] = rows[e][thread].m2;
    }
  }
}

// Writes what is wanted of a group's moments: themselves, or mean and rstd.
template <class A>
__device__ __forceinline__ void keep_moments(const ForwardParams& p, int64_t group, const Moments<A>& found) {
  if (p.moments != nullptr) {
    const int64_t groups = p.shape.batch * p.shape.groups;
    A* const moments = static_cast<A*>(p.moments) + group;
    moments[0] = found.count;
    moments[groups] = found.mean;
    moments[2 * groups] = found.m2;
  } else {
    static_cast<A*>(p.mean)[group] = found.mean;
    static_cast<A*>(p.rstd)[group] = A(1) / sqrt(found.m2 / found.count + A(p.eps));
  }
}

// A small kernel: a block merges the partial moments of a group's channels and chunks, in a fixed order.
template <class A>
__global__ void __launch_bounds__(kThreads) merge_statistics(ForwardParams p) {
  const uint32_t n = blockIdx.x / uint32_t(p.shape.groups), g = blockIdx.x % uint32_t(p.shape.groups);
  const uint32_t channels = p.shape.channels_per_group(), chunks = uint32_t(p.reduce.chunks);
  const int64_t c0 = int64_t(g) * channels;
  const A* partials = static_cast<const A*>(p.partials);
  const A shift = partials[2 * partial_index(p.shape, p.reduce, n, c0, 0)];
  Moments<A> moments{};
  for (uint32_t i = threadIdx.x; i < channels * chunks; i += blockDim.x) {
    const uint32_t c = p.reduce.columns ? i % channels : i / chunks;
    const uint32_t k = p.reduce.columns ? i / channels : i % chunks;
    const A* partial = partials + 2 * partial_index(p.shape, p.reduce, n, c0 + c, k);
    const A count = A(min(p.reduce.chunk, p.shape.spatial - k * p.reduce.chunk));
    moments.merge({count, partial[0] - shift + p.affine.pre_bias.load<A>(n, c0 + c, 0), partial[1]});
  }
  moments = team_reduce(moments, blockDim.x);
  moments.mean += shift;
  if (threadIdx.x == 0) keep_moments(p, blockIdx.x, moments);
}

// A small kernel: a thread merges the moments of a group's parts in their order.
template <class A>
__global__ void __launch_bounds__(kThreads) merge_parts(ForwardParams p) {
  const int64_t groups = p.shape.batch * p.shape.groups, group = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (group >= groups) return;
  const A* part = static_cast<const A*>(p.parts) + group;
  Moments<A> moments{};
  for (int64_t k = 0; k < p.part_count; ++k, part += 3 * groups) {
    moments.merge({part[0], part[groups], part[2 * groups]});
  }
  keep_moments(p, group, moments);
}

// Reads x once, writes y once.
template <class X, class Y, int V>
__global__ void __launch_bounds__(kThreads) apply_rows(ForwardParams p) {
  using A = Accumulate<X>;
  const Unit unit = row_unit(p.shape, p.apply, /*reverse=*/true);
  if (!unit.exists) return;
  const X* x = static_cast<const X*>(p.x) + unit.first;
  Y* y = static_cast<Y*>(p.y) + unit.first;
  const auto affine = load_affine<A>(p, unit.n, unit.c);
  const Mask<A> mask(p.dropout);
  stream<V>(unit, 1, x, [&](int64_t at, const Vec<X, V>& in) {
    A u[V];
    widen(in, u);
#pragma unroll
    for (int e = 0; e < V; ++e) u[e] = affine(u[e]);
    store(y + at, activated<Y>(mask, unit.first + at, p.silu, u));
  });
}

// Reads x once, writes y once.
template <class X, class Y, int V>
__global__ void __launch_bounds__(kThreads) apply_columns(ForwardParams p) {
  using A = Accumulate<X>;
  const Unit unit = column_unit(p.shape, p.apply, /*reverse=*/true);
  const X* x = static_cast<const X*>(p.x) + unit.first;
  Y* y = static_cast<Y*>(p.y) + unit.first;
  ChannelAffine<A> affine[V];
  share_columns(p.shape, affine, [&](int64_t c) { return load_affine<A>(p, unit.n, c); });
  const Mask<A> mask(p.dropout);
  stream<V>(unit, p.shape.channels, x, [&](int64_t at, const Vec<X, V>& in) {
    A u[V];
    widen(in, u);
#pragma unroll
    for (int e = 0; e < V; ++e) u[e] = affine[e](u[e]);
    store(y + at, activated<Y>(mask, unit.first + at, p.silu, u));
  });
}

// ---- Launching ------------------------------------------------------------------------------------------------

// All for a tensor that is not empty, asynchronously on `stream`.

inline cudaError_t launch_statistics(const ForwardParams& p, cudaStream_t stream) {
  return dispatch_pair(p.x_dtype, p.x_dtype, [&](auto x_type, auto) {
    using X = decltype(x_type);
    using A = Accumulate<X>;
    constexpr int V = vector_of(sizeof(X));
    if (const cudaError_t error =
            launch_tiled(p.reduce, sizeof(A), p, stream, statistics_rows<X, V>, statistics_rows<X, 1>,
                         statistics_columns<X, V>, statistics_columns<X, 1>)) {
      return error;
    }
    const dim3 groups(unsigned(p.shape.batch * p.shape.groups));
    return launch(merge_statistics<A>, groups, kThreads, stream, p);
  });
}

inline cudaError_t launch_apply(const ForwardParams& p, cudaStream_t stream) {
  return dispatch_pair(p.x_dtype, p.y_dtype, [&](auto x_type, auto y_type) {
    using X = decltype(x_type);
    using Y = decltype(y_type);
    using A = Accumulate<X>;
    constexpr int V = vector_of(sizeof(X) < sizeof(Y) ? sizeof(X) : sizeof(Y));
    if (p.parts != nullptr) {
      const dim3 blocks(unsigned(ceil_div(p.shape.batch * p.shape.groups, kThreads)));
      if (const cudaError_t error = launch(merge_parts<A>, blocks, kThreads, stream, p)) return error;
    }
    return launch_tiled(p.apply, sizeof(ChannelAffine<A>), p, stream, apply_rows<X, Y, V>, apply_rows<X, Y, 1>,
                        apply_columns<X, Y, V>, apply_columns<X, Y, 1>);
  });
}

inline cudaError_t launch_two_pass_forward(const ForwardParams& p, cudaStream_t stream) {
  const cudaError_t error = launch_statistics(p, stream);
  return error ? error : launch_apply(p, stream);
}

}  // namespace ldm_fused
