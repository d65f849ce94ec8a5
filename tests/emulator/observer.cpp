// What a launch's threads do to memory: whether each access is allowed (memory.h), and what it moves (traffic.h).
#include "observer.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "callbacks.h"

namespace emulator {

// Where an instruction comes from, if there is addr2line to tell: the kernel's line, not the line of a header's
// stand-in that was inlined there.
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

namespace {

Block& block() { return *running.thread->block; }

class Observer {
 public:
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
    fresh = false;  // of the kernels' writes only atomics are seen
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

  void begin_launch() {
    first_event_ += EventId(events_.size());
    events_.clear();
    synchronized_.clear();
    readers_.clear();
    grid_epoch_ = 1;
    if (counts_traffic_) traffic_.emplace_back();
  }

  void resume() { accesses_since_resume_ = 0; }

  Region shared(const void* address, size_t bytes) const { return Region(address, bytes, 0, true, observes_races_); }

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
      if (kind != AccessKind::write) running.thread->accesses.push_back({instruction, start, uint32_t(bytes), false});
      if (kind != AccessKind::read) {  // an atomic operation's two halves are two requests
        const void* const half = static_cast<const char*>(instruction) + (kind == AccessKind::atomic);
        running.thread->accesses.push_back({half, start, uint32_t(bytes), true});
      }
    }
  }

  void check_alignment(const void* address, size_t bytes, const void* instruction) {
    const size_t offset = reinterpret_cast<uintptr_t>(address) % bytes;
    if (offset) {
      fail(format("access of %zu bytes%s is misaligned by %zu bytes", bytes, source_of(instruction).c_str(), offset));
    }
  }

