// PTX for what CUDA C++ cannot express, or not exactly. A host compiler takes plain C++ in its place.
#pragma once

#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include "dtypes.h"

namespace ldm_fused {

// ---- Arithmetic -----------------------------------------------------------------------------------------------

// 2^x to two units in the last place; results below the normal numbers are 0. One operation, no branch.
__device__ __forceinline__ float exp2_approximate(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}

// 1 / x to one unit in the last place; results below the normal numbers are 0. One operation, no branch.
__device__ __forceinline__ float reciprocal_approximate(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}

// ---- Stores ---------------------------------------------------------------------------------------------------

// Stores 16 bytes by one instruction. Left to itself nvcc splits some vector stores into their elements.
__device__ __forceinline__ void store_16_bytes(void* to, uint4 words) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words.x),
               "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
#else
  *static_cast<uint4*>(to) = words;
#endif
}

// ---- Asynchronous copies --------------------------------------------------------------------------------------
// They do what the toolkit's __pipeline functions do, whose wait does not keep the compiler from moving loads above it.
// Before compute capability 8.0 there are none: a copy is made at once.

__device__ __forceinline__ void copy_16_bytes_async(void* to_shared, const void* from_global) {
#if !defined(__CUDA_ARCH__)
  __pipeline_memcpy_async(to_shared, from_global, 16);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(unsigned(__cvta_generic_to_shared(to_shared))),
               "l"(__cvta_generic_to_global(from_global))
               : "memory");
#else
  *static_cast<uint4*>(to_shared) = *static_cast<const uint4*>(from_global);
#endif
}

__device__ __forceinline__ void commit_copies() {
#if !defined(__CUDA_ARCH__)
  __pipeline_commit();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all but the last kGroups committed groups of the thread's copies have arrived.
template <int kGroups>
__device__ __forceinline__ void wait_for_copies() {
#if !defined(__CUDA_ARCH__)
  __pipeline_wait_prior(kGroups);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

// ---- Counters in global memory --------------------------------------------------------------------------------

// Adds 1. A thread that sees this also sees what this thread has written before, and what those have written that it
// has met at a barrier.
__device__ __forceinline__ void arrive(unsigned* counter) {
#ifdef __CUDA_ARCH__
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(counter)) : "memory");
#else
  __threadfence();
  atomicAdd(counter, 1u);
#endif
}

// Waits until the counter is at least `target`.
__device__ __forceinline__ void wait_for(unsigned* counter, unsigned target) {
#ifdef __CUDA_ARCH__
  unsigned value;
  for (;;) {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                 : "=r"(value)
                 : "l"(__cvta_generic_to_global(counter))
                 : "memory");
    if (value >= target) return;
    __nanosleep(20);
  }
#else
  while (atomicAdd(counter, 0u) < target) __nanosleep(20);
  __threadfence();
#endif
}

// ---- Clusters -------------------------------------------------------------------------------------------------
// Clusters need compute capability 9.0. Code for less, compiled at run time for a device that has them, must not run a
// plan with clusters: it stops instead.

// What this block has written before is seen by the others behind their wait.
__device__ __forceinline__ void cluster_arrive() {
#if !defined(__CUDA_ARCH__)
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#else
  __trap();
#endif
}

// Without that: a release waits for all that the block has on its way to memory.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if !defined(__CUDA_ARCH__)
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if !defined(__CUDA_ARCH__)
  cooperative_groups::this_cluster().sync();
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __trap();
#endif
}

// The same place in the shared memory of another block of the cluster.
template <class T>
__device__ __forceinline__ T* in_block_of_cluster(T* shared, int rank) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
#else
  __trap();
  return shared;
#endif
}

}  // namespace ldm_fused
