// Mistakes that tools/check_mutants.py writes into a copy of the kernels. One build holds all of them. set_mutant()
// says which one to make, reached_mutants which ones could have been made.
#pragma once

namespace mutation {

inline int wanted = -1;

}  // namespace mutation

extern "C" {
__attribute__((visibility("default"), used)) inline unsigned char reached_mutants[1 << 12]{};

__attribute__((visibility("default"), used)) inline void set_mutant(int number) { mutation::wanted = number; }
}

namespace mutation {

// `a < bound(k) < b` is a < b; mutant k makes it a < b + 1, mutant k + 1 makes it a < b - 1.
struct Bound {
  int delta;
};

// Functions of their own, because the emulator watches what a kernel reads.
__attribute__((noinline, no_sanitize("thread"))) inline bool is(int mutant) {
  reached_mutants[mutant] = 1;
  return wanted == mutant;
}

__attribute__((noinline, no_sanitize("thread"))) inline Bound bound(int mutant) {
  reached_mutants[mutant] = reached_mutants[mutant + 1] = 1;
  return {wanted == mutant ? 1 : wanted == mutant + 1 ? -1 : 0};
}

template <class T>
struct Left {
  T value;
  int delta;
};

#define MUTATION_COMPARISON(op)                                 \
  template <class T>                                            \
  Left<T> operator op(T value, Bound bound) {                   \
    return {value, bound.delta};                                \
  }                                                             \
  template <class T, class U>                                   \
  bool operator op(Left<T> left, U right) {                     \
    return left.value op static_cast<U>(right + U(left.delta)); \
  }
MUTATION_COMPARISON(<)
MUTATION_COMPARISON(<=)
MUTATION_COMPARISON(>)
MUTATION_COMPARISON(>=)
MUTATION_COMPARISON(==)
#undef MUTATION_COMPARISON

template <class A, class B>
auto least(int mutant, A a, B b) {
  return min(a, b) + bound(mutant).delta;
}

template <class A, class B>
auto most(int mutant, A a, B b) {
  return max(a, b) + bound(mutant).delta;
}

}  // namespace mutation
