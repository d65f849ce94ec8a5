// How long things take: the estimates that plans are chosen by. Plain C++.
//
// Fitted to the times of the workloads' plans on an H200 in bfloat16, in both layouts and passes (`python
// benchmarks/plans.py`; benchmarks/NOTES.md, "Measured times"). They are for choosing, not for saying how long a call
// takes. All devices are taken for an H200 with fewer multiprocessors. Where memory is slower, waits weigh too much.
#pragma once

#include <cstdint>

namespace ldm_fused {

// Of one pass's kernels.
struct Rates {
  double block;               // bytes a nanosecond that a multiprocessor's blocks move, one item each
  double grid, grid_columns;  // the same in a grid
  double rank;                // nanoseconds that a grid's team waits longer for each block that it has
};

constexpr Rates kForwardRates{28, 22, 22, 20}, kBackwardRates{22, 22, 17, 90};
constexpr double kUsedByClusters = 10.0 / 11;  // of the multiprocessors, by clusters of four and more
constexpr double kBlock = 3700;                // nanoseconds of a block besides what it moves
constexpr double kDoubled = 400;               // the same more for each time that its cluster is doubled
constexpr double kIdle = 0.3;                  // so much longer with half the threads that a multiprocessor takes
constexpr double kWait = 5000;                 // nanoseconds that a grid's team waits for its last block
constexpr double kAgainRows = 40, kAgainColumns = 14;          // bytes a nanosecond that a grid reads again
constexpr double kStreamedRows = 28.5, kStreamedColumns = 25;  // the same in two passes
constexpr double kStreaming = 16000;  // nanoseconds of two passes besides, more than one kernel's
constexpr double kPartial = 0.07;     // the same for each partial result in columns

// Nanoseconds of `rounds` of clusters, in each of which a multiprocessor moves `bytes`. `full`: the part of the threads
// that it takes which it has.
inline double time_of_clusters(int64_t rounds, double bytes, int team, double full, const Rates& rates) {
  double besides = kBlock;
  for (int blocks = 1; blocks < team; blocks *= 2) besides += kDoubled;
  return double(rounds) * (besides + bytes / rates.block * (1 + (full < 1 ? kIdle * (1 / full - 1) : 0)));
}

// Nanoseconds of a multiprocessor that takes `items` in turn, moves `bytes` of each, and reads some `again`.
inline double time_of_grid(int64_t items, double bytes, double again, bool columns, int team, const Rates& rates) {
  const double rate = columns ? rates.grid_columns : rates.grid;
  const double moving = bytes / rate + again / (columns ? kAgainColumns : kAgainRows);
  return double(items) * (moving + kWait + rates.rank * team);
}

// Nanoseconds of two passes in which a multiprocessor moves `bytes`, with so many partial results.
inline double time_of_streaming(double bytes, bool columns, int64_t partials) {
  return kStreaming + (columns ? bytes / kStreamedColumns + double(partials) * kPartial : bytes / kStreamedRows);
}

}  // namespace ldm_fused
