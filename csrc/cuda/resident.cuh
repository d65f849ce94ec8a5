// One read: what a block of its kernels keeps in shared memory, and how it goes from item to item.
#pragma once

#include <type_traits>

#include "cuda/launch.h"
#include "cuda/loader.cuh"
#include "cuda/team.cuh"

namespace ldm_fused {

template <class V, int kBytes = 64>
constexpr int kBatchOf = kBytes / sizeof(V);  // vectors that a thread works on side by side
constexpr unsigned kAllLanes = ~0u;

// Of a grid's block, which has a multiprocessor to itself: device.cpp tells the plan. On all other architectures ptxas
// does not get by with the registers of 512 threads.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int kGridThreads = kFewerThreads;
#else
constexpr int kGridThreads = kMostThreads;
#endif

template <int N>
using Number = std::integral_constant<int, N>;

// The tables in front of the slots, in this order; tables_of() counts their bytes.
struct Tables {
  Pair* groups;     // of each group, what the block's threads use
  float* exchange;  // what the block tells its team: a Pair of each group, and floats of each channel
  float* entries;   // partial results of the units
  float* channels;  // what vectors are computed with: kCenter of all channels, kSlope of all channels, ...
  int width;

  enum Value { kCenter, kSlope, kOffset, kK1, kK2 };

  // partial: floats of a partial result; totals: floats of each channel that are exchanged.
  __device__ __forceinline__ Tables(const Residence& r, void* shared, int partial, int totals) : width(r.width) {
    groups = static_cast<Pair*>(shared);
    exchange = reinterpret_cast<float*>(groups + r.bundle);
    entries = exchange + 2 * r.bundle + totals * r.width;
    channels = entries + partial * r.entries;
  }

  __device__ __forceinline__ float& channel(Value value, int c) const { return channels[value * width + c]; }

  __device__ __forceinline__ void set(int c, const ChannelAffine<float>& affine) const {
    channel(kCenter, c) = affine.center;
    channel(kSlope, c) = affine.slope;
    channel(kOffset, c) = affine.offset;
  }

  // A value of kChannels channels from c on.
  template <int kChannels>
  __device__ __forceinline__ Vec<float, kChannels> read(Value value, int c) const {
    return load<float, kChannels>(&channel(value, c));
  }
};

// What a block goes from item to item with. kPieces: of a slot, 16 bytes each.
template <int V, bool kColumns, bool kGrid, int kPieces>
struct ResidentBlock {
  static constexpr int kChannels = kColumns ? V : 1;  // of a vector
  static constexpr int kElements = V / kChannels;     // of a channel in a vector

  const Shape& shape;
  const Residence& r;
  const Tables tables;
  const Slots<V, kPieces> slots;
  Team<kGrid> team;
  Item item;
  Loader<kColumns, kGrid, V> loader;
  int first_slot = 0;  // of the item

  // partial: floats of a partial result; totals: floats of each channel that are exchanged.
  template <class Params>
  __device__ __forceinline__ ResidentBlock(const Params& p, void* shared, int partial, int totals)
      : shape(p.shape),
        r(p.residence),
        tables(r, shared, partial, totals),
        slots(r, shared),
        team(r, p.partials, tables.exchange, totals),
        item(item_of(shape, r, team.index)),
        loader(shape, r, item.index, team.rank) {}

  __device__ __forceinline__ int group_channels() const { return r.by_group_channels.divisor; }

  // The place of the item's first group in mean, rstd and projections.
  __device__ __forceinline__ int64_t first_group() const { return int64_t(item.index) * r.bundle; }

  // The thread's vectors of its unit in that round.
  __device__ __forceinline__ Span span(int round) const {
    return span_of<kColumns, V>(shape, r, item, team.rank, round);
  }

  // The slot that has the thread's k-th vector of the item.
  __device__ __forceinline__ int slot_of(int k) const {
    const int slot = first_slot + k;
    return kGrid && slot >= r.slots ? slot - r.slots : slot;
  }

  // Calls f(Number<N>, slot, at) for the steps from `step` to `end` of a round whose vectors are in slots, kBatch at a
  // time and what is left one by one, and after(step) now and then. Offsets are added up: a multiplication of 64 bits
  // is several instructions.
  template <int kBatch, class F, class After>
  __device__ __forceinline__ void each_kept(const Span& span, int round, int step, int end, F&& f,
                                            After&& after) const {
    int slot = slot_of(round * r.steps + step);
    int64_t at = span.at(step);
    while (step < end) {
      const int run_ends = kGrid ? min(end, step + r.slots - slot) : end;  // not over the ring's end
      for (; step + kBatch <= run_ends; after(step)) {
        f(Number<kBatch>{}, slot, at);
        step += kBatch;
        slot += kBatch;
        at += kBatch * span.stride;
      }
      for (; step < run_ends; ++step, ++slot, at += span.stride) f(Number<1>{}, slot, at);
      if constexpr (!kGrid) return;
      if (slot == r.slots) slot = 0;
      after(step);
    }
  }

  // Calls f(Number<N>, at) for the steps from `step` to `end`, kBatch at a time and what is left one by one.
  template <int kBatch, class F>
  __device__ __forceinline__ void each_of(const Span& span, int step, int end, F&& f) const {
    int64_t at = span.at(step);
    for (; step + kBatch <= end; step += kBatch, at += kBatch * span.stride) f(Number<kBatch>{}, at);
    for (; step < end; ++step, at += span.stride) f(Number<1>{}, at);
  }

  // The same in reverse order.
  template <int kBatch, class F>
  __device__ __forceinline__ void each_back(const Span& span, int step, int end, F&& f) const {
    int64_t at = span.at(end - 1);
    for (; end - kBatch >= step; end -= kBatch, at -= kBatch * span.stride) {
      f(Number<kBatch>{}, at - (kBatch - 1) * span.stride);
    }
    for (; end > step; --end, at -= span.stride) f(Number<1>{}, at);
  }

  // Waits for the thread's copies of a segment of the item, of which only the later ones may still be on their way.
  __device__ __forceinline__ void wait_for_segment(int segment) const {
    switch (r.segments() - 1 - segment) {
      case 0: wait_for_copies<0>(); break;
      case 1: wait_for_copies<1>(); break;
      case 2: wait_for_copies<2>(); break;
      default: wait_for_copies<3>();
    }
  }

  // How many vectors may have been copied once those in front of the k-th are used up: none beyond the next item, for
  // which the next wait is.
  __device__ __forceinline__ int room_behind(int k) const { return min(k + r.slots, 2 * r.kept); }

  // Goes to the team's next item; false if there is none. All threads of the block are then done with the tables.
  __device__ __forceinline__ bool next_item() {
    if constexpr (!kGrid) return false;
    loader.next_item(r);
    team.next_item();
    first_slot += r.kept;
    if (first_slot >= r.slots) first_slot -= r.slots;
    item = item_of(shape, r, item.index + r.teams);
    __syncthreads();
    return item.index < r.items;
  }
};

// ---- Reductions -----------------------------------------------------------------------------------------------

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// Merges values of a warp's lanes that have the same column, r.lanes apart; the results are the first row's.
template <class T>
__device__ __forceinline__ void merge_warp_rows(T& value, const Residence& r) {
  const int row = r.by_lanes.quotient(lane_index());
  for (int height = r.by_lanes.quotient(32); height > 1;) {
    const int half = (height + 1) / 2;
    const T other = shuffle_down(value, half * r.lanes, 32);
    if (row + half < height) value.merge(other);
    height = half;
  }
}

}  // namespace ldm_fused
