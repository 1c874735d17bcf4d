// Rows against candidates in blocks that stay in cache: what a thread has in hand, its scores,
// their exponentials, and what these pull at both sides. Where there is room the exponentials of all
// blocks are kept until their rows' sums are known; else they are made again.
//
// Shape letters: B queries, C candidates, D dimension. All matrices lie row by row without gaps.
// Each thread has a share of the rows, and a gradient of the candidates of its own, which are added
// up in the order of the threads: results depend on their number, not on chance.
#pragma once

#include "product.h"

namespace {

const float NONE = -INFINITY;
// Most rows that a thread has in hand, and fewest for which their exponentials are kept: all that is
// read of the candidates is read again for the next ones.
const int64_t MOST_ROWS = 96, FEWEST_ROWS = 24;
// Most candidates of a block: it stays in the second-level cache between what is done to it.
const int64_t MOST_COLUMNS = 512;
// Floats of a slice of candidates, with all that is kept of it.
const int64_t SLICE = 1 << 24;

inline float share(float part, float whole) {
  return part == NONE || whole == NONE ? 0.f : expf(part - whole);
}

struct Problem {
  int64_t rows, candidates, dim;
  const float *queries, *vectors, *log_weights;
  const int64_t *masked_rows, *masked_columns; // rows rising
  int64_t masked, first = 0;                   // of the candidates, among those that columns count

  Problem slice(int64_t from, int64_t to) const {
    Problem part = *this;
    part.candidates = to - from, part.first = from;
    part.vectors += from * dim, part.log_weights += from;
    return part;
  }
};

// How a problem is cut, and where each piece of a buffer begins, in floats.
struct Plan {
  bool kept; // the exponentials of whole rows
  int64_t threads, height, width, blocks, held, columns, dims, line; // held: blocks that have room
  int64_t panels, vectors, weights, own, queries, pulled, moved, logits, shifts, gradient, room;

  // floats: that a thread may keep. keep: whole rows of exponentials, if they fit.
  Plan(const Problem &p, int64_t wanted, int64_t floats, bool backward, bool keep) {
    dims = up(p.dim > 1 ? p.dim : 1, LANES);
    columns = up(p.candidates, PANEL);
    int64_t groups = (p.rows + TALL - 1) / TALL;
    threads = wanted < groups ? wanted : groups;
    if (threads < 1) threads = 1;
    int64_t most = least(up(floats / MOST_ROWS, PANEL), MOST_COLUMNS);
    most = least(most, SLICE / (dims * (threads + 2)) / PANEL * PANEL);
    if (most < PANEL) most = PANEL;
    blocks = (columns + most - 1) / most;
    width = up((columns + blocks - 1) / blocks, PANEL);
    blocks = (columns + width - 1) / width;
    // A row of logits ends aside of a power of two: rows of 4 KiB would share one set of the cache.
    line = width + 16;
    height = floats / (blocks * line) / TALL * TALL;
    kept = keep && height >= FEWEST_ROWS && columns * dims * (threads + 2) <= 4 * SLICE;
    if (!kept || height > MOST_ROWS) height = MOST_ROWS;
    held = kept ? blocks : 1;
    int64_t at = 0;
    auto take = [&at](int64_t size) {
      int64_t start = at;
      at += up(size, 16);
      return start;
    };
    panels = take(columns * p.dim);
    weights = take(columns);
    vectors = take(backward ? columns * dims : 0);
    int64_t shared = at;
    at = 0;
    queries = take(height * p.dim);
    logits = take(held * height * line);
    shifts = take(kept ? blocks * height : 0);
    pulled = take(backward ? height * dims : 0);
    moved = take(backward ? height * dims : 0);
    gradient = take(backward ? (columns + LOW) * dims : 0);
    own = at;
    room = shared + threads * own;
    queries += shared, logits += shared, shifts += shared;
    pulled += shared, moved += shared, gradient += shared;
  }
};

inline void pack(const Problem &p, const Plan &plan, float *buffer, bool backward) {
  float *weights = buffer + plan.weights;
#pragma omp parallel for num_threads(plan.threads) schedule(static)
  for (int64_t first = 0; first < plan.columns; first += PANEL) {
    pack_panel(p.vectors, p.candidates, p.dim, first, buffer + plan.panels + first * p.dim);
    for (int64_t c = first; c < first + PANEL; c++) {
      bool real = c < p.candidates;
      weights[c] = real ? p.log_weights[c] : NONE;
      if (!backward) continue;
      const float *from = p.vectors + c * p.dim;
      float *to = buffer + plan.vectors + c * plan.dims;
      for (int64_t k = 0; k < plan.dims; k++) to[k] = real && k < p.dim ? from[k] : 0.f;
    }
  }
}

// Candidates of a slice: all, where a thread can keep whole rows of exponentials.
inline int64_t slice_of(const Problem &p, int64_t threads, int64_t floats) {
  Plan plan(p, threads, floats, true, true);
  if (plan.kept) return p.candidates;
  int64_t most = SLICE / (plan.dims * (plan.threads + 2)) / plan.width * plan.width;
  return least(p.candidates, most > plan.width ? most : plan.width);
}

// One thread's view of the rows that it has in hand.
struct Rows {
  const Problem &p;
  const Plan &plan;
  float *buffer, *queries, *logits, *shifts, *pulled, *moved, *gradient;
  int64_t top, count, padded, mask_from, mask_to;

