// Two passes: what their kernels share. tiling.h says how the tensor is cut into units.
#pragma once

#include "cuda/common.cuh"

namespace ldm_fused {

// Merges the values of a team (a power of two up to 32 neighbouring lanes, or the whole block) in a fixed order. The
// result is the team's first thread's. All threads of the team's warps must call it, and for a block once in a kernel:
// a second call would need a barrier before it.
template <class T>
__device__ __forceinline__ T team_reduce(T value, int team) {
  value = lanes_reduce(value, team < 32 ? team : 32);
  if (team > 32) {
    using Warps = T[32];
    LDM_FUSED_SHARED(Warps, warps);
    const int warp = threadIdx.x / 32, warps_used = blockDim.x / 32;
    if (threadIdx.x % 32 == 0) warps[warp] = value;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < warps_used; ++w) value.merge(warps[w]);
    }
  }
  return value;
}

// For kernels that reduce columns: with no number given ptxas aims at fewer registers than it needs, and spills on some
// architectures; 2 x 256 threads leave 128 registers each.
constexpr int kBlocksAtLeast = 2;

// What the threads of a block leave in shared memory, V values each.
template <class T, int V>
using BlockValues = T[V][kThreads];

// Merges what the threads of each column left, two rows of the block at a time; the results are row 0's. All threads of
// the block must call it.
template <class T, int V>
__device__ __forceinline__ void merge_rows(BlockValues<T, V>& rows) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (int height = blockDim.y; height > 1;) {
    const int half = (height + 1) / 2;
    __syncthreads();
    if (int(threadIdx.y) < height - half) {
#pragma unroll
      for (int e = 0; e < V; ++e) rows[e][thread].merge(rows[e][thread + half * blockDim.x]);
    }
    height = half;
  }
}

// ---- Units ----------------------------------------------------------------------------------------------------

// The part of the tensor that a thread works on; Tiling says how the tensor is cut.
struct Unit {
  int64_t n;           // sample
  int64_t c;           // channel, or the first of the thread's `vector` channels
  int64_t chunk;       // index of the chunk
  int64_t first;       // offset of the channel's element 0 from the tensor's start
  int64_t begin, end;  // elements of the channel: this thread takes begin, begin + step, ...
  int64_t step;
  bool exists;
};

// Rows: a thread's elements are begin .. begin + vector - 1, then step further. `reverse` walks the units backward, so
// that a second pass starts on what the first one left in L2.
__device__ __forceinline__ Unit row_unit(const Shape& shape, const Tiling& t, bool reverse = false) {
  const int64_t units = shape.rows() * t.chunks;
  const int64_t index = int64_t(blockIdx.x) * (blockDim.x / t.team) + threadIdx.x / t.team;
  Unit unit{};
  unit.exists = index < units;
  if (!unit.exists) return unit;
  const int64_t u = reverse ? units - 1 - index : index;
  const int64_t row = u / t.chunks;
  unit.chunk = u % t.chunks;
  unit.n = row / shape.channels;
  unit.c = row % shape.channels;
  unit.first = row * shape.spatial;
  unit.begin = unit.chunk * t.chunk + int64_t(threadIdx.x % t.team) * t.vector;
  unit.end = min((unit.chunk + 1) * t.chunk, shape.spatial);
  unit.step = int64_t(t.team) * t.vector;
  return unit;
}

// Columns: a thread's elements are `vector` channels of pixel begin, then of the pixel `step` further down.
__device__ __forceinline__ Unit column_unit(const Shape& shape, const Tiling& t, bool reverse = false) {
  const int64_t units = shape.batch * t.chunks;
  const int64_t u = reverse ? units - 1 - blockIdx.x : blockIdx.x;
  Unit unit{};
  unit.n = u / t.chunks;
  unit.c = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * t.vector;
  unit.exists = unit.c < shape.channels;
  unit.chunk = u % t.chunks;
  unit.first = unit.n * shape.spatial * shape.channels + unit.c;
  unit.begin = unit.chunk * t.chunk + threadIdx.y;
  unit.end = unit.exists ? min((unit.chunk + 1) * t.chunk, shape.spatial) : unit.begin;
  unit.step = blockDim.y;
  return unit;
}

