// GroupNorm and activation, forward, in one launch: a block copies its part of an item to shared memory, reduces it
// there, learns the whole item's statistics from its team, and applies them.
//
// Memory passes: reads x once, writes y once (2 B, the limit); what does not fit the chip is read again, last read
// first. Parallel over items (bundles of whole groups) and over the blocks of a team that shares one.
#pragma once

#include "cuda/resident.cuh"

namespace ldm_fused {

// Moments of kChannels channels of which a thread has seen equally much, relative to a shift that is an element of
// each.
template <int kChannels>
struct ChannelMoments {
  float count, mean[kChannels], m2[kChannels];

  // Vectors of which the thread has the first `existing`. A full batch is averaged, centered and then merged as a
  // whole.
  template <class X, int V, int kBatch>
  __device__ __forceinline__ void add(const Vec<X, V> (&v)[kBatch], const float (&shift)[kChannels], int existing) {
    if (existing >= kBatch) {
      add_whole(v, shift);
    } else {
#pragma unroll
      for (int i = 0; i < kBatch - 1; ++i) {
        if (i < existing) add_whole(reinterpret_cast<const Vec<X, V>(&)[1]>(v[i]), shift);
      }
    }
  }

  template <class X, int V, int N>
  __device__ __forceinline__ void add_whole(const Vec<X, V> (&v)[N], const float (&shift)[kChannels]) {
    constexpr int kCount = N * V / kChannels;  // values of a channel
    const float total = count + kCount, part = kCount / total;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      float values[kCount], sum = 0, squares = 0;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        values[i] = widen(kChannels == 1 ? v[i / V].e[i % V] : v[i].e[c]) - shift[c];
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum += values[i] * (1.0f / kCount);
#pragma unroll
      for (int i = 0; i < kCount; ++i) squares += (values[i] - sum) * (values[i] - sum);
      merge_channel(c, sum, squares, part, count);
    }
    count = total;
  }

  __device__ __forceinline__ void merge(const ChannelMoments& other) {
    if (other.count == 0) return;
    const float total = count + other.count, part = other.count / total;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) merge_channel(c, other.mean[c], other.m2[c], part, count);
    count = total;
  }

 private:
  __device__ __forceinline__ void merge_channel(int c, float other_mean, float other_m2, float part, float before) {
    const float delta = other_mean - mean[c];
    mean[c] += delta * part;
    m2[c] += other_m2 + (delta * part) * (delta * before);
  }
};

// Merges `number` moments, of which f(i) gives one, by all lanes of a warp. The result is lane 0's.
template <class F>
__device__ __forceinline__ Moments<float> merge_in_warp(int number, F&& f) {
  Moments<float> part{}, sum{};
  if (lane_index() < number) part = f(lane_index());
  const float reference = __shfl_sync(kAllLanes, part.mean, 0);
  for (int i = lane_index(); i < number;) {
    part.mean -= reference;
    sum.merge(part);
    if ((i += 32) < number) part = f(i);
  }
  sum = lanes_reduce(sum, 32);
  sum.mean += reference;
  return sum;
}

template <class X, class Y, int V, bool kColumns, bool kGrid>
struct ResidentForward : ResidentBlock<V, kColumns, kGrid, V* int(sizeof(X)) / 16> {
  using Block = ResidentBlock<V, kColumns, kGrid, V* int(sizeof(X)) / 16>;
  using Vector = Vec<X, V>;
  using Affines = ChannelAffine<float>[Block::kChannels];
  using Block::item, Block::r, Block::shape, Block::slots, Block::tables, Block::team;
  static constexpr int kBatch = kBatchOf<Vector>;
  static constexpr int kHeld = kColumns && kGrid ? held_vectors(sizeof(X), sizeof(Y)) : 0;
  using Held = Vector[kHeld > 0 ? kHeld : 1];  // the last vectors of an item, in registers

  const ForwardParams& p;
  const X* const x;
  Y* const y;
  const Mask<float> mask;

  __device__ __forceinline__ ResidentForward(const ForwardParams& p, void* shared)
      : Block(p, shared, 2, 0), p(p), x(static_cast<const X*>(p.x)), y(static_cast<Y*>(p.y)), mask(p.dropout) {}

  __device__ __forceinline__ void copy_to(int end) {
    this->loader.copy_to(end, shape, r,
                         [&](int slot, int64_t at) { slots.copy(slot * slots.template kPieces<X>, x + at); });
  }

