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
// A bit for each lane of a mask.
inline unsigned bits_of(ints mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#else
  int32_t lanes[LANES];
  unsigned bits = 0;
  store(lanes, mask);
  for (int i = 0; i < LANES; i++) bits |= (unsigned)(lanes[i] & 1) << i;
  return bits;
#endif
}
inline bool any(ints mask) { return bits_of(mask) != 0; }
inline int32_t sum(ints v) {
  int32_t lanes[LANES], total = 0;
  store(lanes, v);
  for (int i = 0; i < LANES; i++) total += lanes[i];
  return total;
}
inline ints lane_numbers() {
  int32_t lanes[LANES];
  for (int i = 0; i < LANES; i++) lanes[i] = i;
  return load<ints>(lanes);
}

typedef Vector<uint8_t, 4 * LANES>::type bytes;
typedef Vector<int16_t, 2 * LANES>::type shorts;

// Sums of products of whole numbers, of four for each lane: weights of eight bits that are written with ZERO more than they
// are, and the same four numbers x, from -127 to 127, for all lanes. `sum` is that of all x, from `begin` to `total`.
struct ByteSums {
  static constexpr int ZERO = 128;
  ints totals;
#if defined(__AVX512VNNI__)
  inline void begin(int32_t sum) { totals = ints{} - ZERO * sum; }
  inline void add(bytes weights, const int8_t* x) { totals = (ints)_mm512_dpbusd_epi32((__m512i)totals, (__m512i)weights, same_four(x)); }
  inline ints total(int32_t) const { return totals; }
  static inline __m512i same_four(const int8_t* x) {
    int32_t four;
    memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
  }
#elif defined(__AVX2__)
  inline void begin(int32_t) { totals = ints{}; }
  inline void add(bytes weights, const int8_t* x) {
    int32_t four;
    memcpy(&four, x, 4);
    totals = {totals.low + products((__m256i)weights.low, four), totals.high + products((__m256i)weights.high, four)};
  }
  inline ints total(int32_t) const { return totals; }
  // The weights' signs go to the numbers: two products of magnitudes fit 16 bits.
  static inline Vector<int32_t, 8>::type products(__m256i weights, int32_t four) {
    __m256i numbers = _mm256_xor_si256(weights, _mm256_set1_epi8((char)ZERO));
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(numbers), _mm256_sign_epi8(_mm256_set1_epi32(four), numbers));
    return (Vector<int32_t, 8>::type)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
#else
  inline void begin(int32_t sum) { totals = ints{} - ZERO * sum; }
  inline void add(bytes weights, const int8_t* x) { totals = totals + sums_of_four(weights, x); }
  inline ints total(int32_t) const { return totals; }
#endif
#if !defined(__AVX2__)
  static inline ints sums_of_four(bytes weights, const int8_t* x) {
    uint8_t factors[4 * LANES];
    int32_t sums[LANES];
    store(factors, weights);
    for (int i = 0; i < LANES; i++) {
      sums[i] = 0;
      for (int k = 0; k < 4; k++) sums[i] += factors[4 * i + k] * x[k];
    }
    return load<ints>(sums);
  }
#endif
};

// The same for weights that are written as 0 to 15. At most 8 may be added up.
struct NibbleSums {
  static constexpr int ZERO = 8;
#if defined(__AVX512VNNI__)
  ints totals;
  inline void begin(int32_t sum) { totals = ints{} - ZERO * sum; }
  inline void add(bytes weights, const int8_t* x) {
    totals = (ints)_mm512_dpbusd_epi32((__m512i)totals, (__m512i)weights, ByteSums::same_four(x));
  }
  inline ints total(int32_t) const { return totals; }
#elif defined(__AVX2__)
  shorts pairs;
  inline void begin(int32_t) { pairs = shorts{}; }
  inline void add(bytes weights, const int8_t* x) {
    typedef Vector<int16_t, 16>::type half;
    int32_t four;
    memcpy(&four, x, 4);
    __m256i same = _mm256_set1_epi32(four);
    pairs = {pairs.low + (half)_mm256_maddubs_epi16((__m256i)weights.low, same),
             pairs.high + (half)_mm256_maddubs_epi16((__m256i)weights.high, same)};
  }
  inline ints total(int32_t sum) const {
    typedef Vector<int32_t, 8>::type half;
    __m256i one = _mm256_set1_epi16(1);
    ints whole{(half)_mm256_madd_epi16((__m256i)pairs.low, one), (half)_mm256_madd_epi16((__m256i)pairs.high, one)};
    return whole - ZERO * sum;
  }
#else
  ints totals;
  inline void begin(int32_t sum) { totals = ints{} - ZERO * sum; }
  inline void add(bytes weights, const int8_t* x) { totals = totals + ByteSums::sums_of_four(weights, x); }
  inline ints total(int32_t) const { return totals; }
#endif
};

inline floats magnitude(floats v) { return bits_as<floats>(bits_as<ints>(v) & 0x7fffffff); }

// Writes sixteen numbers from -127 to 127, rounded to the nearest and of two to the even one. Returns their sum.
inline int32_t put_rounded(int8_t* p, floats v) {
#if defined(__AVX512F__)
  __m512i whole = _mm512_cvtps_epi32((__m512)v);
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(whole));
  return _mm512_reduce_add_epi32(whole);
#else
  float lanes[LANES];
  int32_t sum = 0;
  store(lanes, v);
  for (int i = 0; i < LANES; i++) sum += p[i] = (int8_t)lrintf(lanes[i]);
  return sum;
#endif
}

// exp by its Taylor series of degree 6 on [-ln2/2, ln2/2]; below -87 it gives 0. Inlined: a call would save every register.
inline __attribute__((always_inline)) floats exponential(floats x) {
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
#if defined(__AVX512F__)
  return (floats)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
#else
  uint16_t halves[LANES];
  float lanes[LANES];
  memcpy(halves, p, sizeof halves);
  for (int i = 0; i < LANES; i++) lanes[i] = from_bfloat16(halves[i]);
  return load<floats>(lanes);
#endif
}
