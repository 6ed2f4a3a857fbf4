// Choosing tokens from scores: what temperature, top_k, top_p and min_p make of them, and of that the most likely token or
// the Gumbel maximum under the noise of noise.py.

#include <math.h>

#include <algorithm>

#include "context.h"
#include "vectors.h"

extern "C" {
// What becomes of a row of scores, in this order.
struct Warp {
  float temperature;  // 1 for none
  int32_t top_k;      // 0 for all
  float top_p;        // 1 for all
  float min_p;        // 0 for all
};
}

namespace {

constexpr long SEGMENT = 16384;      // token ids that one task looks at
constexpr float LEAST = 0x1p-55f;    // less than `uniform` leaves of one
constexpr int64_t MOST_DRAWN = (1ll << 53) - 2;  // one more would be rounded to a number of 1, which is none
constexpr double MARGIN = 1e-7;      // far above the error of `logarithm`, so that the winner is among those recomputed

typedef Vector<double, 8>::type doubles;
typedef Vector<int64_t, 8>::type longs;
typedef Vector<uint64_t, 8>::type hashes;

using ::any;
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

#if defined(__AVX512F__)
inline bool any(longs mask) { return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask); }
#else
inline bool any(longs mask) {
  int64_t lanes[8], found = 0;
  store(lanes, mask);
  for (int lane = 0; lane < 8; lane++) found |= lanes[lane];
  return found != 0;
}
#endif

inline double uniform(uint64_t key, long token) {
  int64_t drawn = (int64_t)(mixed(key + (uint64_t)(token + 1) * GOLDEN) >> 11);
  return ((double)(drawn > MOST_DRAWN ? MOST_DRAWN : drawn) + 0.5) * 0x1p-53;
}

struct Best {
  double score = -__builtin_inf();
  long token = 0;
};

