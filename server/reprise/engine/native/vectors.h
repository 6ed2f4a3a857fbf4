// Sixteen numbers at a time: every instruction set computes the same steps.
//
// The compiler's own vector types, as long as the CPU's registers; where those are shorter, several of them as one.
// (A vector type that is longer than a register would live in memory.)
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

constexpr int LANES = 16;

#if defined(__AVX512F__)
constexpr int REGISTER_BYTES = 64;
constexpr int NUM_SUMS = 24;  // of sixteen lanes, that fit into the registers beside what is multiplied
#elif defined(__AVX2__)
constexpr int REGISTER_BYTES = 32;
constexpr int NUM_SUMS = 6;
#else
constexpr int REGISTER_BYTES = 16;
constexpr int NUM_SUMS = 6;
#endif

inline long divide_up(long a, long b) { return (a + b - 1) / b; }

// Two vectors as one.
template <class H> struct Twice {
  H low, high;
};

template <class E, int COUNT, bool FITS = (sizeof(E) * COUNT <= REGISTER_BYTES)> struct Vector {
  typedef E type __attribute__((vector_size(sizeof(E) * COUNT)));
};
template <class E, int COUNT> struct Vector<E, COUNT, false> {
  typedef Twice<typename Vector<E, COUNT / 2>::type> type;
};

#define EACH_HALF(OPERATOR)                                                                         \
  template <class H> inline auto operator OPERATOR(Twice<H> a, Twice<H> b) {                        \
    return Twice<decltype(a.low OPERATOR b.low)>{a.low OPERATOR b.low, a.high OPERATOR b.high};     \
  }                                                                                                 \
  template <class H, class E, class = std::enable_if_t<std::is_arithmetic_v<E>>>                    \
  inline auto operator OPERATOR(Twice<H> a, E b) {                                                  \
    return Twice<decltype(a.low OPERATOR b)>{a.low OPERATOR b, a.high OPERATOR b};                  \
  }                                                                                                 \
  template <class H, class E, class = std::enable_if_t<std::is_arithmetic_v<E>>>                    \
  inline auto operator OPERATOR(E a, Twice<H> b) {                                                  \
    return Twice<decltype(a OPERATOR b.low)>{a OPERATOR b.low, a OPERATOR b.high};                  \
  }
EACH_HALF(+) EACH_HALF(-) EACH_HALF(*) EACH_HALF(/) EACH_HALF(&) EACH_HALF(|) EACH_HALF(^) EACH_HALF(<<) EACH_HALF(>>)
EACH_HALF(>) EACH_HALF(<) EACH_HALF(>=) EACH_HALF(<=) EACH_HALF(==) EACH_HALF(!=)
#undef EACH_HALF
template <class H> inline Twice<H> operator-(Twice<H> a) { return {-a.low, -a.high}; }
template <class H> inline Twice<H> operator~(Twice<H> a) { return {~a.low, ~a.high}; }

// The same bits as another type, and the same numbers as another type, lane by lane.
template <class To, class From> struct As {
  static inline To bits(From v) { return (To)v; }
  static inline To numbers(From v) { return __builtin_convertvector(v, To); }
};
template <class To, class From> struct As<Twice<To>, Twice<From>> {
  static inline Twice<To> bits(Twice<From> v) { return {As<To, From>::bits(v.low), As<To, From>::bits(v.high)}; }
  static inline Twice<To> numbers(Twice<From> v) { return {As<To, From>::numbers(v.low), As<To, From>::numbers(v.high)}; }
};
template <class To, class From> inline To bits_as(From v) { return As<To, From>::bits(v); }
template <class To, class From> inline To numbers_as(From v) { return As<To, From>::numbers(v); }

typedef Vector<float, LANES>::type floats;
typedef Vector<int32_t, LANES>::type ints;
typedef Vector<uint32_t, LANES>::type words;

inline floats splat(float x) { return x - floats{}; }
// Half by half: a copy of the whole would go through memory.
template <class V> struct Memory {
  static inline V load(const void* p) { V v; memcpy(&v, p, sizeof v); return v; }
  static inline void store(void* p, V v) { memcpy(p, &v, sizeof v); }
};
template <class H> struct Memory<Twice<H>> {
  static inline Twice<H> load(const void* p) { return {Memory<H>::load(p), Memory<H>::load((const char*)p + sizeof(H))}; }
  static inline void store(void* p, Twice<H> v) { Memory<H>::store(p, v.low); Memory<H>::store((char*)p + sizeof(H), v.high); }
};
template <class V> inline V load(const void* p) { return Memory<V>::load(p); }
template <class V> inline void store(void* p, V v) { Memory<V>::store(p, v); }
inline floats select(ints mask, floats a, floats b) {
  return bits_as<floats>((mask & bits_as<ints>(a)) | (~mask & bits_as<ints>(b)));
}
inline floats maximum(floats a, floats b) { return select(a > b, a, b); }

inline float sum(floats v) {
  float lanes[LANES], total = 0;
  store(lanes, v);
  for (int i = 0; i < LANES; i++) total += lanes[i];
  return total;
}
inline float maximum(floats v) {
  float lanes[LANES];
  store(lanes, v);
  float highest = lanes[0];
  for (int i = 1; i < LANES; i++) highest = lanes[i] > highest ? lanes[i] : highest;
  return highest;
}
inline bool any(ints mask) {
  int32_t lanes[LANES], found = 0;
  store(lanes, mask);
  for (int i = 0; i < LANES; i++) found |= lanes[i];
  return found != 0;
}
inline ints lane_numbers() {
  int32_t lanes[LANES];
  for (int i = 0; i < LANES; i++) lanes[i] = i;
  return load<ints>(lanes);
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
  ints exponent = (numbers_as<ints>(n) + 127) << 23;
  return select(given == given, select(tiny, floats{}, p * bits_as<floats>(exponent)), given);
}

// Rounds sixteen numbers to bfloat16, to the nearest and of two to the even one, and writes them.
inline void put_bfloat16(uint16_t* p, floats v) {
#if defined(__AVX512BF16__)
  store(p, _mm512_cvtneps_pbh((__m512)v));
#else
  words w = bits_as<words>(v);
  words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  words quiet = (w >> 16) | 0x40;
  words nan = bits_as<words>(v != v);
  words chosen = (nan & quiet) | (~nan & rounded);
  uint32_t lanes[LANES];
  store(lanes, chosen);
  for (int i = 0; i < LANES; i++) p[i] = (uint16_t)lanes[i];
#endif
}
inline uint16_t to_bfloat16(float x) {
  uint32_t w;
  memcpy(&w, &x, 4);
  if (x != x) return (uint16_t)(w >> 16 | 0x40);
  return (uint16_t)((w + 0x7fff + (w >> 16 & 1)) >> 16);
}
