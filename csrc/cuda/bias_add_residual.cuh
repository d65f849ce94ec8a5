// The end of a ResNet block, (x + residual + bias + residual_bias) * scale, and the gradient of its biases.
//
// Memory passes: bias_add_residual reads x and the residual and writes y, once each (3 B, the limit). channel_sums
// reads x once (1 B); a small kernel merges its partial results.
#pragma once

#include "cuda/two_pass.cuh"

namespace ldm_fused {

template <class A>
__device__ __forceinline__ A bias_of(const ResidualParams& p, int64_t c) {
  return p.bias.load<A>(0, c, 0) + p.residual_bias.load<A>(0, c, 0);
}

// Reads x and the residual once, writes y once.
template <class X, int V>
__global__ void __launch_bounds__(kThreads) residual_rows(ResidualParams p) {
  using A = Accumulate<X>;
  const Unit unit = row_unit(p.shape, p.tiling);
  if (!unit.exists) return;
  const X* x = static_cast<const X*>(p.x) + unit.first;
  const X* residual = static_cast<const X*>(p.residual) + unit.first;
  X* y = static_cast<X*>(p.y) + unit.first;
  const A bias = bias_of<A>(p, unit.c), scale = A(p.scale);
  stream<V>(unit, 1, x, residual, [&](int64_t at, const Vec<X, V>& vx, const Vec<X, V>& other) {
    Vec<X, V> out;
#pragma unroll
    for (int e = 0; e < V; ++e) out.e[e] = narrow<X>((A(widen(vx.e[e])) + A(widen(other.e[e])) + bias) * scale);
    store(y + at, out);
  });
}

// Reads x and the residual once, writes y once.
template <class X, int V>
__global__ void __launch_bounds__(kThreads) residual_columns(ResidualParams p) {
  using A = Accumulate<X>;
  const Unit unit = column_unit(p.shape, p.tiling);
  const X* x = static_cast<const X*>(p.x) + unit.first;
  const X* residual = static_cast<const X*>(p.residual) + unit.first;
  X* y = static_cast<X*>(p.y) + unit.first;
  A bias[V];
  const A scale = A(p.scale);
  share_columns(p.shape, bias, [&](int64_t c) { return bias_of<A>(p, c); });
  stream<V>(unit, p.shape.channels, x, residual, [&](int64_t at, const Vec<X, V>& vx, const Vec<X, V>& other) {
    Vec<X, V> out;
#pragma unroll
    for (int e = 0; e < V; ++e) out.e[e] = narrow<X>((A(widen(vx.e[e])) + A(widen(other.e[e])) + bias[e]) * scale);
    store(y + at, out);
  });
}

template <class A>
struct Sum {
  A value;

  __device__ void merge(const Sum& other) { value += other.value; }
};

// Reads x once; writes the sum of a channel and chunk. A thread keeps a sum for each element of a vector.
template <class X, int V>
__global__ void __launch_bounds__(kThreads) channel_sums_rows(ChannelSumsParams p) {
  using A = Accumulate<X>;
  const Unit unit = row_unit(p.shape, p.tiling);
  A sums[V]{};
  if (unit.exists) {
    stream<V>(unit, 1, static_cast<const X*>(p.x) + unit.first, [&](int64_t, const Vec<X, V>& v) {
#pragma unroll
      for (int e = 0; e < V; ++e) sums[e] += A(widen(v.e[e]));
    });
  }
  Sum<A> sum{};
#pragma unroll
  for (int e = 0; e < V; ++e) sum.value += sums[e];
  sum = team_reduce(sum, p.tiling.team);
  if (unit.exists && threadIdx.x % p.tiling.team == 0) {
    static_cast<A*>(p.partials)[partial_index(p.shape, p.tiling, unit.n, unit.c, unit.chunk)] = sum.value;
  }
}

// Reads x once; writes the sum of a channel and chunk.
template <class X, int V>
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast) channel_sums_columns(ChannelSumsParams p) {
  using A = Accumulate<X>;
  const Unit unit = column_unit(p.shape, p.tiling);
  Sum<A> sums[V]{};
  stream<V>(unit, p.shape.channels, static_cast<const X*>(p.x) + unit.first, [&](int64_t, const Vec<X, V>& v) {
#pragma unroll
    for (int e = 0; e < V; ++e) sums[e].value += A(widen(v.e[e]));
  });

  using SumRows = Rows<Sum<A>, V>;
  LDM_FUSED_SHARED(SumRows, rows);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int e = 0; e < V; ++e) rows[e][thread] = sums[e];
  merge_rows(rows);
  if (unit.exists && threadIdx.y == 0) {
    A* partial = static_cast<A*>(p.partials) + partial_index(p.shape, p.tiling, unit.n, unit.c, unit.chunk);
#pragma unroll
    for (int e = 0; e < V; ++e) partial[e] = rows[e][thread].value;
  }
}

