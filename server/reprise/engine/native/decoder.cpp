// A decoder of the Llama family, one step of a packed batch: token ids in, logits out.
//
// A row's bits do not depend on its company. Every sum has one order: a matrix product runs over the whole inner
// dimension in one register for each output; attention runs over the keys from the sequence's start, CHUNK by CHUNK;
// which rows share a register tile or a thread changes nothing of that.
//
// Weights are packed into panels of 32 columns (see Panels), so that a product reads them as one stream. PAIR neighbours
// along the inner dimension lie together: two for bfloat16, where one instruction takes both, one for float32.

#include <stdlib.h>

#include <type_traits>
#include <utility>
#include <vector>

#include "context.h"
#include "vectors.h"

namespace {

constexpr int PANEL = 32;   // columns of a panel of weights
constexpr int BLOCK = 16;   // tokens of a block of keys or values
constexpr int CHUNK = 128;  // keys between two corrections of the running maximum
constexpr int TILE = NUM_SUMS >= 24 ? 12 : 6;      // rows of a register tile of a product, and of scores
constexpr int WIDE = NUM_SUMS >= 24 ? 4 : 2;       // groups of a register tile of weighted values
constexpr int WIDE_TILE = NUM_SUMS >= 24 ? 6 : 3;  // its rows

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
  static inline float value(element e) { uint32_t w = (uint32_t)e << 16; float f; memcpy(&f, &w, 4); return f; }
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

}  // namespace

extern "C" {

struct LayerWeights {
  const void* query_key_value;   // packed [(heads + 2 kv_heads) * head_dim, hidden]
  const void* output;            // packed [hidden, heads * head_dim]
  const void* gate_up;           // packed, 16 columns of gate beside 16 of up
  const void* down;              // packed [hidden, intermediate]
  const float* query_key_value_bias;  // or null
  const float* input_norm;       // [hidden]
  const float* post_norm;        // [hidden]
  const float* query_norm;       // [head_dim], or null
  const float* key_norm;
  void* keys;                    // [blocks][kv_heads][head_dim / PAIR][16][PAIR]
  void* values;                  // [blocks][kv_heads][16 / PAIR][head_dim][PAIR]
  int64_t window;                // 0: everything
};

struct Decoder {
  int64_t hidden, intermediate, num_heads, num_kv_heads, head_dim, vocab, num_layers;
  float epsilon, scale;
  const LayerWeights* layers;
  const void* embedding;         // packed [vocab, hidden]
  const void* output;            // packed [vocab, hidden]
  const float* final_norm;
  const float* cosines;          // [positions][head_dim / 2]
  const float* sines;
};

struct Span {
  int64_t query_start, num_queries, num_tokens;
  const int32_t* blocks;
};

struct Step {
  int64_t num_tokens, num_spans, num_logit_rows;
  const int32_t* token_ids;      // [num_tokens]
  const int32_t* positions;
  const int32_t* slots;          // where keys and values of each token go
  const Span* spans;
  const int32_t* logit_rows;
  float* logits;                 // [num_logit_rows][vocab]
};
}

