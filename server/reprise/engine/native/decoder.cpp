// A decoder of the Llama family, one step of a packed batch: token ids in, logits out.
//
// A row's bits do not depend on its company. Every sum has one order: a matrix product runs over the whole inner
// dimension in one register for each output, or as the matrix unit has it; attention runs over the keys from the sequence's
// start, CHUNK by CHUNK; which rows share a tile or a thread changes nothing of that.

#include <stdlib.h>

#include <numeric>
#include <utility>
#include <vector>

#include "context.h"
#include "quantised.h"

namespace {

constexpr int BLOCK = 16;   // tokens of a block of keys or values
constexpr int MAX_HEAD_DIM = 256;
constexpr int CHUNK = 128;  // keys between two corrections of the running maximum
constexpr int WIDE = NUM_SUMS >= 24 ? 4 : 2;       // groups of a register tile of weighted values
constexpr int WIDE_TILE = NUM_SUMS >= 24 ? 6 : 3;  // its rows

}  // namespace

extern "C" {

enum Format { FULL = 0, INT8 = 1, INT4 = 2 };

// A packed weight [columns, inner].
struct Matrix {
  const void* data;
  const float* scales;           // [columns] of INT8, else null
  int64_t format;                // FULL: as keys and values
};

struct LayerWeights {
  Matrix query_key_value;        // [(heads + 2 kv_heads) * head_dim, hidden]
  Matrix output;                 // [hidden, heads * head_dim]
  Matrix gate_up;                // 16 columns of gate beside 16 of up
  Matrix down;                   // [hidden, intermediate]
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
  int64_t num_embeddings, num_positions, num_blocks;  // blocks of BLOCK tokens
  float epsilon, scale;
  const LayerWeights* layers;
  Matrix embedding;              // [vocab, hidden], not INT4
  Matrix output;                 // [vocab, hidden]
  const float* final_norm;
  const float* cosines;          // [positions][head_dim / 2]
  const float* sines;
};

// What is computed of one sequence: the last num_new of its num_tokens, and logits of the last of those.
struct Span {
  int64_t num_new, num_tokens, num_logit_rows, num_blocks;
};

struct Step {
  int64_t num_spans;
  int64_t block_size;            // a multiple of BLOCK
  const Span* spans;
  const int32_t* token_ids;      // the new ones of all spans
  const int32_t* block_ids;      // num_blocks of each span, in the order of its tokens
  float* logits;                 // [rows][vocab], those of all spans
};
}

namespace {

// Where rows of a weight go among the columns of what is packed: from `first` on, or group by group into every second
// group, beginning with the one at `offset`.
struct Columns {
  long first, group, offset;
  long of(long row) const { return first + (group ? row / group * 2 * group + offset + row % group : row); }
};

// Packs rows `row` to `row + count`, which are neighbours among the columns of what is packed: at most 16 of them.
template <class T>
void pack(const typename T::element* weight, long row, long count, long inner, void* packed, long column, float* scales, long format) {
  if (format == FULL) {
    // A pair of neighbours is four bytes in every format.
    static_assert(T::PAIR * sizeof(typename T::element) == sizeof(uint32_t));
    auto* from = (const char*)(weight + row * inner);
    auto* to = (char*)((typename T::element*)packed + Panels<T>::place(column, 0, inner));
    auto copy = [&](long lanes) __attribute__((always_inline)) {
      for (long k = 0; k < inner / T::PAIR; k++)
        for (long lane = 0; lane < lanes; lane++)
          memcpy(to + (k * (Panels<T>::STEP / T::PAIR) + lane) * 4, from + (lane * (inner / T::PAIR) + k) * 4, 4);
    };
    if (count == LANES) copy(LANES);
    else copy(count);
    return;
  }
  std::vector<float> values(inner);
  for (long r = row; r < row + count; r++, column++) {
    for (long k = 0; k < inner; k++) values[k] = T::value(weight[r * inner + k]);
    if (format == INT4) pack_int4(values.data(), inner, (uint8_t*)packed, column);
    else scales[column] = pack_int8(values.data(), inner, (uint8_t*)packed, column);
  }
}

// A step, laid out by rows. Throws std::out_of_range where it names what the decoder has not.
struct Layout {
  struct Queries {
    long first_row, num_queries, num_tokens, first_block;
  };
  std::vector<Queries> spans;
  std::vector<long> positions, slots;  // of each row; a slot is where its key and value go
  std::vector<long> logit_rows;
  std::vector<int32_t> blocks;         // of BLOCK tokens each

