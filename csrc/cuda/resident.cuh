// One read: what its kernels share. residence.h says how items are cut, and what a slot is.
#pragma once

#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>

#include "cuda/launch.h"

namespace ldm_fused {

template <class V>
constexpr int kBatchOf = 64 / sizeof(V);  // vectors that a thread works on side by side
constexpr unsigned kAllLanes = ~0u;

__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }
__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }

// ---- Where a thread is ----------------------------------------------------------------------------------------

struct Item {
  uint32_t index, n, c;  // n: sample; c: first channel
  int64_t first;         // offset of its first element
};

// In 32 bits, of which all need few enough: registers are short, and a longer division is a call.
__device__ __forceinline__ Item item_of(const Shape& shape, const Residence& r, uint32_t index) {
  const uint32_t bundles = uint32_t(shape.groups) / uint32_t(r.bundle);
  Item item{index, index / bundles, index % bundles * r.width, 0};
  item.first =
      r.columns ? item.n * shape.channels * shape.spatial + item.c : (item.n * shape.channels + item.c) * shape.spatial;
  return item;
}

// What block `rank` of the team has of a channel, in vectors (rows) or pixels (columns). The last blocks may have less
// than the others, or nothing.
__device__ __forceinline__ int chunk_of(const Residence& r, int rank) {
  return int(max(int64_t(0), min(r.extent - int64_t(rank) * r.chunk, int64_t(r.chunk))));
}

// A thread's vectors in one unit: at first, first + stride, ...
struct Span {
  int64_t first, stride;  // offsets in elements
  int count;              // may be 0
  int entry;              // where the unit's partial result goes; columns: that of the first channel
  int channel;            // of the item; columns: the first of the vector

  __device__ __forceinline__ int64_t at(int i) const { return first + i * stride; }
};

// Pixels that a block's threads have side by side.
__device__ __forceinline__ int pixels_abreast(const Residence& r) { return blockDim.x / 32 * (32 / r.lanes); }

template <bool kColumns, int V>
__device__ __forceinline__ int64_t stride_of(const Shape& shape, const Residence& r) {
  return kColumns ? pixels_abreast(r) * shape.channels : int64_t(r.lanes) * V;
}

template <bool kColumns, int V>
__device__ __forceinline__ Span span_of(const Shape& shape, const Residence& r, const Item& item, int rank, int round) {
  Span span{};
  span.stride = stride_of<kColumns, V>(shape, r);
  const int chunk = chunk_of(r, rank);
  if constexpr (kColumns) {
    const int abreast = 32 / r.lanes, rows = pixels_abreast(r);
    const int row = warp_index() * abreast + lane_index() / r.lanes, column = lane_index() % r.lanes;
    span.first = item.first + (int64_t(rank) * r.chunk + row) * shape.channels + column * V;
    span.count = lane_index() < abreast * r.lanes && row < chunk ? (chunk - row - 1) / rows + 1 : 0;
    span.channel = column * V;
    span.entry = warp_index() * r.width + span.channel;
  } else {
    const int unit = round * (blockDim.x / r.lanes) + threadIdx.x / r.lanes;
    const int part = unit % r.parts, begin = part * r.length + threadIdx.x % r.lanes;
    const int end = min((part + 1) * r.length, chunk);
    const bool exists = unit < r.entries;
    span.channel = exists ? unit / r.parts : 0;
    span.first = item.first + span.channel * shape.spatial + (int64_t(rank) * r.chunk + begin) * V;
    span.count = exists && begin < end ? (end - begin - 1) / r.lanes + 1 : 0;
    span.entry = unit;
  }
  return span;
}

