// What lets a binary that was linked with a newer glibc load with glibc 2.28. A function's name is defined here, for
// this binary alone, as a jump to the oldest version of that function, which every later glibc has too.
#include <cstdlib>

// libstdc++ reads it to count references without atomic operations while a process has one thread. It came with 2.32;
// here it says that there are more.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

#if defined(__GLIBC__) && defined(__x86_64__)

__asm__(R"(
.text
.macro oldest version, names:vararg
.irp name, \names
  .symver oldest_\name, \name@\version
  .globl \name
  .hidden \name
  .type \name, @function
\name:
  jmp oldest_\name@PLT
  .size \name, . - \name
.endr
.endm

oldest GLIBC_2.2.5, exp
)"               // since 2.29 another exp, which differs in how it reports errors alone
#ifdef USE_CUDA  // the static cudart calls these, which 2.34 moved into libc.so
        R"(
oldest GLIBC_2.3.4, dlmopen
oldest GLIBC_2.2.5, dlclose, dlerror, dlopen, dlsym, dlvsym, pthread_condattr_setpshared, pthread_create
oldest GLIBC_2.2.5, pthread_detach, pthread_getspecific, pthread_join, pthread_key_create, pthread_key_delete
oldest GLIBC_2.2.5, pthread_kill, pthread_mutex_trylock, pthread_mutexattr_destroy, pthread_mutexattr_init
oldest GLIBC_2.2.5, pthread_mutexattr_setpshared, pthread_mutexattr_settype, pthread_once, pthread_rwlock_destroy
oldest GLIBC_2.2.5, pthread_rwlock_init, pthread_rwlock_rdlock, pthread_rwlock_timedrdlock
oldest GLIBC_2.2.5, pthread_rwlock_timedwrlock, pthread_rwlock_tryrdlock, pthread_rwlock_trywrlock
oldest GLIBC_2.2.5, pthread_rwlock_unlock, pthread_rwlock_wrlock, pthread_rwlockattr_destroy
oldest GLIBC_2.2.5, pthread_rwlockattr_init, pthread_rwlockattr_setpshared, pthread_setspecific
oldest GLIBC_2.2.5, pthread_spin_destroy, pthread_spin_init, pthread_spin_lock, pthread_spin_trylock
oldest GLIBC_2.2.5, pthread_spin_unlock, sem_destroy, sem_init, sem_post, sem_timedwait, sem_trywait, sem_wait
oldest GLIBC_2.2.5, shm_open, shm_unlink
)"
#endif
);

#endif
