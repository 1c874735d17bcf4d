// Masked, weighted log-sum-exp of queries against candidates, and the contrastive loss over it,
// with gradients: what kernels/tiled.py and kernels/fused.py compute.
//
// Shape letters: B queries, C candidates, D dimension. Candidates of which a thread cannot keep
// whole rows of logits come a slice at a time, so that memory beside arguments and gradients stays
// bounded whatever C is.

#include "rows.h"

namespace {

float log_of_both(float a, float b) {
  if (a == NONE || b == NONE) return a == NONE ? b : a;
  float high = a > b ? a : b, low = a > b ? b : a;
  return high + log1pf(expf(low - high));
}

// shift, sum: [B] of what came before.
void sum_slice(const Problem &p, const Plan &plan, float *buffer, float *shift, float *sum) {
  each_rows(p, plan, buffer, false,
            [=](Rows &mine, int64_t) { mine.sum_up(shift + mine.top, sum + mine.top); });
}

// Gradients of what has ``slope`` by the log-sum-exps ``result``. grad_weights: [threads, stride]
// of partial sums from the slice's first candidate on, or null.
void pull_slice(const Problem &p, const Plan &plan, float *buffer, const float *result,
                const float *slope, float *grad_queries, float *grad_candidates,
                float *grad_weights, int64_t stride) {
  each_rows(p, plan, buffer, true, [&](Rows &mine, int64_t thread) {
    const float *own_slope = slope + mine.top;
    mine.begin_gradients(own_slope);
    for (int64_t b = 0; b < plan.blocks; b++) {
      int64_t width = mine.width_of(b);
      mine.score(b);
      for (int64_t i = 0; i < mine.count; i++) {
        float whole = result[mine.top + i];
        mine.raise(b, i, whole == NONE ? 0.f : whole);
        if (!grad_weights) continue;
        float *into = grad_weights + thread * stride + b * plan.width;
        const float *from = mine.of(b, i);
        for (int64_t j = 0; j < least(width, p.candidates - b * plan.width); j++)
          into[j] += own_slope[i] * from[j];
      }
      mine.pull(b);
    }
    mine.end_gradients(own_slope, grad_queries);
  });
  add_up(p, plan, buffer, grad_candidates);
}

// What a row's loss is made of, beside its log-partition.
struct Losses {
  const float *positives, *row_weights, *own;
  float power;
  float *losses, *grad_positives, *grad_own;

  // Loss and gradients of row r. whole: log-partition of the shared candidates, to which the row's
  // own is added. Gives the slope by the whole, weighted.
  float row(int64_t r, float &whole) const {
    if (own) whole = log_of_both(whole, own[r]);
    float slope, pull;
    if (power == power) {
      losses[r] = (whole == NONE ? 0.f : power * whole) - positives[r];
      slope = -1.f, pull = whole == NONE ? 0.f : power;
    } else {
      losses[r] = log_of_both(positives[r], whole) - positives[r];
      pull = 1.f / (1.f + expf(positives[r] - whole));
      slope = -pull;
    }
    grad_positives[r] = slope * row_weights[r];
    pull *= row_weights[r];
    if (own) grad_own[r] = pull * share(own[r], whole);
    return pull;
  }
};

// All in one pass over the rows, whose exponentials stay where they are.
void contrast(const Problem &p, const Plan &plan, float *buffer, const Losses &each,
              float *grad_queries, float *grad_candidates) {
  each_rows(p, plan, buffer, true, [&](Rows &mine, int64_t) {
    float shift[MOST_ROWS], sum[MOST_ROWS], scale[MOST_ROWS];
    for (int64_t i = 0; i < mine.count; i++) shift[i] = NONE, sum[i] = 0;
    mine.sum_up(shift, sum);
    for (int64_t i = 0; i < mine.count; i++) {
      float whole = logarithm(shift[i], sum[i]);
      scale[i] = each.row(mine.top + i, whole);
      // Exponentials are relative to their row's largest.
      scale[i] *= share(shift[i], whole);
    }
    mine.begin_gradients(scale);
    for (int64_t b = 0; b < plan.blocks; b++) {
      mine.settle(b, shift);
      mine.pull(b);
    }
    mine.end_gradients(scale, grad_queries);
  });
  add_up(p, plan, buffer, grad_candidates);
}

} // namespace

