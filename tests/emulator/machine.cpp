#include "machine.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>

#include "callbacks.h"
#include "fibers.h"
#include "memory.h"
#include "traffic.h"

namespace emulator {

namespace {

std::string format(const char* pattern, va_list arguments) {
  char text[1024];
  std::vsnprintf(text, sizeof text, pattern, arguments);
  return text;
}

__attribute__((format(printf, 1, 2))) std::string format(const char* pattern, ...) {
  va_list arguments;
  va_start(arguments, pattern);
  const std::string text = format(pattern, arguments);
  va_end(arguments);
  return text;
}

constexpr size_t kMaxSharedBytes = 256 * 1024, kMaxStaticBytes = 48 * 1024;
constexpr unsigned kMaxYields = 1 << 14;

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

std::string format(uint3 index) { return format("(%u,%u,%u)", index.x, index.y, index.z); }

std::string format(const Call& call) {
  const std::string mask = call.scope == Scope::warp ? format(" with mask 0x%08x", call.mask) : std::string();
  return format("%s%s at %s:%d", call.name, mask.c_str(), call.site.file, call.site.line);
}

bool same(const char* a, const char* b) { return a == b || !std::strcmp(a, b); }

bool same(const Call& a, const Call& b) {
  return a.scope == b.scope && a.mask == b.mask && a.site.line == b.site.line && same(a.name, b.name) &&
         same(a.site.file, b.site.file);
}

// Where an instruction comes from, if addr2line is there to tell: the kernel's line, not that of the stand-in for a
// toolkit's header which was inlined there.
std::string source_of(const void* instruction) {
  Dl_info module;
  if (!instruction || !dladdr(instruction, &module)) return "";
  const auto offset = size_t(static_cast<const char*>(instruction) - static_cast<char*>(module.dli_fbase)) - 1;
  const std::string command = format("addr2line -i -e '%s' 0x%zx 2>/dev/null", module.dli_fname, offset);
  std::string line;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    for (char text[1024]; std::fgets(text, sizeof text, pipe);) {
      if (line.empty() || line.find("/emulator/cuda_") != line.npos) line.assign(text, std::strcspn(text, "\n"));
    }
    pclose(pipe);
  }
  line.resize(std::min(line.size(), line.find(" (discriminator")));
  return line.empty() || line[0] == '?' ? "" : " at " + line;
}

class Machine {
 public:
  void set_order(const std::string& order, unsigned seed) {
    if (order != "forward" && order != "reverse" && order != "random") {
      throw std::invalid_argument("order is '" + order + "', expected 'forward', 'reverse' or 'random'");
    }
    random_ = order == "random";
    reverse_ = order == "reverse";
    seed_ = seed;
  }

  void observe(bool races, bool traffic) {
    observes_races_ = races;
    counts_traffic_ = traffic;
  }

  std::vector<Traffic> take_traffic() { return std::exchange(traffic_, {}); }

  void allow(void* address, size_t bytes, bool fresh) {
    if (bytes == 0) return;
    if (fresh) {  // what was allowed there before has been freed
      const char* const begin = static_cast<const char*>(address);
      const auto overlaps = [&](const Region& r) { return r.begin < begin + bytes && begin < r.begin + r.bytes; };
      global_.erase(std::remove_if(global_.begin(), global_.end(), overlaps), global_.end());
    }
#ifdef EMULATOR_ASAN
    fresh = false;  // of what kernels write only atomics are seen
#endif
    for (const Region& region : global_) {
      if (region.begin == address && region.bytes >= bytes) return;
    }
    global_.emplace_back(address, bytes, 1, fresh, observes_races_);
  }

  void forget_allowed() {
    global_.clear();
    first_event_ = 1;
    events_.clear();
  }

  void run(const Launch& launch) {
    const std::lock_guard<std::mutex> lock(mutex_);
    launch_ = &launch;
    count_ = launch.block.x * launch.block.y * launch.block.z;
    indices.grid_dim = launch.grid;
    indices.block_dim = launch.block;
    generator_.seed(seed_);
    first_event_ += EventId(events_.size());
    events_.clear();
    synchronized_.clear();
    readers_.clear();
    shared_offsets_.clear();
    static_bytes_ = 0;
    grid_epoch_ = 1;
    error_.clear();
    if (counts_traffic_) traffic_.emplace_back();
    try {
      run_grid();
    } catch (...) {
      callback_stack_ = nullptr;
      for (Block* block : resident_) {
        for (unsigned i = 0; i < count_; ++i) block->threads[i].fiber.cancel();
      }
      throw;
    }
  }

  // ---- Of the running thread --------------------------------------------------------------------------------------

