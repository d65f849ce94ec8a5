// What kernels may read and write, and who did last: bounds, unwritten memory, races.
//
// Each granule of memory has a cell with the event of its last write and of its last read. An event is a thread between
// two of its barriers. Two accesses of a granule by different threads, one of them a write, must be ordered by a
// barrier, or by fences around an atomic operation on the same address; if not they are a race, whatever order they
// happened to run in.
//
// To say so for all threads of a launch, clocks tick at barriers: `block_epoch` counts those of the thread's block,
// `warp_epoch` the __syncwarps of its warp, `grid_epoch` the barriers of the whole grid. What other blocks are known to
// have done, by cluster barriers and atomics, is a Clock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace emulator {

using EventId = uint32_t;

struct Event {
  static constexpr uint32_t kMany = ~0u;  // stands for several: those that have read the same

  uint32_t block, thread, warp;
  uint32_t grid_epoch, block_epoch, warp_epoch;
  bool atomic;
};

struct Cell {
  static constexpr EventId kPending = 1u << 31;  // of `write`: that of an asynchronous copy which has not arrived

  EventId write = 0, read = 0;  // 0: none
};

// What others know that a block has done: all before its epoch, and in that epoch what one thread has done.
struct Known {
  static constexpr uint32_t kNobody = ~0u - 1;

  uint32_t epoch, thread;
};

class Clock : public std::unordered_map<uint32_t, Known> {
 public:
  void learn(uint32_t block, Known news) {
    Known& known = emplace(block, news).first->second;
    if (known.epoch < news.epoch) known = news;
  }
  void learn(const Clock& other) {
    for (const auto& [block, news] : other) learn(block, news);
  }
  bool has(const Event& event) const {
    const auto known = find(event.block);
    if (known == end()) return false;
    const auto [epoch, thread] = known->second;
    return event.block_epoch < epoch || (event.block_epoch == epoch && event.thread == thread);
  }
};

// Global memory that a kernel was given, or a block's shared memory.
struct Region {
  const char* begin = nullptr;
  size_t bytes = 0;
  unsigned granule_bits = 0;  // a granule has 2^granule_bits bytes
  bool fresh = false;         // what no kernel has written must not be read
  std::vector<Cell> cells;    // empty: not observed

  Region() = default;
  Region(const void* address, size_t size, unsigned granule_bits, bool fresh, bool observed)
      : begin(static_cast<const char*>(address)), bytes(size), granule_bits(granule_bits), fresh(fresh) {
    if (observed) cells.resize(((bytes - 1) >> granule_bits) + 1);
  }

  bool has(const void* address) const { return address >= begin && address < begin + bytes; }
  size_t offset(const void* address) const { return size_t(static_cast<const char*>(address) - begin); }
};

}  // namespace emulator
