// Rows of embedding tables: gradients of equal ones (groups.cpp) summed and the optimiser applied in
// one pass, sums of bags, and rows scaled to length 1. Shape letters: n look-ups, R distinct rows,
// D dimension. The same numbers come out for any number of threads: a row is one thread's.

#include "product.h"

namespace {

// Rows of a table lie anywhere: they are asked for so many turns before they are needed.
const int64_t AHEAD = 8;
const double BETA_1 = 0.9, BETA_2 = 0.999;
const float EPSILON = 1e-8f;

// Gradients of look-ups, from several arrays: vector number p lies in the first array whose end
// exceeds p.
struct Gradients {
  const int64_t *order, *places, *ends;
  const float *const *arrays;
  int64_t dim;

  const float *of(int64_t i) const {
    int64_t place = order[i], part = 0;
    if (places) place = places[place];
    while (place >= ends[part]) part++;
    return arrays[part] + (place - (part ? ends[part - 1] : 0)) * dim;
  }
};

struct State {
  float *weight, *first, *second, *count;
};

enum Kind { SGD, ROWWISE_ADAGRAD, ROWWISE_ADAM, ADAM, SUM };

float mean_square(const float *g, int64_t dim) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < dim; k++) sum += g[k] * g[k];
  return sum / dim;
}

void adam(const State &s, int64_t row, const float *g, int64_t dim, float rate, bool rowwise) {
  const float keep = (float)BETA_2, fresh_1 = (float)(1 - BETA_1), fresh_2 = (float)(1 - BETA_2);
  float count = s.count[row] += 1;
  float left_1 = -(float)expm1(count * log(BETA_1)), left_2 = -(float)expm1(count * log(BETA_2));
  float scale = -rate * sqrtf(left_2) / left_1;
  float *weight = s.weight + row * dim, *first = s.first + row * dim;
  if (rowwise) {
    float &second = s.second[row];
    second = second * keep + fresh_2 * mean_square(g, dim);
    float step = scale / (sqrtf(second) + EPSILON);
#pragma omp simd
    for (int64_t k = 0; k < dim; k++) {
      first[k] += fresh_1 * (g[k] - first[k]);
      weight[k] += step * first[k];
    }
    return;
  }
  float *second = s.second + row * dim;
#pragma omp simd
  for (int64_t k = 0; k < dim; k++) {
    first[k] += fresh_1 * (g[k] - first[k]);
    second[k] = second[k] * keep + fresh_2 * g[k] * g[k];
    weight[k] += scale * first[k] / (sqrtf(second[k]) + EPSILON);
  }
}

void move(Kind kind, const State &s, int64_t row, const float *g, int64_t dim, float rate) {
  if (kind == ADAM || kind == ROWWISE_ADAM) return adam(s, row, g, dim, rate, kind == ROWWISE_ADAM);
  float step = -rate;
  if (kind == ROWWISE_ADAGRAD) {
    s.second[row] += mean_square(g, dim);
    step = -rate / (sqrtf(s.second[row]) + EPSILON);
  }
  float *weight = s.weight + row * dim;
#pragma omp simd
  for (int64_t k = 0; k < dim; k++) weight[k] += step * g[k];
}

void fetch(const float *at, int64_t dim) {
  if (!at) return;
  for (int64_t k = 0; k < dim; k += 16) __builtin_prefetch(at + k);
}

struct Bags {
  int64_t n, size, dim;
  const int64_t *order, *rows;
  const float *weights, *from;

  // What look-ups some turns ahead will read: first the numbers of their rows, then these.
  void prepare(int64_t i) const {
    if (order && i + 3 * AHEAD < n) {
      int64_t later = order[i + 3 * AHEAD];
      __builtin_prefetch(rows + later);
      if (weights) __builtin_prefetch(weights + later);
    }
    if (i + AHEAD < n) fetch(from + rows[order ? order[i + AHEAD] : i + AHEAD] * dim, dim);
  }

  // add(weight, coordinates from ``first`` on) for each row of one bag; how many of its rows there
  // are not.
  template <class Add>
  inline __attribute__((always_inline)) int64_t each(int64_t low, int64_t high, int64_t first,
                                                     Add add) const {
    int64_t strangers = 0;
    for (int64_t i = low; i < high; i++) {
      int64_t j = order ? order[i] : i, row = rows[j];
      if (!first) prepare(i);
      if (row < 0 || row >= size) strangers++;
      else add(weights ? weights[j] : 1.f, from + row * dim + first);
    }
    return strangers;
  }

  // Some of the coordinates, summed in registers.
  template <int VECTORS>
  int64_t part(int64_t low, int64_t high, int64_t first, float *sum) const {
    vec sums[VECTORS] = {};
    int64_t strangers = each(low, high, first, [&](float weight, const float *one) {
      for (int v = 0; v < VECTORS; v++) sums[v] += weight * load(one + v * LANES);
    });
    for (int v = 0; v < VECTORS; v++) store(sum + first + v * LANES, sums[v]);
    return strangers;
  }

