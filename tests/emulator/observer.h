// What the machine tells the observer of memory (observer.cpp). The compiler tells it of every access (callbacks.h).
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "memory.h"
#include "threads.h"

namespace emulator {

inline constexpr unsigned char kPoison = 0xff;  // a NaN as a floating-point number of any size

void begin_launch();
void resumed();  // a thread runs on
void synchronize(const Call& call, const std::vector<Thread*>& members);  // all of whom have reached the call
void count_traffic(const Block& block);                                   // which has exited

Region observed_shared(const void* address, size_t bytes);  // shared memory, which must be written before it is read
std::string source_of(const void* instruction);             // " at file:line", or nothing

}  // namespace emulator
