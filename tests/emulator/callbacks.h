// What the compiler's -fsanitize=thread calls at each access of memory that may be shared, made the emulator's own.
#pragma once

#include <cstddef>

namespace emulator {

class Fiber;
enum class AccessKind { read, write, atomic };

extern const Fiber* callback_stack_;  // the running thread's; null: no thread runs, or the emulator works for it

void access(const void* address, size_t bytes, AccessKind kind, const void* instruction);
void check_alignment(const void* address, size_t bytes, const void* instruction);

}  // namespace emulator
