// Keeps plans: to make one compares some twenty ways to cut a tensor, which takes the host as long as a small kernel
// takes the GPU. Plain C++, no CUDA, no torch.
#pragma once

#include <array>
#include <map>
#include <mutex>

#include "cuda/plan.h"

namespace ldm_fused {

// What a plan of one pass depends on. `extra`: what tells apart plans of the pass that agree in all else.
using PlanKey = std::array<int64_t, 20>;
inline PlanKey plan_key(int pass, const Shape& shape, Dtype x, Dtype y, bool aligned, int64_t parameter_bytes,
                        int extra, const Device& d) {
  return {pass,
          shape.batch,
          shape.channels,
          shape.spatial,
          shape.groups,
          shape.channels_last,
          int64_t(x),
          int64_t(y),
          aligned,
          parameter_bytes,
          extra,
          d.multiprocessors,
          d.shared_per_block,
          d.max_cluster,
          d.grids,
          d.grid_threads,
          d.wanted.two_passes,
          d.wanted.grid_teams,
          d.wanted.team,
          d.wanted.threads};
}

// For all host threads.
class PlanMemory {
 public:
  template <class F>
  Plan find(const PlanKey& key, F&& make) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = plans_.find(key);
      if (found != plans_.end()) return found->second;
    }
    const Plan plan = make();
    const std::lock_guard<std::mutex> lock(mutex_);
    if (plans_.size() >= kMost) plans_.clear();  // shapes that change at each call
    return plans_.emplace(key, plan).first->second;
  }

 private:
  static constexpr size_t kMost = 4096;

  std::mutex mutex_;
  std::map<PlanKey, Plan> plans_;
};

inline PlanMemory& plan_memory() {
  static auto& memory = *new PlanMemory;  // for threads that outlive static objects
  return memory;
}

}  // namespace ldm_fused
