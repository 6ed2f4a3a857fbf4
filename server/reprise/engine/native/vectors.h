// Sixteen numbers at a time, in the compiler's own vector types: every instruction set computes the same steps.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

constexpr int LANES = 16;

inline long divide_up(long a, long b) { return (a + b - 1) / b; }

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

inline floats splat(float x) { return x - floats{}; }
template <class V> inline V load(const void* p) { V v; memcpy(&v, p, sizeof v); return v; }
template <class V> inline void store(void* p, V v) { memcpy(p, &v, sizeof v); }
inline floats select(ints mask, floats a, floats b) { return (floats)((mask & (ints)a) | (~mask & (ints)b)); }
inline floats maximum(floats a, floats b) { return select(a > b, a, b); }

inline float sum(floats v) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}
inline float maximum(floats v) {
  float highest = v[0];
  for (int i = 1; i < LANES; i++) highest = v[i] > highest ? v[i] : highest;
  return highest;
}

// exp by its Taylor series of degree 6 on [-ln2/2, ln2/2]; arguments are at most 0 or small, below -87 gives 0.
inline floats exponential(floats x) {
  const floats given = x;
  ints tiny = x < splat(-87.0f);
  x = maximum(x, splat(-87.0f));
  x = select(x > splat(88.0f), splat(88.0f), x);
  floats n = x * splat(1.44269504f) + splat(12582912.0f);  // 1.5 * 2^23: rounds to the nearest integer
  n = n - splat(12582912.0f);
  floats r = x - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  floats p = splat(1.0f / 720);
  p = p * r + splat(1.0f / 120);
  p = p * r + splat(1.0f / 24);
  p = p * r + splat(1.0f / 6);
  p = p * r + splat(0.5f);
  p = p * r + splat(1.0f);
  p = p * r + splat(1.0f);
  ints exponent = (__builtin_convertvector(n, ints) + 127) << 23;
  return select(given == given, select(tiny, floats{}, p * (floats)exponent), given);
}

inline halves to_bfloat16(floats v) {
#if defined(__AVX512BF16__)
  return (halves)_mm512_cvtneps_pbh((__m512)v);
#else
  words w = (words)v;
  words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  words quiet = (w >> 16) | 0x40;
  ints nan = v != v;
  return __builtin_convertvector((words)((nan & (ints)quiet) | (~nan & (ints)rounded)), halves);
#endif
}
inline uint16_t to_bfloat16(float x) { return to_bfloat16(splat(x))[0]; }
