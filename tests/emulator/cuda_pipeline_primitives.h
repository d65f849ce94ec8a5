// Stands in for the CUDA toolkit's header of this name: asynchronous copies from global to shared memory.
#pragma once

#include <cuda_runtime.h>

// It is inlined and does not end in a jump to copy_async(), which tells copies apart by where it returns to.
__forceinline__ void __pipeline_memcpy_async(void* shared, const void* global, size_t size, size_t zfill = 0) {
  if (zfill) emulator::fail("__pipeline_memcpy_async that fills with zeros (%zu bytes), which is not emulated", zfill);
  emulator::copy_async(shared, global, size);
  asm volatile("");
}

inline void __pipeline_commit() { emulator::commit_copies(); }

inline void __pipeline_wait_prior(size_t groups) { emulator::wait_for_copies(groups); }