  uint64_t wait(const Call& call) {
    Thread& self = *running_;
    if (call.scope == Scope::warp && !(call.mask >> lane() & 1)) {
      fail(format(call) + ", which does not name the calling lane");
    }
    self.call = call;
    suspend(State::waiting);
    return self.result;
  }

  void suspend(State state) {
    running_->state = state;
    Fiber::suspend();
  }

  // The thread does not come back: the scheduler throws.
  [[noreturn]] void fail(const std::string& what) {
    error_ = message(*running_, what);
    for (;;) Fiber::suspend();
  }

  unsigned lane() const { return running_->rank % kWarpSize; }

  uint32_t living_lanes() const {
    uint32_t lanes = 0;
    const unsigned first = running_->rank - lane();
    for (unsigned i = first; i < std::min(first + kWarpSize, count_); ++i) {
      lanes |= uint32_t(running_->block->threads[i].state != State::exited) << (i - first);
    }
    return lanes;
  }

  Block& block() const { return *running_->block; }
  dim3 cluster_dim() const { return launch_->cluster; }

  void* shared(const void* variable, size_t bytes, size_t alignment) {
    const auto [found, is_new] = shared_offsets_.try_emplace(variable, 0);
    if (is_new) {
      const size_t offset = (static_bytes_ + alignment - 1) / alignment * alignment;
      if (offset + bytes > kMaxStaticBytes) fail("more than 48 KB of static shared memory");
      found->second = offset;
      static_bytes_ = offset + bytes + kGap;
    }
    void* const address = block().static_memory() + found->second;
    for (const Region& region : block().static_shared) {
      if (region.begin == address) return address;
    }
#ifdef EMULATOR_ASAN
    __asan_unpoison_memory_region(address, bytes);
#endif
    std::fill_n(static_cast<unsigned char*>(address), bytes, kPoison);
    block().static_shared.emplace_back(address, bytes, 0, true, observes_races_);
    return address;
  }

  void* map_shared_rank(void* address, unsigned rank) {
    Block& here = block();
    const unsigned blocks = launch_->cluster.x * launch_->cluster.y * launch_->cluster.z;
    if (rank >= blocks) fail(format("block %u of a cluster of %u", rank, blocks));
    if (!here.dynamic_shared.has(address)) fail("map_shared_rank() takes addresses of dynamic shared memory");
    Block& other = *resident_[index_of(here) - here.cluster_rank + rank];
    return other.dynamic_memory() + here.dynamic_shared.offset(address);
  }

  void access(const void* address, size_t bytes, AccessKind kind, const void* instruction) {
    if (++accesses_since_resume_ > kMaxAccesses) fail("spins without letting other threads run (__nanosleep does)");
    Region* region = find(address, instruction, bytes);
    if (!region->cells.empty()) {
      const size_t first = region->offset(address) >> region->granule_bits;
      const size_t last = (region->offset(address) + bytes - 1) >> region->granule_bits;
      const EventId self = event(kind == AccessKind::atomic);
      for (size_t i = first; i <= last; ++i) observe(*region, i, self, kind, instruction);
    }
    if (counts_traffic_ && is_global(*region)) {
      const auto start = reinterpret_cast<uintptr_t>(address);
      if (kind != AccessKind::write) running_->accesses.push_back({instruction, start, uint32_t(bytes), false});
      if (kind != AccessKind::read) {  // an atomic operation's two halves are two requests
        const void* const half = static_cast<const char*>(instruction) + (kind == AccessKind::atomic);
        running_->accesses.push_back({half, start, uint32_t(bytes), true});
      }
    }
  }

  void check_alignment(const void* address, size_t bytes, const void* instruction) {
    const size_t offset = reinterpret_cast<uintptr_t>(address) % bytes;
    if (offset) {
      fail(format("access of %zu bytes%s is misaligned by %zu bytes", bytes, source_of(instruction).c_str(), offset));
    }
  }

