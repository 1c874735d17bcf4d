// Known positives among the candidates of a batch: the two walks of known_positives.py. Each is made
// twice, once to count and once to write, so that pairs come out by rising rows without a sort.
// Shape letters: B rows, C candidates, P pairs.

#include <cstdint>

extern "C" {

// From the rows: items of each row's user that have a slot (place among the candidates, -1: none).
// starts[B + 1] is filled where columns is null, and read otherwise. Gives P.
int64_t recclr_known_of_rows(int64_t rows, const int64_t *users, const int64_t *offsets,
                             const int32_t *items, const int64_t *slots, int64_t *starts,
                             int64_t *pair_rows, int64_t *columns, int64_t threads) {
  if (columns) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
      int64_t at = starts[r];
      for (int64_t i = offsets[users[r]]; i < offsets[users[r] + 1]; i++)
        if (slots[items[i]] >= 0) pair_rows[at] = r, columns[at++] = slots[items[i]];
    }
    return starts[rows];
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    int64_t count = 0;
    for (int64_t i = offsets[users[r]]; i < offsets[users[r] + 1]; i++) count += slots[items[i]] >= 0;
    starts[r + 1] = count;
  }
  starts[0] = 0;
  for (int64_t r = 0; r < rows; r++) starts[r + 1] += starts[r];
  return starts[rows];
}

// From the candidates: users of each that own rows of the batch. heads[num_users]: -1 everywhere,
// and again afterwards; next[B]: scratch. starts is moved as pairs are written.
int64_t recclr_known_of_candidates(int64_t rows, const int64_t *users, int64_t candidates,
                                   const int64_t *items, const int64_t *offsets,
                                   const int32_t *audience, int64_t *heads, int64_t *next,
                                   int64_t *starts, int64_t *pair_rows, int64_t *columns) {
  for (int64_t r = 0; r < rows; r++) next[r] = heads[users[r]], heads[users[r]] = r;
  if (!columns)
    for (int64_t r = 0; r <= rows; r++) starts[r] = 0;
  for (int64_t c = 0; c < candidates; c++)
    for (int64_t i = offsets[items[c]]; i < offsets[items[c] + 1]; i++)
      for (int64_t r = heads[audience[i]]; r >= 0; r = next[r]) {
        if (!columns) {
          starts[r + 1]++;
          continue;
        }
        int64_t at = starts[r]++;
        pair_rows[at] = r, columns[at] = c;
      }
  for (int64_t r = 0; r < rows; r++) heads[users[r]] = -1;
  if (!columns)
    for (int64_t r = 0; r < rows; r++) starts[r + 1] += starts[r];
  return starts[rows];
}

} // extern "C"
