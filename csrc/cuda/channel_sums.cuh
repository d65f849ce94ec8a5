// The sum of each channel over samples and pixels: the gradient of a bias.
//
// Memory passes: x is read once (1 B); a small kernel merges the partial results.
#pragma once

#include "cuda/two_pass.cuh"

namespace ldm_fused {

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

  using SumRows = BlockValues<Sum<A>, V>;
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

// A small kernel: a row of threads adds up every kPartialsAbreast-th partial result, a thread a channel; then the rows
// are added up in their order.
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

// For a tensor that is not empty, asynchronously on `stream`.
inline cudaError_t launch_channel_sums(const ChannelSumsParams& p, cudaStream_t stream) {
  return dispatch_pair(p.dtype, p.dtype, [&](auto type, auto) {
    using X = decltype(type);
    using A = Accumulate<X>;
    constexpr int V = vector_of(sizeof(X));
    if (const cudaError_t error =
            launch_tiled(p.tiling, 0, p, stream, channel_sums_rows<X, V>, channel_sums_rows<X, 1>,
                         channel_sums_columns<X, V>, channel_sums_columns<X, 1>)) {
      return error;
    }
    const dim3 grid(unsigned(ceil_div(p.shape.channels, kSumsAbreast)));
    return launch(merge_channel_sums<A>, grid, dim3(kSumsAbreast, kPartialsAbreast), stream, p);
  });
}

}  // namespace ldm_fused