  // Reads the source at once. The destination is the thread's to write from now on, too: what others do with it must be
  // over. AddressSanitizer, under which accesses by plain instructions go unseen here, checks the two memory functions.
  void copy_async(void* to, const void* from, size_t bytes, const void* instruction) {
    if (bytes != 4 && bytes != 8 && bytes != 16) {
      fail(format("asynchronous copy of %zu bytes%s: it must be 4, 8 or 16", bytes, source_of(instruction).c_str()));
    }
    check_alignment(to, bytes, instruction);
    check_alignment(from, bytes, instruction);
#ifndef EMULATOR_ASAN
    if (!is_global(*find(from, instruction, bytes))) {
      fail("asynchronous copy" + source_of(instruction) + " whose source is not global memory");
    }
    if (!find_shared(block(), to)) {
      fail("asynchronous copy" + source_of(instruction) + " whose destination is not the block's shared memory");
    }
    access(from, bytes, AccessKind::read, instruction);
    access(to, bytes, AccessKind::write, instruction);
    each_shared_cell(to, bytes, [](Cell& cell) { cell.write |= Cell::kPending; });
#endif
    Thread& self = *running_;
    AsyncCopy& copy = self.copies.emplace_back();
    copy.to = static_cast<char*>(to);
    copy.from = static_cast<const char*>(from);
    copy.instruction = instruction;
    copy.bytes = uint32_t(bytes);
    copy.group = self.committed_groups;
    std::memcpy(copy.value, from, bytes);
    std::memset(to, kPoison, bytes);  // for those who look too early where nobody watches
  }

  void commit_copies() { ++running_->committed_groups; }

  void wait_for_copies(size_t groups_left) {
    Thread& self = *running_;
    if (self.copies.empty() || self.committed_groups <= groups_left) return;
    const uint64_t end = self.committed_groups - groups_left;
    const EventId now = event(false);
    size_t arrived = 0;
    for (; arrived < self.copies.size() && self.copies[arrived].group < end; ++arrived) {
      const AsyncCopy& copy = self.copies[arrived];
      if (std::memcmp(copy.from, copy.value, copy.bytes)) {
        fail("the source of the asynchronous copy" + source_of(copy.instruction) + " was written before it arrived");
      }
      std::memcpy(copy.to, copy.value, copy.bytes);
      each_shared_cell(copy.to, copy.bytes, [now](Cell& cell) { cell = {now, 0}; });
    }
    self.copies.erase(self.copies.begin(), self.copies.begin() + ptrdiff_t(arrived));
  }

  // A fence makes the atomics before it acquire, and those after it release.
  void fence() {
    Thread& self = *running_;
    for (const uintptr_t address : self.acquiring) self.acquired.learn(synchronized_[address]);
    self.acquiring.clear();
    self.released = self.block->clock;
    self.released.learn(self.acquired);
    self.released.learn(self.block->id, {self.block->epoch, self.rank});
    self.fenced = true;
  }

  void atomic(const void* address) {
    const auto at = reinterpret_cast<uintptr_t>(address);
    if (running_->fenced) synchronized_[at].learn(running_->released);
    running_->acquiring.push_back(at);
  }

 private:
  static constexpr unsigned char kPoison = 0xff;  // a NaN as a floating-point number of any size
  static constexpr size_t kGap = 64;              // between static shared variables
  static constexpr uint64_t kMaxAccesses = 1 << 24;

  // ---- Running ----------------------------------------------------------------------------------------------------

  void run_grid() {
    const dim3 grid = launch_->grid, cluster = launch_->cluster;
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    const uint64_t clusters = blocks / (cluster.x * cluster.y * cluster.z);
    if (launch_->cooperative) {
      prepare(0, clusters);
      run_resident();
      return;
    }
    // A stride that has no divisor in common with the number of clusters visits each cluster once.
    uint64_t first = reverse_ ? clusters - 1 : 0, stride = reverse_ ? clusters - 1 : 1;
    if (random_) {
      first = generator_() % clusters;
      do stride = 1 + generator_() % clusters;
      while (std::gcd(stride, clusters) != 1);
    }
    for (uint64_t i = 0, c = first; i < clusters; ++i, c = (c + stride) % clusters) {
      prepare(c, c + 1);
      run_resident();
    }
  }

  // Makes the blocks of some clusters resident, in their clusters' order.
  void prepare(uint64_t first_cluster, uint64_t end_cluster) {
    const dim3 cluster = launch_->cluster, grid = launch_->grid;
    const unsigned size = cluster.x * cluster.y * cluster.z;
    resident_.clear();
    for (uint64_t c = first_cluster; c < end_cluster; ++c) {
      const unsigned nx = grid.x / cluster.x, ny = grid.y / cluster.y;
      const uint3 corner{unsigned(c % nx) * cluster.x, unsigned(c / nx % ny) * cluster.y,
                         unsigned(c / nx / ny) * cluster.z};
      for (unsigned rank = 0; rank < size; ++rank) {
        const uint3 index{corner.x + rank % cluster.x, corner.y + rank / cluster.x % cluster.y,
                          corner.z + rank / (cluster.x * cluster.y)};
        if (resident_.size() == blocks_.size()) blocks_.emplace_back(new Block);
        Block& block = *blocks_[resident_.size()];
        resident_.push_back(&block);
        block.index = index;
        block.id = (index.z * grid.y + index.y) * grid.x + index.x;
        block.cluster_rank = rank;
        start(block);
      }
    }
  }