  // What is known of the item's channels before its statistics are.
  __device__ __forceinline__ void load_parameters() const {
    for (int c = threadIdx.x; c < r.width; c += blockDim.x) {
      const ChannelAffine<float> affine = channel_affine(p.affine, item.n, item.c + c, 0.0f, 1.0f);
      tables.affine[c] = affine;
    }
  }

  // Mean and m2 of each unit, in the order of the vectors in memory; the last ones stay in registers.
  __device__ __forceinline__ void reduce_units(Held& held) const {
    Pair* const entries = reinterpret_cast<Pair*>(tables.entries);
    const int steps = r.steps - (kHeld > 0 ? r.held : 0);
    for (int round = 0; round < r.rounds; ++round) {
      const Span span = this->span(round);
      ChannelMoments<Block::kChannels> moments{};
      float shift[Block::kChannels];
      for (int step = 0; step < steps; step += kBatch) {
        Vector v[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int k = round * r.steps + step + i;
          if (step + i >= min(steps, span.count)) continue;
          v[i] = !kGrid || k < r.kept ? slots.template read<X>(this->piece_of(k)) : load<X, V>(x + span.at(step + i));
        }
        if (step == 0) {  // of the unit's first vector: its lanes, or the lanes of its column, have it in common
#pragma unroll
          for (int c = 0; c < Block::kChannels; ++c) {
            shift[c] = __shfl_sync(kAllLanes, widen(v[0].e[c]), kColumns ? lane_index() % r.lanes : 0,
                                   kColumns ? 32 : r.lanes);
          }
        }
        moments.add(v, shift, min(steps, span.count) - step);
      }
      if constexpr (kHeld > 0) {
        if (r.held > 0) {
          const X* from = x + span.at(steps);
#pragma unroll
          for (int i = 0; i < kHeld; ++i, from += span.stride) {
            if (steps + i < span.count) held[i] = load<X, V>(from);
          }
#pragma unroll
          for (int i = 0; i < kHeld; i += kBatch) {
            moments.add(reinterpret_cast<const Vector(&)[kBatch]>(held[i]), shift, span.count - steps - i);
          }
        }
      }
      if constexpr (kColumns) {
        merge_warp_rows(moments, r.lanes);
        if (lane_index() < r.lanes) {
#pragma unroll
          for (int e = 0; e < V; ++e) entries[span.entry + e] = {moments.mean[e] + shift[e], moments.m2[e]};
        }
      } else {
        const Moments<float> unit =
            lanes_reduce(Moments<float>{moments.count, moments.mean[0], moments.m2[0]}, r.lanes);
        if (threadIdx.x % r.lanes == 0 && span.entry < r.entries) entries[span.entry] = {unit.mean + shift[0], unit.m2};
      }
    }
    __syncthreads();
  }

  // Mean and rstd of each group: a warp merges what its block has of one, then what the team has.
  __device__ __forceinline__ void reduce_groups() {
    const int channels = this->group_channels(), parts = parts_of<kColumns>(r);
    const int chunk = chunk_of(r, team.rank);
    for (int g = warp_index(); g < r.bundle; g += blockDim.x / 32) {
      const Moments<float> own = merge_in_warp(chunk > 0 ? channels * parts : 0, [&](int i) {
        const int part = kColumns ? i / channels : i % parts;
        const int c = g * channels + (kColumns ? i % channels : i / parts);
        const Pair entry = reinterpret_cast<const Pair*>(tables.entries)[entry_of<kColumns>(r, c, part)];
        return Moments<float>{float(vectors_of<kColumns>(r, chunk, part) * Block::kElements),
                              entry.a - tables.affine[c].center, entry.b};
      });
      if (lane_index() == 0) reinterpret_cast<Pair*>(tables.exchange)[g] = {own.mean, own.m2};
    }
    team.exchange([&] { copy_to(r.slots); });
    for (int g = warp_index(); g < r.bundle; g += blockDim.x / 32) {
      const Moments<float> all = merge_in_warp(team.size, [&](int rank) {
        const float count = float(channels * Block::kElements) * chunk_of(r, rank);
        if (count == 0) return Moments<float>{};
        const Pair part = team.group_of(rank, g);
        return Moments<float>{count, part.a, part.b};
      });
      if (lane_index() > 0) continue;
      const float rstd = 1.0f / sqrtf(all.m2 / all.count + float(p.eps));
      tables.groups[g] = {all.mean, rstd};
      if (team.rank > 0 || p.mean == nullptr) continue;
      const int64_t index = shape.group(item.n, item.c) + g;
      static_cast<float*>(p.mean)[index] = all.mean;
      static_cast<float*>(p.rstd)[index] = rstd;
    }
    __syncthreads();
  }

