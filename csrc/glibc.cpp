// What lets a binary that was linked with a newer glibc load with glibc 2.28. A function's name is defined here, for
// this binary alone, as a jump to the oldest version of that function, which every later glibc has too.
#include <cstdlib>

// libstdc++ reads it to count references without atomic operations while a process has one thread. It came with 2.32;
// here it says that there are more.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

#if defined(__GLIBC__) && defined(__x86_64__)

#ifdef USE_CUDA  // the static cudart calls those behind exp, which 2.34 moved into libc.so
#define LDM_FUSED_OLDEST                                                                                        \
  "exp, dlclose, dlerror, dlopen, dlsym, dlvsym, pthread_condattr_setpshared, pthread_create, pthread_detach, " \
  "pthread_getspecific, pthread_join, pthread_key_create, pthread_key_delete, pthread_kill, "                   \
  "pthread_mutex_trylock, pthread_mutexattr_destroy, pthread_mutexattr_init, pthread_mutexattr_setpshared, "    \
  "pthread_mutexattr_settype, pthread_once, pthread_setspecific, sem_post, sem_wait"
#else  // since 2.29 another exp, which differs in how it reports errors alone
#define LDM_FUSED_OLDEST "exp"
#endif

__asm__(".text\n.irp name, " LDM_FUSED_OLDEST R"(
  .symver oldest_\name, \name@GLIBC_2.2.5
  .globl \name
  .hidden \name
  .type \name, @function
\name:
  jmp oldest_\name@PLT
  .size \name, . - \name
.endr)");

#endif
