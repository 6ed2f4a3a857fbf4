// Products of rows with weights of eight or four bits, each sum in one order whatever rows are beside it.
//
// Rows are rounded to eight bits, with a scale for each GROUP of neighbours, so that products within a group are sums of
// whole numbers. Weights lie in strips of 16 columns, group by group; of four weights along the inner dimension one byte
// each, column by column, is what one instruction multiplies.
#pragma once

#include "products.h"

namespace {

constexpr int GROUP = 32;
constexpr int QUAD = 4;
constexpr float MOST_OF_ROW = 127;

// A row in eight bits: whole numbers, and for each group their scale and their sum.
struct RoundedRow {
  const int8_t* numbers;
  const float* scales;
  const int32_t* sums;
};

// inner: a multiple of 16. The last group may be half of one.
template <class Load> inline void round_row(const Load& load_lanes, long inner, int8_t* numbers, float* scales, int32_t* sums) {
  for (long first = 0; first < inner; first += GROUP, numbers += GROUP, scales++, sums++) {
    bool half = inner - first < GROUP;
    floats low = load_lanes(first), high = half ? floats{} : load_lanes(first + LANES);
    float most = maximum(maximum(magnitude(low), magnitude(high)));
    // What is no number stays none, by the scale.
    floats odd = (low - low) + (high - high);
    bool broken = any(odd != odd);
    float inverse = most > 0 && !broken ? MOST_OF_ROW / most : 0;
    *scales = broken ? __builtin_nanf("") : most / MOST_OF_ROW;
    *sums = put_rounded(numbers, low * splat(inverse));
    if (!half) *sums += put_rounded(numbers + LANES, high * splat(inverse));
  }
}

// Eight bits a weight, and a scale for each column, which `apply` multiplies the sums with.
struct Int8 {
  typedef ByteSums Sums;
  static constexpr int ZERO = ByteSums::ZERO;
  static constexpr int LOADS = GROUP / QUAD;
  static constexpr int PARTS = 1;
  static constexpr int BYTES = LANES * GROUP;
  static constexpr float MOST = 127;
  template <int PART> static inline bytes part(bytes loaded) { return loaded; }
  static inline floats scaled(floats whole, const uint8_t*) { return whole; }
  static long strip_bytes(long inner) { return LANES * inner; }
  static long place(long column, long k, long inner) {
    return column / LANES * strip_bytes(inner) + k / QUAD * LANES * QUAD + column % LANES * QUAD + k % QUAD;
  }
};

// Four bits a weight, and a scale in bfloat16 for each GROUP of a column, which follows the weights. The low halves of the
// bytes are the first weights of a group, the high ones those 16 further on.
struct Int4 {
  typedef NibbleSums Sums;
  static constexpr int ZERO = NibbleSums::ZERO;
  static constexpr int LOADS = GROUP / QUAD / 2;
  static constexpr int PARTS = 2;
  static constexpr int BYTES = LANES * GROUP / 2 + LANES * 2;
  template <int PART> static inline bytes part(bytes loaded) { return PART ? loaded >> (uint8_t)4 : loaded & (uint8_t)15; }
  static inline floats scaled(floats whole, const uint8_t* group) { return whole * widened_bfloat16(group + LANES * GROUP / 2); }
  static long strip_bytes(long inner) { return inner / GROUP * BYTES; }
};

// sums[ROWS][STRIPS] = ROWS rows times the 16 columns of each strip. `fetches` take a step with each group.
template <class Q, int ROWS, int STRIPS, class F>
inline __attribute__((always_inline)) void multiply(const RoundedRow* rows, const uint8_t* strip, long inner,
                                                    floats (&sums)[ROWS][STRIPS], F fetches) {
  const long next = Q::strip_bytes(inner);
  auto add_group = [&](long g, int num_loads) __attribute__((always_inline)) {
    typename Q::Sums totals[ROWS][STRIPS];
    for (int i = 0; i < ROWS; i++)
      for (int s = 0; s < STRIPS; s++) totals[i][s].begin(rows[i].sums[g]);
    fetches.next();
#pragma GCC unroll 8
    for (int n = 0; n < num_loads; n++) {
      bytes loaded[STRIPS];
      for (int s = 0; s < STRIPS; s++) loaded[s] = load<bytes>(strip + s * next + n * LANES * QUAD);
      auto add = [&](auto part) __attribute__((always_inline)) {
        bytes weights[STRIPS];
        for (int s = 0; s < STRIPS; s++) weights[s] = Q::template part<part()>(loaded[s]);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) {
          const int8_t* x = rows[i].numbers + g * GROUP + part() * GROUP / 2 + n * QUAD;
          for (int s = 0; s < STRIPS; s++) totals[i][s].add(weights[s], x);
        }
      };
      add(std::integral_constant<int, 0>{});
      if (Q::PARTS > 1) add(std::integral_constant<int, Q::PARTS - 1>{});
    }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
      for (int s = 0; s < STRIPS; s++) {
        floats whole = numbers_as<floats>(totals[i][s].total(rows[i].sums[g]));
        sums[i][s] = sums[i][s] + Q::scaled(whole, strip + s * next) * splat(rows[i].scales[g]);
      }
  };
  long g = 0;
  for (; (g + 1) * GROUP <= inner; g++, strip += Q::BYTES) add_group(g, Q::LOADS);
  if (g * GROUP < inner) add_group(g, Q::LOADS / 2);
}