  Rows(const Problem &p, const Plan &plan, float *buffer, int64_t thread)
      : p(p), plan(plan), buffer(buffer) {
    float *own = buffer + thread * plan.own;
    queries = own + plan.queries, logits = own + plan.logits, shifts = own + plan.shifts;
    pulled = own + plan.pulled, moved = own + plan.moved, gradient = own + plan.gradient;
  }

  void take(int64_t from, int64_t number) {
    top = from, count = number, padded = take_rows(p.queries, top, count, p.dim, queries);
    mask_from = count_below(p.masked_rows, p.masked, top);
    mask_to = count_below(p.masked_rows, p.masked, top + count);
  }

  int64_t width_of(int64_t block) const {
    return least(plan.width, plan.columns - block * plan.width);
  }

  // What is kept of a block, from a row on.
  float *of(int64_t block, int64_t row = 0) const {
    return logits + ((plan.kept ? block * plan.height : 0) + row) * plan.line;
  }

  // Logits with their log-weights; -inf where a pair is masked.
  void score(int64_t block_number) {
    int64_t left = block_number * plan.width, width = width_of(block_number);
    const float *panels = buffer + plan.panels + left * p.dim;
    multiply(queries, padded, p.dim, panels, width, of(block_number), plan.line);
    const float *weights = buffer + plan.weights + left;
    for (int64_t i = 0; i < count; i++) {
      float *row = of(block_number, i);
      for (int64_t j = 0; j < width; j += LANES) store(row + j, load(row + j) + load(weights + j));
    }
    for (int64_t at = mask_from; at < mask_to; at++) {
      int64_t column = p.masked_columns[at] - p.first - left;
      if (column >= 0 && column < width) of(block_number, p.masked_rows[at] - top)[column] = NONE;
    }
  }

  float top_of(int64_t block, int64_t row) const {
    const float *at = of(block, row);
    vec best = all(NONE);
    for (int64_t j = 0; j < width_of(block); j += LANES) {
      vec x = load(at + j);
      best = x > best ? x : best;
    }
    return highest(best);
  }

  // Logits become exp(logit - shift); their sum.
  float raise(int64_t block, int64_t row, float shift) {
    float *at = of(block, row);
    vec sum = {};
    for (int64_t j = 0; j < width_of(block); j += LANES) {
      vec e = exponential(load(at + j) - shift);
      store(at + j, e);
      sum += e;
    }
    return total(sum);
  }

  // Largest logit and sum of exponentials beside it of each row, brought up to date with these
  // candidates.
  void sum_up(float *shift, float *sum) {
    for (int64_t b = 0; b < plan.blocks; b++) {
      score(b);
      for (int64_t i = 0; i < count; i++) {
        float best = top_of(b, i), before = shift[i];
        if (best > before) {
          shift[i] = best;
          sum[i] = before > NONE ? sum[i] * expf(before - best) : 0.f;
        }
        sum[i] += raise(b, i, shift[i] > NONE ? shift[i] : 0.f);
        if (plan.kept) shifts[b * plan.height + i] = shift[i];
      }
    }
  }

