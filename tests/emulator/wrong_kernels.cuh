// Kernels with one mistake each, which the emulator must report.
#pragma once
#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

__global__ void divergent_barrier() {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void early_exit() {
  if (threadIdx.x == 40) return;
  __syncthreads();
}

__global__ void missing_lanes(int* out) {
  if (threadIdx.x % warpSize < 16) out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
}

__global__ void mixed_masks(int* out) {
  const int lane = threadIdx.x % warpSize;
  out[threadIdx.x] = __shfl_sync(lane < 16 ? 0xffffffffu : 0xffff0000u, 1, 16);
}

__global__ void foreign_mask() { __syncwarp(0x0000ffffu); }

__global__ void absent_source(int* out) {
  if (threadIdx.x % warpSize < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 20);
}

__global__ void barrier_against_shuffle(int* out) {
  if (threadIdx.x == 0)
    __syncthreads();
  else
    out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
}

__global__ void trap() {
  if (blockIdx.x == 1 && threadIdx.x == 33) __trap();
  __syncthreads();
}

__global__ void misaligned(int* x) { *reinterpret_cast<int4*>(x) = *reinterpret_cast<const int4*>(x + 3); }
__global__ void reads_past_global(const int* x, int* out) {
  if (x[threadIdx.x] == 1) out[0] = 1;
}
__global__ void writes_past_global(int* out) { out[threadIdx.x] = 1; }
__global__ void reads_before_global(const int* x, int* out) { out[0] = x[-1]; }

__global__ void reads_past_shared(int* out) {
  using Few = int[8];
  LDM_FUSED_SHARED(Few, few);
  if (threadIdx.x < 8) few[threadIdx.x] = 0;
  __syncthreads();
  if (threadIdx.x == 0) out[0] = few[8 + blockIdx.x];
}

__global__ void writes_past_dynamic_shared() {
  LDM_FUSED_DYNAMIC_SHARED(int, values);
  values[threadIdx.x] = 0;
}

// By way of other memory, so that each place is looked up anew.
__global__ void writes_the_end_first(int* memory, int* out) {
  memory[40] = 1;
  memory[0] = 2;
  out[0] = 3;
  out[0] = memory[0];
}

__global__ void reads_unwritten_shared(int* out) {
  using Values = int[64];
  LDM_FUSED_SHARED(Values, values);
  if (threadIdx.x != 33) values[threadIdx.x] = 0;
  __syncthreads();
  if (threadIdx.x == 0) out[0] = values[33];
}

__global__ void all_write_one(int* out) { out[0] = threadIdx.x; }
__global__ void blocks_write_one(int* out) {
  if (threadIdx.x == 0) out[0] = blockIdx.x;
}
__global__ void writes_what_others_read(int* out) {
  const int before = out[0];
  if (threadIdx.x == 63 && before == 0) out[0] = 1;
}
__global__ void plain_beside_atomic(unsigned* out) {
  if (threadIdx.x == 0) atomicAdd(out, 1);
  if (threadIdx.x == 40) out[0] = 0;
}
__global__ void waits_for_nobody(unsigned* out) {
  while (atomicAdd(out, 0) == 0) __nanosleep(20);
}
__global__ void spins(volatile unsigned* out) {
  while (out[0] == 0) {
  }
}
__global__ void one_block_leaves_the_grid() {
  if (blockIdx.x == 1) return;
  cooperative_groups::this_grid().sync();
}

__device__ int* some_shared() {
  using Values = int[64];
  LDM_FUSED_SHARED(Values, values);
  return values;
}

__device__ int* copies_own(const int* in) {
  int* const own = some_shared() + threadIdx.x;
  __pipeline_memcpy_async(own, in + threadIdx.x, sizeof *own);
  __pipeline_commit();
  return own;
}

__global__ void copies_misaligned_from(const int* in) { __pipeline_memcpy_async(some_shared(), in + 1, 16); }
__global__ void copies_misaligned_to(const int* in) { __pipeline_memcpy_async(some_shared() + 1, in, 8); }
__global__ void copies_12_bytes(const int* in) { __pipeline_memcpy_async(some_shared(), in, 12); }
__global__ void copies_zeros(const int* in) { __pipeline_memcpy_async(some_shared(), in, 16, 4); }
__global__ void copies_from_shared() {
  int* const own = some_shared() + 2 * (threadIdx.x / 2);
  own[threadIdx.x % 2] = 1;
  __syncthreads();
  __pipeline_memcpy_async(own, own + 1, 4);
}
__global__ void copies_to_global(const int* in, int* out) { __pipeline_memcpy_async(out, in, 4); }
__global__ void copies_past_global(const int* in) { __pipeline_memcpy_async(some_shared(), in + 8, 4); }
__global__ void copies_and_exits(const int* in) { copies_own(in); }
__global__ void copies_uncommitted_and_exits(const int* in) {
  __pipeline_memcpy_async(some_shared() + threadIdx.x, in + threadIdx.x, 4);
  __pipeline_wait_prior(0);
}
__global__ void reads_what_was_there(const int* in, int* out) {
  some_shared()[threadIdx.x] = 1;
  out[0] = *copies_own(in);
}
__global__ void overwrites_copy(const int* in) {
  *copies_own(in) = 1;
  __pipeline_wait_prior(0);
}
__global__ void copies_twice(const int* in) {
  copies_own(in);
  copies_own(in);
  __pipeline_wait_prior(0);
}
__global__ void copies_what_others_read(const int* in, int* out) {
  int* const values = some_shared();
  values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % 64];
  copies_own(in);
  __pipeline_wait_prior(0);
}
__global__ void changes_source(int* in) {
  copies_own(in);
  in[threadIdx.x] ^= 1;
  __pipeline_wait_prior(0);
}
__global__ void reads_copy_of_neighbour(const int* in, int* out) {
  copies_own(in);
  __syncthreads();
  __pipeline_wait_prior(0);
  out[threadIdx.x] = some_shared()[threadIdx.x ? threadIdx.x - 1 : 0];
}

// For AddressSanitizer alone to see: an overflow on the stack of a thread that has been suspended.
__attribute__((no_sanitize("undefined"))) __global__ void stack_overflow(int index, int* out) {
  int local[4] = {1, 2, 3, 4};
  __syncthreads();
  local[index] = 5;
  __syncthreads();
  out[0] = local[0];
}