  void start(Block& block) {
    const size_t bytes = launch_->dynamic_shared_bytes;
    block.epoch = 1;
    block.warp_epochs.assign((count_ + kWarpSize - 1) / kWarpSize, 1);
    block.clock.clear();
    block.exited = false;
    block.static_shared.clear();
    block.dynamic_shared = bytes ? Region(block.dynamic_memory(), bytes, 0, true, observes_races_) : Region();
#ifdef EMULATOR_ASAN
    __asan_poison_memory_region(block.memory.get(), Block::kBytes);
    __asan_unpoison_memory_region(block.dynamic_memory(), bytes);
#endif
    std::fill_n(block.dynamic_memory(), bytes, kPoison);
    while (block.threads.size() < count_) block.threads.emplace_back();
    for (unsigned i = 0; i < count_; ++i) {
      Thread& thread = block.threads[i];
      thread.block = &block;
      thread.rank = i;
      const dim3 dim = launch_->block;
      thread.index = {i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y)};
      thread.state = State::ready;
      thread.call = {};
      thread.event = 0;
      thread.acquired.clear();
      thread.released.clear();
      thread.acquiring.clear();
      thread.fenced = false;
      thread.accesses.clear();
      thread.copies.clear();
      thread.committed_groups = 0;
      thread.fiber.start(launch_->kernel, launch_->arguments);
    }
  }

  void run_resident() {
    std::vector<unsigned> order;
    for (unsigned yields = 0;;) {
      bool progress = false;
      arrange(order, unsigned(resident_.size()));
      for (const unsigned i : order) progress |= run_block(*resident_[i]);
      for (Block* block : resident_) progress |= complete(block->threads[0], Scope::cluster);
      progress |= complete(resident_[0]->threads[0], Scope::grid);
      if (progress) {
        yields = 0;
        continue;
      }
      if (!wake_yielding()) break;
      if (++yields > kMaxYields) throw std::runtime_error("threads spin for what no other thread will do");
    }
    for (Block* block : resident_) {
      for (unsigned i = 0; i < count_; ++i) {
        if (block->threads[i].state == State::waiting) report_deadlock(block->threads[i]);
      }
    }
  }

  // A warp runs as far as it can before the next one does. Between two barriers threads cannot drift further apart,
  // and that is what brings a missing barrier to light. In random order any warp may fall behind at any point, and any
  // block behind the others. True if anything ran.
  bool run_block(Block& block) {
    if (block.exited) return false;
    bool progress = false;
    std::vector<unsigned>& order = warp_order_;
    for (;;) {
      bool interrupted = false;
      arrange(order, unsigned(block.warp_epochs.size()));
      for (const unsigned warp : order) {
        while (!interrupted && step(block, warp * kWarpSize, progress)) interrupted = random_ && generator_() % 4 == 0;
      }
      if (interrupted && resident_.size() > 1 && generator_() % 8 == 0) return true;
      if (interrupted || complete(block.threads[0], Scope::block)) continue;
      block.exited = std::all_of(block.threads.begin(), block.threads.begin() + count_,
                                 [](const Thread& thread) { return thread.state == State::exited; });
      if (block.exited && counts_traffic_) count_traffic(block);
      return progress;
    }
  }

  // Runs each ready lane of a warp to where it waits next, then completes what all the lanes it names have reached.
  // True if that made a lane ready.
  bool step(Block& block, unsigned first, bool& ran) {
    arrange(lane_order_, kWarpSize);
    const unsigned end = std::min(first + kWarpSize, count_);
    for (const unsigned lane : lane_order_) {
      if (first + lane >= end || block.threads[first + lane].state != State::ready) continue;
      resume(block.threads[first + lane]);
      ran |= block.threads[first + lane].state != State::yielding;
    }
    bool progress = false;
    for (unsigned i = first; i < end; ++i) progress |= complete(block.threads[i], Scope::warp);
    return progress;
  }

  void resume(Thread& thread) {
    running_ = &thread;
    indices.thread = thread.index;
    indices.block = thread.block->index;
    accesses_since_resume_ = 0;
    callback_stack_ = &thread.fiber;
    thread.fiber.resume();
    callback_stack_ = nullptr;
    if (!error_.empty()) throw std::runtime_error(error_);
    if (!thread.fiber.finished()) return;
    thread.state = State::exited;
    if (!thread.copies.empty()) {  // it could arrive in the memory of a later block
      throw std::runtime_error(message(thread, "exits before the asynchronous copy" +
                                                   source_of(thread.copies[0].instruction) +
                                                   " has arrived: no wait is for it"));
    }
  }