constexpr int kSumsAbreast = 32, kPartialsAbreast = 8;  // threads of a block

// Small: a row of threads adds up every kPartialsAbreast-th partial result, a thread a channel; then the rows are added
// up in their order.
template <class A>
__global__ void __launch_bounds__(kSumsAbreast* kPartialsAbreast) merge_channel_sums(ChannelSumsParams p) {
  const int64_t c = int64_t(blockIdx.x) * kSumsAbreast + threadIdx.x;
  const A* partials = static_cast<const A*>(p.partials);
  A sum = 0;
  for (int64_t i = threadIdx.y; i < p.shape.batch * p.tiling.chunks && c < p.shape.channels; i += kPartialsAbreast) {
    sum += partials[partial_index(p.shape, p.tiling, i / p.tiling.chunks, c, i % p.tiling.chunks)];
  }
  using Sums = A[kPartialsAbreast][kSumsAbreast];
  LDM_FUSED_SHARED(Sums, sums);
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && c < p.shape.channels) {
    for (int row = 1; row < kPartialsAbreast; ++row) sum += sums[row][threadIdx.x];
    static_cast<A*>(p.sums)[c] = sum;
  }
}

// ---- Launching ------------------------------------------------------------------------------------------------

// For a tensor that is not empty, asynchronously on `stream`.
inline cudaError_t launch_residual(const ResidualParams& p, Dtype x, cudaStream_t stream) {
  return dispatch_pair(x, x, [&](auto type, auto) {
    using X = decltype(type);
    constexpr int V = vector_of(sizeof(X));
    const auto kernel = p.tiling.columns ? (p.tiling.vector == 1 ? residual_columns<X, 1> : residual_columns<X, V>)
                                         : (p.tiling.vector == 1 ? residual_rows<X, 1> : residual_rows<X, V>);
    return launch(kernel, grid_of(p.tiling), block_of(p.tiling), stream, p, columns_shared<Accumulate<X>>(p.tiling));
  });
}

// For a tensor that is not empty, asynchronously on `stream`.
inline cudaError_t launch_channel_sums(const ChannelSumsParams& p, Dtype x, cudaStream_t stream) {
  return dispatch_pair(x, x, [&](auto type, auto) {
    using X = decltype(type);
    constexpr int V = vector_of(sizeof(X));
    const auto kernel = p.tiling.columns
                            ? (p.tiling.vector == 1 ? channel_sums_columns<X, 1> : channel_sums_columns<X, V>)
                            : (p.tiling.vector == 1 ? channel_sums_rows<X, 1> : channel_sums_rows<X, V>);
    if (const cudaError_t error = launch(kernel, grid_of(p.tiling), block_of(p.tiling), stream, p)) return error;
    const dim3 grid(unsigned(ceil_div(p.shape.channels, kSumsAbreast)));
    return launch(merge_channel_sums<Accumulate<X>>, grid, dim3(kSumsAbreast, kPartialsAbreast), stream, p);
  });
}

}  // namespace ldm_fused
