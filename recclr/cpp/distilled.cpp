// The divergence of a weighted softmax from a teacher's, with gradients, in one pass over the rows:
// what kernels/distilled.py computes.
//
// Shape letters: B queries, C candidates, D dimension, T dimension of the teacher.

#include "rows.h"

namespace {

// In place of a score that takes no part: finite, since a difference of two of them is multiplied.
const float HIDDEN = -1e30f;

inline vec seen(const float *at) {
  vec x = load(at), low = all(HIDDEN);
  return x > low ? x : low;
}

// Cost of a row, whose scores become what pulls at both sides: weight * (own share - teacher's).
// Both rows hold scores with their log-weights, -inf for what takes no part, and none afterwards.
float diverge(float *own, float *told, int64_t width, float own_top, float told_top,
              float weight) {
  if (own_top == NONE || told_top == NONE) {
    memset(own, 0, sizeof(float) * width);
    return 0.f;
  }
  vec own_sum = {}, told_sum = {}, gaps = {};
  for (int64_t j = 0; j < width; j += LANES) {
    vec s = seen(own + j), t = seen(told + j);
    vec a = exponential(s - own_top), b = exponential(t - told_top);
    own_sum += a, told_sum += b, gaps += b * (t - s);
    store(own + j, a), store(told + j, b);
  }
  float ours = total(own_sum), theirs = total(told_sum);
  float left = weight / ours, right = weight / theirs;
  for (int64_t j = 0; j < width; j += LANES)
    store(own + j, load(own + j) * left - load(told + j) * right);
  return total(gaps) / theirs + own_top + logf(ours) - told_top - logf(theirs);
}

} // namespace

extern "C" {

// Floats that ``buffer`` must hold; 0 where a thread cannot keep whole rows of both.
int64_t recclr_distilled_room(int64_t rows, int64_t candidates, int64_t dim, int64_t told_dim,
                              int64_t threads, int64_t floats) {
  Problem own = {rows, candidates, dim, 0, 0, 0, 0, 0, 0}, told = own;
  told.dim = told_dim;
  Plan plan(own, threads, floats, true), teacher(told, threads, floats, false);
  bool whole = plan.blocks == 1 && teacher.blocks == 1 && plan.height == teacher.height;
  return whole ? up(plan.room, 16) + teacher.room : 0;
}

// costs[B]: KL(teacher || student) of each row; gradients of their weighted sum.
void recclr_distilled(int64_t rows, int64_t candidates, int64_t dim, const float *queries,
                      const float *vectors, const float *log_weights, const int64_t *masked_rows,
                      const int64_t *masked_columns, int64_t masked, int64_t threads,
                      int64_t floats, float *buffer, int64_t told_dim, const float *told_queries,
                      const float *told_vectors, const float *row_weights, float *costs,
                      float *grad_queries, float *grad_candidates) {
  Problem own = {rows, candidates, dim, queries, vectors, log_weights, masked_rows, masked_columns, masked};
  Problem told = own;
  told.dim = told_dim, told.queries = told_queries, told.vectors = told_vectors;
  Plan plan(own, threads, floats, true), teacher(told, threads, floats, false);
  float *other = buffer + up(plan.room, 16);
  pack(told, teacher, other, false);
  float ones[MOST_ROWS];
  for (float &one : ones) one = 1.f;
  each_rows(own, plan, buffer, true, [&](Rows &mine, int64_t thread) {
    Rows theirs(told, teacher, other, thread);
    theirs.take(mine.top, mine.count);
    theirs.score(0), mine.score(0);
    int64_t width = mine.width_of(0);
    for (int64_t i = 0; i < mine.count; i++)
      costs[mine.top + i] =
          diverge(mine.logits + i * plan.line, theirs.logits + i * teacher.line, width,
                  mine.top_of(i, width), theirs.top_of(i, width), row_weights[mine.top + i]);
    mine.begin_gradients(ones);
    mine.pull(0);
    mine.end_gradients(ones, grad_queries);
  });
  add_up(own, plan, buffer, grad_candidates);
}

} // extern "C"