  // Kept exponentials of a block, which are beside the largest logit up to there, beside their row's.
  void settle(int64_t block, const float *shift) {
    for (int64_t i = 0; i < count; i++) {
      float before = shifts[block * plan.height + i];
      if (before == shift[i]) continue;
      float *at = of(block, i), factor = share(before, shift[i]);
      for (int64_t j = 0; j < width_of(block); j += LANES) store(at + j, load(at + j) * factor);
    }
  }

  void begin_gradients(const float *scale) {
    memset(moved, 0, sizeof(float) * padded * plan.dims);
    memset(pulled, 0, sizeof(float) * padded * plan.dims);
    for (int64_t i = 0; i < count; i++)
      for (int64_t k = 0; k < p.dim; k++) pulled[i * plan.dims + k] = queries[i * p.dim + k] * scale[i];
  }

  // What the exponentials of a block pull at both sides.
  void pull(int64_t block_number) {
    int64_t left = block_number * plan.width, width = width_of(block_number), dims = plan.dims;
    const float *vectors = buffer + plan.vectors + left * dims, *from = of(block_number);
    // So many candidates stay in the first-level cache while all rows meet them.
    const int64_t some = 8192 / dims > 16 ? 8192 / dims : 16;
    for (int64_t k = 0; k < width; k += some)
      for (int64_t i = 0; i < padded; i += LOW)
        add_rows(from + i * plan.line + k, plan.line, 1, vectors + k * dims, dims,
                 least(some, width - k), moved + i * dims);
    for (int64_t c = 0; c < width; c += LOW)
      add_rows(from + c, 1, plan.line, pulled, dims, padded, gradient + (left + c) * dims);
  }

  void end_gradients(const float *scale, float *grad_queries) {
    for (int64_t i = 0; i < count; i++)
      for (int64_t k = 0; k < p.dim; k++) {
        float &into = grad_queries[(top + i) * p.dim + k], more = moved[i * plan.dims + k] * scale[i];
        into = p.first ? into + more : more;
      }
  }
};

// Rows of a thread, in whole groups of TALL.
inline int64_t edge(const Problem &p, const Plan &plan, int64_t thread) {
  int64_t groups = (p.rows + TALL - 1) / TALL;
  return least(groups * thread / plan.threads * TALL, p.rows);
}

inline void add_up(const Problem &p, const Plan &plan, const float *buffer, float *grad_candidates) {
#pragma omp parallel for num_threads(plan.threads) schedule(static)
  for (int64_t c = 0; c < p.candidates; c++)
    for (int64_t k = 0; k < p.dim; k++) {
      float sum = 0;
      for (int64_t t = 0; t < plan.threads; t++)
        sum += buffer[t * plan.own + plan.gradient + c * plan.dims + k];
      grad_candidates[c * p.dim + k] = sum;
    }
}

// Packs the candidates, and gives each thread its rows, some at a time: body(rows, thread).
template <class Body>
void each_rows(const Problem &p, const Plan &plan, float *buffer, bool backward, Body body) {
  pack(p, plan, buffer, backward);
#pragma omp parallel for num_threads(plan.threads) schedule(static, 1)
  for (int64_t t = 0; t < plan.threads; t++) {
    Rows mine(p, plan, buffer, t);
    if (backward) {
      memset(mine.gradient, 0, sizeof(float) * (plan.columns + LOW) * plan.dims);
      // What is beside a block is multiplied too.
      for (int64_t i = 0; i < plan.held * plan.height; i++)
        memset(mine.logits + i * plan.line + plan.width, 0, sizeof(float) * (plan.line - plan.width));
    }
    int64_t end = edge(p, plan, t + 1);
    for (int64_t top = edge(p, plan, t); top < end; top += plan.height) {
      mine.take(top, least(plan.height, end - top));
      body(mine, t);
    }
  }
}

inline float logarithm(float shift, float sum) { return sum > 0 ? shift + logf(sum) : (sum == 0 ? NONE : sum); }

} // namespace
