// The functions that -fsanitize=thread calls at each access of memory that may be shared. The compiler's own runtime,
// which looks for races between operating system threads, is not linked: kernels know nothing of all this, and yet no
// access of theirs goes unseen.
#include "callbacks.h"

#include <cstdint>

#include "fibers.h"
#include "machine.h"

namespace emulator {
namespace {

bool is_watched(const void* address) {
  const Fiber* const stack = callback_stack_;
  return stack && !stack->has_on_stack(address) &&
         !(address >= static_cast<const void*>(&indices) && address < static_cast<const void*>(&indices + 1));
}

// `alignment`: what the hardware asks for; more than 16 bytes are moved in several accesses.
__attribute__((always_inline)) inline void watch(const void* address, size_t bytes, size_t alignment, AccessKind kind,
                                                 const void* instruction) {
  if (!is_watched(address)) return;
  if (alignment > 1) check_alignment(address, alignment, instruction);
  for (const char* at = static_cast<const char*>(address); bytes > 0;) {
    const size_t part = bytes < 16 ? bytes : 16;
    access(at, part, kind, instruction);
    at += part;
    bytes -= part;
  }
}

}  // namespace
}  // namespace emulator

using emulator::AccessKind;

#define EMULATOR_CALLBACKS(bytes)                                                      \
  void __tsan_read##bytes(void* at) {                                                  \
    emulator::watch(at, bytes, bytes, AccessKind::read, __builtin_return_address(0));  \
  }                                                                                    \
  void __tsan_write##bytes(void* at) {                                                 \
    emulator::watch(at, bytes, bytes, AccessKind::write, __builtin_return_address(0)); \
  }                                                                                    \
  void __tsan_unaligned_read##bytes(void* at) {                                        \
    emulator::watch(at, bytes, 1, AccessKind::read, __builtin_return_address(0));      \
  }                                                                                    \
  void __tsan_unaligned_write##bytes(void* at) {                                       \
    emulator::watch(at, bytes, 1, AccessKind::write, __builtin_return_address(0));     \
  }

#define EMULATOR_ATOMIC(bits, name)                                                                      \
  uint##bits##_t __tsan_atomic##bits##_##name(uint##bits##_t* at, uint##bits##_t value, int /*order*/) { \
    return __atomic_##name(at, value, __ATOMIC_SEQ_CST);                                                 \
  }
#define EMULATOR_ATOMICS(bits)                                                                                         \
  EMULATOR_ATOMIC(bits, fetch_add)                                                                                     \
  EMULATOR_ATOMIC(bits, fetch_sub)                                                                                     \
  uint##bits##_t __tsan_atomic##bits##_exchange(uint##bits##_t* at, uint##bits##_t value, int) {                       \
    return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);                                                           \
  }                                                                                                                    \
  uint##bits##_t __tsan_atomic##bits##_load(uint##bits##_t* at, int) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); } \
  void __tsan_atomic##bits##_store(uint##bits##_t* at, uint##bits##_t value, int) {                                    \
    __atomic_store_n(at, value, __ATOMIC_SEQ_CST);                                                                     \
  }                                                                                                                    \
  bool __tsan_atomic##bits##_compare_exchange_strong(uint##bits##_t* at, uint##bits##_t* expected,                     \
                                                     uint##bits##_t value, int, int) {                                 \
    return __atomic_compare_exchange_n(at, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                \
  }                                                                                                                    \
  bool __tsan_atomic##bits##_compare_exchange_weak(uint##bits##_t* at, uint##bits##_t* expected, uint##bits##_t value, \
                                                   int, int) {                                                         \
    return __atomic_compare_exchange_n(at, expected, value, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                 \
  }

extern "C" {
EMULATOR_CALLBACKS(1)
EMULATOR_CALLBACKS(2)
EMULATOR_CALLBACKS(4)
EMULATOR_CALLBACKS(8)
EMULATOR_CALLBACKS(16)
void __tsan_read_range(void* at, size_t bytes) {
  emulator::watch(at, bytes, 1, AccessKind::read, __builtin_return_address(0));
}
void __tsan_write_range(void* at, size_t bytes) {
  emulator::watch(at, bytes, 1, AccessKind::write, __builtin_return_address(0));
}

// Atomics of the C++ library, which only host code uses: what they would have been without the flag.
EMULATOR_ATOMICS(8)
EMULATOR_ATOMICS(16)
EMULATOR_ATOMICS(32)
EMULATOR_ATOMICS(64)

void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
