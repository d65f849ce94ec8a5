// Toy kernels for tests/test_emulator.py. They are right, except for what their parameters tell them to leave out.
#pragma once
#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

__global__ void write_indices(int* out) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  int* to = out + 6 * (block * threads + thread);
  to[0] = blockIdx.x, to[1] = blockIdx.y, to[2] = blockIdx.z;
  to[3] = threadIdx.x, to[4] = threadIdx.y, to[5] = threadIdx.z;
}

__device__ float warp_sum(float value) {
  for (int by = warpSize / 2; by > 0; by /= 2) value += __shfl_xor_sync(0xffffffffu, value, by);
  return value;
}

// The sum of `value` over the block, in all its threads. `partial` is used again by the next call, so the barrier
// before its first write is as necessary as the one before its first read: each can be left out here.
template <bool BarrierBeforeWrite, bool BarrierBeforeRead>
__device__ float block_sum(float value) {
  using Partial = float[32];
  LDM_FUSED_SHARED(Partial, partial);
  value = warp_sum(value);
  if (BarrierBeforeWrite) __syncthreads();
  if (threadIdx.x % warpSize == 0) partial[threadIdx.x / warpSize] = value;
  if (BarrierBeforeRead) __syncthreads();
  float sum = 0;
  for (unsigned w = 0; w < blockDim.x / warpSize; ++w) sum += partial[w];
  return sum;
}

// y = (x - mean) / std of each row; a block a row. One read and one write of x, which stays in shared memory.
template <bool BarrierBeforeWrite, bool BarrierBeforeRead>
__global__ void __launch_bounds__(1024) normalize(const float* __restrict__ x, float* __restrict__ y, int columns) {
  LDM_FUSED_DYNAMIC_SHARED(float, kept);
  x += int64_t(blockIdx.x) * columns;
  y += int64_t(blockIdx.x) * columns;
  float sum = 0;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) sum += kept[i] = x[i];
  const float mean = block_sum<BarrierBeforeWrite, BarrierBeforeRead>(sum) / columns;
  float squares = 0;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) squares += (kept[i] - mean) * (kept[i] - mean);
  const float rstd = rsqrtf(block_sum<BarrierBeforeWrite, BarrierBeforeRead>(squares) / columns);
  for (int i = threadIdx.x; i < columns; i += blockDim.x) y[i] = (kept[i] - mean) * rstd;
}

enum Shuffle { indexed, up, down, exclusive_or };

template <class T>
__global__ void shuffle(Shuffle kind, const T* in, T* out, int by, int width) {
  const T value = in[threadIdx.x];
  switch (kind) {
    case indexed: out[threadIdx.x] = __shfl_sync(0xffffffffu, value, by, width); break;
    case up: out[threadIdx.x] = __shfl_up_sync(0xffffffffu, value, by, width); break;
    case down: out[threadIdx.x] = __shfl_down_sync(0xffffffffu, value, by, width); break;
    case exclusive_or: out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, value, by, width); break;
  }
}

// The two halves of a warp take different ways, and meet again.
__global__ void vote(const int* in, unsigned* out) {
  const int predicate = in[threadIdx.x], lane = threadIdx.x % warpSize;
  unsigned* to = out + 7 * threadIdx.x;
  if (lane < 16) {
    to[0] = __ballot_sync(0x0000ffffu, predicate);
  } else {
    to[0] = __ballot_sync(0xffff0000u, predicate);
  }
  __syncwarp();
  to[1] = __any_sync(0xffffffffu, predicate);
  to[2] = __all_sync(0xffffffffu, predicate);
  to[3] = __syncthreads_count(predicate);
  to[4] = __syncthreads_or(predicate);
  to[5] = __syncthreads_and(predicate);
  to[6] = __activemask();
}

// The last block to finish adds up what all blocks have written. Without a fence it may see nothing of it.
template <bool Fence>
__global__ void count_threads(unsigned* per_block, unsigned* finished, unsigned* total) {
  LDM_FUSED_SHARED(bool, last);
  unsigned count = __syncthreads_count(true);
  if (threadIdx.x == 0) {
    per_block[blockIdx.x] = count;
    if (Fence) __threadfence();
    last = atomicInc(finished, gridDim.x - 1) == gridDim.x - 1;
    if (Fence) __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x < gridDim.x) atomicAdd(total, per_block[threadIdx.x]);
}

