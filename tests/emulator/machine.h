// What emulated kernels and their launches see of the machine that runs them (machine.cpp).
//
// Blocks run one after another, those of a cluster or of a cooperative grid side by side; each thread is a fiber. A
// thread runs until a barrier or a warp primitive, which is completed only when all threads that it names wait in it.
// If nothing is left to run or to complete, it never will be, and both sides of the disagreement are known. This is
// stricter than the hardware on purpose: naming a thread that has exited, or reaching a primitive on different source
// lines, is an error here, since what a GPU makes of it depends on the architecture and on the compiler.
//
// The compiler reports every access to memory that is not a thread's own (callbacks.cpp); the observer says what is
// wrong with it (observer.cpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "vector_types.h"

namespace emulator {

inline constexpr unsigned kWarpSize = 32;

// What the runtime says of the device, and what bounds a launch.
struct Device {
  int multiprocessors = 4;
  int major = 9, minor = 0;
  int l2_bytes = 50 << 20;
  int shared_per_multiprocessor = 228 << 10;
  int shared_per_block = 227 << 10;  // where a kernel has asked for more than 48 KB
  int threads_per_multiprocessor = 2048;

  // Of the binary's code for it: the architecture that it was written for, such as 90; 0: there is none.
  int code_version = 90;
  // What it refuses. Clusters lie within groups of multiprocessors (0: one group of all).
  int multiprocessors_per_group = 0;
  int largest_cluster = 16;
  int refused_cluster = 0;  // launches of clusters of so many blocks or more (0: none), though a query says they fit
  int refused_grid = 0;     // cooperative launches of so many blocks or more; 0: none
  int refusal = 0;          // the cudaError_t of both

  int ordinal = 0;
  int copy = 0;  // tells devices apart that are alike

  bool has_clusters() const { return major >= 9; }
  int blocks_per_multiprocessor(unsigned threads, size_t shared_bytes) const;  // registers are not looked at
};

inline Device device;

// A line of kernel source. As a default argument, `Site site = Site::here()` is where the function was called.
struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

enum class Scope { warp, block, cluster, grid };

// What a thread brings to a barrier, a vote or a shuffle.
struct Call {
  static constexpr unsigned kNoSource = ~0u;

  const char* name;
  Site site;
  Scope scope = Scope::block;
  uint32_t mask = ~0u;          // of a warp's lanes: those that take part
  uint64_t value = 0;           // a predicate, or the bits to shuffle
  unsigned source = kNoSource;  // shuffles: the lane to read from
};

struct Launch {
  dim3 grid, block, cluster;
  bool cooperative;  // all blocks side by side
  size_t dynamic_shared_bytes;
  void (*kernel)(void*);  // what each thread calls, with `arguments`
  void* arguments;
};

// Runs a launch to its end. Throws std::runtime_error, which says what the kernel did wrong, where, and which thread.
void run(const Launch& launch);

// ---- Called by a kernel's threads --------------------------------------------------------------------------------

struct Indices {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};

inline Indices indices;

// Waits until the call is complete. The result is the number of non-zero values for a barrier, the lanes that have one
// for a vote, the source's value for a shuffle.
uint64_t wait(const Call& call);
void yield();  // lets others run first, as a thread does that spins
[[noreturn]] void fail(const char* pattern, ...) __attribute__((format(printf, 1, 2)));  // ends the launch

unsigned lane();
uint32_t living_lanes();  // those of the calling thread's warp that have not exited
dim3 cluster_dim();
unsigned block_rank();                                               // in the cluster
void* shared(const void* variable, size_t bytes, size_t alignment);  // the block's own, one for each `variable`
void* dynamic_shared();
void* map_shared_rank(void* address, unsigned rank);  // the same place in another block of the cluster
void fence();                                         // with an atomic operation before or after: acquires, releases
void atomic_access(void* address, size_t bytes);
void check_alignment(const void* address, size_t bytes);

// Asynchronous copies to shared memory: what is to be written arrives when the thread waits for the group that the copy
// was committed with, and not before. Until then nobody may touch it.
void copy_async(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(size_t groups_left);  // all but the last so many groups

// ---- Called by tests ---------------------------------------------------------------------------------------------

// In which order blocks, warps and lanes run: "forward", "reverse" or "random". A kernel without races gives the same
// bits in all of them.
void set_order(const std::string& order, unsigned seed);

// Memory that kernels may touch from now on; of `fresh` memory they may read only what they have written.
void allow(void* address, size_t bytes, bool fresh);
void forget_allowed();

// What a launch moved between its threads and global memory. What a warp's lanes ask for in one instruction is one
// request: its bytes are those of the union of the lanes' bytes, its sectors the aligned 32-byte pieces that hold them.
struct Traffic {
  int64_t bytes_read, bytes_written, sectors_read, sectors_written;
  int64_t requests;
};

// Whether races and unwritten memory are looked for (default), and whether traffic is counted (default: not).
void observe(bool races, bool traffic);
std::vector<Traffic> take_traffic();  // of the launches since the last call

}  // namespace emulator
