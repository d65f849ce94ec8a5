// Two passes: how the tensor is cut for kernels that stream over it. Plain C++, no CUDA, no torch.
//
// A first pass reduces the tensor (statistics; backward: gradient sums), a second pass, which needs the reductions,
// writes the result. A pass is cut into units, and a unit never leaves its channels, so that what a thread needs to
// know of a channel is constant while it streams:
//   rows     contiguous memory: a unit is a chunk of one channel, shared by a team of 1 to 256 threads;
//   columns  channels_last: a unit is a chunk of pixels, a thread stays on its vector of channels.
// The reductions leave one partial result a channel and chunk; a small kernel merges them in a fixed order.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/device.h"
#include "problem.h"

namespace ldm_fused {

struct Tiling {
  bool columns;    // the layout, see above
  int vector;      // consecutive elements a thread moves at once: 16 bytes of them, or 1 where they are not aligned
  int team;        // rows: threads sharing a unit, a power of two up to 32, or the whole block
  int block_x;     // rows: threads of a block; columns: vectors of channels side by side
  int block_y;     // columns: pixels one below the other
  int64_t chunk;   // elements of a channel in one unit
  int64_t chunks;  // units covering a channel
  int64_t grid_x;
  int grid_y;  // columns: blocks side by side that cover all channels
};

constexpr int kThreads = 256;           // of a streaming block
constexpr int kVectorsInFlight = 4;     // loads a thread issues before it uses the first one
constexpr int kBlocksPerProcessor = 8;  // 8 x 256 threads fill a multiprocessor
constexpr int kManyBlocks = 64;         // a multiprocessor, of long units: the last ones end nearly together
constexpr int kVectorsOfLongUnit = 16;  // of a thread: to begin takes little of its time
constexpr int kEnoughBlocks = 2;        // a multiprocessor: below that, more blocks are worth more partial results
constexpr int kPixelsPerPartial = 32;   // of a channels_last chunk: partial results stay below 9 % of the traffic

inline Tiling tile_rows(const Shape& shape, int vector, const Device& device) {
  const int64_t vectors = ceil_div(shape.spatial, vector);
  Tiling t{};
  t.vector = vector;
  t.block_x = kThreads;
  t.block_y = 1;
  t.grid_y = 1;
  if (vectors > 32 * 2 * kVectorsInFlight) {
    const auto blocks = [&](int per_processor) {
      return ceil_div(int64_t(device.multiprocessors) * per_processor, shape.rows());
    };
    const int64_t useful = ceil_div(vectors, kThreads * kVectorsInFlight);
    const int64_t cheap = std::min(blocks(kManyBlocks), vectors / (kThreads * kVectorsOfLongUnit));
    const int64_t units = std::min(std::max(blocks(kBlocksPerProcessor), cheap), useful);
    const int64_t chunk_vectors = ceil_div(ceil_div(vectors, units), kThreads) * kThreads;
    t.team = kThreads;
    t.chunk = chunk_vectors * vector;
  } else {
    t.team = 1;
    while (t.team < 32 && t.team < vectors) t.team *= 2;
    t.chunk = vectors * vector;
  }
  t.chunks = ceil_div(shape.spatial, t.chunk);
  t.grid_x = ceil_div(shape.rows() * t.chunks, kThreads / t.team);
  return t;
}

inline Tiling tile_columns(const Shape& shape, int vector, const Device& device) {
  const int64_t vectors = ceil_div(shape.channels, vector);
  Tiling t{};
  t.columns = true;
  t.vector = vector;
  t.grid_y = int(ceil_div(vectors, kThreads));
  t.block_x = int(ceil_div(vectors, t.grid_y));
  t.block_y = kThreads / t.block_x;
  const auto blocks = [&](int per_processor) {
    return ceil_div(int64_t(device.multiprocessors) * per_processor, shape.batch * t.grid_y);
  };
  const int64_t useful = ceil_div(shape.spatial, t.block_y * kVectorsInFlight);
  const int64_t cheap = std::max(ceil_div(shape.spatial, kPixelsPerPartial), blocks(kEnoughBlocks));
  const int64_t units = std::min({useful, cheap, blocks(kBlocksPerProcessor)});
  t.chunk = ceil_div(ceil_div(shape.spatial, units), t.block_y) * t.block_y;
  t.chunks = ceil_div(shape.spatial, t.chunk);
  t.grid_x = shape.batch * t.chunks;
  return t;
}

// `widest` is the vector that moves 16 bytes of the narrowest tensor of the pass. It is used where every vector of
// every tensor starts at a multiple of 16 bytes; `aligned` says whether the tensors themselves do.
inline Tiling tile(const Shape& shape, int widest, bool aligned, const Device& device) {
  const bool columns = shape.walks_columns();
  const int64_t run = columns ? shape.channels : shape.spatial;
  const int vector = aligned && run % widest == 0 ? widest : 1;
  return columns ? tile_columns(shape, vector, device) : tile_rows(shape, vector, device);
}

constexpr int vector_of(int size) { return 16 / size; }

inline int64_t partials_of(const Shape& shape, const Tiling& reduce) { return shape.rows() * reduce.chunks; }

// What a streaming pass reads of its channels before it streams: `channel_bytes` of each channel and `group_bytes` of
// its group. Rows read them once a warp, columns once a block; a warp reads what its lanes have in common once.
inline int64_t channel_reads(const Shape& shape, const Tiling& t, int64_t channel_bytes, int64_t group_bytes) {
  const int64_t per_group = shape.channels_per_group();
  int64_t readers, channels;  // warps that read, and how many channels each
  if (t.columns) {
    readers = t.grid_x * ceil_div(shape.channels, 32);
    channels = 32;
  } else {
    readers = ceil_div(shape.rows() * t.chunks * t.team, 32);
    channels = t.team < 32 ? 32 / t.team : 1;
  }
  return readers * (channels * channel_bytes + (1 + (channels - 1) / per_group) * group_bytes);
}

}  // namespace ldm_fused
