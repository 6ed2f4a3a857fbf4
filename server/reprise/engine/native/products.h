// Matrix products of rows with packed weights, each sum in one order whatever rows are beside it.
//
// Weights are packed into panels of 32 columns (see Panels), so that a product reads them as one stream. PAIR neighbours
// along the inner dimension lie together: two for bfloat16, where one instruction takes both, one for float32.
#pragma once

#include <math.h>

#include <type_traits>
#include <utility>

#include "tiles.h"
#include "vectors.h"

namespace {

constexpr int PANEL = 32;   // columns of a panel of weights
constexpr int TILE = NUM_SUMS >= 24 ? 12 : 6;  // rows of a register tile

inline words upper_halves(words v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // With the mask in memory: in a register it would push a sum of a tile out of the registers.
  alignas(32) static constexpr uint32_t MASK[] = {~0xffffu, ~0xffffu, ~0xffffu, ~0xffffu, ~0xffffu, ~0xffffu, ~0xffffu, ~0xffffu};
  static_assert(sizeof MASK == sizeof v.low);
  asm("vpand %1, %0, %0" : "+x"(v.low) : "m"(MASK));
  asm("vpand %1, %0, %0" : "+x"(v.high) : "m"(MASK));
  return v;
#else
  return v & ~0xffffu;
#endif
}

// A number format. `element` is what weights, keys and values are kept in, `operand` what is multiplied with them. Of
// PAIR neighbours along the inner dimension, `factor` gives those of one PART in sixteen columns.
struct BFloat16 {
  typedef uint16_t element;
  static constexpr int PAIR = 2;
  static constexpr bool TILED = MatrixUnit::EXISTS;
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
  static inline floats lanes(const operand* p) { return widened_bfloat16(p); }
#else
  typedef float operand;
  static constexpr int PARTS = 2;
  template <int PART> static inline floats factor(const element* p) {
    words both = load<words>(p);
    return bits_as<floats>(PART ? upper_halves(both) : both << 16);
  }
  template <int PART> static inline floats spread(const operand* x) { return splat(x[PART]); }
  static inline floats add_products(floats acc, floats a, floats b) { return acc + a * b; }
  static inline void put(operand* p, floats v) { store(p, v); }
  static inline floats lanes(const operand* p) { return load<floats>(p); }
#endif
  static inline void keep(element* p, floats v) { put_bfloat16(p, v); }
  static inline float value(element e) { return from_bfloat16(e); }
};

struct Float32 {
  typedef float element;
  typedef float operand;
  static constexpr int PAIR = 1;
  static constexpr int PARTS = 1;
  static constexpr bool TILED = false;
  template <int PART> static inline floats factor(const element* p) { return load<floats>(p); }
  template <int PART> static inline floats spread(const operand* x) { return splat(*x); }
  static inline floats add_products(floats acc, floats a, floats b) { return acc + a * b; }
  static inline void put(operand* p, floats v) { store(p, v); }
  static inline floats lanes(const operand* p) { return load<floats>(p); }
  static inline void keep(element* p, floats v) { store(p, v); }
  static inline float value(element e) { return e; }
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

// What is fetched from memory while something else is computed, so many bytes in each step of it.
struct Fetch {
  static constexpr long LINE = 64, AHEAD = 4096;
  const char* from;
  long bytes;
  // For a tile of a product that takes so many bytes in each of num_steps steps from `now` on: its share of what is read
  // `next`; where it is the only tile, what it reads a little later itself.
  static inline Fetch of_tile(const void* now, const void* next, long bytes, long num_steps, long first_row, long rows, long num_rows) {
    if (rows == num_rows) return {(const char*)now + AHEAD, bytes};
    return {(const char*)next + first_row * bytes * num_steps / num_rows, divide_up(rows * bytes, num_rows)};
  }
};
// Several streams at once, LINES lines of each in a step: as many as a step's bytes can touch. Where they are fewer, some
// lines are asked for again, which costs less than to decide.
template <int STREAMS, int LINES> struct Fetches {
  Fetch of[STREAMS];
  inline __attribute__((always_inline)) void next() {
    for (auto& fetch : of) {
#pragma GCC unroll 8
      for (int line = 0; line < LINES; line++) __builtin_prefetch(fetch.from + line * Fetch::LINE);
      fetch.from += fetch.bytes;
    }
  }
};
struct NoFetch {
  inline void next() {}
};

// sums[ROWS][GROUPS] += ROWS rows of x times GROUPS groups of 16 columns, over num_inner pairs. `step` elements lie from
// one pair to the next, and `to_next_group` from one group to the next. `fetch` takes a step with each pair.
template <class T, int ROWS, int GROUPS, class F>
inline __attribute__((always_inline)) void add_columns(const typename T::operand* x, long stride,
                                                       const typename T::element* columns, long step, long to_next_group,
                                                       long num_inner, floats (&sums)[ROWS][GROUPS], F fetch) {
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
    fetch.next();
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

template <int ROWS, class F> inline void in_tile(long num_rows, long m, const F& f) {
  if (num_rows == ROWS) f(std::integral_constant<int, ROWS>{}, m);
  else if constexpr (ROWS > 1) in_tile<ROWS - 1>(num_rows, m, f);
}

// f(number of rows, first row) for tiles as large as each other, of at most MOST rows. The number is a constant.
template <int MOST, class F> inline void in_tiles(long num_rows, const F& f) {
  long m = 0;
  for (long left = divide_up(num_rows, MOST); left; left--) {
    long rows = divide_up(num_rows - m, left);
    in_tile<MOST>(rows, m, f);
    m += rows;
  }
}

// `rows_times_panel` in the matrix unit; inner: a multiple of TILE_INNER.
template <class T, class F>
inline void rows_times_panel_in_tiles(MatrixUnit& unit, const typename T::operand* x, long stride, const typename T::element* panel,
                                      const typename T::element* next, long inner, long num_rows, F apply) {
  // A tile's rows are pairs of bfloat16, and the right columns follow the left ones.
  static_assert(sizeof(typename T::operand) == 2 && Panels<T>::SIDE_BY_SIDE && PANEL == 2 * TILE_ROWS);
  constexpr long ROW = Panels<T>::STEP * sizeof(typename T::element), BYTES = ROW * TILE_INNER / T::PAIR;
  alignas(TILE_BYTES) float sums[MOST_TILED][PANEL];
  for (long m = 0; m < num_rows; m += MOST_TILED) {
    long rows = num_rows - m < MOST_TILED ? num_rows - m : MOST_TILED, num_steps = inner / TILE_INNER;
    Fetch ahead = Fetch::of_tile(panel, next, BYTES, num_steps, m, rows, num_rows);
    unit.prepare(rows, TILE_INNER / T::PAIR);
    unit.multiply<false>(
        {x + m * stride, stride * (long)sizeof(*x), TILE_INNER * sizeof(*x)}, num_steps, ROW, true,
        [&](long k) {
          auto* columns = (const char*)panel + k * BYTES;
          return std::make_pair(columns, columns + TILE_BYTES);
        },
        {&sums[0][0], sizeof sums[0]},
        [&](long k) {
          // Into the second cache: the next panel may be larger than the first.
          for (long byte = 0; byte < ahead.bytes; byte += Fetch::LINE) __builtin_prefetch(ahead.from + k * ahead.bytes + byte, 0, 2);
        });
    for (long i = 0; i < rows; i++) apply(m + i, load<floats>(sums[i]), load<floats>(sums[i] + LANES));
  }
}

// Rows of x times a panel. `apply(row, left, right)` takes the sums of its two groups. The panel that is read `next` is
// fetched meanwhile.
template <class T, class F>
inline void rows_times_panel([[maybe_unused]] MatrixUnit& unit, const typename T::operand* x, long stride,
                             const typename T::element* panel, const typename T::element* next, long inner, long num_rows, F apply) {
  if constexpr (T::TILED)
    if (inner % TILE_INNER == 0) return rows_times_panel_in_tiles<T>(unit, x, stride, panel, next, inner, num_rows, apply);
  long step = Panels<T>::STEP, num_inner = inner / T::PAIR, to_next_group = Panels<T>::to_next_group(inner);
  in_tiles<TILE>(num_rows, [&](auto count, long m) {
    constexpr int ROWS = count();
    constexpr long BYTES = Panels<T>::STEP * sizeof(typename T::element);
    auto fetch = [&](long group) { return Fetch::of_tile(panel + group, next + group, BYTES, num_inner, m, ROWS, num_rows); };
    constexpr int LINES = BYTES / Fetch::LINE, STREAMS = Panels<T>::SIDE_BY_SIDE ? 1 : 2;
    if constexpr (2 * ROWS <= NUM_SUMS - (T::PARTS > 1 ? 2 : 0)) {
      floats sums[ROWS][2] = {};
      Fetches<STREAMS, LINES> fetches;
      for (int f = 0; f < STREAMS; f++) fetches.of[f] = fetch(f * to_next_group);
      add_columns<T, ROWS, 2>(x + m * stride, stride, panel, step, to_next_group, num_inner, sums, fetches);
#pragma GCC unroll 12  // else all sums go through memory
      for (int i = 0; i < ROWS; i++) apply(m + i, sums[i][0], sums[i][1]);
    } else {
      floats left[ROWS][1] = {}, right[ROWS][1] = {};
      add_columns<T, ROWS, 1>(x + m * stride, stride, panel, step, to_next_group, num_inner, left, Fetches<1, LINES>{fetch(0)});
      add_columns<T, ROWS, 1>(x + m * stride, stride, panel + to_next_group, step, to_next_group, num_inner, right,
                              Fetches<1, LINES>{fetch(to_next_group)});
#pragma GCC unroll 12
      for (int i = 0; i < ROWS; i++) apply(m + i, left[i][0], right[i][0]);
    }
  });
}

}  // namespace