  bool wake_yielding() {
    bool woke = false;
    for (Block* block : resident_) {
      for (unsigned i = 0; i < count_; ++i) {
        if (block->threads[i].state != State::yielding) continue;
        block->threads[i].state = State::ready;
        woke = true;
      }
    }
    return woke;
  }

  // ---- Completing -------------------------------------------------------------------------------------------------

  size_t index_of(const Block& block) const {
    return size_t(std::find(resident_.begin(), resident_.end(), &block) - resident_.begin());
  }

  // The threads that a thread's call names. The lanes that a block's last, partial warp lacks are no threads.
  std::vector<Thread*>& named(const Thread& thread) {
    std::vector<Thread*>& threads = named_;
    threads.clear();
    const Call& call = thread.call;
    size_t first_block = index_of(*thread.block), blocks = 1;
    unsigned begin = 0, end = count_;
    if (call.scope == Scope::warp) {
      begin = thread.rank - thread.rank % kWarpSize;
      end = std::min(begin + kWarpSize, count_);
    } else if (call.scope == Scope::cluster) {
      blocks = launch_->cluster.x * launch_->cluster.y * launch_->cluster.z;
      first_block -= thread.block->cluster_rank;
    } else if (call.scope == Scope::grid) {
      first_block = 0;
      blocks = resident_.size();
    }
    for (size_t b = first_block; b < first_block + blocks; ++b) {
      for (unsigned i = begin; i < end; ++i) {
        if (call.scope != Scope::warp || call.mask >> (i - begin) & 1) threads.push_back(&resident_[b]->threads[i]);
      }
    }
    return threads;
  }

  static bool is_in(const Thread& thread, const Call& call) {
    return thread.state == State::waiting && same(thread.call, call);
  }

  // Once all threads that the thread's call names are in it, gives them their results and lets them go on.
  bool complete(Thread& thread, Scope scope) {
    if (thread.state != State::waiting || thread.call.scope != scope) return false;
    const Call call = thread.call;
    const std::vector<Thread*>& members = named(thread);
    for (const Thread* member : members) {
      if (!is_in(*member, call)) return false;
    }
    uint64_t count = 0, lanes = 0;
    for (const Thread* member : members) {
      count += member->call.value != 0;
      lanes |= uint64_t(member->call.value != 0) << member->rank % kWarpSize;
    }
    for (Thread* member : members) {
      member->state = State::ready;
      member->result = scope == Scope::warp ? lanes : count;
      const unsigned source = member->call.source;
      if (source == Call::kNoSource) continue;
      const Thread* from = nullptr;
      for (const Thread* other : members) {
        if (other->rank % kWarpSize == source) from = other;
      }
      if (!from) {
        throw std::runtime_error(
            message(*member, format(member->call) + format(" reads lane %u, which takes no part", source)));
      }
      member->result = from->call.value;
    }
    synchronize(call, members);
    return true;
  }

  // Shuffles and votes order no memory accesses, and __syncwarp only those of the lanes that it names: one that does
  // not name all living lanes is taken for none.
  void synchronize(const Call& call, const std::vector<Thread*>& members) {
    Block& block = *members[0]->block;
    switch (call.scope) {
      case Scope::warp: {
        if (std::strcmp(call.name, "__syncwarp")) return;
        const unsigned first = members[0]->rank - members[0]->rank % kWarpSize;
        size_t living = 0;
        for (unsigned i = first; i < std::min(first + kWarpSize, count_); ++i) {
          living += block.threads[i].state != State::exited;
        }
        if (members.size() == living) ++block.warp_epochs[first / kWarpSize];
        return;
      }
      case Scope::block: finish_epoch(block); return;
      case Scope::cluster: {
        Clock clock;
        each_block(members, [&](Block& b) {
          finish_epoch(b);
          clock.learn(b.clock);
          clock.learn(b.id, {b.epoch, Known::kNobody});
        });
        each_block(members, [&](Block& b) { b.clock = clock; });
        return;
      }
      case Scope::grid:
        ++grid_epoch_;
        each_block(members, [&](Block& b) { finish_epoch(b); });
        return;
    }
  }

  template <class F>
  void each_block(const std::vector<Thread*>& members, F f) {
    for (size_t i = 0; i < members.size(); i += count_) f(*members[i]->block);
  }

  void finish_epoch(Block& block) {
    ++block.epoch;
    for (unsigned i = 0; i < count_; ++i) {
      Clock& acquired = block.threads[i].acquired;
      if (acquired.empty()) continue;
      block.clock.learn(acquired);
      acquired.clear();
    }
  }