// As the other `rows_times_panel`.
template <class Q, class F>
inline void rounded_rows_times_panel(const RoundedRow* rows, const uint8_t* panel, const uint8_t* next, long inner,
                                     long num_rows, F apply) {
  long to_next_strip = Q::strip_bytes(inner);
  in_tiles<6>(num_rows, [&](auto count, long m) {
    constexpr int ROWS = count();
    auto fetch = [&](long strip) { return Fetch::of_tile(panel + strip, next + strip, Q::BYTES, inner / GROUP, m, ROWS, num_rows); };
    constexpr int LINES = (Q::BYTES + Fetch::LINE - 1) / Fetch::LINE;
    if constexpr (2 * ROWS <= NUM_SUMS / 2) {
      floats sums[ROWS][2] = {};
      multiply<Q, ROWS, 2>(rows + m, panel, inner, sums, Fetches<2, LINES>{fetch(0), fetch(to_next_strip)});
#pragma GCC unroll 12
      for (int i = 0; i < ROWS; i++) apply(m + i, sums[i][0], sums[i][1]);
    } else {
      floats left[ROWS][1] = {}, right[ROWS][1] = {};
      multiply<Q, ROWS, 1>(rows + m, panel, inner, left, Fetches<1, LINES>{fetch(0)});
      multiply<Q, ROWS, 1>(rows + m, panel + to_next_strip, inner, right, Fetches<1, LINES>{fetch(to_next_strip)});
#pragma GCC unroll 12
      for (int i = 0; i < ROWS; i++) apply(m + i, left[i][0], right[i][0]);
    }
  });
}

// A column's weights, from a row of them, in eight bits. Returns their scale.
inline float pack_int8(const float* weight, long inner, uint8_t* packed, long column) {
  float most = 0;
  for (long k = 0; k < inner; k++) most = fabsf(weight[k]) > most ? fabsf(weight[k]) : most;
  float inverse = most > 0 ? Int8::MOST / most : 0;
  for (long k = 0; k < inner; k++) packed[Int8::place(column, k, inner)] = (uint8_t)(lrintf(weight[k] * inverse) + Int8::ZERO);
  return most / Int8::MOST;
}

// The same in four bits.
inline void pack_int4(const float* weight, long inner, uint8_t* packed, long column) {
  auto* strip = packed + (column / LANES) * Int4::strip_bytes(inner);
  long lane = column % LANES;
  for (long g = 0; g < inner / GROUP; g++, weight += GROUP, strip += Int4::BYTES) {
    float furthest = 0;  // from zero, with its sign: it becomes the one end, -8, of the scale
    for (int i = 0; i < GROUP; i++) furthest = fabsf(weight[i]) > fabsf(furthest) ? weight[i] : furthest;
    uint16_t scale = to_bfloat16(furthest / -Int4::ZERO);
    float value = from_bfloat16(scale), inverse = value != 0 ? 1 / value : 0;
    memcpy(strip + LANES * GROUP / 2 + lane * 2, &scale, 2);
    for (int i = 0; i < GROUP / 2; i++) {
      auto nibble = [&](float w) { long n = lrintf(w * inverse) + Int4::ZERO; return (uint8_t)(n < 0 ? 0 : n > 15 ? 15 : n); };
      strip[i / QUAD * LANES * QUAD + lane * QUAD + i % QUAD] = (uint8_t)(nibble(weight[i]) | nibble(weight[i + GROUP / 2]) << 4);
    }
  }
}

}  // namespace
