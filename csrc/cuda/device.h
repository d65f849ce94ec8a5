// The properties of a device that a plan depends on, and the functions that ask for them. Plain C++.
#pragma once

#include <atomic>
#include <cstdint>

namespace ldm_fused {

constexpr int kLargestCluster = 16;  // where there are clusters
constexpr int kPortableCluster = 8;  // above, it depends on the kernel and on the device's layout
constexpr int kMostThreads = 512;    // of a block that keeps what it reads and has a multiprocessor to itself
constexpr int kFewerThreads = 256;   // of one that shares it

// What a plan must be, where it is possible; 0: as the estimates say. For tests, whose tensors are too small for most
// plans to be fast, and for benchmarks/plans.py, which times them all.
struct Wanted {
  int16_t two_passes;
  int16_t grid_teams;     // of a grid
  int16_t team, threads;  // of a block (1) or a cluster
};

struct Device {
  int multiprocessors;               // that a plan may use
  int shared_per_block;              // bytes, for a kernel that asks for more than 48 KB
  int max_cluster;                   // blocks of a cluster; 1: there are none
  bool grids = true;                 // whether a launch may wait until it has all of them for itself
  int grid_threads = kFewerThreads;  // of a grid's block
  Wanted wanted{};
};

namespace cuda {

inline std::atomic<Wanted> wanted{};

// Multiprocessors that plans may use from now on; 0: all, but no grids; below 0: all.
inline std::atomic<int> multiprocessor_limit{-1};

// What plans may use of a device now. The device itself is asked once.
Device device_of(int ordinal);

// Whether this binary has code that the device runs.
bool has_code(int ordinal);

// Bytes of dynamic shared memory that a kernel can be allowed.
int most_shared_bytes(int ordinal);

// Plans no grids of so many blocks, or more, from now on.
void forbid_grids(int ordinal, int blocks);

// Of this binary, which has them all for the same architectures.
const void* any_kernel();

}  // namespace cuda
}  // namespace ldm_fused
