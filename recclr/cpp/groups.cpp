// Equal numbers put side by side. Each thread sorts those of a range of values, so that the same comes
// out for any number of threads and they wait for each other twice: where other programs want the same
// cores, each such wait may take a turn of the scheduler. Shape letters: n numbers, T threads.

#include <cstdint>
#include <cstring>

namespace {

const int MOST_BITS = 11, SAMPLES = 32;
// Neighbours among rows that have one owner, as a power of two: as many as have their counts in a line
// of a cache, which two owners would take from each other.
const int NEIGHBOUR_BITS = 4;

// Which rows are meant: those of one of several owners.
struct Share {
  int64_t rank, size;

  bool has(int64_t row) const { return size == 1 || (row >> NEIGHBOUR_BITS) % size == rank; }
};

// Where ranges begin that hold about as many numbers each: bounds[T + 1], rising. By a sample, as
// popular rows may have small numbers.
void cut(int64_t n, const int64_t *rows, int64_t threads, int64_t *bounds) {
  const int64_t samples = threads > 1 ? SAMPLES * threads : 0;
  int64_t *found = new int64_t[samples];
  for (int64_t s = 0; s < samples; s++) {
    int64_t row = rows[n * s / samples], at = s;
    for (; at && found[at - 1] > row; at--) found[at] = found[at - 1];
    found[at] = row;
  }
  for (int64_t t = 1; t < threads; t++) bounds[t] = found[t * SAMPLES];
  bounds[0] = 0, bounds[threads] = INT64_C(1) << 32;
  delete[] found;
}

// Bits of a digit: as few passes as MOST_BITS allow, and these as even as can be. Fewer buckets keep
// the lines that a pass writes to in the first-level cache.
int digit_bits(uint64_t most) {
  int bits = most ? 64 - __builtin_clzll(most) : 1;
  int passes = (bits + MOST_BITS - 1) / MOST_BITS;
  return (bits + passes - 1) / passes;
}

// Stable, by the upper half, which no key has above ``most``. Where the result lies: keys or spare.
const uint64_t *sorted(uint64_t *keys, uint64_t *spare, int64_t n, uint64_t most) {
  const int bits = digit_bits(most);
  const int64_t last = (INT64_C(1) << bits) - 1;
  for (int low = 32; most >> (low - 32); low += bits) {
    int64_t starts[1 << MOST_BITS];
    memset(starts, 0, sizeof(int64_t) * (last + 1));
    for (int64_t i = 0; i < n; i++) starts[(keys[i] >> low) & last]++;
    int64_t before = 0;
    for (int64_t digit = 0; digit <= last; digit++) {
      int64_t count = starts[digit];
      starts[digit] = before, before += count;
    }
    for (int64_t i = 0; i < n; i++) spare[starts[(keys[i] >> low) & last]++] = keys[i];
    uint64_t *other = keys;
    keys = spare, spare = other;
  }
  return keys;
}

// Of the numbers of a share from ``low`` to below ``high``: how many stand before them, how many they are, how
// many are distinct; and keys (number, place), sorted.
struct Range {
  int64_t before, size, distinct;
  const uint64_t *keys;
};

// scratch: 2 (n + T), of which other ranges write the parts that are theirs. Without keys where a
// number is below 0 or beyond 32 bits.
Range sorted_range(int64_t n, const int64_t *rows, int64_t low, int64_t high, Share share,
                   int64_t number, int64_t threads, uint64_t *scratch) {
  Range range = {0, 0, 0, nullptr};
  uint64_t most = 0;
  for (int64_t i = 0; i < n; i++)
    most |= (uint64_t)rows[i], range.before += (rows[i] < low) & share.has(rows[i]);
  if (most >> 32) return range;
  // Each key is written, and written over where it is none of these: no branch to guess. So each
  // range has room for one more.
  uint64_t *keys = scratch + range.before + number, *spare = keys + n + threads;
  for (int64_t i = 0; i < n; i++) {
    keys[range.size] = (uint64_t)rows[i] << 32 | (uint64_t)i;
    range.size += (rows[i] >= low) & (rows[i] < high) & share.has(rows[i]);
  }
  range.keys = sorted(keys, spare, range.size, most);
  for (int64_t i = 0; i < range.size; i++)
    range.distinct += !i || range.keys[i] >> 32 != range.keys[i - 1] >> 32;
  return range;
}

} // namespace

extern "C" {

// Equal rows side by side, rising, look-ups of one in their order. scratch: 2 (n + threads).
// distinct, starts: n + 1 at most. inverse: which distinct row each look-up has, or null. Of ``size``
// owners only the rows of number ``rank``. Gives how many are distinct; -1 for a row below 0 or beyond
// 32 bits.
int64_t recclr_group(int64_t n, const int64_t *rows, uint64_t *scratch, int64_t *order,
                     int64_t *distinct, int64_t *starts, int64_t *inverse, int64_t rank,
                     int64_t size, int64_t threads) {
  if (n >> 32) return -1;
  if (n < threads) threads = 1;
  int64_t *bounds = new int64_t[threads + 1], found = 0, total = 0;
  const Share share = {rank, size};
  Range *ranges = new Range[threads];
  cut(n, rows, threads, bounds);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t t = 0; t < threads; t++)
    ranges[t] = sorted_range(n, rows, bounds[t], bounds[t + 1], share, t, threads, scratch);
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(max : found, total)
  for (int64_t t = 0; t < threads; t++) {
    const Range &range = ranges[t];
    int64_t place = 0;
    for (int64_t other = 0; other < t; other++) place += ranges[other].distinct;
    for (int64_t i = 0; range.keys && i < range.size; i++) {
      int64_t row = range.keys[i] >> 32, at = range.keys[i] & 0xffffffff;
      if (!i || row != (int64_t)(range.keys[i - 1] >> 32))
        distinct[place] = row, starts[place++] = range.before + i;
      order[range.before + i] = at;
      if (inverse) inverse[at] = place - 1;
    }
    found = place, total = range.before + range.size;
  }
  starts[found] = total;
  if (!ranges[0].keys) found = -1;
  delete[] ranges;
  delete[] bounds;
  return found;
}

} // extern "C"