  [[noreturn]] void report_deadlock(const Thread& thread) {
    for (const Thread* other : named(thread)) {
      if (is_in(*other, thread.call)) continue;
      const std::string of_block = other->block == thread.block ? "" : " of block " + format(other->block->index);
      throw std::runtime_error(message(
          thread, "deadlock: waits in " + format(thread.call) + " for thread " + format(other->index) + of_block +
                      ", which " + (other->state == State::exited ? "has exited" : "waits in " + format(other->call))));
    }
    throw std::logic_error("the emulator has lost a thread");
  }

  // ---- Observing --------------------------------------------------------------------------------------------------

  bool is_global(const Region& region) const {
    return !global_.empty() && &region >= &global_.front() && &region <= &global_.back();
  }

  Region* find(const void* address, const void* instruction, size_t bytes) {
    Region* region = nullptr;
    if (last_global_ < global_.size() && global_[last_global_].has(address)) region = &global_[last_global_];
    if (!region) region = find_shared(block(), address);
    for (size_t i = 0; !region && i < global_.size(); ++i) {
      if (global_[i].has(address)) region = &global_[last_global_ = i];
    }
    for (size_t i = 0; !region && i < resident_.size(); ++i) {
      region = find_shared(*resident_[i], address);
      if (region && resident_[i]->exited) fail("access of the shared memory of a block that has exited");
    }
    if (!region || region->offset(address) + bytes > region->bytes) {
      const size_t missed =
          region ? region->offset(address) + bytes - region->bytes : bytes + distance(address, &region);
      fail(format("access of %zu bytes%s is out of bounds", bytes, source_of(instruction).c_str()) +
           (region ? format(": it ends %zu bytes past an array of %zu", missed, region->bytes) : std::string()));
    }
    return region;
  }

  // Of an address outside all regions: how far it is behind the end of the closest one before it.
  size_t distance(const void* address, Region** closest) {
    size_t least = 4096;
    const auto look = [&](Region& region) {
      const char* const end = region.begin + region.bytes;
      if (address < end || size_t(static_cast<const char*>(address) - end) >= least) return;
      least = size_t(static_cast<const char*>(address) - end);
      *closest = &region;
    };
    for (Region& region : global_) look(region);
    look(block().dynamic_shared);
    for (Region& region : block().static_shared) look(region);
    return least;
  }

  static Region* find_shared(Block& block, const void* address) {
    if (block.dynamic_shared.has(address)) return &block.dynamic_shared;
    for (Region& region : block.static_shared) {
      if (region.has(address)) return &region;
    }
    return nullptr;
  }

  // Of the block's own shared memory, if it is observed.
  template <class F>
  void each_shared_cell(const void* address, size_t bytes, F f) {
    Region* const region = find_shared(block(), address);
    if (!region || region->cells.empty()) return;
    const size_t first = region->offset(address) >> region->granule_bits;
    const size_t last = (region->offset(address) + bytes - 1) >> region->granule_bits;
    for (size_t i = first; i <= last; ++i) f(region->cells[i]);
  }

  // The running thread's, a new one after each of its barriers.
  EventId event(bool atomic) {
    const Thread& self = *running_;
    const Event now{self.block->id, self.rank,         self.warp(),
                    grid_epoch_,    self.block->epoch, self.block->warp_epochs[self.warp()],
                    atomic};
    if (self.event) {
      const Event& last = events_[self.event - first_event_];
      if (last.atomic == atomic && last.grid_epoch == now.grid_epoch && last.block_epoch == now.block_epoch &&
          last.warp_epoch == now.warp_epoch) {
        return self.event;
      }
    }
    return running_->event = add(now);
  }

  EventId add(const Event& event) {
    events_.push_back(event);
    return first_event_ + EventId(events_.size()) - 1;
  }

  // Whether what the running thread does now comes after that event on any hardware.
  bool is_ordered(EventId id) const {
    if (id < first_event_ || id == running_->event) return true;  // an earlier launch's
    const Event& event = events_[id - first_event_];
    const Thread& self = *running_;
    if (event.block == Event::kMany) {
      const std::vector<EventId>& readers = readers_.find(id)->second;
      return std::all_of(readers.begin(), readers.end(), [this](EventId reader) { return is_ordered(reader); });
    }
    if (event.grid_epoch < grid_epoch_) return true;
    if (event.block == self.block->id) {
      if (event.thread == self.rank || event.block_epoch < self.block->epoch) return true;
      if (event.warp == self.warp() && event.warp_epoch < self.block->warp_epochs[self.warp()]) return true;
    }
    return self.block->clock.has(event) || self.acquired.has(event);
  }

