// Sixteen numbers at a time: every instruction set computes the same steps.
//
// The compiler's own vector types, as long as the CPU's registers; where those are shorter, several of them as one.
// (A vector type that is longer than a register would live in memory.)
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>

#if defined(__AVX2__)
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
// The second where one is no number.
inline floats maximum(floats a, floats b) {
#if defined(__AVX512F__)
  return (floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return select(a > b, a, b);
#endif
}

// Half onto half, so that the sum has one order.
inline float sum(floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float lanes[LANES];
  store(lanes, v);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
#endif
}
// Of what are numbers, if there are any.
inline float maximum(floats v) {
#if defined(__AVX512F__)
  return _mm512_mask_reduce_max_ps(_mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q), (__m512)v);
#else
  float lanes[LANES], highest = -__builtin_inff();
  store(lanes, v);
  for (int i = 0; i < LANES; i++) highest = lanes[i] > highest ? lanes[i] : highest;
  return highest;
#endif
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

typedef Vector<uint8_t, 4 * LANES>::type bytes;
typedef Vector<int16_t, 2 * LANES>::type shorts;

// Sixteen whole numbers of eight bits.
inline ints widened(const int8_t* p) {
#if defined(__AVX512F__)
  return (ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  typedef Vector<int32_t, 8>::type half;
  return {(half)_mm256_cvtepi8_epi32(_mm_loadu_si64(p)), (half)_mm256_cvtepi8_epi32(_mm_loadu_si64(p + 8))};
#else
  int32_t lanes[LANES];
  for (int i = 0; i < LANES; i++) lanes[i] = p[i];
  return load<ints>(lanes);
#endif
}

// For each lane of four bytes a and the same four x: a0 x0 + a1 x1, and a2 x2 + a3 x3. The a are at most 15.
inline shorts pair_sums(bytes a, const int8_t* x) {
#if defined(__AVX512BW__) || defined(__AVX2__)
  int32_t four;
  memcpy(&four, x, 4);
#endif
#if defined(__AVX512BW__)
  return (shorts)_mm512_maddubs_epi16((__m512i)a, _mm512_set1_epi32(four));
#elif defined(__AVX2__)
  typedef Vector<int16_t, 16>::type half;
  __m256i b = _mm256_set1_epi32(four);
  return {(half)_mm256_maddubs_epi16((__m256i)a.low, b), (half)_mm256_maddubs_epi16((__m256i)a.high, b)};
#else
  uint8_t factors[4 * LANES];
  int16_t sums[2 * LANES];
  store(factors, a);
  for (int i = 0; i < 2 * LANES; i++) sums[i] = (int16_t)(factors[2 * i] * x[2 * i % 4] + factors[2 * i + 1] * x[2 * i % 4 + 1]);
  return load<shorts>(sums);
#endif
}

// Of each lane of two.
inline ints neighbour_sums(shorts a) {
#if defined(__AVX512BW__)
  return (ints)_mm512_madd_epi16((__m512i)a, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  typedef Vector<int32_t, 8>::type half;
  __m256i one = _mm256_set1_epi16(1);
  return {(half)_mm256_madd_epi16((__m256i)a.low, one), (half)_mm256_madd_epi16((__m256i)a.high, one)};
#else
  int16_t pairs[2 * LANES];
  int32_t sums[LANES];
  store(pairs, a);
  for (int i = 0; i < LANES; i++) sums[i] = pairs[2 * i] + pairs[2 * i + 1];
  return load<ints>(sums);
#endif
}

// exp by its Taylor series of degree 6 on [-ln2/2, ln2/2]; below -87 it gives 0.
inline floats exponential(floats x) {
  auto series = [](floats r) {
    floats p = splat(1.0f / 720);
    p = p * r + splat(1.0f / 120);
    p = p * r + splat(1.0f / 24);
    p = p * r + splat(1.0f / 6);
    p = p * r + splat(0.5f);
    p = p * r + splat(1.0f);
    return p * r + splat(1.0f);
  };
#if defined(__AVX512F__)
  auto large = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(-87.0f), _CMP_NLT_UQ);
  floats n = (floats)_mm512_roundscale_ps((__m512)(x * splat(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  floats r = x - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  return (floats)_mm512_maskz_scalef_ps(large, (__m512)series(r), (__m512)n);
#else
  const floats given = x;
  ints tiny = x < splat(-87.0f);
  x = maximum(x, splat(-87.0f));
  x = select(x > splat(88.0f), splat(88.0f), x);
  floats n = x * splat(1.44269504f) + splat(12582912.0f);  // 1.5 * 2^23: rounds to the nearest integer
  n = n - splat(12582912.0f);
  floats r = x - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  ints exponent = (numbers_as<ints>(n) + 127) << 23;
  return select(given == given, select(tiny, floats{}, series(r) * bits_as<floats>(exponent)), given);
#endif
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
inline float from_bfloat16(uint16_t x) {
  uint32_t w = (uint32_t)x << 16;
  float f;
  memcpy(&f, &w, 4);
  return f;
}
inline floats widened_bfloat16(const void* p) {
  uint16_t halves[LANES];
  float lanes[LANES];
  memcpy(halves, p, sizeof halves);
  for (int i = 0; i < LANES; i++) lanes[i] = from_bfloat16(halves[i]);
  return load<floats>(lanes);
}
