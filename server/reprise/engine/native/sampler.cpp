// Choosing tokens from scores: the most likely one, those that top_p leaves, or the Gumbel maximum under the noise of
// noise.py.

#include <math.h>

#include <algorithm>

#include "context.h"
#include "vectors.h"

namespace {

constexpr long SEGMENT = 16384;      // token ids that one task looks at
constexpr double MARGIN = 1e-7;      // far above the error of `logarithm`, so that the winner is among those recomputed

typedef Vector<double, 8>::type doubles;
typedef Vector<int64_t, 8>::type longs;
typedef Vector<uint64_t, 8>::type hashes;

using ::maximum;
using ::splat;
inline doubles splat(double x) { return x - doubles{}; }

// As many floats as V has doubles, as those.
template <class V> struct Widened {
  typedef typename Vector<float, sizeof(V) / sizeof(double)>::type part;
  static inline V from(const float* p) { return numbers_as<V>(load<part>(p)); }
};
template <class H> struct Widened<Twice<H>> {
  static inline Twice<H> from(const float* p) { return {Widened<H>::from(p), Widened<H>::from(p + sizeof(H) / sizeof(double))}; }
};

inline doubles maximum(doubles a, doubles b) {
  longs higher = a > b;
  return bits_as<doubles>((higher & bits_as<longs>(a)) | (~higher & bits_as<longs>(b)));
}

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15ull;

// The finaliser of SplitMix64.
template <class W> inline W mixed(W word) {
  word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9ull;
  word = (word ^ (word >> 27)) * 0x94D049BB133111EBull;
  return word ^ (word >> 31);
}

// Natural logarithm of positive normal numbers, good to about 1e-13: the series of the inverse hyperbolic tangent.
inline doubles logarithm(doubles x) {
  longs bits = bits_as<longs>(x);
  longs shifted = bits - 0x3fe6a09e667f3bcdll;  // the bits of sqrt(1/2)
  doubles exponent = numbers_as<doubles>(shifted >> 52);
  doubles m = bits_as<doubles>(bits - (shifted & (int64_t)(0xfffull << 52)));
  doubles s = (m - 1.0) / (m + 1.0), z = s * s;
  doubles p = splat(1.0 / 15);
  p = p * z + 1.0 / 13;
  p = p * z + 1.0 / 11;
  p = p * z + 1.0 / 9;
  p = p * z + 1.0 / 7;
  p = p * z + 1.0 / 5;
  p = p * z + 1.0 / 3;
  p = p * z + 1.0;
  return exponent * 0.69314718055994530942 + 2.0 * s * p;
}

inline double uniform(uint64_t key, long token) {
  uint64_t word = mixed(key + (uint64_t)(token + 1) * GOLDEN);
  return ((double)(word >> 11) + 0.5) * 0x1p-53;
}

struct Best {
  double score = -__builtin_inf();
  long token = 0;
};

// Of the scores x[count] of the tokens from `first` on the Gumbel maximum; total[count]: memory to work in.
Best draw(const float* x, long first, long count, uint64_t key, double* total) {
  doubles peak = splat(-__builtin_inf());
  uint64_t starts[8];
  for (int lane = 0; lane < 8; lane++) starts[lane] = key + (uint64_t)(first + lane + 1) * GOLDEN;
  hashes words = load<hashes>(starts);
  long i = 0;
  for (; i + 8 <= count; i += 8, words = words + 8 * GOLDEN) {
    doubles u = (numbers_as<doubles>(bits_as<longs>(mixed(words) >> 11)) + 0.5) * 0x1p-53;
    doubles noise = -logarithm(-logarithm(u));
    doubles value = Widened<doubles>::from(x + i) + noise;
    store(total + i, value);
    peak = maximum(value, peak);
  }
  double peaks[8], most = -__builtin_inf();
  store(peaks, peak);
  for (int lane = 0; lane < 8; lane++) most = peaks[lane] > most ? peaks[lane] : most;
  for (; i < count; i++) {
    total[i] = x[i] - log(-log(uniform(key, first + i)));
    most = total[i] > most ? total[i] : most;
  }
  Best best{-__builtin_inf(), first};
  for (i = 0; i < count && most > -__builtin_inf(); i++)
    if (total[i] >= most - MARGIN) {
      double exact = x[i] - log(-log(uniform(key, first + i)));
      if (exact > best.score) best = {exact, first + i};
    }
  return best;
}

// The first of the highest of x[size]; whether some are NaN.
Best highest(const float* x, long size, bool& has_nan) {
  floats peak = splat(-__builtin_inff());
  ints nan{};
  long i = 0;
  for (; i + LANES <= size; i += LANES) {
    floats v = load<floats>(x + i);
    nan = nan | (v != v);
    peak = maximum(v, peak);
  }
  float most = maximum(peak);
  has_nan = any(nan);
  for (; i < size; i++) {
    has_nan |= x[i] != x[i];
    most = x[i] > most ? x[i] : most;
  }
  long at = 0;
  while (at + LANES <= size && !any(load<floats>(x + at) == splat(most))) at += LANES;
  while (at < size - 1 && x[at] != most) at++;
  return {most, at};
}

void choose(Context& context, const float* scores, long num_rows, long size, const uint64_t* keys, const uint8_t* draws, int64_t* choices) {
  struct Found {
    Best most_likely, drawn;
    bool has_nan;
  };
  long num_segments = divide_up(size, SEGMENT);
  bool any_drawn = false;
  for (long row = 0; row < num_rows; row++) any_drawn |= draws[row];
  std::vector<Found> found(num_rows * num_segments);
  std::vector<double> totals(any_drawn ? (size_t)context.pool.size() * (SEGMENT + 8) : 0);
  context.pool.run(num_rows * num_segments, [&](long task, int thread) {
    long row = task / num_segments, first = task % num_segments * SEGMENT;
    long count = size - first < SEGMENT ? size - first : SEGMENT;
    const float* x = scores + row * size + first;
    Found& of = found[task];
    of.most_likely = highest(x, count, of.has_nan);
    of.most_likely.token += first;
    if (draws[row]) of.drawn = draw(x, first, count, keys[row], totals.data() + (size_t)thread * (SEGMENT + 8));
  });
  for (long row = 0; row < num_rows; row++) {
    Found best = found[row * num_segments];
    for (long s = 1; s < num_segments; s++) {
      const Found& of = found[row * num_segments + s];
      best.has_nan |= of.has_nan;
      if (of.most_likely.score > best.most_likely.score) best.most_likely = of.most_likely;
      if (of.drawn.score > best.drawn.score) best.drawn = of.drawn;
    }
    bool infinite = isinf(best.most_likely.score);
    choices[row] = draws[row] ? best.drawn.token : best.most_likely.token;
    choices[num_rows + row] = best.has_nan;
    choices[2 * num_rows + row] = !infinite ? 0 : best.most_likely.score > 0 ? 1 : -1;
  }
}

constexpr int BUCKETS_PER_NAT = 64;
constexpr int NUM_BUCKETS = 87 * BUCKETS_PER_NAT + 1;  // what is further below the highest has no probability in float32

inline floats lanes_from(const float* x, long first, long size) {
  if (first + LANES <= size) return load<floats>(x + first);
  float lanes[LANES];
  for (int lane = 0; lane < LANES; lane++) lanes[lane] = first + lane < size ? x[first + lane] : -__builtin_inff();
  return load<floats>(lanes);
}

// Which bucket scores are in: 0 holds the highest.
inline ints bucket_of(floats v, float highest) {
  floats steps = (splat(highest) - v) * splat((float)BUCKETS_PER_NAT);
  return numbers_as<ints>(select(steps < splat((float)(NUM_BUCKETS - 1)), steps, splat((float)(NUM_BUCKETS - 1))));
}

struct Candidate {
  float score, weight;
  long token;
  bool operator<(const Candidate& other) const { return score != other.score ? score < other.score : token < other.token; }
};

// What one thread works in; made beforehand, since no exception may leave a thread.
struct Sorting {
  explicit Sorting(long size) : masses(NUM_BUCKETS) { candidates.reserve(size); }
  std::vector<double> masses;  // of the buckets
  std::vector<Candidate> candidates;
};

// kept[size] = x, with minus infinity for whatever p leaves out: from the lowest score on, the first token first where some
// are equal, all whose probability together is at most 1 - p, but never the last. Rows without a sum stay as they are.
//
// Only one bucket of scores has to be sorted: the others are in or out as a whole.
void keep_top_p(const float* x, long size, float p, float* kept, Sorting& work) {
  memcpy(kept, x, size * sizeof(float));
  floats peak = splat(-__builtin_inff());
  ints nan{};
  for (long i = 0; i < size; i += LANES) {
    floats v = lanes_from(x, i, size);
    nan = nan | (v != v);
    peak = maximum(v, peak);
  }
  float highest = maximum(peak);
  if (any(nan) || !isfinite(highest)) return;
  auto& [masses, candidates] = work;
  std::fill(masses.begin(), masses.end(), 0.0);
  candidates.clear();
  float weights[LANES];
  int32_t buckets[LANES];
  auto weigh = [&](long first) {
    floats v = lanes_from(x, first, size);
    store(weights, exponential(v - splat(highest)));
    store(buckets, bucket_of(v, highest));
  };
  for (long i = 0; i < size; i += LANES) {
    weigh(i);
    for (int lane = 0; lane < LANES; lane++) masses[buckets[lane]] += weights[lane];
  }
  double total = 0, below = 0;
  for (int bucket = NUM_BUCKETS - 1; bucket >= 0; bucket--) total += masses[bucket];
  const double limit = (double)(1.0f - p) * total;
  int border = NUM_BUCKETS - 1;
  for (; border > 0 && below + masses[border] <= limit; border--) below += masses[border];
  for (long i = 0; i < size; i += LANES) {
    weigh(i);
    for (int lane = 0; lane < LANES && i + lane < size; lane++) {
      if (buckets[lane] > border) kept[i + lane] = -__builtin_inff();
      if (buckets[lane] == border) candidates.push_back({x[i + lane], weights[lane], i + lane});
    }
  }
  std::sort(candidates.begin(), candidates.end());
  long num_others = border ? (long)candidates.size() : (long)candidates.size() - 1;
  for (long c = 0; c < num_others; c++) {
    below += candidates[c].weight;
    if (below > limit) break;
    kept[candidates[c].token] = -__builtin_inff();
  }
}

}  // namespace

extern "C" {

// For each row of scores [num_rows][size] the token whose score plus the noise of (keys[row], token) is highest where
// draws[row], else the first of the highest scores. choices[3][num_rows]: the tokens, whether some scores are NaN, and 1 or
// -1 where the highest is plus or minus infinity.
int reprise_choose(Context* context, const float* scores, int64_t num_rows, int64_t size, const uint64_t* keys,
                   const uint8_t* draws, int64_t* choices) {
  return guarded([&] { choose(*context, scores, num_rows, size, keys, draws, choices); });
}

// kept[num_rows][size]: scores with minus infinity for what p[row] leaves out.
int reprise_keep_top_p(Context* context, const float* scores, int64_t num_rows, int64_t size, const float* p, float* kept) {
  return guarded([&] {
    std::vector<Sorting> work(context->pool.size(), Sorting(size));
    context->pool.run(num_rows, [&](long row, int thread) {
      keep_top_p(scores + row * size, size, p[row], kept + row * size, work[thread]);
    });
  });
}

}  // extern "C"