// The vectors that went into the entries of one part: rows: of a channel's chunk; columns: of the pixels, by one warp.
template <bool kColumns>
__device__ __forceinline__ int vectors_of(const Residence& r, int chunk, int part) {
  if constexpr (kColumns) {
    const int abreast = 32 / r.lanes, rows = pixels_abreast(r);
    return chunk / rows * abreast + max(0, min(chunk % rows - part * abreast, abreast));
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

struct alignas(8) Pair {
  float a, b;
};

// The tables in front of the slots, in this order; tables_of() counts their bytes.
struct Tables {
  Pair* groups;                  // of each group, what the block's threads use
  float* exchange;               // what the block tells its team: a Pair of each group, and floats of each channel
  float* entries;                // partial results of the units
  ChannelAffine<float>* affine;  // of each channel

  // floats: of a partial result, and of each channel that are exchanged.
  __device__ __forceinline__ Tables(const Residence& r, void* shared, int partial, int totals) {
    groups = static_cast<Pair*>(shared);
    exchange = reinterpret_cast<float*>(groups + r.bundle);
    entries = exchange + 2 * r.bundle + totals * r.width;
    affine = reinterpret_cast<ChannelAffine<float>*>(entries + partial * r.entries);
  }
};

// A thread's slots, V elements of each of one or two tensors in each.
template <int V>
struct Slots {
  uint4* own;

  template <class T>
  static constexpr int kPieces = V * int(sizeof(T)) / 16;

  __device__ __forceinline__ Slots(const Residence& r, void* shared)
      : own(reinterpret_cast<uint4*>(static_cast<char*>(shared) + r.tables) + threadIdx.x) {}

  // Neighbouring threads' pieces are neighbours: no two lanes meet in a bank.
  __device__ __forceinline__ uint4* piece(int i) const { return own + i * blockDim.x; }

  template <class T>
  __device__ __forceinline__ void copy(int first_piece, const T* from) const {
#pragma unroll
    for (int i = 0; i < kPieces<T>; ++i) {
      __pipeline_memcpy_async(piece(first_piece + i), reinterpret_cast<const uint4*>(from) + i, 16);
    }
  }

  template <class T>
  __device__ __forceinline__ Vec<T, V> read(int first_piece) const {
    uint4 words[kPieces<T>];
#pragma unroll
    for (int i = 0; i < kPieces<T>; ++i) words[i] = *piece(first_piece + i);
    Vec<T, V> result;
    memcpy(&result, words, sizeof result);
    return result;
  }
};

// Copies a thread's vectors of all its items to its slots, in the order of their use and ahead of it.
template <bool kColumns, int V>
class Loader {
 public:
  __device__ __forceinline__ Loader(const Shape& shape, const Residence& r, uint32_t item, int rank)
      : item_(item), rank_(rank) {
    begin_unit(shape, r);
  }

  // Up to the position `end` of the current item, or of those behind it. copy_one(slot, offset) starts a copy.
  template <class F>
  __device__ __forceinline__ void copy_to(int end, const Shape& shape, const Residence& r, F&& copy_one) {
    for (; ahead_ < end && item_ < r.items; ++ahead_) {
      if (step_ < count_) copy_one(slot_, at_);
      at_ += stride_of<kColumns, V>(shape, r);
      if (++slot_ == r.slots) slot_ = 0;
      const bool item_ends = round_ * r.steps + ++step_ == r.kept;
      if (!item_ends && step_ < r.steps) continue;
      step_ = 0;
      round_ = item_ends ? 0 : round_ + 1;
      if (item_ends) item_ += r.teams;
      begin_unit(shape, r);
    }
    __pipeline_commit();
  }

  // The current item is done with.
  __device__ __forceinline__ void next_item(const Residence& r) { ahead_ -= r.kept; }

 private:
  __device__ __forceinline__ void begin_unit(const Shape& shape, const Residence& r) {
    const Span span = span_of<kColumns, V>(shape, r, item_of(shape, r, item_), rank_, round_);
    at_ = span.first;
    count_ = span.count;
  }

  uint32_t item_;
  int rank_, ahead_ = 0, round_ = 0, step_ = 0, slot_ = 0, count_;
  int64_t at_;
};

// ---- Teams ----------------------------------------------------------------------------------------------------

// Not there before compute capability 9.0, where no plan asks for it.
__device__ __forceinline__ void cluster_sync() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#endif
}

template <class T>
__device__ __forceinline__ T* in_block_of_cluster(T* shared, int rank) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
#else
  return shared;
#endif
}

// Memory of a grid's teams, apart so that they do not wait for each other's lines.
struct TeamCounter {
  unsigned arrived, padding[31];
};

// The blocks that share an item. Each leaves what it has of the item's groups, and of its channels, in tables.exchange;
// after exchange() all can read it. In a grid that goes through memory, in two places by turns: who writes the next
// item's results cannot overtake who still reads this one's, but may be one exchange ahead.
template <bool kGrid>
class Team {
 public:
  const int index, rank, size;

  // `floats` of each channel are exchanged beside the Pair of each group.
  __device__ __forceinline__ Team(const Residence& r, void* workspace, const Tables& tables, int floats)
      : index(blockIdx.x / r.team),
        rank(blockIdx.x % r.team),
        size(r.team),
        bundle_(r.bundle),
        floats_(int(round_up(floats * r.width, 2))),
        own_(tables.exchange) {
    if constexpr (kGrid) {
      counter_ = static_cast<TeamCounter*>(workspace) + index;
      memory_ = reinterpret_cast<float*>(static_cast<TeamCounter*>(workspace) + r.teams) +
                int64_t(index) * 2 * size * (2 * bundle_ + floats_);
    }
  }

