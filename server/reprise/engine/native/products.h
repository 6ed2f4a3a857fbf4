// Matrix products of rows with packed weights, each sum in one order whatever rows are beside it.
//
// Weights are packed into panels of 32 columns (see Panels), so that a product reads them as one stream. PAIR neighbours
// along the inner dimension lie together: two for bfloat16, where one instruction takes both, one for float32.
#pragma once

#include <math.h>

#include <type_traits>

#include "vectors.h"

namespace {

constexpr int PANEL = 32;   // columns of a panel of weights
constexpr int TILE = NUM_SUMS >= 24 ? 12 : 6;  // rows of a register tile

// A number format. `element` is what weights, keys and values are kept in, `operand` what is multiplied with them. Of
// PAIR neighbours along the inner dimension, `factor` gives those of one PART in sixteen columns.
struct BFloat16 {
  typedef uint16_t element;
  static constexpr int PAIR = 2;
#if defined(__AVX512BF16__)
  typedef uint16_t operand;
  static constexpr int PARTS = 1;
  template <int PART> static inline __m512bh factor(const element* p) { return (__m512bh)load<words>(p); }
  template <int PART> static inline __m512bh spread(const operand* x) {
    int32_t w;
    memcpy(&w, x, 4);
    return (__m512bh)_mm512_set1_epi32(w);
  }
  static inline floats add_products(floats acc, __m512bh a, __m512bh b) { return (floats)_mm512_dpbf16_ps((__m512)acc, a, b); }
  static inline void put(operand* p, floats v) { put_bfloat16(p, v); }
#else
  typedef float operand;
  static constexpr int PARTS = 2;
  template <int PART> static inline floats factor(const element* p) {
    words both = load<words>(p);
    return bits_as<floats>(PART ? both & 0xffff0000u : both << 16);
  }
  template <int PART> static inline floats spread(const operand* x) { return splat(x[PART]); }
  static inline floats add_products(floats acc, floats a, floats b) { return acc + a * b; }
  static inline void put(operand* p, floats v) { store(p, v); }
#endif
  static inline float value(element e) { return from_bfloat16(e); }
  static inline element element_of(float f) { return to_bfloat16(f); }
};

struct Float32 {
  typedef float element;
  typedef float operand;
  static constexpr int PAIR = 1;
  static constexpr int PARTS = 1;
  template <int PART> static inline floats factor(const element* p) { return load<floats>(p); }
  template <int PART> static inline floats spread(const operand* x) { return splat(*x); }
  static inline floats add_products(floats acc, floats a, floats b) { return acc + a * b; }
  static inline void put(operand* p, floats v) { store(p, v); }
  static inline float value(element e) { return e; }
  static inline element element_of(float f) { return f; }
};

// Where a weight lies. Its two groups of 16 columns are side by side, [inner / PAIR][32][PAIR], where a tile takes both at
// once; else one after the other, each [inner / PAIR][16][PAIR].
template <class T> struct Panels {
  static constexpr bool SIDE_BY_SIDE = NUM_SUMS >= 24;
  static constexpr long STEP = (SIDE_BY_SIDE ? PANEL : LANES) * T::PAIR;
  static long to_next_group(long inner) { return SIDE_BY_SIDE ? LANES * T::PAIR : LANES * inner; }
  static long place(long column, long k, long inner) {
    long lane = column % PANEL;
    return column / PANEL * PANEL * inner + lane / LANES * to_next_group(inner) + k / T::PAIR * STEP + lane % LANES * T::PAIR +
           k % T::PAIR;
  }
};

// ---- matrix products ------------------------------------------------------------------------------------------

// sums[ROWS][GROUPS] += ROWS rows of x times GROUPS groups of 16 columns, over num_inner pairs. `step` elements lie from
// one pair to the next, and `to_next_group` from one group to the next.
template <class T, int ROWS, int GROUPS>
inline __attribute__((always_inline)) void add_columns(const typename T::operand* x, long stride,
                                                       const typename T::element* columns, long step, long to_next_group,
                                                       long num_inner, floats (&sums)[ROWS][GROUPS]) {
  auto add = [&](auto part, long k) __attribute__((always_inline)) {
    decltype(T::template factor<part()>(columns)) factors[GROUPS];
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) factors[g] = T::template factor<part()>(columns + k * step + g * to_next_group);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) {
      auto a = T::template spread<part()>(x + i * stride + k * T::PAIR);
#pragma GCC unroll 4
      for (int g = 0; g < GROUPS; g++) sums[i][g] = T::add_products(sums[i][g], a, factors[g]);
    }
  };
  for (long k = 0; k < num_inner; k++) {
    if (ROWS <= 4) {
      for (int g = 0; g < GROUPS; g++) __builtin_prefetch((const char*)(columns + k * step + g * to_next_group) + 4096);
    }
    add(std::integral_constant<int, 0>{}, k);
    if (T::PARTS > 1) {
      // Has the columns read again, since there are not registers for both parts.
      if (REGISTER_BYTES == 32) asm("" : "+r"(columns));
      add(std::integral_constant<int, T::PARTS - 1>{}, k);
    }
  }
}

