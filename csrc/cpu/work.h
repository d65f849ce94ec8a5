// How the CPU's ops cut a tensor into units of work and hand them to the threads. Units have a fixed size, and their
// results are merged in a fixed order: the bits do not depend on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "cpu/kernels.h"

namespace ldm_fused {
namespace cpu {

constexpr int64_t kChunk = 4096;         // elements that both steps of the statistics find in the first-level cache
constexpr int64_t kTile = 32768;         // elements of rows that one call of a kernel walks
constexpr int64_t kColumnTile = 65536;   // elements of pixels that one call of a kernel walks twice
constexpr int64_t kSmallParts = 8192;    // elements of small parts that a thread takes through each step at once
constexpr int64_t kNear = 589824;        // bytes of a group that a cache holds while the next one is prefetched
constexpr int64_t kNearBundle = 393216;  // bytes of a bundle that the second-level cache holds beside the next one
constexpr int64_t kGrain = 16384;        // elements worth a thread
constexpr int64_t kKept = 4194304;       // elements of the largest part whose dz is kept for the input gradient

// Memory that nothing has written yet. A std::vector would write zeros to it first.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : values_(size ? new T[size] : nullptr) {}
  T* data() const { return values_.get(); }
  T& operator[](int64_t i) const { return values_[i]; }

 private:
  std::unique_ptr<T[]> values_;
};

// Memory for a tile before or after dropout, which the calling thread keeps.
template <class A>
A* tile_of_thread(int64_t elements) {
  thread_local std::vector<A> tile;
  if (int64_t(tile.size()) < elements) tile.resize(elements);
  return tile.data();
}

// Calls f(begin, end) for ranges of [0, count) on all threads. Each of the `count` has about `elements` elements.
template <class F>
void parallel_over(int64_t count, int64_t elements, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
  torch::stable::parallel_for(0, count, grain, f);
}

// A part has statistics of its own: it is a group, or in channels_last a bundle of groups.
struct Parts {
  int64_t count, elements;            // elements of each
  int64_t first_units, second_units;  // of each, in the two passes
  int64_t scratch;                    // elements of scratch memory for each
};

// Takes every part through three steps: first(part, unit, scratch) for its units, then merge(part), then second(part,
// unit, scratch) for its units, the last one first. Where threads can share the parts out evenly, each takes whole
// parts, which stay in its cache. It takes several small parts through a step before the next step, so that no step
// waits for the one before. Else all threads share each step, of as many parts as there is scratch memory for.
template <class A, class First, class Merge, class Second>
void two_passes(const Parts& parts, const First& first, const Merge& merge, const Second& second) {
  const int64_t threads = torch::stable::get_num_threads();
  if (parts.count >= 4 * threads || parts.count % threads == 0) {
    const int64_t together = std::max<int64_t>(1, kSmallParts / parts.elements);
    parallel_over(ceil_div(parts.count, together), together * parts.elements, [&](int64_t begin, int64_t end) {
      const Buffer<A> scratch(together * parts.scratch);
      for (int64_t p0 = begin * together; p0 < std::min(end * together, parts.count); p0 += together) {
        const int64_t p1 = std::min(p0 + together, parts.count);
        for (int64_t p = p0; p < p1; ++p) {
          for (int64_t unit = 0; unit < parts.first_units; ++unit) {
            first(p, unit, scratch.data() + (p - p0) * parts.scratch);
          }
        }
        for (int64_t p = p0; p < p1; ++p) merge(p);
        for (int64_t p = p0; p < p1; ++p) {
          for (int64_t unit = parts.second_units; unit-- > 0;) {
            second(p, unit, scratch.data() + (p - p0) * parts.scratch);
          }
        }
      }
    });
  } else {
    const int64_t round = parts.scratch ? std::clamp<int64_t>(kKept / parts.scratch, 1, parts.count) : parts.count;
    const Buffer<A> scratch(round * parts.scratch);
    for (int64_t p0 = 0; p0 < parts.count; p0 += round) {
      const int64_t p1 = std::min(p0 + round, parts.count);
      const auto over_units = [&](int64_t units, bool backward, const auto& f) {
        const int64_t elements = parts.elements / std::max<int64_t>(1, units);
        parallel_over((p1 - p0) * units, elements, [&](int64_t begin, int64_t end) {
          for (int64_t k = begin; k < end; ++k) {
            const int64_t i = backward ? begin + end - 1 - k : k;
            f(p0 + i / units, i % units, scratch.data() + i / units * parts.scratch);
          }
        });
      };
      over_units(parts.first_units, false, first);
      for (int64_t p = p0; p < p1; ++p) merge(p);
      over_units(parts.second_units, true, second);
    }
  }
}

// A run of `length` elements cut into chunks.
struct Chunks {
  int64_t length, size, count;

  explicit Chunks(int64_t length, int64_t size) : length(length), size(size), count(ceil_div(length, size)) {}
  int64_t begin(int64_t k) const { return k * size; }
  int64_t extent(int64_t k) const { return std::min(size, length - k * size); }
};

// A group's rows cut into tiles: whole rows, or a piece of one.
struct Tiles {
  struct Tile {
    int64_t channel, piece;
    Rows rows;
    int64_t at;  // of its first element in the group
  };

