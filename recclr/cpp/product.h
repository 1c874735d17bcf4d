// Small matrix products out of registers, under the loss and its gradients.
//
// Every product here is C[M x N] (+)= A[M x K] . B[K x N] with A read one number at a time and B
// and C by vectors, so that the three products of a contrastive step differ in strides only. No
// function of the standard library's templates is used: the file is compiled once for each
// instruction set, and the linker would keep one copy of theirs for all.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#if defined(__AVX512F__)
#define LANES 16
// Accumulators of a block must fit the registers: 32 here, 16 below.
#define TALL 12
#define WIDE 4
#else
#define LANES 8
#define TALL 6
#define WIDE 2
#endif
// Rows of the block that spans WIDE vectors. TALL rows span two vectors.
#define LOW 6
#define PANEL (2 * LANES)

namespace {

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

inline vec load(const float *at) { return *(const loose *)at; }
inline void store(float *at, vec value) { *(loose *)at = value; }
inline vec all(float value) { return value - (vec){}; }
inline int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ROWS x (VECTORS * LANES) of the product. a: element (m, k) at a[m * a_row + k * a_step].
template <int ROWS, int VECTORS, bool ADD>
inline __attribute__((always_inline)) void
block(const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_row, int64_t depth,
      float *c, int64_t c_row) {
  vec sums[ROWS][VECTORS];
  for (int m = 0; m < ROWS; m++)
    for (int v = 0; v < VECTORS; v++)
      sums[m][v] = ADD ? load(c + m * c_row + v * LANES) : vec{};
  for (int64_t k = 0; k < depth; k++) {
    vec right[VECTORS];
    for (int v = 0; v < VECTORS; v++) right[v] = load(b + k * b_row + v * LANES);
    for (int m = 0; m < ROWS; m++) {
      float left = a[m * a_row + k * a_step];
      for (int v = 0; v < VECTORS; v++) sums[m][v] += left * right[v];
    }
  }
  for (int m = 0; m < ROWS; m++)
    for (int v = 0; v < VECTORS; v++) store(c + m * c_row + v * LANES, sums[m][v]);
}

// LOW rows of C by all of its columns (a multiple of LANES), added to what is there.
inline void add_rows(const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t columns,
                     int64_t depth, float *c) {
  int64_t j = 0;
  for (; j + WIDE * LANES <= columns; j += WIDE * LANES)
    block<LOW, WIDE, true>(a, a_row, a_step, b + j, columns, depth, c + j, columns);
  for (; j + 2 * LANES <= columns; j += 2 * LANES)
    block<LOW, 2, true>(a, a_row, a_step, b + j, columns, depth, c + j, columns);
  for (; j < columns; j += LANES)
    block<LOW, 1, true>(a, a_row, a_step, b + j, columns, depth, c + j, columns);
}

// Rows ``first`` to ``first + PANEL`` of a matrix, one below the other; zeros beyond its last row.
inline void pack_panel(const float *matrix, int64_t rows, int64_t dim, int64_t first, float *panel) {
  for (int64_t i = 0; i < PANEL; i++)
    for (int64_t k = 0; k < dim; k++)
      panel[k * PANEL + i] = first + i < rows ? matrix[(first + i) * dim + k] : 0.f;
}

// Some rows of a matrix to ``to``, with zeros up to a multiple of TALL, which is given.
inline int64_t take_rows(const float *matrix, int64_t top, int64_t count, int64_t dim, float *to) {
  int64_t tall = up(count, TALL);
  memcpy(to, matrix + top * dim, sizeof(float) * count * dim);
  memset(to + count * dim, 0, sizeof(float) * (tall - count) * dim);
  return tall;
}

// Products of ``tall`` taken rows with ``width`` rows that lie in panels; a row of them is ``line``
// long.
inline void multiply(const float *rows, int64_t tall, int64_t dim, const float *panels,
                     int64_t width, float *products, int64_t line) {
  for (int64_t j = 0; j < width; j += PANEL)
    for (int64_t i = 0; i < tall; i += TALL)
      block<TALL, 2, false>(rows + i * dim, dim, 1, panels + j * dim, PANEL, dim,
                            products + i * line + j, line);
}

// How many of rising numbers are below ``value``.
inline int64_t count_below(const int64_t *rising, int64_t size, int64_t value) {
  int64_t low = 0, high = size;
  while (low < high) {
    int64_t middle = low + (high - low) / 2;
    if (rising[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

// exp of numbers up to about 0, 2e-7 off; below -87 it is 0, as what is beside a sum of 1 may be.
// Cody and Waite's reduction to |r| <= ln(2)/2, then a polynomial.
inline vec exponential(vec x) {
  const vec shifter = all(12582912.f); // 1.5 * 2^23: adding it rounds to an integer
  vec turns = x * 1.44269504089f + shifter;
  vec n = turns - shifter;
  vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  vec result = (vec)((ints)p + ((ints)turns << 23));
  ints tiny = x < all(-87.f);
  return (vec)(~tiny & (ints)result);
}

inline float highest(vec x) {
  float best = x[0];
  for (int i = 1; i < LANES; i++) best = x[i] > best ? x[i] : best;
  return best;
}

// One bit for each number above ``floor``, the lowest for the first; none for what is no number.
inline uint32_t above(vec x, float floor) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(floor), _CMP_GT_OQ);
#else
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_set1_ps(floor), _CMP_GT_OQ));
#endif
}

// Whether any of them is no number.
inline bool broken(vec x) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
#else
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)x, _CMP_UNORD_Q));
#endif
}

inline float total(vec x) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += x[i];
  return sum;
}

} // namespace
