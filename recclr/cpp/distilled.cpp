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
// Both hold scores with their log-weights, -inf for what takes no part, and none afterwards.
float diverge(const Rows &own, const Rows &told, int64_t row, float weight) {
  const Plan &plan = own.plan;
  float own_top = NONE, told_top = NONE;
  for (int64_t b = 0; b < plan.blocks; b++) {
    float ours = own.top_of(b, row), theirs = told.top_of(b, row);
    own_top = ours > own_top ? ours : own_top, told_top = theirs > told_top ? theirs : told_top;
  }
  const bool nothing = own_top == NONE || told_top == NONE;
  vec own_sum = {}, told_sum = {}, gaps = {};
  for (int64_t b = 0; b < plan.blocks; b++) {
    float *mine = own.of(b, row), *other = told.of(b, row);
    if (nothing) memset(mine, 0, sizeof(float) * own.width_of(b));
    for (int64_t j = 0; j < own.width_of(b) && !nothing; j += LANES) {
      vec s = seen(mine + j), t = seen(other + j);
      vec ours = exponential(s - own_top), theirs = exponential(t - told_top);
      own_sum += ours, told_sum += theirs, gaps += theirs * (t - s);
      store(mine + j, ours), store(other + j, theirs);
    }
  }
  if (nothing) return 0.f;
  float ours = total(own_sum), theirs = total(told_sum);
  float left = weight / ours, right = weight / theirs;
  for (int64_t b = 0; b < plan.blocks; b++) {
    float *mine = own.of(b, row), *other = told.of(b, row);
    for (int64_t j = 0; j < own.width_of(b); j += LANES)
      store(mine + j, load(mine + j) * left - load(other + j) * right);
  }
  return total(gaps) / theirs + own_top + logf(ours) - told_top - logf(theirs);
}

} // namespace

extern "C" {

// Floats that ``buffer`` must hold; 0 where a thread cannot keep whole rows of both.
int64_t recclr_distilled_room(int64_t rows, int64_t candidates, int64_t dim, int64_t told_dim,
                              int64_t threads, int64_t floats) {
  Problem own = {rows, candidates, dim, 0, 0, 0, 0, 0, 0}, told = own;
  told.dim = told_dim;
  Plan plan(own, threads, floats, true, true), teacher(told, threads, floats, false, true);
  bool whole = plan.kept && teacher.kept && plan.height == teacher.height && plan.width == teacher.width;
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
  Plan plan(own, threads, floats, true, true), teacher(told, threads, floats, false, true);
  float *other = buffer + up(plan.room, 16);
  pack(told, teacher, other, false);
  float ones[MOST_ROWS];
  for (float &one : ones) one = 1.f;
  each_rows(own, plan, buffer, true, [&](Rows &mine, int64_t thread) {
    Rows theirs(told, teacher, other, thread);
    theirs.take(mine.top, mine.count);
    for (int64_t b = 0; b < plan.blocks; b++) theirs.score(b), mine.score(b);
    for (int64_t i = 0; i < mine.count; i++)
      costs[mine.top + i] = diverge(mine, theirs, i, row_weights[mine.top + i]);
    mine.begin_gradients(ones);
    for (int64_t b = 0; b < plan.blocks; b++) mine.pull(b);
    mine.end_gradients(ones, grad_queries);
  });
  add_up(own, plan, buffer, grad_candidates);
}

} // extern "C"
