// The protocol by which the blocks that share an item exchange what they have of it.
#pragma once

#include "cuda/common.cuh"
#include "cuda/ptx.cuh"

namespace ldm_fused {

struct alignas(8) Pair {
  float a, b;
};

// How many floats a block tells its team: a Pair of each group, and `totals` of each channel, rounded up so that a Pair
// may follow.
LDM_FUSED_HD int channel_floats(const Residence& r, int totals) { return int(round_up(totals * r.width, 2)); }
LDM_FUSED_HD int block_floats(const Residence& r, int totals) { return 2 * r.bundle + channel_floats(r, totals); }

// Memory of a grid's teams, apart so that they do not wait for each other's lines.
struct TeamCounter {
  unsigned arrived, padding[31];
};

// How many floats a grid's workspace has: the teams' counters, then what all blocks tell, in two places.
inline int64_t grid_floats(const Residence& r, int totals) {
  return r.teams * int64_t(sizeof(TeamCounter) / sizeof(float)) + 2 * r.blocks() * block_floats(r, totals);
}

// The blocks that share an item. Each leaves what it has of the item's groups, and of its channels, in `own`, in shared
// memory; after exchange() all can read it. In a grid that goes through global memory, in two places by turns: a block
// that writes the next item's results may be one exchange ahead of a block that still reads this one's, and no more.
template <bool kGrid>
class Team {
 public:
  const int index, rank, size;

  __device__ __forceinline__ Team(const Residence& r, void* workspace, float* own, int totals)
      : index(r.by_team.quotient(blockIdx.x)),
        rank(r.by_team.remainder(blockIdx.x)),
        size(r.team),
        bundle_(r.bundle),
        floats_(channel_floats(r, totals)),
        own_(own) {
    if constexpr (kGrid) {
      counter_ = &(static_cast<TeamCounter*>(workspace) + index)->arrived;
      memory_ = reinterpret_cast<float*>(static_cast<TeamCounter*>(workspace) + r.teams) +
                int64_t(index) * 2 * size * block_floats(r, totals);
    }
  }

  // Before the first exchange.
  __device__ __forceinline__ void start() {
    if constexpr (kGrid) {
      if (rank == 0 && threadIdx.x == 0) *counter_ = 0;
      cooperative_groups::this_grid().sync();
    }
  }

  // Waits until all blocks of the team are here. In a grid, where that takes longest, it calls meanwhile() first.
  template <class F>
  __device__ __forceinline__ void exchange(F&& meanwhile) {
    if constexpr (kGrid) {
      target_ += size;
      __syncthreads();
      publish();
      __syncthreads();
      if (threadIdx.x == 0) arrive(counter_);
      meanwhile();
      if (threadIdx.x == 0) wait_for(counter_, target_);
      __syncthreads();
    } else if (size > 1) {  // alone, each thread reads what it has written itself
      cluster_arrive();
      cluster_wait();
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

  // No block of a cluster may leave while another reads its shared memory. Between the two calls a block stores
  // results, for which nobody waits.
  __device__ __forceinline__ void has_read() {
    if (!kGrid && size > 1) cluster_arrive_relaxed();
  }
  __device__ __forceinline__ void leave() {
    if (!kGrid && size > 1) cluster_wait();
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
  unsigned* counter_ = nullptr;
  unsigned target_ = 0;
};

}  // namespace ldm_fused