  void observe(Region& region, size_t granule, EventId self, AccessKind kind, const void* instruction) {
    Cell& cell = region.cells[granule];
    const bool reads = kind != AccessKind::write, writes = kind != AccessKind::read;
    if (cell.write & Cell::kPending) report_pending(region, granule, reads, instruction);
    if (reads && region.fresh && cell.write == 0) {
      report(region, granule, "reads memory that nothing has written", instruction);
    }
    if (cell.write != self && !is_ordered(cell.write) &&
        !(kind == AccessKind::atomic && events_[cell.write - first_event_].atomic)) {
      report(region, granule, (writes ? "race: writes what " : "race: reads what ") + name(cell.write) + " writes",
             instruction);
    }
    if (writes) {
      if (cell.read != self && !is_ordered(cell.read) &&
          !(kind == AccessKind::atomic && events_[cell.read - first_event_].atomic)) {
        report(region, granule, "race: writes what " + name(cell.read) + " reads", instruction);
      }
      cell = {self, reads ? self : 0};
    } else if (cell.read != self) {
      cell.read = is_ordered(cell.read) ? self : several(cell.read);
    }
  }

  // The event that stands for a reader and the running thread. Of one block it is the later one's, by any of its
  // threads; of several it is a list of these.
  EventId several(EventId reader) {
    const Event other = events_[reader - first_event_];
    if (other.block == block().id) return several_of_block(reader);
    EventId many = reader;
    if (other.block != Event::kMany) {
      many = add({Event::kMany, Event::kMany, Event::kMany, grid_epoch_, 0, 0, false});
      readers_[many] = {reader};
    }
    std::vector<EventId>& readers = readers_[many];
    for (size_t i = readers.size(); i-- > 0;) {
      if (events_[readers[i] - first_event_].block != block().id) continue;
      readers[i] = is_ordered(readers[i]) ? event(false) : several_of_block(readers[i]);
      return many;
    }
    readers.push_back(event(false));
    return many;
  }

  EventId several_of_block(EventId reader) {
    const Event& other = events_[reader - first_event_];
    const Thread& self = *running_;
    const bool same_warp = other.warp == self.warp();
    const bool stands_already = other.thread == Event::kMany && other.block_epoch == self.block->epoch &&
                                (other.warp == Event::kMany || same_warp);
    if (stands_already) return reader;
    return add({self.block->id, Event::kMany, same_warp ? other.warp : Event::kMany, grid_epoch_, self.block->epoch,
                self.block->warp_epochs[self.warp()], false});
  }

  std::string name(EventId id) const {
    const Event& event = events_[id - first_event_];
    if (event.block == Event::kMany) return "several blocks";
    if (event.thread == Event::kMany) return "several threads";
    const dim3 dim = launch_->block;
    const std::string thread =
        "thread " + format({event.thread % dim.x, event.thread / dim.x % dim.y, event.thread / (dim.x * dim.y)});
    return event.block == block().id ? thread : thread + format(" of block %u", event.block);
  }

  [[noreturn]] void report(const Region& region, size_t granule, const std::string& what, const void* instruction) {
    fail(what +
         format(" (byte %zu of %zu of %s memory)", granule << region.granule_bits, region.bytes,
                is_global(region) ? "global" : "shared") +
         source_of(instruction));
  }

  // Not inlined: observe() is as fast as what it does at each access is short.
  [[noreturn]] __attribute__((noinline, cold)) void report_pending(const Region& region, size_t granule, bool reads,
                                                                   const void* instruction) {
    const std::string writer = name(region.cells[granule].write & ~Cell::kPending);
    report(region, granule,
           (reads ? "reads" : "writes") + (" what an asynchronous copy of " + writer) + " is still to write",
           instruction);
  }

  void count_traffic(Block& block) {
    for (unsigned first = 0; first < count_; first += kWarpSize) {
      std::vector<const std::vector<Access>*> lanes;
      for (unsigned i = first; i < std::min(first + kWarpSize, count_); ++i)
        lanes.push_back(&block.threads[i].accesses);
      count_requests(lanes, traffic_.back());
    }
  }

  // -----------------------------------------------------------------------------------------------------------------

  static std::string message(const Thread& thread, const std::string& what) {
    return "block " + format(thread.block->index) + ", thread " + format(thread.index) + ": " + what;
  }

