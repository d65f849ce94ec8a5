// One read: what its kernels share. residence.h says how items are cut, and what a slot is.
#pragma once

#include <type_traits>

#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/team.cuh"

namespace ldm_fused {

template <class V, int kBytes = 64>
constexpr int kBatchOf = kBytes / sizeof(V);  // vectors that a thread works on side by side
constexpr unsigned kAllLanes = ~0u;

template <int N>
using Number = std::integral_constant<int, N>;

__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }
__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }

// ---- Where a thread is ----------------------------------------------------------------------------------------

struct Item {
  uint32_t index, n, c;  // n: sample; c: first channel
  int64_t first;         // offset of its first element
};

__device__ __forceinline__ Item item_of(const Shape& shape, const Residence& r, uint32_t index) {
  const uint32_t n = r.by_items_of_sample.quotient(index);
  Item item{index, n, (index - n * r.by_items_of_sample.divisor) * r.width, 0};
  item.first =
      r.columns ? item.n * shape.channels * shape.spatial + item.c : (item.n * shape.channels + item.c) * shape.spatial;
  return item;
}

// What block `rank` of the team has of a channel, in vectors (rows) or pixels (columns). The last blocks may have less
// than the others, or nothing.
__device__ __forceinline__ int chunk_of(const Residence& r, int rank) {
  return int(max(int64_t(0), min(r.extent - int64_t(rank) * r.chunk, int64_t(r.chunk))));
}

// Rows: lanes are a power of two.
__device__ __forceinline__ int lane_of_unit(const Residence& r) { return threadIdx.x & (r.lanes - 1); }

// A thread's vectors in one unit: at first, first + stride, ...
struct Span {
  int64_t first, stride;  // in elements: where the first one is, and from one to the next
  int count;              // may be 0
  int entry;              // where the unit's partial result goes; columns: that of the first channel
  int channel;            // of the item; columns: the first of the vector

  __device__ __forceinline__ int64_t at(int i) const { return first + i * stride; }
};

template <bool kColumns, int V>
__device__ __forceinline__ int64_t stride_of(const Shape& shape, const Residence& r) {
  return kColumns ? r.abreast * shape.channels : int64_t(r.lanes) * V;
}

template <bool kColumns, int V>
__device__ __forceinline__ Span span_of(const Shape& shape, const Residence& r, const Item& item, int rank, int round) {
  Span span{};
  span.stride = stride_of<kColumns, V>(shape, r);
  const int chunk = chunk_of(r, rank);
  if constexpr (kColumns) {
    const int row_in_warp = r.by_lanes.quotient(lane_index()), rows_of_warp = r.by_lanes.quotient(32);
    const int row = warp_index() * rows_of_warp + row_in_warp, column = lane_index() - row_in_warp * r.lanes;
    span.first = item.first + (int64_t(rank) * r.chunk + row) * shape.channels + column * V;
    span.count = row_in_warp < rows_of_warp && row < chunk ? r.by_abreast.quotient(chunk - row - 1) + 1 : 0;
    span.channel = column * V;
    span.entry = warp_index() * r.width + span.channel;
  } else {
    const int unit = round * r.abreast + r.by_lanes.quotient(threadIdx.x), channel = r.by_parts.quotient(unit);
    const int part = unit - channel * r.parts, begin = part * r.length + lane_of_unit(r);
    const int end = min((part + 1) * r.length, chunk);
    const bool exists = unit < r.entries;
    span.channel = exists ? channel : 0;
    span.first = item.first + span.channel * shape.spatial + (int64_t(rank) * r.chunk + begin) * V;
    span.count = exists && begin < end ? r.by_lanes.quotient(end - begin - 1) + 1 : 0;
    span.entry = unit;
  }
  return span;
}

// The vectors that went into the entries of one part: rows: of a channel's chunk; columns: of the pixels, by one warp.
template <bool kColumns>
__device__ __forceinline__ int vectors_of(const Residence& r, int chunk, int part) {
  if constexpr (kColumns) {
    const int whole = r.by_abreast.quotient(chunk), rows_of_warp = r.by_lanes.quotient(32);
    return whole * rows_of_warp + max(0, min(chunk - whole * r.abreast - part * rows_of_warp, rows_of_warp));
  }
  return max(0, min((part + 1) * r.length, chunk) - part * r.length);
}

// Entries of a channel.
template <bool kColumns>
__device__ __forceinline__ int parts_of(const Residence& r) {
  return kColumns ? blockDim.x / 32 : r.parts;
}

template <bool kColumns>
__device__ __forceinline__ int entry_of(const Residence& r, int channel, int part) {
  return kColumns ? part * r.width + channel : channel * r.parts + part;
}

// ---- Shared memory --------------------------------------------------------------------------------------------

// The tables in front of the slots, in this order; tables_of() counts their bytes.
struct Tables {
  Pair* groups;     // of each group, what the block's threads use
  float* exchange;  // what the block tells its team: a Pair of each group, and floats of each channel
  float* entries;   // partial results of the units
  float* channels;  // what vectors are computed with: kCenter of all channels, kSlope of all channels, ...
  int width;

  enum Value { kCenter, kSlope, kOffset, kK1, kK2 };

  // floats: of a partial result, and of each channel that are exchanged.
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

// A thread's slots, kPieces times 16 bytes each: V elements of each of one or two tensors. Neighbouring threads' pieces
// are neighbours: no two lanes meet in a bank.
template <int V, int kPieces>
struct Slots {
  uint4* own;