  int64_t channels, spatial;
  Chunks rows, pieces;
  int64_t count;
  bool near;      // whether a cache near the processor holds the group
  int64_t ahead;  // elements to what is prefetched: the next group, or what follows in one that is not near

  // `bytes` are read of each element.
  Tiles(int64_t channels, int64_t spatial, int64_t bytes)
      : channels(channels),
        spatial(spatial),
        rows(channels, std::max<int64_t>(1, kTile / spatial)),
        pieces(spatial, kTile),
        count(rows.count * pieces.count),
        near(channels * spatial * bytes <= kNear),
        ahead(near ? std::max(channels * spatial, kSmallParts) : 1024) {}

  Tile operator[](int64_t unit) const {
    const int64_t block = unit / pieces.count, piece = unit % pieces.count;
    return {rows.begin(block),
            piece,
            {rows.extent(block), pieces.extent(piece), spatial, ahead},
            rows.begin(block) * spatial + pieces.begin(piece)};
  }
};

// Cuts a sample of channels_last memory into bundles: whole groups and whole cache lines, as many as the second-level
// cache holds beside the next bundle. Where none fits, or there is no exponential to compute while the next one is
// prefetched, the whole sample is one bundle.
struct Bundles {
  const Shape& shape;
  int64_t width, count;  // channels of each, but the last of a sample may be narrower
  bool near;             // whether the cache holds them
  Chunks pixels;         // that a kernel walks at once: about equally many, and at most kLongestSum

  // `bytes` are read of each element, in tensors of `itemsize`.
  Bundles(const Shape& shape, int64_t itemsize, int64_t bytes, bool silu)
      : shape(shape),
        width(silu ? width_of(shape, itemsize, bytes) : shape.channels),
        count(ceil_div(shape.channels, width)),
        near(width * shape.spatial * bytes <= kNearBundle),
        pixels(shape.spatial, pixels_of(shape.spatial, std::clamp<int64_t>(kColumnTile / width, 16, kLongestSum))) {}

  int64_t sample(int64_t part) const { return part / count; }
  int64_t channel(int64_t part) const { return part % count * width; }
  int64_t channels(int64_t part) const { return std::min(width, shape.channels - channel(part)); }
  int64_t elements() const { return width * shape.spatial; }

  // The bundle's pixels of chunk k, and where their first element is in the sample.
  Columns columns(int64_t part, int64_t k) const {
    const int64_t next = part % count + 1 < count ? width : shape.channels * shape.spatial - channel(part);
    return {pixels.extent(k), channels(part), shape.channels, near ? next : 0};
  }
  int64_t at(int64_t part, int64_t k) const { return pixels.begin(k) * shape.channels + channel(part); }

 private:
  static int64_t width_of(const Shape& shape, int64_t itemsize, int64_t bytes) {
    constexpr int64_t kLine = 64, kPage = 4096, kCache = 1048576;  // bytes
    const int64_t in_group = shape.channels_per_group(), lanes = kLine / itemsize;
    const int64_t least = in_group * (lanes / std::gcd(lanes, in_group));  // whole groups, whole lines
    const int64_t fitting = kNearBundle / (least * shape.spatial * bytes);
    const int64_t width = std::min(shape.channels, least * fitting);
    // Pixels that are a power of two apart put their lines into few sets of the cache, which then holds that much less.
    const int64_t period = std::gcd(shape.channels * itemsize, kPage);
    return width && std::max(period, width * itemsize) * shape.spatial <= kCache ? width : shape.channels;
  }
  static int64_t pixels_of(int64_t spatial, int64_t most) { return ceil_div(spatial, ceil_div(spatial, most)); }
};

constexpr int64_t kNothingReadAgain = 0;  // bytes of each element that a cache must hold for a second walk

// Calls f(row, Rows, piece, offset) for all rows of the tensor on all threads. A call has whole rows of one sample, or
// a piece of one row.
template <class F>
void over_rows(const Shape& shape, const F& f) {
  const Tiles tiles(shape.channels, shape.spatial, kNothingReadAgain);
  parallel_over(
      shape.batch * tiles.count, shape.elements() / (shape.batch * tiles.count), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t n = i / tiles.count;
          const Tiles::Tile tile = tiles[i % tiles.count];
          f(n * shape.channels + tile.channel, tile.rows, tile.piece, n * shape.channels * shape.spatial + tile.at);
        }
      });
}

// Calls f(chunk, Columns, offset) for all chunks of the tensor's pixels on all threads.
template <class F>
void over_columns(const Shape& shape, const Chunks& pixels, const F& f) {
  parallel_over(pixels.count, pixels.size * shape.channels, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      f(k, Columns{pixels.extent(k), shape.channels, shape.channels, 0}, pixels.begin(k) * shape.channels);
    }
  });
}

}  // namespace cpu
}  // namespace ldm_fused