// Of the scores x[count] of the tokens from `first` on the Gumbel maximum.
//
// Few tokens can win, so few logarithms are computed. With B the best so far, a token of score s wins where -log(-log u) >=
// B - s, so where -log u <= exp(s - B); and 1 - u <= -log u.
Best draw(const float* x, long first, long count, uint64_t key) {
  Best best;
  double most = -__builtin_inf();  // the best so far, but for the error of `logarithm`
  floats lowered = splat(-__builtin_inff());
  auto judge = [&](double value, long i) {
    if (!(value >= most - MARGIN)) return;
    if (value > most) {
      most = value;
      lowered = splat((float)(most - 1e-3 - 1e-6 * fabs(most)));  // more than the rounding of what it is compared with
    }
    double exact = x[i] - log(-log(uniform(key, first + i)));
    if (exact > best.score) best = {exact, first + i};
  };
  uint64_t starts[8];
  for (int lane = 0; lane < 8; lane++) starts[lane] = key + (uint64_t)(first + lane + 1) * GOLDEN;
  hashes words = load<hashes>(starts);
  long i = 0;
  for (; i + LANES <= count; i += LANES, words = words + LANES * GOLDEN) {
    floats v = load<floats>(x + i);
    if (!any(v > splat(-__builtin_inff()))) continue;
    bool has_best = most > -__builtin_inf();
    floats most_left = exponential(v - lowered);
    if (has_best && !any(~(most_left < splat(LEAST)))) continue;
    float limits[LANES];
    store(limits, most_left);
    for (int half = 0; half < LANES; half += 8) {
      longs drawn = bits_as<longs>(mixed(words + half * GOLDEN) >> 11);
      drawn = drawn + (drawn > MOST_DRAWN);
      // Half a step more for what `uniform` rounds up.
      doubles left_of_one = (numbers_as<doubles>((int64_t)(1ull << 53) - drawn) - 1.0) * 0x1p-53;
      if (has_best && !any(~(Widened<doubles>::from(limits + half) < left_of_one))) continue;
      doubles u = (numbers_as<doubles>(drawn) + 0.5) * 0x1p-53;
      double values[8];
      store(values, Widened<doubles>::from(x + i + half) - logarithm(-logarithm(u)));
      for (int lane = 0; lane < 8; lane++) judge(values[lane], i + half + lane);
    }
  }
  for (; i < count; i++) judge(x[i] - log(-log(uniform(key, first + i))), i);
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
  std::vector<Found> found(num_rows * num_segments);
  context.pool.run(num_rows * num_segments, [&](long task, int) {
    long row = task / num_segments, first = task % num_segments * SEGMENT;
    long count = size - first < SEGMENT ? size - first : SEGMENT;
    const float* x = scores + row * size + first;
    Found& of = found[task];
    of.most_likely = highest(x, count, of.has_nan);
    of.most_likely.token += first;
    if (draws[row]) of.drawn = draw(x, first, count, keys[row]);
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

// Which bucket scores are in that are so far below the highest: 0 holds it.
inline ints bucket_of(floats below) {
  floats steps = below * splat((float)BUCKETS_PER_NAT);
  return numbers_as<ints>(select(steps < splat((float)(NUM_BUCKETS - 1)), steps, splat((float)(NUM_BUCKETS - 1))));
}

// So far below the highest are the scores that are looked at one by one for a border: the nearest that do.
constexpr float EVERYTHING = __builtin_inff();
constexpr float REACHES[] = {0.5f, 1, 2, 4, 8, 16, EVERYTHING};
constexpr int NUM_REACHES = sizeof REACHES / sizeof *REACHES;

struct Candidate {
  float score, weight;
  long token;
  bool operator<(const Candidate& other) const { return score != other.score ? score < other.score : token < other.token; }
};

// What one thread works in; made beforehand, since no exception may leave a thread.
struct Sorting {
  explicit Sorting(long size) : masses(size ? NUM_BUCKETS : 0) { candidates.reserve(size); }
  std::vector<double> masses;  // of the buckets
  std::vector<Candidate> candidates;
};

// A row of scores [size] whose low ones are removed, which is to become minus infinity. Its highest is a number.
struct Row {
  float* scores;
  long size;
  float highest;
  Sorting& work;

  // All comparisons are of this distance, which large scores round.
  floats below(floats v) const { return splat(highest) - v; }
  floats weights(floats v) const { return exponential(-below(v)); }

  // Calls f(token, score, weight, bucket) for all scores that are `reach` below the highest at most.
  template <class F> void visit(float reach, const F& f) const {
    float values[LANES], of_each[LANES];
    int32_t buckets[LANES];
    for (long i = 0; i < size; i += LANES) {
      floats v = lanes_from(scores, i, size);
      unsigned near = bits_of(below(v) <= splat(reach));
      if (size - i < LANES) near &= (1u << (size - i)) - 1;
      if (!near) continue;
      store(values, v);
      store(of_each, weights(v));
      store(buckets, bucket_of(below(v)));
      for (; near; near &= near - 1) {
        int lane = __builtin_ctz(near);
        f(i + lane, values[lane], of_each[lane], buckets[lane]);
      }
    }
  }
  // Removes all scores of which of(scores) is true.
  template <class F> void remove(const F& of) const {
    for (long i = 0; i < size; i += LANES) {
      floats v = lanes_from(scores, i, size);
      v = select(of(v), splat(-__builtin_inff()), v);
      if (i + LANES <= size) {
        store(scores + i, v);
      } else {
        float lanes[LANES];
        store(lanes, v);
        memcpy(scores + i, lanes, (size - i) * sizeof(float));
      }
    }
  }

  // All that are below the k-th of the highest.
  void keep_top_k(long k) const {
    if (k >= size) return;
    ints within[NUM_REACHES] = {};
    for (long i = 0; i < size; i += LANES) {
      floats distance = below(lanes_from(scores, i, size));
      for (int r = 0; r + 1 < NUM_REACHES; r++) within[r] = within[r] - (distance <= splat(REACHES[r]));
    }
    int r = 0;
    while (r + 1 < NUM_REACHES && sum(within[r]) < k) r++;
    auto& candidates = work.candidates;
    candidates.clear();
    visit(REACHES[r], [&](long token, float score, float, int) { candidates.push_back({score, 0, token}); });
    auto last = candidates.end() - k;
    std::nth_element(candidates.begin(), last, candidates.end());
    const floats threshold = splat(last->score);
    remove([&](floats v) { return v < threshold; });
  }

  // Whatever p leaves out: from the lowest score on, the first token first where some are equal, all whose probability
  // together is at most 1 - p, but never the last. Only one bucket of scores has to be sorted: the others are in or out as a
  // whole.
  void keep_top_p(float p) const {
    auto& [masses, candidates] = work;
    floats all{}, beyond[NUM_REACHES] = {};
    for (long i = 0; i < size; i += LANES) {
      floats distance = below(lanes_from(scores, i, size)), weight = exponential(-distance);
      all = all + weight;
      for (int r = 0; r + 1 < NUM_REACHES; r++) beyond[r] = beyond[r] + select(distance <= splat(REACHES[r]), floats{}, weight);
    }
    int r = 0;
    while (sum(beyond[r]) > (1 - p) * sum(all)) r++;
    const float reach = REACHES[r];
    const int num_buckets = reach < EVERYTHING ? (int)(reach * BUCKETS_PER_NAT) + 1 : NUM_BUCKETS;
    std::fill(masses.begin(), masses.begin() + num_buckets, 0.0);
    visit(reach, [&](long, float, float weight, int bucket) { masses[bucket] += weight; });
    double left_out = sum(beyond[r]), total = left_out;
    for (int bucket = num_buckets - 1; bucket >= 0; bucket--) total += masses[bucket];
    const double limit = (double)(1.0f - p) * total;
    int border = num_buckets - 1;
    for (; border > 0 && left_out + masses[border] <= limit; border--) left_out += masses[border];
    candidates.clear();
    visit(reach, [&](long token, float score, float weight, int bucket) {
      if (bucket == border) candidates.push_back({score, weight, token});
      if (bucket > border) scores[token] = -__builtin_inff();
    });
    remove([&](floats v) { return below(v) > splat(reach); });
    std::sort(candidates.begin(), candidates.end());
    long num_others = border ? (long)candidates.size() : (long)candidates.size() - 1;
    for (long c = 0; c < num_others; c++) {
      left_out += candidates[c].weight;
      if (left_out > limit) break;
      scores[candidates[c].token] = -__builtin_inff();
    }
  }

  // All that have less than `ratio` of the probability of the highest.
  void keep_min_p(float ratio) const {
    const floats least = splat(ratio < 1 ? ratio : 1);
    remove([&](floats v) { return weights(v) < least; });
  }
};

// kept[size]: x divided by the temperature, without what the rest leaves out. Rows without a sum stay as they are.
void warp(const float* x, long size, const Warp& warp, float* kept, Sorting& work) {
  floats peak = splat(-__builtin_inff());
  ints nan{};
  const floats temperature = splat(warp.temperature);
  long i = 0;
  for (; i + LANES <= size; i += LANES) {
    floats v = load<floats>(x + i) / temperature;
    nan = nan | (v != v);
    peak = maximum(v, peak);
    store(kept + i, v);
  }
  float highest = maximum(peak);
  bool has_nan = any(nan);
  for (; i < size; i++) {
    kept[i] = x[i] / warp.temperature;
    has_nan |= kept[i] != kept[i];
    highest = kept[i] > highest ? kept[i] : highest;
  }
  if (has_nan || !isfinite(highest)) {
    memcpy(kept, x, size * sizeof(float));
    return;
  }
  Row row{kept, size, highest, work};
  if (warp.top_k > 0) row.keep_top_k(warp.top_k);
  if (warp.top_p < 1) row.keep_top_p(warp.top_p);
  if (warp.min_p > 0) row.keep_min_p(warp.min_p);
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

// kept[num_rows][size]: scores as rows[row] has it.
int reprise_warp(Context* context, const float* scores, int64_t num_rows, int64_t size, const Warp* rows, float* kept) {
  return guarded([&] {
    bool sorts = std::any_of(rows, rows + num_rows, [](const Warp& row) { return row.top_k > 0 || row.top_p < 1; });
    std::vector<Sorting> work;  // not filled with copies, which would have reserved nothing
    work.reserve(context->pool.size());
    for (int thread = 0; thread < context->pool.size(); thread++) work.emplace_back(sorts ? size : 0);
    context->pool.run(num_rows, [&](long row, int thread) {
      warp(scores + row * size, size, rows[row], kept + row * size, work[thread]);
    });
  });
}

}  // extern "C"