extern "C" {

// Floats that ``buffer`` must hold. floats: of exponentials that a thread may keep.
int64_t recclr_room(int64_t rows, int64_t candidates, int64_t dim, int64_t threads, int64_t floats,
                    int32_t backward) {
  Problem p = {rows, candidates, dim, 0, 0, 0, 0, 0, 0};
  int64_t step = slice_of(p, threads, floats), left = step ? candidates % step : 0;
  int64_t room = Plan(p.slice(0, step), threads, floats, backward, false).room;
  // The last slice has fewer candidates, but may be cut in wider blocks.
  int64_t last = left ? Plan(p.slice(0, left), threads, floats, backward, false).room : 0;
  int64_t whole = backward && step == candidates ? Plan(p, threads, floats, true, true).room : 0;
  if (last > room) room = last;
  return 2 * up(rows, 16) + (whole > room ? whole : room);
}

// result[B]: as kernels.masked_logsumexp_reference.
void recclr_logsumexp(int64_t rows, int64_t candidates, int64_t dim, const float *queries,
                      const float *vectors, const float *log_weights, const int64_t *masked_rows,
                      const int64_t *masked_columns, int64_t masked, int64_t threads,
                      int64_t floats, float *buffer, float *result) {
  Problem p = {rows, candidates, dim, queries, vectors, log_weights, masked_rows, masked_columns, masked};
  float *shift = buffer, *sum = buffer + up(rows, 16), *room = sum + up(rows, 16);
  for (int64_t r = 0; r < rows; r++) shift[r] = NONE, sum[r] = 0;
  int64_t step = slice_of(p, threads, floats);
  for (int64_t from = 0; from < candidates; from += step) {
    Problem part = p.slice(from, least(from + step, candidates));
    sum_slice(part, Plan(part, threads, floats, false, false), room, shift, sum);
  }
  for (int64_t r = 0; r < rows; r++) result[r] = logarithm(shift[r], sum[r]);
}

// Gradients of sum(slope * logsumexp). grad_weights: [threads, C] of partial sums, or null.
void recclr_logsumexp_backward(int64_t rows, int64_t candidates, int64_t dim, const float *queries,
                               const float *vectors, const float *log_weights,
                               const int64_t *masked_rows, const int64_t *masked_columns,
                               int64_t masked, int64_t threads, int64_t floats, float *buffer,
                               const float *result, const float *slope, float *grad_queries,
                               float *grad_candidates, float *grad_weights) {
  Problem p = {rows, candidates, dim, queries, vectors, log_weights, masked_rows, masked_columns, masked};
  int64_t step = slice_of(p, threads, floats);
  for (int64_t from = 0; from < candidates; from += step) {
    Problem part = p.slice(from, least(from + step, candidates));
    pull_slice(part, Plan(part, threads, floats, true, false), buffer, result, slope, grad_queries,
               grad_candidates + from * dim, grad_weights ? grad_weights + from : 0, candidates);
  }
}

// Losses of all rows and the gradients of their weighted sum, as kernels/fused.py has it.
// own: log-partition of a row's own negatives, or null. power: of the denominator (the ratio of two
// temperatures), or NaN for InfoNCE.
void recclr_contrastive(int64_t rows, int64_t candidates, int64_t dim, const float *queries,
                        const float *vectors, const float *log_weights, const int64_t *masked_rows,
                        const int64_t *masked_columns, int64_t masked, int64_t threads,
                        int64_t floats, float *buffer, const float *positives,
                        const float *row_weights, const float *own, float power, float *losses,
                        float *grad_queries, float *grad_candidates, float *grad_positives,
                        float *grad_own) {
  Problem p = {rows, candidates, dim, queries, vectors, log_weights, masked_rows, masked_columns, masked};
  Plan plan(p, threads, floats, true, true);
  const Losses each = {positives, row_weights, own, power, losses, grad_positives, grad_own};
  if (plan.kept) return contrast(p, plan, buffer, each, grad_queries, grad_candidates);
  // Rows that do not fit are summed first, and their exponentials made again.
  float *whole = buffer + up(rows, 16), *slope = buffer, *room = whole + up(rows, 16);
  recclr_logsumexp(rows, candidates, dim, queries, vectors, log_weights, masked_rows,
                   masked_columns, masked, threads, floats, buffer, whole);
  for (int64_t r = 0; r < rows; r++) slope[r] = each.row(r, whole[r]);
  recclr_logsumexp_backward(rows, candidates, dim, queries, vectors, log_weights, masked_rows,
                            masked_columns, masked, threads, floats, room, whole, slope,
                            grad_queries, grad_candidates, 0);
}

} // extern "C"