  // The coordinates that fill no vector.
  int64_t rest(int64_t low, int64_t high, int64_t first, float *sum) const {
    memset(sum + first, 0, sizeof(float) * (dim - first));
    return each(low, high, first, [&](float weight, const float *one) {
      for (int64_t k = first; k < dim; k++) sum[k] += weight * one[k - first];
    });
  }

  int64_t sum(int64_t low, int64_t high, float *into) const {
    if (low < 0 || high > n || low > high) {
      memset(into, 0, sizeof(float) * dim);
      return 1;
    }
    int64_t k = 0, strangers = 0;
    for (; k + 8 * LANES <= dim; k += 8 * LANES) strangers = part<8>(low, high, k, into);
    for (; k + 4 * LANES <= dim; k += 4 * LANES) strangers = part<4>(low, high, k, into);
    for (; k + LANES <= dim; k += LANES) strangers = part<1>(low, high, k, into);
    return k < dim ? rest(low, high, k, into) : strangers;
  }
};

} // namespace

extern "C" {

// The optimiser's step of each distinct row by the sum of its look-ups' gradients, in their order;
// kind SUM writes the sums to ``weight`` instead, [R, D]. starts, order: of recclr_group. first,
// second, count: what the kind has of them.
void recclr_move(int32_t kind, int64_t found, const int64_t *distinct, const int64_t *starts,
                 const int64_t *order, const int64_t *places, const int64_t *ends,
                 const float *const *arrays, int64_t dim, float *weight, float *first,
                 float *second, float *count, float rate, int64_t threads) {
  const Gradients gradients = {order, places, ends, arrays, dim};
  const State state = {weight, first, second, count};
  const bool wide_second = kind == ADAM;
#pragma omp parallel num_threads(threads)
  {
    float *sum = new float[dim];
    // Popular rows have many look-ups: pieces go to whoever is free.
#pragma omp for schedule(dynamic, 128)
    for (int64_t r = 0; r < found; r++) {
      if (r + AHEAD < found) fetch(gradients.of(starts[r + AHEAD]), dim);
      if (r + AHEAD < found && kind != SUM) {
        int64_t next = distinct[r + AHEAD];
        fetch(weight + next * dim, dim);
        fetch(first ? first + next * dim : 0, dim);
        if (second) fetch(wide_second ? second + next * dim : second + next, wide_second ? dim : 1);
      }
      int64_t low = starts[r], high = starts[r + 1];
      const float *g = gradients.of(low);
      if (high > low + 1) {
        memcpy(sum, g, sizeof(float) * dim);
        for (int64_t i = low + 1; i < high; i++) {
          const float *more = gradients.of(i);
#pragma omp simd
          for (int64_t k = 0; k < dim; k++) sum[k] += more[k];
        }
        g = sum;
      }
      if (kind == SUM) memcpy(weight + r * dim, g, sizeof(float) * dim);
      else move((Kind)kind, state, distinct[r], g, dim, rate);
    }
    delete[] sum;
  }
}

// result[R, D]: sum over i from starts[r] to starts[r + 1] of weights[j] * from[rows[j]], where j is
// order[i], or i without an order; weights may be null for ones. Gives how many rows are none of
// ``size``, or bags do not lie within n rows; they are left out.
int64_t recclr_bags(int64_t bags, int64_t dim, int64_t n, const int64_t *starts, const int64_t *order,
                    const int64_t *rows, const float *weights, const float *from, int64_t size,
                    float *result, int64_t threads) {
  const Bags all_of_them = {n, size, dim, order, rows, weights, from};
  int64_t strangers = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 64) reduction(+ : strangers)
  for (int64_t r = 0; r < bags; r++)
    strangers += all_of_them.sum(starts[r], starts[r + 1], result + r * dim);
  return strangers;
}

// unit[M, D] = x / max(length, 1e-12), lengths[M].
void recclr_unit(int64_t rows, int64_t dim, const float *x, float *unit, float *lengths,
                 int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const float *from = x + r * dim;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < dim; k++) sum += from[k] * from[k];
    float length = sqrtf(sum);
    length = length < 1e-12f ? 1e-12f : length;
    lengths[r] = length;
#pragma omp simd
    for (int64_t k = 0; k < dim; k++) unit[r * dim + k] = from[k] / length;
  }
}

// Gradient by x of what has ``grad`` by its unit rows.
void recclr_unit_backward(int64_t rows, int64_t dim, const float *unit, const float *lengths,
                          const float *grad, float *result, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const float *u = unit + r * dim, *g = grad + r * dim;
    float along = 0;
#pragma omp simd reduction(+ : along)
    for (int64_t k = 0; k < dim; k++) along += u[k] * g[k];
    float left = 1.f / lengths[r];
#pragma omp simd
    for (int64_t k = 0; k < dim; k++) result[r * dim + k] = (g[k] - u[k] * along) * left;
  }
}

} // extern "C"