  // Before the first exchange.
  __device__ __forceinline__ void start() {
    if constexpr (kGrid) {
      if (rank == 0 && threadIdx.x == 0) counter_->arrived = 0;
      cooperative_groups::this_grid().sync();
    }
  }

  // Waits until all blocks of the team are here, and does something else first.
  template <class F>
  __device__ __forceinline__ void exchange(F&& meanwhile) {
    if constexpr (kGrid) {
      target_ += size;
      __syncthreads();
      publish();
      __syncthreads();
      if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(&counter_->arrived, 1u);
      }
      meanwhile();
      if (threadIdx.x == 0) {
        while (atomicAdd(&counter_->arrived, 0u) < target_) __nanosleep(32);
        __threadfence();
      }
      __syncthreads();
    } else if (size > 1) {  // alone, each thread reads what it has written itself
      cluster_sync();
    }
  }

  __device__ __forceinline__ Pair group_of(int from, int g) const {
    if constexpr (kGrid) return groups()[g * size + from];
    return reinterpret_cast<const Pair*>(of_block(from))[g];
  }

  // The floats of each channel, all channels of the first one first.
  __device__ __forceinline__ const float* channels_of(int from) const {
    if constexpr (kGrid) return channels() + from * floats_;
    return of_block(from) + 2 * bundle_;
  }

  __device__ __forceinline__ void next_item() { turn_ ^= 1; }

  // No block may leave while another reads its shared memory.
  __device__ __forceinline__ void leave() {
    if (!kGrid && size > 1) cluster_sync();
  }

 private:
  __device__ __forceinline__ float* turn() const { return memory_ + turn_ * size * (2 * bundle_ + floats_); }
  // A group's pairs are neighbours, because each block reads them all.
  __device__ __forceinline__ Pair* groups() const { return reinterpret_cast<Pair*>(turn()); }
  __device__ __forceinline__ float* channels() const { return turn() + 2 * bundle_ * size; }

  __device__ __forceinline__ float* of_block(int from) const {
    return size > 1 ? in_block_of_cluster(own_, from) : own_;
  }

  __device__ __forceinline__ void publish() {
    for (int g = threadIdx.x; g < bundle_; g += blockDim.x) {
      groups()[g * size + rank] = reinterpret_cast<const Pair*>(own_)[g];
    }
    for (int i = threadIdx.x; i < floats_; i += blockDim.x) channels()[rank * floats_ + i] = own_[2 * bundle_ + i];
  }

  int bundle_, floats_, turn_ = 0;
  float* own_;
  float* memory_ = nullptr;
  TeamCounter* counter_ = nullptr;
  unsigned target_ = 0;
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
  const Slots<V> slots;
  Team<kGrid> team;
  Item item;
  Loader<kColumns, V> loader;
  int first_slot = 0;  // of the item

  // partial: floats of a partial result; totals: floats of each channel that are exchanged.
  template <class Params>
  __device__ __forceinline__ ResidentBlock(const Params& p, void* shared, int partial, int totals)
      : shape(p.shape),
        r(p.residence),
        tables(r, shared, partial, totals),
        slots(r, shared),
        team(r, p.partials, tables, totals),
        item(item_of(shape, r, team.index)),
        loader(shape, r, item.index, team.rank) {}

  __device__ __forceinline__ int group_channels() const { return r.width / r.bundle; }

  // The thread's vectors of its unit in that round.
  __device__ __forceinline__ Span span(int round) const {
    return span_of<kColumns, V>(shape, r, item, team.rank, round);
  }

  // The first piece of the slot that has the thread's k-th vector of the item.
  __device__ __forceinline__ int piece_of(int k) const {
    const int slot = first_slot + k;
    return (slot < r.slots ? slot : slot - r.slots) * kPieces;
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

// Merges values of a warp's lanes that have the same column, lanes apart; the results are the first row's.
template <class T>
__device__ __forceinline__ void merge_warp_rows(T& value, int lanes) {
  const int row = lane_index() / lanes;
  for (int height = 32 / lanes; height > 1;) {
    const int half = (height + 1) / 2;
    const T other = shuffle_down(value, half * lanes, 32);
    if (row + half < height) value.merge(other);
    height = half;
  }
}

}  // namespace ldm_fused