// sums[ROWS][BLOCKS] = ROWS rows of x times the sixteen columns of each block, [num_inner][16][PAIR]. `ahead`: blocks that
// are fetched meanwhile, of the same size, or null.
template <class T, int ROWS, int BLOCKS>
inline __attribute__((always_inline)) void multiply_blocks(const typename T::operand* x, long stride,
                                                           const typename T::element* const* blocks,
                                                           const typename T::element* const* ahead, long num_inner,
                                                           floats (&sums)[ROWS][BLOCKS]) {
  const typename T::element* columns[BLOCKS];
  for (int b = 0; b < BLOCKS; b++) columns[b] = blocks[b];
  auto add = [&](auto part, long k) __attribute__((always_inline)) {
    decltype(T::template factor<part()>(columns[0])) factors[BLOCKS];
#pragma GCC unroll 8
    for (int b = 0; b < BLOCKS; b++) factors[b] = T::template factor<part()>(columns[b] + k * LANES * T::PAIR);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) {
      auto a = T::template spread<part()>(x + i * stride + k * T::PAIR);
#pragma GCC unroll 8
      for (int b = 0; b < BLOCKS; b++) sums[i][b] = T::add_products(sums[i][b], a, factors[b]);
    }
  };
  for (long k = 0; k < num_inner; k++) {
    if (ROWS <= 4 && ahead)
      for (int b = 0; b < BLOCKS; b++) __builtin_prefetch(ahead[b] + k * LANES * T::PAIR);
    add(std::integral_constant<int, 0>{}, k);
    if (T::PARTS > 1) add(std::integral_constant<int, T::PARTS - 1>{}, k);
  }
}

template <int ROWS, class F> inline void in_tiles_left(long num_rows, long m, const F& f) {
  if (num_rows == ROWS) f(std::integral_constant<int, ROWS>{}, m);
  else if constexpr (ROWS > 1) in_tiles_left<ROWS - 1>(num_rows, m, f);
}

// f(number of rows, first row) for tiles of MOST rows, and for one of those that are left over. The number is a constant.
template <int MOST, class F> inline void in_tiles(long num_rows, const F& f) {
  long m = 0;
  for (; m + MOST <= num_rows; m += MOST) f(std::integral_constant<int, MOST>{}, m);
  if constexpr (MOST > 1) {
    if (m < num_rows) in_tiles_left<MOST - 1>(num_rows - m, m, f);
  }
}

// Rows of x times a panel. `apply(row, left, right)` takes the sums of its two groups.
template <class T, class F>
inline void rows_times_panel(const typename T::operand* x, long stride, const typename T::element* panel, long inner,
                             long num_rows, F apply) {
  long step = Panels<T>::STEP, num_inner = inner / T::PAIR, next = Panels<T>::to_next_group(inner);
  in_tiles<TILE>(num_rows, [&](auto count, long m) {
    constexpr int ROWS = count();
    if constexpr (2 * ROWS <= NUM_SUMS - (T::PARTS > 1 ? 2 : 0)) {
      floats sums[ROWS][2] = {};
      add_columns<T, ROWS, 2>(x + m * stride, stride, panel, step, next, num_inner, sums);
      for (int i = 0; i < ROWS; i++) apply(m + i, sums[i][0], sums[i][1]);
    } else {
      floats left[ROWS][1] = {}, right[ROWS][1] = {};
      add_columns<T, ROWS, 1>(x + m * stride, stride, panel, step, next, num_inner, left);
      add_columns<T, ROWS, 1>(x + m * stride, stride, panel + next, step, next, num_inner, right);
      for (int i = 0; i < ROWS; i++) apply(m + i, left[i][0], right[i][0]);
    }
  });
}

// ---- quantised weights ----------------------------------------------------------------------------------------

// Eight bits a weight, and a scale for each column, which `apply` multiplies the sums with.
struct Int8 {
  typedef int8_t element;
  typedef float operand;
  static constexpr int PAIR = 1;
  static constexpr int PARTS = 1;
  template <int PART> static inline floats factor(const element* p) { return numbers_as<floats>(widened(p)); }
  template <int PART> static inline floats spread(const operand* x) { return splat(*x); }
  static inline floats add_products(floats acc, floats a, floats b) { return acc + a * b; }
  static constexpr float MOST = 127;
};

