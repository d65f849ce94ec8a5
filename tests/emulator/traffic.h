// Counts what the warps of a launch ask of global memory; machine.h says what a request is.
#pragma once

#include <algorithm>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "machine.h"

namespace emulator {

struct Access {
  const void* instruction;
  uintptr_t address;
  uint32_t bytes;
  bool write;
};

// Lanes run at different times here, so a request is put together afterwards: the k-th time that each lane executed an
// instruction. That is what the hardware executes at once unless lanes skip iterations that they later make up for.
inline void count_requests(const std::vector<const std::vector<Access>*>& lanes, Traffic& traffic) {
  struct Request {
    std::vector<Access> accesses;
  };
  std::unordered_map<const void*, std::vector<Request>> requests;
  std::unordered_map<const void*, size_t> executions;  // of a lane
  for (const auto* lane : lanes) {
    executions.clear();
    for (const Access& access : *lane) {
      auto& of_instruction = requests[access.instruction];
      const size_t execution = executions[access.instruction]++;
      if (execution >= of_instruction.size()) of_instruction.resize(execution + 1);
      of_instruction[execution].accesses.push_back(access);
    }
  }
  constexpr uintptr_t kSector = 32;
  for (auto& [instruction, of_instruction] : requests) {
    for (auto& [accesses] : of_instruction) {
      std::sort(accesses.begin(), accesses.end(),
                [](const Access& a, const Access& b) { return a.address < b.address; });
      uintptr_t end = 0, sector_end = 0;  // of what is counted already
      int64_t bytes = 0, sectors = 0;
      for (const Access& access : accesses) {
        const uintptr_t first = std::max(access.address, end), last = std::max(access.address + access.bytes, end);
        bytes += int64_t(last - first);
        end = last;
        const uintptr_t first_sector = std::max(access.address / kSector, sector_end);
        sector_end = std::max((access.address + access.bytes - 1) / kSector + 1, first_sector);
        sectors += int64_t(sector_end - first_sector);
      }
      (accesses[0].write ? traffic.bytes_written : traffic.bytes_read) += bytes;
      (accesses[0].write ? traffic.sectors_written : traffic.sectors_read) += sectors;
      ++traffic.requests;
    }
  }
}

}  // namespace emulator
