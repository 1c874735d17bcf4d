// How often each user is drawn in a bootstrap resample. What costs there is not the drawing but the
// memory that draws and their counts go through when they are arrays, so there are none: a draw is made
// and counted at once, in counts that a second-level cache holds.

#include <cstdint>
#include <cstring>

namespace {

// SplitMix64's finaliser (Steele, Lea, Flood 2014), as order.scrambled.
uint64_t scrambled(uint64_t state) {
  state = (state ^ (state >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
  state = (state ^ (state >> 27)) * UINT64_C(0x94D049BB133111EB);
  return state ^ (state >> 31);
}

}  // namespace

// counts[n, u] of u users in n resamples, each with a stream of its own; as order.keyed_below.
extern "C" void recclr_resample(int64_t n, int64_t u, const int64_t *seeds, double *counts,
                                int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < n; r++) {
    double *row = counts + r * u;
    memset(row, 0, sizeof(double) * u);
    uint64_t state = seeds[r];
    for (int64_t i = 0; i < u; i++) {
      state += UINT64_C(0x9E3779B97F4A7C15);
      row[int64_t(double(scrambled(state) >> 11) * 0x1p-53 * double(u))] += 1;
    }
  }
}
