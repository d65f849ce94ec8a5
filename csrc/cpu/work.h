// How the CPU's ops cut a tensor into units of work and hand them to the threads: into chunks of fixed size, whose
// results are merged in their order whichever threads computed them, so that the bits do not depend on their number.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <numeric>

#include "cpu/kernels.h"

namespace ldm_fused {
namespace cpu {

constexpr int64_t kChunk = 4096;     // elements that both steps of the statistics find in the first-level cache
constexpr int64_t kTile = 32768;     // elements that one call of a kernel walks
constexpr int64_t kPixels = 65536;   // elements of the pixels that one call of a kernel walks twice
constexpr int64_t kTogether = 8192;  // elements of small parts that go through each step together
constexpr int64_t kNear = 589824;  // bytes of a group that is read from a cache again while the next one is prefetched
constexpr int64_t kNearBundle = 393216;  // bytes of a bundle that the second-level cache holds beside the next one
constexpr int64_t kGrain = 16384;        // elements worth a thread
constexpr int64_t kKept = 4194304;       // elements of a part of which dz is kept from the sums to the input gradient

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that nothing has written yet: a std::vector would walk it once more.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : values_(size ? new T[size] : nullptr) {}
  T* data() const { return values_.get(); }
  T& operator[](int64_t i) const { return values_[i]; }

 private:
  std::unique_ptr<T[]> values_;
};

// f(begin, end) for ranges of [0, count), each of which is about `elements` elements of work.
template <class F>
void parallel_over(int64_t count, int64_t elements, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
  torch::stable::parallel_for(0, count, grain, f);
}

// Parts are what has statistics of its own: groups, or bundles of them in channels_last.
struct Parts {
  int64_t count, elements;            // elements of each
  int64_t first_units, second_units;  // of each, in the two passes
  int64_t scratch;                    // elements of scratch memory for each
};

// For every part: first(part, unit, scratch) over its units, then merge(part), then second(part, unit, scratch) over
// its units. Where threads can share the parts out evenly, each takes whole parts, while they are in its cache, small
// ones several at once, so that no step waits for the one before; else all threads share each step, of as many parts as
// scratch memory is for.
template <class A, class First, class Merge, class Second>
void two_passes(const Parts& parts, const First& first, const Merge& merge, const Second& second) {
  const int64_t threads = torch::stable::get_num_threads();
  if (parts.count >= 4 * threads || parts.count % threads == 0) {
    const int64_t together = std::max<int64_t>(1, kTogether / parts.elements);
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
  int64_t ahead;  // what comes next: the next group, or what follows in one that is not near

  // `bytes` are read of each element.
  Tiles(int64_t channels, int64_t spatial, int64_t bytes)
      : channels(channels),
        spatial(spatial),
        rows(channels, std::max<int64_t>(1, kTile / spatial)),
        pieces(spatial, kTile),
        count(rows.count * pieces.count),
        near(channels * spatial * bytes <= kNear),
        ahead(near ? std::max(channels * spatial, kTogether) : 1024) {}

  Tile operator[](int64_t unit) const {
    const int64_t block = unit / pieces.count, piece = unit % pieces.count;
    return {rows.begin(block),
            piece,
            {rows.extent(block), pieces.extent(piece), spatial, ahead},
            rows.begin(block) * spatial + pieces.begin(piece)};
  }
};

// A sample of channels_last memory cut into bundles of whole groups and cache lines that the second-level cache holds
// beside the next one; where there are none, or no exponential to compute while the next one is prefetched, the whole
// sample.
struct Bundles {
  const Shape& shape;
  int64_t width, count;  // channels of each, but the last of a sample may be narrower
  bool near;             // whether the cache holds them
  Chunks pixels;         // that a kernel walks at once: no longer than a sum of floats, and about equally many

  // `bytes` are read of each element, in tensors of `itemsize`.
  Bundles(const Shape& shape, int64_t itemsize, int64_t bytes, bool silu)
      : shape(shape),
        width(silu ? width_of(shape, itemsize, bytes) : shape.channels),
        count(ceil_div(shape.channels, width)),
        near(width * shape.spatial * bytes <= kNearBundle),
        pixels(shape.spatial, pixels_of(shape.spatial, std::clamp<int64_t>(kPixels / width, 16, kLongestSum))) {}

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
    // Pixels that are a power of two apart put their lines into few sets of the cache, as if it were so much smaller.
    const int64_t period = std::gcd(shape.channels * itemsize, kPage);
    return width && std::max(period, width * itemsize) * shape.spatial <= kCache ? width : shape.channels;
  }
  static int64_t pixels_of(int64_t spatial, int64_t most) { return ceil_div(spatial, ceil_div(spatial, most)); }
};

inline bool walks_columns(const Shape& shape) { return shape.channels_last || shape.spatial == 1; }

}  // namespace cpu
}  // namespace ldm_fused
