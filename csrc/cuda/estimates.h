// How long things take: the plan's estimates, which tools/time_model.py uses too. Plain C++.
//
// No GPU has run these kernels, so none of these numbers is measured here. They come from:
//   kBytesPerNanosecond  an H200's data sheet: 90 % of 4.8 TB/s, over 132 multiprocessors. Other devices move less, but
//                        their waits are about as long: there the plan gives waits too much weight;
//   kComputedPerNanosecond  four warps of 32 lanes a cycle at 1.755 GHz (H100), over the 16 and 26 instructions that
//                        `make sass` counts for an element of bfloat16, forward and backward, of 4 and 6 bytes;
//   kLaunch              what one kernel leaves idle between two others: published measurements of empty kernels in a
//                        stream or a graph are 1 to 3 us;
//   kClusterWait         a barrier of a cluster and reads of distributed shared memory, of 180 cycles each (Luo et al.,
//                        arXiv:2402.13499, on an H100), are some 0.3 us; the rest is that blocks do not end together;
//   kWait                a barrier through global memory takes three to four trips to L2, about 1.5 us for a whole V100
//                        (Zhang et al., arXiv:2004.05371); the rest, again, is that blocks do not end together;
//   kHiddenWait          a guess of how much of kWait is left while the next item's loads keep memory busy.
#pragma once

#include <cstdint>

namespace ldm_fused {

constexpr double kBytesPerNanosecond = 32;     // that one multiprocessor moves
constexpr double kComputedPerNanosecond = 54;  // bytes whose elements it computes, of all that are moved
constexpr double kLaunch = 2000;               // nanoseconds between dependent kernels
constexpr double kClusterWait = 1000;          // that a cluster waits for its last block
constexpr double kWait = 2000;                 // the same for a team of a grid
constexpr double kHiddenWait = 500;            // the same while the next item's loads are in flight

// Nanoseconds of a multiprocessor that takes `items` in turn, moves `bytes` of each and waits. `alone`: nothing is
// moved while it computes.
inline double time_of_items(int64_t items, double bytes, double wait, bool alone) {
  const double computing = alone ? bytes / kComputedPerNanosecond : 0;
  return double(items) * (bytes / kBytesPerNanosecond + computing + wait);
}

// Nanoseconds of dependent kernels that together move `bytes`.
inline double time_of_kernels(int kernels, double bytes, int multiprocessors) {
  return bytes / multiprocessors / kBytesPerNanosecond + kernels * kLaunch;
}

}  // namespace ldm_fused