// Four bits a weight, and a scale in bfloat16 for each GROUP of a column. Rows are rounded to eight bits, with a scale of
// each group, so that products within a group are sums of whole numbers.
//
// A group of 16 columns is BYTES of a strip: of four weights along the inner dimension one byte each, column by column,
// four times; the low halves are the weights 4 i to 4 i + 3, the high ones those 16 further on; then the scales.
namespace int4 {
constexpr int GROUP = 32;
constexpr int ZERO = 8;  // what a weight of 0 is written as
constexpr int QUADS = GROUP / 8;
constexpr int BYTES = LANES * GROUP / 2 + LANES * 2;
constexpr int MOST = 127;

inline long strip_bytes(long inner) { return inner / GROUP * BYTES; }

// A row in eight bits: whole numbers, and for each group their scale and their sum.
struct Row {
  const int8_t* numbers;
  const float* scales;
  const int32_t* sums;
};

inline void round_row(const float* x, long inner, int8_t* numbers, float* scales, int32_t* sums) {
  for (long g = 0; g < inner / GROUP; g++, x += GROUP, numbers += GROUP) {
    float most = 0;
    for (int i = 0; i < GROUP; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    // What is no number stays none, by the scale.
    float total = 0;
    for (int i = 0; i < GROUP; i++) total += x[i];
    scales[g] = total - total == 0 ? most / MOST : __builtin_nanf("");
    float inverse = most > 0 && total - total == 0 ? MOST / most : 0;
    int32_t sum = 0;
    for (int i = 0; i < GROUP; i++) {
      int32_t rounded = (int32_t)rintf(x[i] * inverse);
      numbers[i] = (int8_t)(rounded > MOST ? MOST : rounded < -MOST ? -MOST : rounded);
      sum += numbers[i];
    }
    sums[g] = sum;
  }
}

// sums[ROWS] = ROWS rows times the 16 columns of a strip.
template <int ROWS> inline __attribute__((always_inline)) void multiply(const Row* rows, const uint8_t* strip, long inner, floats (&sums)[ROWS]) {
  for (int i = 0; i < ROWS; i++) sums[i] = floats{};
  for (long g = 0; g < inner / GROUP; g++, strip += BYTES) {
    // At most 8 sums of two products of at most 15 and 127: they fit 16 bits.
    shorts totals[ROWS] = {};
    if (ROWS <= 2) for (int line = 0; line < BYTES; line += 64) __builtin_prefetch(strip + 4096 + line);
#pragma GCC unroll 4
    for (int quad = 0; quad < QUADS; quad++) {
      bytes both = load<bytes>(strip + quad * LANES * 4);
      bytes low = both & (uint8_t)15;
#pragma GCC unroll 6
      for (int i = 0; i < ROWS; i++) totals[i] = totals[i] + pair_sums(low, rows[i].numbers + g * GROUP + quad * 4);
      bytes high = both >> (uint8_t)4;
#pragma GCC unroll 6
      for (int i = 0; i < ROWS; i++) totals[i] = totals[i] + pair_sums(high, rows[i].numbers + g * GROUP + GROUP / 2 + quad * 4);
    }
    floats scales = widened_bfloat16(strip + LANES * GROUP / 2);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) {
      floats whole = numbers_as<floats>(neighbour_sums(totals[i]) - ZERO * rows[i].sums[g]);
      sums[i] = sums[i] + whole * splat(rows[i].scales[g]) * scales;
    }
  }
}

// As `rows_times_panel`.
template <class F> inline void rows_times_panel(const Row* rows, const uint8_t* panel, long inner, long num_rows, F apply) {
  in_tiles<6>(num_rows, [&](auto count, long m) {
    constexpr int ROWS = count();
    floats left[ROWS], right[ROWS];
    multiply<ROWS>(rows + m, panel, inner, left);
    multiply<ROWS>(rows + m, panel + strip_bytes(inner), inner, right);
    for (int i = 0; i < ROWS; i++) apply(m + i, left[i], right[i]);
  });
}

// A column's weights, from a row of them.
inline void pack(const float* weight, long inner, uint8_t* packed, long column) {
  auto* strip = packed + (column / LANES) * strip_bytes(inner);
  long lane = column % LANES;
  for (long g = 0; g < inner / GROUP; g++, weight += GROUP, strip += BYTES) {
    float furthest = 0;  // from zero, with its sign: it becomes the one end, -8, of the scale
    for (int i = 0; i < GROUP; i++) furthest = fabsf(weight[i]) > fabsf(furthest) ? weight[i] : furthest;
    uint16_t scale = to_bfloat16(furthest / -ZERO);
    float value = from_bfloat16(scale), inverse = value != 0 ? 1 / value : 0;
    memcpy(strip + LANES * GROUP / 2 + lane * 2, &scale, 2);
    for (int i = 0; i < GROUP / 2; i++) {
      auto nibble = [&](float w) { long n = lrintf(w * inverse) + ZERO; return (uint8_t)(n < 0 ? 0 : n > 15 ? 15 : n); };
      strip[i / 4 * LANES * 4 + lane * 4 + i % 4] = (uint8_t)(nibble(weight[i]) | nibble(weight[i + GROUP / 2]) << 4);
    }
  }
}
}  // namespace int4

}  // namespace