// Columns: computes f(channel) once for each channel of the block, in dynamic shared memory, and gives each thread the
// values of its own V channels. So the block reads once what all its pixels need, and not once a warp. All threads of
// the block must call it.
template <int V, class F, class T>
__device__ __forceinline__ void share_columns(const Shape& shape, T (&own)[V], F&& f) {
  LDM_FUSED_DYNAMIC_SHARED(T, table);
  const int64_t first = int64_t(blockIdx.y) * blockDim.x * V;
  const int channels = int(min(int64_t(blockDim.x) * V, shape.channels - first));
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < channels; i += blockDim.x * blockDim.y) {
    table[i % V * blockDim.x + i / V] = f(first + i);  // so that neighbouring threads read neighbouring entries
  }
  __syncthreads();
  if (int(threadIdx.x) * V < channels) {
#pragma unroll
    for (int e = 0; e < V; ++e) own[e] = table[e * blockDim.x + threadIdx.x];
  }
}

// Calls f(offset, vectors...) for each of the thread's vectors, one of each tensor at that offset; loads run ahead of
// their use. `stride` is that of the unit's elements: 1 in rows, the number of channels in columns.
template <int V, class X, class F>
__device__ __forceinline__ void stream(const Unit& unit, int64_t stride, const X* x, F&& f) {
  constexpr int kInFlight = kVectorsInFlight;
  for (int64_t i = unit.begin; i < unit.end; i += kInFlight * unit.step) {
    Vec<X, V> vx[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t at = i + k * unit.step;
      if (at < unit.end) vx[k] = load<X, V>(x + at * stride);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t at = i + k * unit.step;
      if (at < unit.end) f(at * stride, vx[k]);
    }
  }
}

// The same of two tensors and a third, of which f gets zeros where it is null.
template <int V, class X, class Y, class F>
__device__ __forceinline__ void stream(const Unit& unit, int64_t stride, const X* x, const Y* dy, const X* optional,
                                       F&& f) {
  constexpr int kInFlight = kVectorsInFlight / 2;  // of each tensor
  for (int64_t i = unit.begin; i < unit.end; i += kInFlight * unit.step) {
    Vec<X, V> vx[kInFlight], third[kInFlight]{};
    Vec<Y, V> vdy[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t at = i + k * unit.step;
      if (at < unit.end) vx[k] = load<X, V>(x + at * stride);
      if (at < unit.end) vdy[k] = load<Y, V>(dy + at * stride);
      if (at < unit.end && optional != nullptr) third[k] = load<X, V>(optional + at * stride);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t at = i + k * unit.step;
      if (at < unit.end) f(at * stride, vx[k], vdy[k], third[k]);
    }
  }
}

template <int V, class X, class Y, class F>
__device__ __forceinline__ void stream(const Unit& unit, int64_t stride, const X* x, const Y* dy, F&& f) {
  const X* const none = nullptr;
  stream<V>(unit, stride, x, dy, none,
            [&](int64_t at, const Vec<X, V>& vx, const Vec<Y, V>& vdy, const Vec<X, V>&) { f(at, vx, vdy); });
}

// Where the partial result of channel c and chunk k lies: consecutive for the units that one block writes.
__device__ __forceinline__ int64_t partial_index(const Shape& shape, const Tiling& t, int64_t n, int64_t c, int64_t k) {
  return t.columns ? (n * t.chunks + k) * shape.channels + c : (n * shape.channels + c) * t.chunks + k;
}

// The affine map of channel c of sample n, from the statistics in memory.
template <class A, class Params>
__device__ __forceinline__ ChannelAffine<A> load_affine(const Params& p, int64_t n, int64_t c) {
  const int64_t group = p.shape.group(n, c);
  return channel_affine<A>(p.affine, n, c, static_cast<const A*>(p.mean)[group], static_cast<const A*>(p.rstd)[group]);
}

// ---- Launching ------------------------------------------------------------------------------------------------

// Launches the kernel for the tiling: it walks rows or columns, by vectors or by single elements. `shared`: bytes of
// each channel that share_columns() shares.
template <class Params>
cudaError_t launch_tiled(const Tiling& t, size_t shared, const Params& p, cudaStream_t stream, void (*rows)(Params),
                         void (*rows_by_one)(Params), void (*columns)(Params), void (*columns_by_one)(Params)) {
  const auto kernel = choose(t.columns, t.vector == 1, rows, rows_by_one, columns, columns_by_one);
  const size_t shared_bytes = t.columns ? size_t(t.block_x) * t.vector * shared : 0;
  const dim3 grid(unsigned(t.grid_x), unsigned(t.grid_y)), block(unsigned(t.block_x), unsigned(t.block_y));
  return launch(kernel, grid, block, stream, p, shared_bytes);
}

}  // namespace ldm_fused