  __device__ __forceinline__ void load_affine(const Span& span, Affines& affine) const {
#pragma unroll
    for (int c = 0; c < Block::kChannels; ++c) {
      const ChannelAffine<float> own = tables.affine[span.channel + c];
      const Pair group = tables.groups[(span.channel + c) / this->group_channels()];
      affine[c] = {group.a + own.center, group.b * own.slope, own.offset};
    }
  }

  __device__ __forceinline__ void write(const Vector& in, const Affines& affine, int64_t at) const {
    const auto u = [&](int e) { return affine[kColumns ? e : 0](float(widen(in.e[e]))); };
    store(y + at, activated<Y, V>(mask, at, p.silu, u));
  }

  // y of what did not fit, the last read first.
  __device__ __forceinline__ void write_what_is_not_kept(const Held& held) const {
    const int steps = r.steps - r.held;
    for (int round = r.rounds - 1; (round + 1) * r.steps > r.kept; --round) {
      const Span span = this->span(round);
      Affines affine;
      load_affine(span, affine);
      if constexpr (kHeld > 0) {
        int64_t at = span.at(steps);
#pragma unroll
        for (int i = 0; i < kHeld; ++i, at += span.stride) {
          if (r.held > 0 && steps + i < span.count) write(held[i], affine, at);
        }
      }
      for (int step = (steps - 1) / kBatch * kBatch; step >= 0; step -= kBatch) {
        Vector v[kBatch];
        const auto is_wanted = [&](int i) {
          return step + i < min(steps, span.count) && round * r.steps + step + i >= r.kept;
        };
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (is_wanted(i)) v[i] = load<X, V>(x + span.at(step + i));
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (is_wanted(i)) write(v[i], affine, span.at(step + i));
        }
      }
    }
  }

  // y of what is in the slots, which the next item's vectors take.
  __device__ __forceinline__ void write_what_is_kept() {
    for (int round = 0; round < r.rounds && round * r.steps < r.kept; ++round) {
      const Span span = this->span(round);
      Affines affine;
      load_affine(span, affine);
      const int steps = min(r.steps, r.kept - round * r.steps);
      for (int step = 0; step < steps; step += kBatch) {
        const int first = round * r.steps + step, end = min(steps, span.count);
        Vector v[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (step + i < end) v[i] = slots.template read<X>(this->piece_of(first + i));
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (step + i < end) write(v[i], affine, span.at(step + i));
        }
        if constexpr (kGrid) copy_to(this->room_behind(first + min(kBatch, steps - step)));
      }
    }
  }
};

template <class X, class Y, int V, bool kColumns, bool kGrid>
__global__ void __launch_bounds__(kGrid ? kGridThreads : kMostThreads, 1) resident_forward(ForwardParams p) {
  LDM_FUSED_DYNAMIC_SHARED(unsigned char, shared);
  ResidentForward<X, Y, V, kColumns, kGrid> block(p, shared);
  block.copy_to(p.residence.kept);
  block.team.start();
  do {
    typename ResidentForward<X, Y, V, kColumns, kGrid>::Held held;
    block.load_parameters();
    __pipeline_wait_prior(0);
    block.reduce_units(held);
    block.reduce_groups();
    if constexpr (kGrid) block.write_what_is_not_kept(held);
    block.write_what_is_kept();
  } while (block.next_item());
  block.team.leave();
}

inline cudaError_t launch_resident_forward(const ForwardParams& p, Dtype x, Dtype y, cudaStream_t stream) {
  return dispatch_resident(x, y, [&](auto x_type, auto y_type) {
    using X = decltype(x_type);
    using Y = decltype(y_type);
    constexpr int V = vector_of(sizeof(X) < sizeof(Y) ? sizeof(X) : sizeof(Y));
    const bool grid = p.residence.exchange == Exchange::grid;
    const auto kernel = p.residence.columns
                            ? (grid ? resident_forward<X, Y, V, true, true> : resident_forward<X, Y, V, true, false>)
                            : (grid ? resident_forward<X, Y, V, false, true> : resident_forward<X, Y, V, false, false>);
    return launch_resident(kernel, p, stream);
  });
}

}  // namespace ldm_fused
