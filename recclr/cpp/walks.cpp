// Known positives among the candidates of a batch: the two walks of known_positives.py. Pairs come out
// by rising rows without a sort: that from the rows is made twice, once to count and once to write, and
// what that from the candidates finds is put in order by counts.
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
// and again afterwards; next[B], starts[B + 1], keys[room]: scratch. Gives P; where that is more than
// ``room``, nothing was written.
int64_t recclr_known_of_candidates(int64_t rows, const int64_t *users, int64_t candidates,
                                   const int64_t *items, const int64_t *offsets,
                                   const int32_t *audience, int64_t *heads, int64_t *next,
                                   int64_t *starts, int64_t room, uint64_t *keys,
                                   int64_t *pair_rows, int64_t *columns) {
  for (int64_t r = 0; r < rows; r++) next[r] = heads[users[r]], heads[users[r]] = r;
  for (int64_t r = 0; r <= rows; r++) starts[r] = 0;
  int64_t found = 0;
  for (int64_t c = 0; c < candidates; c++)
    for (int64_t i = offsets[items[c]]; i < offsets[items[c] + 1]; i++)
      for (int64_t r = heads[audience[i]]; r >= 0; r = next[r], found++) {
        starts[r + 1]++;
        if (found < room) keys[found] = (uint64_t)r << 32 | (uint64_t)c;
      }
  for (int64_t r = 0; r < rows; r++) heads[users[r]] = -1;
  if (found > room) return found;
  for (int64_t r = 0; r < rows; r++) starts[r + 1] += starts[r];
  for (int64_t i = 0; i < found; i++) {
    int64_t r = keys[i] >> 32, at = starts[r]++;
    pair_rows[at] = r, columns[at] = keys[i] & 0xffffffff;
  }
  return found;
}

} // extern "C"