  Layout(const Decoder& d, const Step& s) {
    const long parts = s.block_size / BLOCK;
    const int32_t* block_ids = s.block_ids;
    for (long i = 0; i < s.num_spans; i++) {
      const Span& span = s.spans[i];
      Queries queries{(long)positions.size(), span.num_new, span.num_tokens, (long)blocks.size()};
      if (span.num_new < 0 || span.num_new > span.num_tokens || span.num_logit_rows < 0 || span.num_logit_rows > span.num_new)
        throw std::out_of_range("a row");
      if (span.num_tokens > d.num_positions || span.num_tokens > span.num_blocks * s.block_size) throw std::out_of_range("a position");
      for (long b = 0; b * s.block_size < span.num_tokens; b++) {
        long block = block_ids[b];
        if (block < 0 || (block + 1) * parts > d.num_blocks) throw std::out_of_range("a block");
        for (long part = 0; part < parts; part++) blocks.push_back((int32_t)(block * parts + part));
      }
      block_ids += span.num_blocks;
      for (long p = span.num_tokens - span.num_new; p < span.num_tokens; p++) {
        positions.push_back(p);
        slots.push_back((long)blocks[queries.first_block + p / BLOCK] * BLOCK + p % BLOCK);
      }
      for (long r = span.num_logit_rows; r > 0; r--) logit_rows.push_back((long)positions.size() - r);
      spans.push_back(queries);
    }
    for (size_t row = 0; row < positions.size(); row++)
      if (s.token_ids[row] < 0 || s.token_ids[row] >= d.num_embeddings) throw std::out_of_range("a token id");
  }
};

template <class T> struct Runner {
  typedef typename T::element element;
  typedef typename T::operand operand;
  const Decoder& d;
  const Step& s;
  const Layout& layout;
  Pool& pool;

  // A run of panels times a run of rows, of one product.
  struct Task {
    long first_panel, last_panel, first_row, num_rows;
    int thread;
    long row_in_task(long row) const { return row - first_row; }
    long column_in_task(long panel) const { return (panel - first_panel) * PANEL; }
  };
  static constexpr long MOST_ROWS = 96;
  static_assert(MOST_ROWS % MOST_TILED == 0);
  // Where others read the same panels for other rows, so that those are still near.
  static constexpr long MOST_PANELS = 8;

  // Panels of a task, of which so many `together` are never in two.
  long panels_of_task(long num_panels, long row_tasks, long together) const {
    long share = divide_up(num_panels, divide_up(8L * pool.size(), row_tasks));
    if (row_tasks > 1 && share > MOST_PANELS) share = MOST_PANELS;
    return divide_up(share, together) * together;
  }

  // Calls f(task, panel, the next panel, the thread's matrix unit) for all of a product, and done(task) where it is complete.
  template <class F, class G> void in_tasks(long columns, long num_rows, long together, const F& f, const G& done) {
    long num_panels = divide_up(columns, PANEL);
    long row_tasks = divide_up(num_rows, MOST_ROWS), row_chunk = divide_up(num_rows, row_tasks);
    if (T::TILED) row_chunk = divide_up(row_chunk, MOST_TILED) * MOST_TILED;
    long panel_chunk = panels_of_task(num_panels, row_tasks, together);
    long panel_tasks = divide_up(num_panels, panel_chunk);
    pool.run(panel_tasks * row_tasks, [&](long number, int thread) {
      long panel = number / row_tasks * panel_chunk, row = number % row_tasks * row_chunk;
      Task task{panel, panel + panel_chunk < num_panels ? panel + panel_chunk : num_panels, row,
                row + row_chunk < num_rows ? row_chunk : num_rows - row, thread};
      // The task that this thread gets next, if all take the same time.
      long then = (number + pool.size()) / row_tasks * panel_chunk;
      MatrixUnit unit;
      for (long p = panel; p < task.last_panel; p++) f(task, p, p + 1 < task.last_panel || then >= num_panels ? p + 1 : then, unit);
      done(task);
    });
  }

  // What rows become before they meet quantised weights.
  struct Rounded {
    int8_t* numbers;
    float* scales;
    int32_t* sums;
    RoundedRow* rows;
  };
  Rounded rounded{};

  // apply(task, row, panel, left, right) takes the sums of a panel's two groups, done(task) comes after those of a task.
  template <class F, class G>
  void product(const operand* x, long inner, const Matrix& weights, long columns, long num_rows, long together, F apply, G done) {
    if (num_rows == 0) return;
    if (weights.format == FULL) {
      auto* panels = (const element*)weights.data;
      in_tasks(columns, num_rows, together, [&](const Task& task, long p, long next, MatrixUnit& unit) {
        rows_times_panel<T>(unit, x + task.first_row * inner, inner, panels + p * PANEL * inner, panels + next * PANEL * inner, inner,
                            task.num_rows, [&](long row, floats left, floats right) { apply(task, task.first_row + row, p, left, right); });
      }, done);
      return;
    }
    long groups = divide_up(inner, GROUP);
    pool.run(divide_up(num_rows, 4), [&](long task, int) {
      for (long t = task * 4; t < num_rows && t < task * 4 + 4; t++) {
        rounded.rows[t] = {rounded.numbers + t * inner, rounded.scales + t * groups, rounded.sums + t * groups};
        round_row([&](long k) { return T::lanes(x + t * inner + k); }, inner, rounded.numbers + t * inner,
                  rounded.scales + t * groups, rounded.sums + t * groups);
      }
    });
    auto* panels = (const uint8_t*)weights.data;
    if (weights.format == INT4) {
      long size = 2 * Int4::strip_bytes(inner);
      in_tasks(columns, num_rows, together, [&](const Task& task, long p, long next, MatrixUnit&) {
        rounded_rows_times_panel<Int4>(rounded.rows + task.first_row, panels + p * size, panels + next * size, inner, task.num_rows,
                                       [&](long row, floats left, floats right) { apply(task, task.first_row + row, p, left, right); });
      }, done);
      return;
    }
    long size = 2 * Int8::strip_bytes(inner);
    in_tasks(columns, num_rows, together, [&](const Task& task, long p, long next, MatrixUnit&) {
      const float* scales = weights.scales + p * PANEL;
      rounded_rows_times_panel<Int8>(rounded.rows + task.first_row, panels + p * size, panels + next * size, inner, task.num_rows,
                                     [&](long row, floats left, floats right) __attribute__((always_inline)) {
                                       apply(task, task.first_row + row, p, left * load<floats>(scales), right * load<floats>(scales + LANES));
                                     });
    }, done);
  }
  template <class F> void product(const operand* x, long inner, const Matrix& weights, long columns, long num_rows, F apply) {
    product(x, inner, weights, columns, num_rows, 1,
            [&](const Task&, long row, long panel, floats left, floats right) __attribute__((always_inline)) {
              apply(row, panel, left, right);
            },
            [](const Task&) {});
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
    long half = d.head_dim / 2, i = 0;
    const float *c = d.cosines + position * half, *s_ = d.sines + position * half;
    for (; i + LANES <= half; i += LANES) {
      floats a = load<floats>(x + i), b = load<floats>(x + half + i), cosine = load<floats>(c + i), sine = load<floats>(s_ + i);
      store(x + i, a * cosine - b * sine);
      store(x + half + i, b * cosine + a * sine);
    }
    for (; i < half; i++) {
      float a = x[i], b = x[i + half];
      x[i] = a * c[i] - b * s_[i];
      x[i + half] = b * c[i] + a * s_[i];
    }
  }

  void embed(long token, float* out) const {
    if (d.embedding.format == INT8) {
      auto* data = (const uint8_t*)d.embedding.data;
      for (long k = 0; k < d.hidden; k++) out[k] = (data[Int8::place(token, k, d.hidden)] - Int8::ZERO) * d.embedding.scales[token];
      return;
    }
    auto* first = (const element*)d.embedding.data + Panels<T>::place(token, 0, d.hidden);
    for (long k = 0; k < d.hidden; k++) out[k] = T::value(first[k / T::PAIR * Panels<T>::STEP + k % T::PAIR]);
  }

  element* block_of(void* of, long slot) const { return (element*)of + slot / BLOCK * d.num_kv_heads * BLOCK * d.head_dim; }

  // Makes a block zero whose first token is about to be written: what it held before may be no number, and zero times that
  // is none either.
  void clear_blocks(const LayerWeights& layer, long token) const {
    long slot = layout.slots[token], size = d.num_kv_heads * BLOCK * d.head_dim * sizeof(element);
    if (slot % BLOCK) return;
    memset(block_of(layer.keys, slot), 0, size);
    memset(block_of(layer.values, slot), 0, size);
  }
  // Writes one head of a token's key or value; they come as floats.
  void write_key(const LayerWeights& layer, long token, long head, const float* key) const {
    long slot = layout.slots[token], dim = d.head_dim;
    element* k = block_of(layer.keys, slot) + head * BLOCK * dim + slot % BLOCK * T::PAIR;
    element rounded[MAX_HEAD_DIM];
    for (long i = 0; i < dim; i += LANES) T::keep(rounded + i, load<floats>(key + i));
    for (long i = 0; i < dim; i += T::PAIR) memcpy(k + i * BLOCK, rounded + i, T::PAIR * sizeof(element));
  }
  void write_value(const LayerWeights& layer, long token, long head, const float* value) const {
    long slot = layout.slots[token], lane = slot % BLOCK, dim = d.head_dim;
    element* v = block_of(layer.values, slot) + head * BLOCK * dim + lane / T::PAIR * dim * T::PAIR + lane % T::PAIR;
    element rounded[MAX_HEAD_DIM];
    for (long i = 0; i < dim; i += LANES) T::keep(rounded + i, load<floats>(value + i));
    for (long i = 0; i < dim; i++) v[i * T::PAIR] = rounded[i];
  }
  // What a token's query, key and value become after their product: [num_columns] from `column` on, whole heads.
  void take_heads(const LayerWeights& layer, long token, long column, long num_columns, float* row, operand* queries) const {
    long dim = d.head_dim, num_heads = d.num_heads;
    for (long end = column + num_columns; column < end; column += dim, row += dim) {
      if (layer.query_key_value_bias)
        for (long i = 0; i < dim; i += LANES) store(row + i, load<floats>(row + i) + load<floats>(layer.query_key_value_bias + column + i));
      long h = column / dim;
      if (h >= num_heads + d.num_kv_heads) {
        write_value(layer, token, h - num_heads - d.num_kv_heads, row);
        continue;
      }
      const float* norm = h < num_heads ? layer.query_norm : layer.key_norm;
      if (norm) normalise_head(row, norm, dim, d.epsilon);
      rotate(row, layout.positions[token]);
      if (h >= num_heads) write_key(layer, token, h - num_heads, row);
      else
        for (long i = 0; i < dim; i += LANES) T::put(queries + (token * num_heads + h) * dim + i, load<floats>(row + i));
    }
  }

  // Blocks that are read one after the other are fetched so many before their turn, by tiles so small that they wait for them.
  static constexpr int AHEAD = REGISTER_BYTES < 64 ? 8 : 4;
  static constexpr int FEW_ROWS = 4;

  // acc[rows][GROUPS groups from `first` on] += weights[rows][num_tokens] times values, over whole blocks.
  template <int GROUPS, int MOST>
  static inline void weigh(const operand* weights, const element* const* blocks, long num_blocks, long dim, long first,
                           long rows, float* acc) {
    in_tiles<MOST>(rows, [&](auto count, long r) {
      constexpr int ROWS = count();
      floats sums[ROWS][GROUPS];
      float* a = acc + r * dim + first;
#pragma GCC unroll 12  // else all sums go through memory
      for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int g = 0; g < GROUPS; g++) sums[i][g] = load<floats>(a + i * dim + g * LANES);
      for (long block = 0; block < num_blocks; block++) {
        if (ROWS <= FEW_ROWS)
          for (long i = 0; i < BLOCK / T::PAIR; i++)
            for (int g = 0; g < GROUPS; g++) __builtin_prefetch(blocks[block + AHEAD] + (i * dim + first + g * LANES) * T::PAIR);
        add_columns<T, ROWS, GROUPS>(weights + r * CHUNK + block * BLOCK, CHUNK, blocks[block] + first * T::PAIR, dim * T::PAIR,
                                     LANES * T::PAIR, BLOCK / T::PAIR, sums, NoFetch{});
      }
#pragma GCC unroll 12
      for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int g = 0; g < GROUPS; g++) store(a + i * dim + g * LANES, sums[i][g]);
    });
  }

  static constexpr int QUERY_ROWS = 48;
  // With more rows a register tile of several groups does not pay: what they are multiplied with takes registers from sums.
  static constexpr int MOST_WIDE = REGISTER_BYTES < 64 ? WIDE_TILE : QUERY_ROWS;
  struct Scratch {
    operand query[QUERY_ROWS * MAX_HEAD_DIM];
    float scores[QUERY_ROWS * CHUNK];
    operand weights[QUERY_ROWS * CHUNK];
    float acc[QUERY_ROWS * MAX_HEAD_DIM];
    floats totals[QUERY_ROWS];
    float highest[QUERY_ROWS];
    long last[QUERY_ROWS];
  };

  // Whether attention's products run in the matrix unit, for any number of rows.
  bool tiled_heads() const { return T::TILED && d.head_dim % TILE_INNER == 0; }

  // scores[rows][num_blocks blocks] = queries times keys, in the matrix unit.
  void score_in_tiles(MatrixUnit& unit, const element* const* keys, long num_blocks, long rows, Scratch& w) const {
    constexpr long STEP = TILE_INNER * LANES;
    long dim = d.head_dim;
    for (long r = 0; r < rows; r += MOST_TILED) {
      unit.prepare(rows - r < MOST_TILED ? rows - r : MOST_TILED, TILE_INNER / T::PAIR);
      for (long b = 0; b < num_blocks; b += 2)
        unit.multiply<false>(
            {w.query + r * dim, dim * (long)sizeof(operand), TILE_INNER * sizeof(operand)}, dim / TILE_INNER, TILE_BYTES,
            b + 1 < num_blocks, [&](long k) { return std::make_pair(keys[b] + k * STEP, keys[b + 1] + k * STEP); },
            {w.scores + r * CHUNK + b * BLOCK, CHUNK * sizeof(float)},
            [&](long k) {
              if (rows <= FEW_ROWS)
                for (long ahead = b + AHEAD; ahead < b + AHEAD + 2; ahead++)
                  for (long i = 0; i < STEP; i += Fetch::LINE / (long)sizeof(element)) __builtin_prefetch(keys[ahead] + k * STEP + i);
            });
    }
  }

  // acc[rows][dim] += weights[rows][num_tokens] times values, over whole blocks, in the matrix unit.
  void weigh_in_tiles(MatrixUnit& unit, const element* const* values, long num_blocks, long rows, Scratch& w) const {
    long dim = d.head_dim;
    for (long r = 0; r < rows; r += MOST_TILED) {
      unit.prepare(rows - r < MOST_TILED ? rows - r : MOST_TILED, BLOCK / T::PAIR);
      for (long i = 0; i < dim; i += 2 * LANES)
        unit.multiply<true>(
            {w.weights + r * CHUNK, CHUNK * sizeof(operand), BLOCK * sizeof(operand)}, num_blocks, dim * T::PAIR * (long)sizeof(element),
            true, [&](long b) { return std::make_pair(values[b] + i * T::PAIR, values[b] + (i + LANES) * T::PAIR); },
            {w.acc + r * dim + i, dim * (long)sizeof(float)},
            [&](long b) {
              if (rows <= FEW_ROWS)
                for (long pair = 0; pair < BLOCK / T::PAIR; pair++)
                  for (long group = i; group < i + 2 * LANES; group += LANES)
                    __builtin_prefetch(values[b + AHEAD] + (pair * dim + group) * T::PAIR);
            });
    }
  }

  // Queries first .. first + count of a span, for key-value heads first_head .. last_head and their groups of query heads.
  void attend(const LayerWeights& layer, const Layout::Queries& span, long first_head, long last_head, long first, long count,
              const operand* queries, operand* out, Scratch& w, [[maybe_unused]] MatrixUnit& unit) const {
    long dim = d.head_dim, group = d.num_heads / d.num_kv_heads, rows = count * group;
    long start = span.num_tokens - span.num_queries + first, end = start + count;
    long begin = layer.window && start - layer.window + 1 > 0 ? (start - layer.window + 1) / CHUNK * CHUNK : 0;
    // Blocks in the order of their use: keys of a chunk, its values, and the keys that come next.
    const element* blocks[2 * CHUNK / BLOCK + AHEAD];
    auto put_blocks = [&](const void* of, long kv_head, long chunk, long count, const element** into) {
      for (long b = 0; b < count; b++)
        into[b] = (const element*)of + ((long)layout.blocks[span.first_block + chunk / BLOCK + b] * d.num_kv_heads + kv_head) * BLOCK * dim;
    };
    for (long kv_head = first_head; kv_head < last_head; kv_head++) {
      for (long q = 0; q < count; q++)
        for (long g = 0; g < group; g++) {
          long r = q * group + g;
          memcpy(w.query + r * dim, queries + ((span.first_row + first + q) * d.num_heads + kv_head * group + g) * dim,
                 dim * sizeof(operand));
          w.highest[r] = -__builtin_inff();
          w.totals[r] = floats{};
          w.last[r] = start + q;
        }
      memset(w.acc, 0, rows * dim * sizeof(float));
      for (long chunk = begin; chunk < end; chunk += CHUNK) {
        long num_blocks = divide_up((end < chunk + CHUNK ? end : chunk + CHUNK) - chunk, BLOCK);
        put_blocks(layer.keys, kv_head, chunk, num_blocks, blocks);
        put_blocks(layer.values, kv_head, chunk, num_blocks, blocks + num_blocks);
        bool at_end = chunk + CHUNK >= end;
        long next = at_end ? begin : chunk + CHUNK, next_head = at_end && kv_head + 1 < last_head ? kv_head + 1 : kv_head;
        long num_next = divide_up(end - next, BLOCK) < AHEAD ? divide_up(end - next, BLOCK) : AHEAD;
        put_blocks(layer.keys, next_head, next, num_next, blocks + 2 * num_blocks);
        for (long b = num_next; b < AHEAD; b++) blocks[2 * num_blocks + b] = blocks[2 * num_blocks];
        const element* const* values = blocks + num_blocks;
        if constexpr (T::TILED)
          if (tiled_heads()) {
            score_in_tiles(unit, blocks, num_blocks, rows, w);
            for (long r = 0; r < rows; r++) soften(layer, chunk, num_blocks, r, w);
            weigh_in_tiles(unit, values, num_blocks, rows, w);
            continue;
          }
        score(blocks, num_blocks, rows, w);
        for (long r = 0; r < rows; r++) soften(layer, chunk, num_blocks, r, w);
        long i = 0;
        if (rows <= MOST_WIDE)
          for (; i + WIDE * LANES <= dim; i += WIDE * LANES) weigh<WIDE, WIDE_TILE>(w.weights, values, num_blocks, dim, i, rows, w.acc);
        for (; i < dim; i += LANES) weigh<1, TILE>(w.weights, values, num_blocks, dim, i, rows, w.acc);
      }
      for (long q = 0; q < count; q++)
        for (long g = 0; g < group; g++) {
          long r = q * group + g;
          floats factor = splat(1.0f / sum(w.totals[r]));
          operand* o = out + ((span.first_row + first + q) * d.num_heads + kv_head * group + g) * dim;
          for (long i = 0; i < dim; i += LANES) T::put(o + i, load<floats>(w.acc + r * dim + i) * factor);
        }
    }
  }

  // scores[rows][num_blocks blocks] = queries times keys. More keys at a time where there are few queries.
  void score(const element* const* keys, long num_blocks, long rows, Scratch& w) const {
    long dim = d.head_dim;
    in_tiles<TILE>(rows, [&](auto count, long r) {
      constexpr int ROWS = count();
      constexpr int AT_ONCE = ROWS * 4 <= NUM_SUMS ? 4 : ROWS * 2 <= NUM_SUMS ? 2 : 1;
      auto some = [&](auto several, long b) {
        constexpr int BLOCKS = several();
        floats sums[ROWS][BLOCKS] = {};
        const element* const* ahead = ROWS <= FEW_ROWS ? keys + b + AHEAD : nullptr;
        multiply_blocks<T, ROWS, BLOCKS>(w.query + r * dim, dim, keys + b, ahead, dim / T::PAIR, sums);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
          for (int j = 0; j < BLOCKS; j++) store(w.scores + (r + i) * CHUNK + (b + j) * BLOCK, sums[i][j]);
      };
      long b = 0;
      for (; b + AT_ONCE <= num_blocks; b += AT_ONCE) some(std::integral_constant<int, AT_ONCE>{}, b);
      for (; b < num_blocks; b++) some(std::integral_constant<int, 1>{}, b);
    });
  }

  // Makes weights of a row's scores against the highest so far, and corrects what was weighed against a lower one. What is
  // no number stays so in the total.
  void soften(const LayerWeights& layer, long chunk, long num_blocks, long r, Scratch& w) const {
    float* scores = w.scores + r * CHUNK;
    long dim = d.head_dim, last = w.last[r];
    floats peak = splat(w.highest[r]);
    for (long b = 0; b < num_blocks; b++) {
      floats v = load<floats>(scores + b * BLOCK);
      long first = chunk + b * BLOCK;
      if (first + BLOCK - 1 > last || (layer.window && first <= last - layer.window)) {
        ints key = lane_numbers() + (int32_t)first;
        ints visible = key <= (int32_t)last;
        if (layer.window) visible = visible & (key > (int32_t)(last - layer.window));
        v = select(visible, v, splat(-__builtin_inff()));
        store(scores + b * BLOCK, v);
      }
      peak = maximum(v, peak);
    }
    float highest = maximum(peak);
    if (highest == -__builtin_inff()) {
      for (long b = 0; b < num_blocks; b++) {
        floats v = load<floats>(scores + b * BLOCK);
        if (any(v != v)) w.totals[r] = splat(__builtin_nanf(""));
      }
      memset(w.weights + r * CHUNK, 0, CHUNK * sizeof(operand));
      return;
    }
    if (highest != w.highest[r]) {
      floats correction = exponential(splat((w.highest[r] - highest) * d.scale));
      w.totals[r] = w.totals[r] * correction;
      for (long i = 0; i < dim; i += LANES) store(w.acc + r * dim + i, load<floats>(w.acc + r * dim + i) * correction);
      w.highest[r] = highest;
    }
    floats base = splat(highest * d.scale), total = w.totals[r];
    for (long b = 0; b < num_blocks; b++) {
      floats e = exponential(load<floats>(scores + b * BLOCK) * splat(d.scale) - base);
      total = total + e;
      T::put(w.weights + r * CHUNK + b * BLOCK, e);
    }
    w.totals[r] = total;
  }

  void run(Workspace& memory, bool counting) {
    long n = (long)layout.positions.size(), num_logit_rows = (long)layout.logit_rows.size(), hidden = d.hidden, dim = d.head_dim;
    long query_size = d.num_heads * dim, key_size = d.num_kv_heads * dim, fused = query_size + 2 * key_size;
    float* x = memory.take<float>(n * hidden);
    operand* normed = memory.take<operand>(n * hidden);
    operand* queries = memory.take<operand>(n * query_size);
    operand* attended = memory.take<operand>(n * query_size);
    operand* activated = memory.take<operand>(n * d.intermediate);
    operand* last = memory.take<operand>(num_logit_rows * hidden);
    Scratch* scratch = memory.take<Scratch>(pool.size());
    // Of a head's panels none is in another task.
    long panels_of_heads = dim / std::gcd(dim, (long)PANEL);
    long most_columns = panels_of_task(divide_up(fused, PANEL), divide_up(n, MOST_ROWS), panels_of_heads) * PANEL;
    float* projected = memory.take<float>(pool.size() * MOST_ROWS * most_columns);
    long widest = d.intermediate > query_size ? d.intermediate : query_size;
    if (widest < hidden) widest = hidden;
    if (d.layers[0].down.format != FULL || d.output.format != FULL) {
      rounded.numbers = memory.take<int8_t>(n * widest);
      rounded.scales = memory.take<float>(n * divide_up(widest, GROUP));
      rounded.sums = memory.take<int32_t>(n * divide_up(widest, GROUP));
      rounded.rows = memory.take<RoundedRow>(n);
    }
    if (counting) return;

    // The last queries of a span have the most keys, so they go first.
    long group = d.num_heads / d.num_kv_heads, queries_per_task = QUERY_ROWS / group;
    std::vector<std::pair<long, long>> tiles;
    for (size_t i = 0; i < layout.spans.size(); i++)
      for (long q = 0; q < layout.spans[i].num_queries; q += queries_per_task) tiles.emplace_back(i, q);
    long num_tiles = (long)tiles.size();
    // All heads of a tile are one task where there are tiles enough: what a task reads is fetched ahead within it.
    long heads_per_task = num_tiles >= 4L * pool.size() ? d.num_kv_heads : 1, head_tasks = d.num_kv_heads / heads_per_task;

    pool.run(divide_up(n, 16), [&](long task, int) {
      for (long t = task * 16; t < n && t < task * 16 + 16; t++) embed(s.token_ids[t], x + t * hidden);
    });
    for (long l = 0; l < d.num_layers; l++) {
      const LayerWeights& layer = d.layers[l];
      pool.run(divide_up(n, 8), [&](long task, int) {
        for (long t = task * 8; t < n && t < task * 8 + 8; t++) {
          normalise(x + t * hidden, layer.input_norm, hidden, d.epsilon, normed + t * hidden);
          clear_blocks(layer, t);
        }
      });
      product(normed, hidden, layer.query_key_value, fused, n, panels_of_heads,
              [&](const Task& task, long row, long panel, floats left, floats right) {
                float* p = projected + (task.thread * MOST_ROWS + task.row_in_task(row)) * most_columns + task.column_in_task(panel);
                store(p, left);
                store(p + LANES, right);
              },
              [&](const Task& task) {
                long first = task.first_panel * PANEL, last = task.last_panel * PANEL < fused ? task.last_panel * PANEL : fused;
                for (long i = 0; i < task.num_rows; i++)
                  take_heads(layer, task.first_row + i, first, last - first, projected + (task.thread * MOST_ROWS + i) * most_columns, queries);
              });
      pool.run(num_tiles * head_tasks, [&](long task, int thread) {
        auto [i, q] = tiles[num_tiles - 1 - task / head_tasks];
        const Layout::Queries& span = layout.spans[i];
        long count = span.num_queries - q < queries_per_task ? span.num_queries - q : queries_per_task;
        long head = task % head_tasks * heads_per_task;
        MatrixUnit unit;
        attend(layer, span, head, head + heads_per_task, q, count, queries, attended, scratch[thread], unit);
      });
      // Inlined everywhere or nowhere: a product and this sum may become one operation, with other bits.
      auto add = [&](long row, long panel, floats left, floats right) __attribute__((always_inline)) {
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
    for (long r = 0; r < num_logit_rows; r++)
      normalise(x + layout.logit_rows[r] * hidden, d.final_norm, hidden, d.epsilon, last + r * hidden);
    product(last, hidden, d.output, d.vocab, num_logit_rows, [&](long row, long panel, floats left, floats right) {
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
  Layout layout(decoder, step);
  if (layout.positions.empty()) return;
  Runner<T> runner{decoder, step, layout, context.pool, {}};
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

// Whether the system lets this process use the instructions. To be called before any product.
int reprise_permitted() { return MatrixUnit::permitted(); }

// Null where threads or memory are not to be had.
Context* reprise_create(int num_threads) {
  Context* made = nullptr;
  guarded([&] { made = new Context(num_threads); });
  return made;
}

void reprise_destroy(Context* context) { delete context; }

// Bytes that a weight of so many columns takes when it is packed.
int64_t reprise_packed_bytes(int64_t columns, int64_t inner, int64_t format, int element_size) {
  int64_t padded = divide_up(columns, PANEL) * PANEL;
  if (format == INT4) return padded / LANES * Int4::strip_bytes(inner);
  return padded * inner * (format == INT8 ? 1 : element_size);
}

// Puts rows of a weight [num_rows, inner] into panels as the columns from first_column on; where group is not 0,
// group by group into every second group of columns, beginning with the one at offset. first_column and group: multiples
// of 16.
int reprise_pack(Context* context, const void* weight, int64_t num_rows, int64_t inner, void* packed, int64_t first_column,
                 int64_t group, int64_t offset, float* scales, int64_t format, int element_size) {
  return guarded([&] {
    Columns columns{first_column, group, offset};
    context->pool.run(divide_up(num_rows, LANES), [&](long task, int) {
      long r = task * LANES, count = num_rows - r < LANES ? num_rows - r : LANES;
      if (element_size == 2) pack<BFloat16>((const uint16_t*)weight, r, count, inner, packed, columns.of(r), scales, format);
      else pack<Float32>((const float*)weight, r, count, inner, packed, columns.of(r), scales, format);
    });
  });
}

int reprise_forward(Context* context, const Decoder* decoder, const Step* step, int element_size) {
  return guarded([&] {
    if (element_size == 2) forward<BFloat16>(*context, *decoder, *step);
    else forward<Float32>(*context, *decoder, *step);
  });
}

}  // extern "C"