// Adds up over a cluster, in distributed shared memory. The first barrier is needed because others read what a block
// writes, the last because a block's shared memory is gone when it exits.
template <bool BarrierBefore, bool BarrierAfter>
__global__ void cluster_sum(const int* in, int* out) {
  const auto cluster = cooperative_groups::this_cluster();
  LDM_FUSED_DYNAMIC_SHARED(int, own);
  own[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  if (BarrierBefore) cluster.sync();
  int sum = 0;
  for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank) sum += cluster.map_shared_rank(own, rank)[threadIdx.x];
  if (BarrierAfter) cluster.sync();
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// Each block writes, and after the grid's barrier reads what the next one has written.
template <bool Barrier>
__global__ void rotate(const int* in, int* between, int* out) {
  const unsigned here = blockIdx.x * blockDim.x + threadIdx.x, all = gridDim.x * blockDim.x;
  between[here] = in[here];
  if (Barrier) cooperative_groups::this_grid().sync();
  out[here] = between[(here + blockDim.x) % all];
}

// The same with a barrier made by hand.
template <bool Fence>
__global__ void rotate_by_hand(const int* in, int* between, unsigned* arrived, int* out) {
  const unsigned here = blockIdx.x * blockDim.x + threadIdx.x, all = gridDim.x * blockDim.x;
  between[here] = in[here];
  __syncthreads();
  if (threadIdx.x == 0) {
    if (Fence) __threadfence();
    atomicAdd(arrived, 1);
    while (atomicAdd(arrived, 0) < gridDim.x) __nanosleep(20);
    if (Fence) __threadfence();
  }
  __syncthreads();
  out[here] = between[(here + blockDim.x) % all];
}

// All blocks read what block 0 has written, which writes anew when all have read, if it waits for them.
template <bool Waits>
__global__ void broadcast(int* between, unsigned* arrived, int* out) {
  unsigned target = 0;
  const auto meet = [&] {
    __syncthreads();
    target += gridDim.x;
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(arrived, 1);
      while (atomicAdd(arrived, 0) < target) __nanosleep(20);
      __threadfence();
    }
    __syncthreads();
  };
  if (blockIdx.x == 0) between[threadIdx.x] = int(threadIdx.x);
  meet();
  out[blockIdx.x * blockDim.x + threadIdx.x] = between[(threadIdx.x + 1) % blockDim.x];
  if (Waits) meet();
  __syncthreads();
  if (blockIdx.x == 0) between[threadIdx.x] = 0;
}

// Lanes hand values on through shared memory within their warp.
template <bool Barrier>
__global__ void next_lane(int* out) {
  using Values = int[64];
  LDM_FUSED_SHARED(Values, values);
  values[threadIdx.x] = threadIdx.x;
  if (Barrier) __syncwarp();
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

// Each thread reads `bytes` bytes, a multiple of 4, at its own place, `stride` bytes behind the one before.
__global__ void strided_reads(const char* in, int stride, int bytes, int* out) {
  int sum = 0;
  for (int i = 0; i < bytes; i += 4) sum += *reinterpret_cast<const int*>(in + threadIdx.x * stride + i);
  if (sum == 1) out[0] = sum;
}
__global__ void vector_reads(const int4* in, int4* out) { out[threadIdx.x] = in[threadIdx.x]; }

__global__ void async_vector_reads(const int4* in, int4* out) {
  using Values = int4[32];
  LDM_FUSED_SHARED(Values, values);
  __pipeline_memcpy_async(&values[threadIdx.x], &in[threadIdx.x], 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  out[threadIdx.x] = values[threadIdx.x];
}

enum Mistake { none, no_commit, no_wait, waits_for_too_few, no_barrier_before_read, no_barrier_after_read };

// Reverses each tile of 64 elements. Two of them have a place in shared memory: while one is read, the next is copied.
template <class T>
__global__ void reverse_tiles(const T* in, T* out, int count, Mistake mistake) {
  using Tiles = T[2][64];
  LDM_FUSED_SHARED(Tiles, tiles);
  const unsigned here = threadIdx.x;
  const auto copy = [&](int tile) {
    __pipeline_memcpy_async(&tiles[tile % 2][here], &in[tile * 64 + here], sizeof(T));
    if (mistake != no_commit) __pipeline_commit();
  };
  copy(0);
  for (int tile = 0; tile < count; ++tile) {
    const bool is_last = tile + 1 == count;
    if (!is_last) copy(tile + 1);
    if (mistake != no_wait) __pipeline_wait_prior((is_last ? 0 : 1) + (mistake == waits_for_too_few));
    if (mistake != no_barrier_before_read) __syncthreads();
    out[tile * 64 + here] = tiles[tile % 2][63 - here];
    if (mistake != no_barrier_after_read) __syncthreads();
  }
}
