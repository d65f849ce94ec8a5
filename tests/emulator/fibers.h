// Stackful coroutines: the emulator runs each CUDA thread of a block on one.
//
// ucontext creates a fiber; _setjmp and _longjmp switch, because swapcontext makes a system call each time.
#pragma once

#if defined(_FORTIFY_SOURCE) && _FORTIFY_SOURCE > 0
#error "Compile with -U_FORTIFY_SOURCE: the checked longjmp refuses to change stacks."
#endif

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN 1
#endif
#endif
#ifdef EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

// AddressSanitizer forgets the red zones of a whole stack when it sees a longjmp, but the frames of a suspended fiber
// live on. The built-in jump, in functions that are not instrumented, is not seen.
#ifdef EMULATOR_ASAN
#define EMULATOR_JUMPS __attribute__((noinline, no_sanitize("address")))
using Place = void* [5];
#define EMULATOR_MARK(place) __builtin_setjmp(place)
#define EMULATOR_JUMP(place) __builtin_longjmp(place, 1)
#else
#define EMULATOR_JUMPS
using Place = jmp_buf;
#define EMULATOR_MARK(place) _setjmp(place)
#define EMULATOR_JUMP(place) _longjmp(place, 1)
#endif

// Runs one body after another on its own stack. One fiber runs at a time, and only the stack that resumes it, never
// another fiber, is switched to when it suspends. Bodies throw nothing: what is wrong in one is told to the resumer.
class Fiber {
 public:
  Fiber() {
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    // Stacks grow down: an overflow faults instead of writing elsewhere. Only the first stacks are guarded so: each
    // guard is one more mapping, and a process may have 65,530. All fibers of a kernel run the same code.
    if (created_++ < kGuarded) mprotect(stack, kGuardBytes, PROT_NONE);
    stack_ = static_cast<char*>(stack);
    reset();
  }

  ~Fiber() { munmap(stack_, kStackBytes); }

  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the next resume() call body(argument).
  void start(void (*body)(void*), void* argument) {
    body_ = body;
    argument_ = argument;
    finished_ = false;
  }

  // Runs the body until it suspends or ends.
  void resume() { enter(nullptr); }

  bool finished() const { return finished_; }

  // Forgets a body that is not finished, without unwinding it, so that the fiber can be started again.
  void cancel() {
    if (!finished_) reset();
  }

  // Called on a fiber: back to its resume().
  static void suspend() { running_->leave(); }

  bool has_on_stack(const void* address) const { return address >= usable_stack() && address < stack_ + kStackBytes; }

 private:
  static constexpr size_t kStackBytes = 256 * 1024, kGuardBytes = 64 * 1024;
  static constexpr unsigned kGuarded = 4096;
  static inline unsigned created_ = 0;

  char* usable_stack() const { return stack_ + kGuardBytes; }

  // Puts the loop on the stack, up to its first suspension: from there on a switch is a longjmp.
  void reset() {
#ifdef EMULATOR_ASAN
    __asan_unpoison_memory_region(usable_stack(), kStackBytes - kGuardBytes);
#endif
    finished_ = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = usable_stack();
    context.uc_stack.ss_size = kStackBytes - kGuardBytes;
    context.uc_link = nullptr;
    makecontext(&context, [] { running_->loop(); }, 0);
    enter(&context);
  }

  void loop() {
    finish_switch(nullptr, &outside_stack_, &outside_stack_bytes_);
    for (;;) {
      leave();
      body_(argument_);
      finished_ = true;
    }
  }

  // To the fiber: the first time by way of `context`.
  EMULATOR_JUMPS void enter(const ucontext_t* context) {
    running_ = this;
    void* fake_stack = nullptr;
    start_switch(&fake_stack, usable_stack(), kStackBytes - kGuardBytes);
    if (EMULATOR_MARK(outside_) == 0) {
      if (context) setcontext(context);
      EMULATOR_JUMP(inside_);
    }
    finish_switch(fake_stack, nullptr, nullptr);
  }

  // Back to enter().
  EMULATOR_JUMPS void leave() {
    void* fake_stack = nullptr;
    start_switch(&fake_stack, outside_stack_, outside_stack_bytes_);
    if (EMULATOR_MARK(inside_) == 0) EMULATOR_JUMP(outside_);
    finish_switch(fake_stack, &outside_stack_, &outside_stack_bytes_);
  }

  // AddressSanitizer keeps track of the stack that it is on.
#ifdef EMULATOR_ASAN
  static void start_switch(void** fake_stack, const void* bottom, size_t bytes) {
    __sanitizer_start_switch_fiber(fake_stack, bottom, bytes);
  }
  static void finish_switch(void* fake_stack, const void** old_bottom, size_t* old_bytes) {
    __sanitizer_finish_switch_fiber(fake_stack, old_bottom, old_bytes);
  }
#else
  static void start_switch(void**, const void*, size_t) {}
  static void finish_switch(void*, const void**, size_t*) {}
#endif

  static inline Fiber* running_ = nullptr;
  static inline Place outside_;
  static inline const void* outside_stack_ = nullptr;
  static inline size_t outside_stack_bytes_ = 0;

  char* stack_;
  Place inside_;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  bool finished_ = true;
};

}  // namespace emulator
