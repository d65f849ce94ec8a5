// One read: where a thread is in an item. residence.h says how items are cut into units.
#pragma once

#include "cuda/common.cuh"

namespace ldm_fused {

__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }
__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }

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

}  // namespace ldm_fused
