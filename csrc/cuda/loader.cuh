// One read: how a thread's vectors come to shared memory. residence.h says what a slot is.
#pragma once

#include "cuda/units.cuh"

namespace ldm_fused {

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

  // Moves on from the current item.
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

}  // namespace ldm_fused