namespace {

template <class T>
void pack(const typename T::element* weight, long num_rows, long inner, typename T::element* packed, long first_column,
          long group, long offset) {
  // Row r of the weight becomes column first_column + (r / group) * (2 * group) + offset + r % group where group > 0.
  for (long r = 0; r < num_rows; r++) {
    long column = first_column + (group ? r / group * 2 * group + offset + r % group : r);
    auto* first = packed + Panels<T>::place(column, 0, inner);
    for (long k = 0; k < inner; k++) first[k / T::PAIR * Panels<T>::STEP + k % T::PAIR] = weight[r * inner + k];
  }
}

template <class T> struct Runner {
  typedef typename T::element element;
  typedef typename T::operand operand;
  const Decoder& d;
  const Step& s;
  Pool& pool;

  // One product: tasks are pairs of a run of panels and a run of rows.
  template <class F> void product(const operand* x, long inner, const void* weights, long columns, long num_rows, F apply) {
    if (num_rows == 0) return;
    long num_panels = divide_up(columns, PANEL);
    long row_chunk = num_rows <= 96 ? num_rows : 96;
    long row_tasks = divide_up(num_rows, row_chunk);
    long wanted = divide_up(8L * pool.size(), row_tasks);
    long panel_chunk = divide_up(num_panels, wanted);
    long panel_tasks = divide_up(num_panels, panel_chunk);
    pool.run(panel_tasks * row_tasks, [&](long task, int) {
      long first = task / row_tasks * panel_chunk, last = first + panel_chunk < num_panels ? first + panel_chunk : num_panels;
      long m = task % row_tasks * row_chunk, count = m + row_chunk < num_rows ? row_chunk : num_rows - m;
      for (long p = first; p < last; p++)
        rows_times_panel<T>(x + m * inner, inner, (const element*)weights + p * PANEL * inner, inner, count,
                            [&](long row, floats left, floats right) { apply(m + row, p, left, right); });
    });
  }

  static void normalise(const float* x, const float* weight, long size, float epsilon, operand* out) {
    floats squares{};
    for (long i = 0; i < size; i += LANES) { floats v = load<floats>(x + i); squares = squares + v * v; }
    float factor = 1.0f / __builtin_sqrtf(sum(squares) / size + epsilon);
    for (long i = 0; i < size; i += LANES) T::put(out + i, load<floats>(x + i) * splat(factor) * load<floats>(weight + i));
  }
  static void normalise_head(float* x, const float* weight, long size, float epsilon) {
    floats squares{};
    for (long i = 0; i < size; i += LANES) { floats v = load<floats>(x + i); squares = squares + v * v; }
    float factor = 1.0f / __builtin_sqrtf(sum(squares) / size + epsilon);
    for (long i = 0; i < size; i += LANES) store(x + i, load<floats>(x + i) * splat(factor) * load<floats>(weight + i));
  }
  void rotate(float* x, long position) const {
    long half = d.head_dim / 2;
    const float *c = d.cosines + position * half, *s_ = d.sines + position * half;
    for (long i = 0; i < half; i++) {
      float a = x[i], b = x[i + half];
      x[i] = a * c[i] - b * s_[i];
      x[i + half] = b * c[i] + a * s_[i];
    }
  }

  void embed(long token, float* out) const {
    auto* first = (const element*)d.embedding + Panels<T>::place(token, 0, d.hidden);
    for (long k = 0; k < d.hidden; k++) out[k] = T::value(first[k / T::PAIR * Panels<T>::STEP + k % T::PAIR]);
  }

  void write_keys(const LayerWeights& layer, long token, const float* key, const float* value) const {
    long slot = s.slots[token], block = slot / BLOCK, lane = slot % BLOCK, dim = d.head_dim;
    for (long h = 0; h < d.num_kv_heads; h++) {
      auto* k = (element*)layer.keys + (block * d.num_kv_heads + h) * BLOCK * dim;
      auto* v = (element*)layer.values + (block * d.num_kv_heads + h) * BLOCK * dim;
      // What a block held before may be no number, and zero times that is none either.
      if (lane == 0) { memset(k, 0, BLOCK * dim * sizeof(element)); memset(v, 0, BLOCK * dim * sizeof(element)); }
      for (long i = 0; i < dim; i++) {
        k[i / T::PAIR * BLOCK * T::PAIR + lane * T::PAIR + i % T::PAIR] = T::element_of(key[h * dim + i]);
        v[lane / T::PAIR * dim * T::PAIR + i * T::PAIR + lane % T::PAIR] = T::element_of(value[h * dim + i]);
      }
    }
  }

  // acc[rows][GROUPS groups from `first` on] += weights[rows][num_tokens] times values, over whole blocks.
  template <int GROUPS, int MOST>
  static inline void weigh(const operand* weights, const element* const* blocks, long num_blocks, long dim, long first,
                           long rows, float* acc) {
    in_tiles<MOST>(rows, [&](auto count, long r) {
      constexpr int ROWS = count();
      floats sums[ROWS][GROUPS];
      float* a = acc + r * dim + first;
      for (int i = 0; i < ROWS; i++) for (int g = 0; g < GROUPS; g++) sums[i][g] = load<floats>(a + i * dim + g * LANES);
      for (long block = 0; block < num_blocks; block++)
        add_columns<T, ROWS, GROUPS>(weights + r * CHUNK + block * BLOCK, CHUNK, blocks[block] + first * T::PAIR, dim * T::PAIR,
                                     LANES * T::PAIR, BLOCK / T::PAIR, sums);
      for (int i = 0; i < ROWS; i++) for (int g = 0; g < GROUPS; g++) store(a + i * dim + g * LANES, sums[i][g]);
    });
  }

  static constexpr int QUERY_ROWS = 48;
  struct Scratch {
    operand query[QUERY_ROWS * 256];
    float scores[QUERY_ROWS * CHUNK];
    operand weights[QUERY_ROWS * CHUNK];
    float acc[QUERY_ROWS * 256];
    floats totals[QUERY_ROWS];
    float highest[QUERY_ROWS];
    long last[QUERY_ROWS];
  };

  // Queries first .. first + count of a span, for one key-value head and its group of query heads.
  void attend(const LayerWeights& layer, const Span& span, long kv_head, long first, long count, const operand* queries,
              operand* out, Scratch& w) const {
    long dim = d.head_dim, group = d.num_heads / d.num_kv_heads, rows = count * group;
    long start = span.num_tokens - span.num_queries + first, end = start + count;
    for (long q = 0; q < count; q++)
      for (long g = 0; g < group; g++) {
        long r = q * group + g;
        memcpy(w.query + r * dim, queries + ((span.query_start + first + q) * d.num_heads + kv_head * group + g) * dim,
               dim * sizeof(operand));
        w.highest[r] = -__builtin_inff();
        w.totals[r] = floats{};
        w.last[r] = start + q;
      }
    memset(w.acc, 0, rows * dim * sizeof(float));
    long begin = layer.window && start - layer.window + 1 > 0 ? (start - layer.window + 1) / CHUNK * CHUNK : 0;
    const element *keys[CHUNK / BLOCK], *values[CHUNK / BLOCK];
    const ints lanes = lane_numbers();
    for (long chunk = begin; chunk < end; chunk += CHUNK) {
      long num_blocks = divide_up((end < chunk + CHUNK ? end : chunk + CHUNK) - chunk, BLOCK);
      for (long b = 0; b < num_blocks; b++) {
        long at = ((long)span.blocks[chunk / BLOCK + b] * d.num_kv_heads + kv_head) * BLOCK * dim;
        keys[b] = (const element*)layer.keys + at;
        values[b] = (const element*)layer.values + at;
      }
      for (long b = 0; b < num_blocks; b++) {
        in_tiles<TILE>(rows, [&](auto count, long r) {
          constexpr int ROWS = count();
          floats sums[ROWS][1] = {};
          add_columns<T, ROWS, 1>(w.query + r * dim, dim, keys[b], BLOCK * T::PAIR, 0, dim / T::PAIR, sums);
          for (int i = 0; i < ROWS; i++) store(w.scores + (r + i) * CHUNK + b * BLOCK, sums[i][0]);
        });
      }
      for (long r = 0; r < rows; r++) {
        floats peak = splat(w.highest[r]);
        ints broken{};
        for (long b = 0; b < num_blocks; b++) {
          ints key = lanes + (int32_t)(chunk + b * BLOCK);
          ints visible = key <= (int32_t)w.last[r];
          if (layer.window) visible = visible & (key > (int32_t)(w.last[r] - layer.window));
          floats v = select(visible, load<floats>(w.scores + r * CHUNK + b * BLOCK) * splat(d.scale), splat(-__builtin_inff()));
          store(w.scores + r * CHUNK + b * BLOCK, v);
          broken = broken | (v != v);
          peak = maximum(peak, v);
        }
        float highest = maximum(peak);
        if (highest == -__builtin_inff()) { memset(w.weights + r * CHUNK, 0, CHUNK * sizeof(operand)); continue; }
        if (highest != w.highest[r]) {
          floats correction = exponential(splat(w.highest[r] - highest));
          if (w.highest[r] == -__builtin_inff()) correction = floats{};
          w.totals[r] = w.totals[r] * correction;
          for (long i = 0; i < dim; i += LANES) store(w.acc + r * dim + i, load<floats>(w.acc + r * dim + i) * correction);
          w.highest[r] = highest;
        }
        for (long b = 0; b < num_blocks; b++) {
          floats e = exponential(load<floats>(w.scores + r * CHUNK + b * BLOCK) - splat(highest));
          w.totals[r] = w.totals[r] + e;
          T::put(w.weights + r * CHUNK + b * BLOCK, e);
        }
        // A maximum does not keep what is no number; the sum does.
        if (any(broken)) w.totals[r] = splat(__builtin_nanf(""));
      }
      long i = 0;
      for (; i + WIDE * LANES <= dim; i += WIDE * LANES) weigh<WIDE, WIDE_TILE>(w.weights, values, num_blocks, dim, i, rows, w.acc);
      for (; i < dim; i += LANES) weigh<1, TILE>(w.weights, values, num_blocks, dim, i, rows, w.acc);
    }
    for (long q = 0; q < count; q++)
      for (long g = 0; g < group; g++) {
        long r = q * group + g;
        floats factor = splat(1.0f / sum(w.totals[r]));
        operand* o = out + ((span.query_start + first + q) * d.num_heads + kv_head * group + g) * dim;
        for (long i = 0; i < dim; i += LANES) T::put(o + i, load<floats>(w.acc + r * dim + i) * factor);
      }
  }

  void run(Workspace& memory, bool counting) {
    long n = s.num_tokens, hidden = d.hidden, dim = d.head_dim;
    long query_size = d.num_heads * dim, key_size = d.num_kv_heads * dim, fused = query_size + 2 * key_size;
    float* x = memory.take<float>(n * hidden);
    operand* normed = memory.take<operand>(n * hidden);
    float* projected = memory.take<float>(n * fused);
    operand* queries = memory.take<operand>(n * query_size);
    operand* attended = memory.take<operand>(n * query_size);
    operand* activated = memory.take<operand>(n * d.intermediate);
    operand* last = memory.take<operand>(s.num_logit_rows * hidden);
    Scratch* scratch = memory.take<Scratch>(pool.size());
    if (counting) return;

    // Tokens that go into one block belong to one task, since the first of them clears the block.
    std::vector<std::pair<long, long>> writes;
    for (long t = 0; t < n;) {
      long next = t + 1;
      while (next < n && s.slots[next] == s.slots[next - 1] + 1 && s.slots[next] % BLOCK) next++;
      writes.emplace_back(t, next);
      t = next;
    }
    // The last queries of a span have the most keys, so they go first.
    long group = d.num_heads / d.num_kv_heads, queries_per_task = QUERY_ROWS / group;
    std::vector<std::pair<long, long>> tiles;
    for (long i = 0; i < s.num_spans; i++)
      for (long q = 0; q < s.spans[i].num_queries; q += queries_per_task) tiles.emplace_back(i, q);
    long num_tasks = (long)tiles.size();

    pool.run(divide_up(n, 16), [&](long task, int) {
      for (long t = task * 16; t < n && t < task * 16 + 16; t++) embed(s.token_ids[t], x + t * hidden);
    });
    for (long l = 0; l < d.num_layers; l++) {
      const LayerWeights& layer = d.layers[l];
      pool.run(divide_up(n, 8), [&](long task, int) {
        for (long t = task * 8; t < n && t < task * 8 + 8; t++) normalise(x + t * hidden, layer.input_norm, hidden, d.epsilon, normed + t * hidden);
      });
      product(normed, hidden, layer.query_key_value, fused, n, [&](long row, long panel, floats left, floats right) {
        long c = panel * PANEL;
        if (layer.query_key_value_bias) {
          left = left + load<floats>(layer.query_key_value_bias + c);
          if (c + LANES < fused) right = right + load<floats>(layer.query_key_value_bias + c + LANES);
        }
        store(projected + row * fused + c, left);
        if (c + LANES < fused) store(projected + row * fused + c + LANES, right);
      });
      pool.run(divide_up(n, 4), [&](long task, int) {
        for (long t = task * 4; t < n && t < task * 4 + 4; t++) {
          float* row = projected + t * fused;
          for (long h = 0; h < d.num_heads + d.num_kv_heads; h++) {
            const float* norm = h < d.num_heads ? layer.query_norm : layer.key_norm;
            if (norm) normalise_head(row + h * dim, norm, dim, d.epsilon);
            rotate(row + h * dim, s.positions[t]);
          }
          for (long i = 0; i < query_size; i += LANES) T::put(queries + t * query_size + i, load<floats>(row + i));
        }
      });
      pool.run((long)writes.size(), [&](long i, int) {
        for (long t = writes[i].first; t < writes[i].second; t++)
          write_keys(layer, t, projected + t * fused + query_size, projected + t * fused + query_size + key_size);
      });
      pool.run(num_tasks * d.num_kv_heads, [&](long task, int thread) {
        auto [i, q] = tiles[num_tasks - 1 - task / d.num_kv_heads];
        const Span& span = s.spans[i];
        long count = span.num_queries - q < queries_per_task ? span.num_queries - q : queries_per_task;
        attend(layer, span, task % d.num_kv_heads, q, count, queries, attended, scratch[thread]);
      });
      auto add = [&](long row, long panel, floats left, floats right) {
        float* p = x + row * hidden + panel * PANEL;
        store(p, load<floats>(p) + left);
        if (panel * PANEL + LANES < hidden) store(p + LANES, load<floats>(p + LANES) + right);
      };
      product(attended, query_size, layer.output, hidden, n, add);
      pool.run(divide_up(n, 8), [&](long task, int) {
        for (long t = task * 8; t < n && t < task * 8 + 8; t++) normalise(x + t * hidden, layer.post_norm, hidden, d.epsilon, normed + t * hidden);
      });
      product(normed, hidden, layer.gate_up, 2 * d.intermediate, n, [&](long row, long panel, floats gate, floats up) {
        floats silu = gate / (splat(1.0f) + exponential(-gate));
        T::put(activated + row * d.intermediate + panel * LANES, silu * up);
      });
      product(activated, d.intermediate, layer.down, hidden, n, add);
    }
    for (long r = 0; r < s.num_logit_rows; r++)
      normalise(x + (long)s.logit_rows[r] * hidden, d.final_norm, hidden, d.epsilon, last + r * hidden);
    product(last, hidden, d.output, d.vocab, s.num_logit_rows, [&](long row, long panel, floats left, floats right) {
      float* out = s.logits + row * d.vocab;
      long c = panel * PANEL, count = d.vocab - c;
      if (count >= PANEL) { store(out + c, left); store(out + c + LANES, right); }
      else {
        float both[PANEL];
        store(both, left);
        store(both + LANES, right);
        memcpy(out + c, both, count * sizeof(float));
      }
    });
  }
};

template <class T> void forward(Context& context, const Decoder& decoder, const Step& step) {
  Runner<T> runner{decoder, step, context.pool};
  Workspace sizes(nullptr);
  runner.run(sizes, true);
  Workspace memory(context.reserve(sizes.used + ALIGNMENT));
  runner.run(memory, false);
}

}  // namespace