  template <class T>
  static constexpr int kPiecesOf = V * int(sizeof(T)) / 16;

  __device__ __forceinline__ Slots(const Residence& r, void* shared)
      : own(reinterpret_cast<uint4*>(static_cast<char*>(shared) + r.tables) + threadIdx.x) {}

  // The first piece of a slot; its next one is a block's threads further.
  __device__ __forceinline__ uint4* operator[](int slot) const { return own + slot * (kPieces * int(blockDim.x)); }

  template <class T>
  __device__ __forceinline__ void copy(uint4* piece, const T* from) const {
#pragma unroll
    for (int i = 0; i < kPiecesOf<T>; ++i) {
      copy_16_bytes_async(piece + i * blockDim.x, reinterpret_cast<const uint4*>(from) + i);
    }
  }

  template <class T>
  __device__ __forceinline__ Vec<T, V> read(const uint4* piece) const {
    uint4 words[kPiecesOf<T>];
#pragma unroll
    for (int i = 0; i < kPiecesOf<T>; ++i) words[i] = piece[i * blockDim.x];
    Vec<T, V> result;
    memcpy(&result, words, sizeof result);
    return result;
  }

  template <class T>
  __device__ __forceinline__ void write(uint4* piece, const Vec<T, V>& vector) const {
    uint4 words[kPiecesOf<T>];
    memcpy(words, &vector, sizeof vector);
#pragma unroll
    for (int i = 0; i < kPiecesOf<T>; ++i) piece[i * blockDim.x] = words[i];
  }
};

// Copies a thread's vectors of all its items to its slots, in the order of their use and ahead of it. What it copies
// goes by position: a unit that has fewer vectors than others leaves its last positions empty. A group of copies is a
// segment of an item, for which the thread waits together.
template <bool kColumns, bool kGrid, int V>
class Loader {
 public:
  __device__ __forceinline__ Loader(const Shape& shape, const Residence& r, uint32_t item, int rank)
      : item_(item), rank_(rank) {
    begin_unit(shape, r);
    begin_segment(r);
  }

  // Up to the position `end` of the current item, or of those behind it. copy_one(slot, offset) starts a copy.
  template <class F>
  __device__ __forceinline__ void copy_to(int end, const Shape& shape, const Residence& r, F&& copy_one) {
    const int64_t stride = stride_of<kColumns, V>(shape, r);
    while (ahead_ < end) {
      const int run = min(end - ahead_, burst_), copies = min(run, count_);
      int i = 0;
#pragma unroll kUnrolled
      for (; i + kTogether <= copies; i += kTogether, at_ += kTogether * stride) {
#pragma unroll
        for (int k = 0; k < kTogether; ++k) copy_one(slot_ + i + k, at_ + k * stride);
      }
#pragma unroll 1
      for (; i < copies; ++i, at_ += stride) copy_one(slot_ + i, at_);
      count_ -= run;
      slot_ += run;
      ahead_ += run;
      if ((burst_ -= run) == 0) next_burst(shape, r);
    }
  }

  // The current item is done with.
  __device__ __forceinline__ void next_item(const Residence& r) { ahead_ -= r.kept; }

 private:
  static constexpr int kTogether = 4;  // copies: their instructions stand together, of which the first costs more
  static constexpr int kUnrolled = kGrid ? 1 : 4;  // a grid copies in between, a few at a time
  static constexpr int kForever = 1 << 30;         // ahead of all items

  __device__ __forceinline__ void next_burst(const Shape& shape, const Residence& r) {
    if (slot_ == r.slots) slot_ = 0;
    if (left_ > 0) return begin_burst(r);
    commit_copies();
    position_ += r.segment;
    if (position_ >= r.kept) {
      position_ = round_ = 0;
      if ((item_ += r.teams) >= r.items) {
        ahead_ = kForever;
        return;
      }
      begin_unit(shape, r);
    } else if (r.rounds > 1) {  // whose segments are units
      ++round_;
      begin_unit(shape, r);
    }
    begin_segment(r);
  }

  __device__ __forceinline__ void begin_segment(const Residence& r) {
    left_ = min(r.segment, r.kept - position_);
    begin_burst(r);
  }

  __device__ __forceinline__ void begin_burst(const Residence& r) {
    burst_ = min(left_, r.slots - slot_);
    left_ -= burst_;
  }

  __device__ __forceinline__ void begin_unit(const Shape& shape, const Residence& r) {
    const Span span = span_of<kColumns, V>(shape, r, item_of(shape, r, item_), rank_, round_);
    at_ = span.first;
    count_ = span.count;
  }

  uint32_t item_;
  int rank_, round_ = 0;
  int position_ = 0;  // of the segment's first vector in its item
  int ahead_ = 0;     // of the current item's first vector
  int slot_ = 0;
  int burst_;  // positions up to the end of the segment or of the ring
  int left_;   // positions of the segment behind that
  int count_;  // vectors that are left of the unit; below 0 where it has fewer than positions
  int64_t at_;
};

// ---- Blocks ---------------------------------------------------------------------------------------------------

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

  // Of the item's first group in mean, rstd and projections.
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

  // The same, the last ones first.
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

  // Vectors that may have been copied once those in front of the k-th are used up: no further than the next item, for
  // which the next wait is.
  __device__ __forceinline__ int room_behind(int k) const { return min(k + r.slots, 2 * r.kept); }

  // To the team's next item; false: there is none. All threads of the block are done with the tables then.
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