  // Keeps an order that is right already, which it is but for random ones.
  void arrange(std::vector<unsigned>& order, unsigned count) {
    if (!random_ && order.size() == count && (count < 2 || (order[0] > order[1]) == reverse_)) return;
    order.resize(count);
    std::iota(order.begin(), order.end(), 0u);
    if (reverse_) std::reverse(order.begin(), order.end());
    if (random_) std::shuffle(order.begin(), order.end(), generator_);
  }

  std::mutex mutex_;
  bool random_ = false, reverse_ = false, observes_races_ = true, counts_traffic_ = false;
  unsigned seed_ = 0;
  std::minstd_rand generator_;
  std::vector<std::unique_ptr<Block>> blocks_;  // as many as were ever resident at once
  std::vector<Traffic> traffic_;

  // Of the launch.
  const Launch* launch_ = nullptr;
  unsigned count_ = 0;  // threads in a block
  std::vector<Block*> resident_;
  Thread* running_ = nullptr;
  std::string error_;
  uint64_t accesses_since_resume_ = 0;
  std::vector<unsigned> warp_order_, lane_order_;
  std::vector<Thread*> named_;
  std::map<const void*, size_t> shared_offsets_;  // of static variables
  size_t static_bytes_ = 0;

  // Of memory.
  std::vector<Region> global_;
  size_t last_global_ = 0;
  EventId first_event_ = 1;  // of the launch
  std::vector<Event> events_;
  std::unordered_map<EventId, std::vector<EventId>> readers_;  // of an event that stands for those of several blocks
  uint32_t grid_epoch_ = 1;
  std::unordered_map<uintptr_t, Clock> synchronized_;  // what was released through an atomic's address
};

Machine machine;

}  // namespace

const Fiber* callback_stack_ = nullptr;

namespace {

// While the emulator works for a thread, accesses are not the thread's.
class Work {
 public:
  ~Work() { callback_stack_ = stack_; }

 private:
  const Fiber* const stack_ = std::exchange(callback_stack_, nullptr);
};

}  // namespace

void access(const void* address, size_t bytes, AccessKind kind, const void* instruction) {
  const Work work;
  machine.access(address, bytes, kind, instruction);
}

void check_alignment(const void* address, size_t bytes, const void* instruction) {
  const Work work;
  machine.check_alignment(address, bytes, instruction);
}

int Device::blocks_per_multiprocessor(unsigned threads, size_t shared_bytes) const {
  const int by_threads = threads_per_multiprocessor / int((threads + kWarpSize - 1) / kWarpSize * kWarpSize);
  return std::min(by_threads, shared_per_multiprocessor / int(shared_bytes + 1024));  // 1 KB of each is the system's
}

void run(const Launch& launch) { machine.run(launch); }

uint64_t wait(const Call& call) {
  const Work work;
  return machine.wait(call);
}

void yield() {
  const Work work;
  machine.suspend(State::yielding);
}

void fail(const char* pattern, ...) {
  const Work work;
  va_list arguments;
  va_start(arguments, pattern);
  machine.fail(format(pattern, arguments));
}

void* shared(const void* variable, size_t bytes, size_t alignment) {
  const Work work;
  return machine.shared(variable, bytes, alignment);
}

void* map_shared_rank(void* address, unsigned rank) {
  const Work work;
  return machine.map_shared_rank(address, rank);
}

void fence() {
  const Work work;
  machine.fence();
}

void check_alignment(const void* address, size_t bytes) {
  check_alignment(address, bytes, __builtin_return_address(0));
}

void atomic_access(void* address, size_t bytes) {
  const Work work;
  machine.check_alignment(address, bytes, __builtin_return_address(0));
  machine.access(address, bytes, AccessKind::atomic, __builtin_return_address(0));
  machine.atomic(address);
}

void copy_async(void* to, const void* from, size_t bytes) {
  const Work work;
  machine.copy_async(to, from, bytes, __builtin_return_address(0));
}

void commit_copies() {
  const Work work;
  machine.commit_copies();
}

void wait_for_copies(size_t groups_left) {
  const Work work;
  machine.wait_for_copies(groups_left);
}

unsigned lane() { return machine.lane(); }
uint32_t living_lanes() { return machine.living_lanes(); }
dim3 cluster_dim() { return machine.cluster_dim(); }
unsigned block_rank() { return machine.block().cluster_rank; }
void* dynamic_shared() { return machine.block().dynamic_memory(); }

void set_order(const std::string& order, unsigned seed) { machine.set_order(order, seed); }
void allow(void* address, size_t bytes, bool fresh) { machine.allow(address, bytes, fresh); }
void forget_allowed() { machine.forget_allowed(); }
void observe(bool races, bool traffic) { machine.observe(races, traffic); }
std::vector<Traffic> take_traffic() { return machine.take_traffic(); }

}  // namespace emulator