extern "C" {

#ifndef REPRISE_SOURCES
#define REPRISE_SOURCES 0
#endif

// Which sources this was compiled from.
uint64_t reprise_sources() { return REPRISE_SOURCES; }

// Null where threads or memory are not to be had.
Context* reprise_create(int num_threads) {
  Context* made = nullptr;
  guarded([&] { made = new Context(num_threads); });
  return made;
}

void reprise_destroy(Context* context) { delete context; }

// Puts rows of a weight [num_rows, inner] into panels as the columns from first_column on; where group is not 0,
// group by group into every second group of columns, beginning with the one at offset.
void reprise_pack(Context* context, const void* weight, int64_t num_rows, int64_t inner, void* packed, int64_t first_column,
                  int64_t group, int64_t offset, int element_size) {
  const long rows = 64;  // a multiple of every group, so that a task's rows begin one
  context->pool.run(divide_up(num_rows, rows), [&](long task, int) {
    long r = task * rows, count = num_rows - r < rows ? num_rows - r : rows;
    long first = first_column + (group ? 2 * r : r);
    if (element_size == 2)
      pack<BFloat16>((const uint16_t*)weight + r * inner, count, inner, (uint16_t*)packed, first, group, offset);
    else
      pack<Float32>((const float*)weight + r * inner, count, inner, (float*)packed, first, group, offset);
  });
}

int reprise_forward(Context* context, const Decoder* decoder, const Step* step, int element_size) {
  return guarded([&] {
    if (element_size == 2) forward<BFloat16>(*context, *decoder, *step);
    else forward<Float32>(*context, *decoder, *step);
  });
}

}  // extern "C"