  // Reads the source at once. The thread may write the destination from now on, so others must be done with it. Under
  // AddressSanitizer plain accesses go unseen here, and it checks the two memory functions itself.
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
    Thread& self = *running.thread;
    AsyncCopy& copy = self.copies.emplace_back();
    copy.to = static_cast<char*>(to);
    copy.from = static_cast<const char*>(from);
    copy.instruction = instruction;
    copy.bytes = uint32_t(bytes);
    copy.group = self.committed_groups;
    std::memcpy(copy.value, from, bytes);
    std::memset(to, kPoison, bytes);  // whoever reads too early finds this, even where nobody watches
  }

  void commit_copies() { ++running.thread->committed_groups; }

  void wait_for_copies(size_t groups_left) {
    Thread& self = *running.thread;
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
    Thread& self = *running.thread;
    for (const uintptr_t address : self.acquiring) self.acquired.learn(synchronized_[address]);
    self.acquiring.clear();
    self.released = self.block->clock;
    self.released.learn(self.acquired);
    self.released.learn(self.block->id, {self.block->epoch, self.rank});
    self.fenced = true;
  }

  void atomic(const void* address) {
    const auto at = reinterpret_cast<uintptr_t>(address);
    if (running.thread->fenced) synchronized_[at].learn(running.thread->released);
    running.thread->acquiring.push_back(at);
  }

  // Shuffles and votes order no memory accesses, and __syncwarp only those of the lanes that it names. A __syncwarp
  // that does not name all living lanes counts as none.
  void synchronize(const Call& call, const std::vector<Thread*>& members) {
    Block& block = *members[0]->block;
    switch (call.scope) {
      case Scope::warp: {
        if (std::strcmp(call.name, "__syncwarp")) return;
        const unsigned first = members[0]->rank - members[0]->rank % kWarpSize;
        size_t living = 0;
        for (unsigned i = first; i < std::min(first + kWarpSize, running.block_size); ++i) {
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

  void count_traffic(const Block& block) {
    if (!counts_traffic_) return;
    for (unsigned first = 0; first < running.block_size; first += kWarpSize) {
      std::vector<const std::vector<Access>*> lanes;
      for (unsigned i = first; i < std::min(first + kWarpSize, running.block_size); ++i)
        lanes.push_back(&block.threads[i].accesses);
      count_requests(lanes, traffic_.back());
    }
  }

 private:
  static constexpr uint64_t kMaxAccesses = 1 << 24;

  template <class F>
  void each_block(const std::vector<Thread*>& members, F f) {
    for (size_t i = 0; i < members.size(); i += running.block_size) f(*members[i]->block);
  }

  void finish_epoch(Block& block) {
    ++block.epoch;
    for (unsigned i = 0; i < running.block_size; ++i) {
      Clock& acquired = block.threads[i].acquired;
      if (acquired.empty()) continue;
      block.clock.learn(acquired);
      acquired.clear();
    }
  }

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
    for (size_t i = 0; !region && i < running.blocks.size(); ++i) {
      region = find_shared(*running.blocks[i], address);
      if (region && running.blocks[i]->exited) fail("access of the shared memory of a block that has exited");
    }
    if (!region || region->offset(address) + bytes > region->bytes) {
      const size_t missed =
          region ? region->offset(address) + bytes - region->bytes : bytes + distance(address, &region);
      fail(format("access of %zu bytes%s is out of bounds", bytes, source_of(instruction).c_str()) +
           (region ? format(": it ends %zu bytes past an array of %zu", missed, region->bytes) : std::string()));
    }
    return region;
  }

  // How far an address outside all regions is behind the end of the closest one before it.
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

  // Calls f for each cell of the block's own shared memory, if that is observed.
  template <class F>
  void each_shared_cell(const void* address, size_t bytes, F f) {
    Region* const region = find_shared(block(), address);
    if (!region || region->cells.empty()) return;
    const size_t first = region->offset(address) >> region->granule_bits;
    const size_t last = (region->offset(address) + bytes - 1) >> region->granule_bits;
    for (size_t i = first; i <= last; ++i) f(region->cells[i]);
  }

  // The running thread's event: a new one after each of its barriers.
  EventId event(bool atomic) {
    const Thread& self = *running.thread;
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
    return running.thread->event = add(now);
  }

  EventId add(const Event& event) {
    events_.push_back(event);
    return first_event_ + EventId(events_.size()) - 1;
  }

  // Whether what the running thread does now comes after that event on any hardware.
  bool is_ordered(EventId id) const {
    if (id < first_event_ || id == running.thread->event) return true;  // an earlier launch's
    const Event& event = events_[id - first_event_];
    const Thread& self = *running.thread;
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

  // The event that stands for a reader and the running thread. If both are of one block it is the later one's, by any
  // of its threads; if not it is a list of the blocks' events.
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
    const Thread& self = *running.thread;
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
    const dim3 dim = running.launch->block;
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

  // It is not inlined, to keep observe() short: that runs at each access.
  [[noreturn]] __attribute__((noinline, cold)) void report_pending(const Region& region, size_t granule, bool reads,
                                                                   const void* instruction) {
    const std::string writer = name(region.cells[granule].write & ~Cell::kPending);
    report(region, granule,
           (reads ? "reads" : "writes") + (" what an asynchronous copy of " + writer) + " is still to write",
           instruction);
  }

  bool observes_races_ = true, counts_traffic_ = false;
  std::vector<Traffic> traffic_;
  uint64_t accesses_since_resume_ = 0;
  std::vector<Region> global_;
  size_t last_global_ = 0;
  EventId first_event_ = 1;  // of the launch
  std::vector<Event> events_;
  std::unordered_map<EventId, std::vector<EventId>> readers_;  // of an event that stands for those of several blocks
  uint32_t grid_epoch_ = 1;
  std::unordered_map<uintptr_t, Clock> synchronized_;  // what was released through an atomic's address
};

Observer observer;

}  // namespace

void access(const void* address, size_t bytes, AccessKind kind, const void* instruction) {
  const Work work;
  observer.access(address, bytes, kind, instruction);
}

void check_alignment(const void* address, size_t bytes, const void* instruction) {
  const Work work;
  observer.check_alignment(address, bytes, instruction);
}

void check_alignment(const void* address, size_t bytes) {
  check_alignment(address, bytes, __builtin_return_address(0));
}

void fence() {
  const Work work;
  observer.fence();
}

void atomic_access(void* address, size_t bytes) {
  const Work work;
  observer.check_alignment(address, bytes, __builtin_return_address(0));
  observer.access(address, bytes, AccessKind::atomic, __builtin_return_address(0));
  observer.atomic(address);
}

void copy_async(void* to, const void* from, size_t bytes) {
  const Work work;
  observer.copy_async(to, from, bytes, __builtin_return_address(0));
}

void commit_copies() {
  const Work work;
  observer.commit_copies();
}

void wait_for_copies(size_t groups_left) {
  const Work work;
  observer.wait_for_copies(groups_left);
}

void allow(void* address, size_t bytes, bool fresh) { observer.allow(address, bytes, fresh); }
void forget_allowed() { observer.forget_allowed(); }
void observe(bool races, bool traffic) { observer.observe(races, traffic); }
std::vector<Traffic> take_traffic() { return observer.take_traffic(); }

void begin_launch() { observer.begin_launch(); }
void resumed() { observer.resume(); }
Region observed_shared(const void* address, size_t bytes) { return observer.shared(address, bytes); }
void synchronize(const Call& call, const std::vector<Thread*>& members) { observer.synchronize(call, members); }
void count_traffic(const Block& block) { observer.count_traffic(block); }

}  // namespace emulator
