// Stands in for the CUDA toolkit's header of this name: what kernels need of clusters and cooperative grids.
#pragma once

#include <cuda_runtime.h>

namespace cooperative_groups {

class cluster_group {
 public:
  static void sync(emulator::Site site = emulator::Site::here()) {
    emulator::wait({"cluster.sync", site, emulator::Scope::cluster});
  }
  static unsigned block_rank() { return emulator::block_rank(); }
  static unsigned num_blocks() {
    const dim3 dim = emulator::cluster_dim();
    return dim.x * dim.y * dim.z;
  }
  template <class T>
  static T* map_shared_rank(T* address, unsigned rank) {
    return static_cast<T*>(emulator::map_shared_rank(address, rank));
  }
};

class grid_group {
 public:
  static void sync(emulator::Site site = emulator::Site::here()) {
    emulator::wait({"grid.sync", site, emulator::Scope::grid});
  }
};

inline cluster_group this_cluster() { return {}; }
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
