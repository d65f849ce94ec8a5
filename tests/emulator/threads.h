// The blocks and threads of a launch while they run. The machine schedules them (machine.cpp); the observer watches
// what they do to memory (observer.cpp).
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "callbacks.h"
#include "fibers.h"
#include "machine.h"
#include "memory.h"
#include "traffic.h"

namespace emulator {

inline constexpr size_t kMaxSharedBytes = 256 * 1024, kMaxStaticBytes = 48 * 1024;

struct Block;

enum class State { ready, waiting, yielding, exited };

struct AsyncCopy {
  char* to;
  const char* from;
  const void* instruction;
  uint32_t bytes;
  uint64_t group;
  unsigned char value[16];  // of the source when the copy was issued
};

struct Thread {
  Fiber fiber;
  Block* block;
  unsigned rank;  // in the block
  uint3 index;
  State state;
  Call call;  // while waiting
  uint64_t result;

  EventId event;                     // of its last access
  Clock acquired, released;          // see fence()
  std::vector<uintptr_t> acquiring;  // atomics since the last fence
  bool fenced;
  std::vector<Access> accesses;   // while traffic is counted
  std::vector<AsyncCopy> copies;  // that have not arrived, in order
  uint64_t committed_groups;

  unsigned warp() const { return rank / kWarpSize; }
  unsigned lane() const { return rank % kWarpSize; }
};

struct Block {
  uint3 index;
  uint32_t id;  // in the grid
  unsigned cluster_rank;
  std::deque<Thread> threads;  // of the largest block so far: fibers are created once
  uint32_t epoch;
  std::vector<uint32_t> warp_epochs;
  Clock clock;
  Region dynamic_shared;
  std::deque<Region> static_shared;
  bool exited;
  static constexpr size_t kBytes = kMaxStaticBytes + kMaxSharedBytes + 128;
  std::unique_ptr<unsigned char[]> memory{new unsigned char[kBytes]};

  unsigned char* static_memory() {  // CUDA promises no alignment above that of the variables
    const auto start = reinterpret_cast<uintptr_t>(memory.get());
    return memory.get() + (-start & 127);
  }
  unsigned char* dynamic_memory() { return static_memory() + kMaxStaticBytes + 16; }  // nor above 16 bytes here
};

struct Running {
  const Launch* launch = nullptr;
  unsigned block_size = 0;     // threads
  std::vector<Block*> blocks;  // those that are resident
  Thread* thread = nullptr;
};
inline Running running;

// While the emulator works for a thread, accesses are not the thread's.
class Work {
 public:
  ~Work() { callback_stack_ = stack_; }

 private:
  const Fiber* const stack_ = std::exchange(callback_stack_, nullptr);
};

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
std::string format(uint3 index);
std::string message(const Thread& thread, const std::string& what);

// Ends the running thread, to which this does not return: the scheduler throws.
[[noreturn]] void fail(const std::string& what);

}  // namespace emulator
