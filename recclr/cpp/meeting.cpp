// Counters in memory that processes share: each raises its own, and waits for those of the others.

#include <cstdint>
#include <sched.h>
#include <time.h>

namespace {

// Where nothing else runs, an answer is a few microseconds away, and sleeping costs fifty.
constexpr int LOOKS_BEFORE_YIELD = 4096;
constexpr int64_t NS_BEFORE_SLEEP = 2'000'000;

int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * INT64_C(1'000'000'000) + time.tv_nsec;
}

} // namespace

extern "C" {

// Everything that was written before is seen by whoever sees the number.
void recclr_tell(int64_t *counter, int64_t number) {
  __atomic_store_n(counter, number, __ATOMIC_RELEASE);
}

// Waits until all counters (``stride`` numbers apart) are at ``number`` or beyond. -1 when they are,
// or after ``limit_ns`` which of them is not. ``crowded``: there are more processes than cores, so
// that who waits is in the way of who is waited for.
int64_t recclr_await(const int64_t *counters, int64_t count, int64_t stride, int64_t number,
                     int64_t limit_ns, int64_t crowded) {
  int64_t start = now_ns();
  for (int64_t looks = 0, r = 0; r < count; looks++) {
    if (__atomic_load_n(counters + r * stride, __ATOMIC_ACQUIRE) >= number) {
      r++;
      continue;
    }
    if (looks < LOOKS_BEFORE_YIELD && !crowded) {
      __builtin_ia32_pause();
      continue;
    }
    int64_t waited = now_ns() - start;
    if (waited > limit_ns) return r;
    if (waited < NS_BEFORE_SLEEP) {
      sched_yield();
    } else {
      timespec pause = {0, 50'000};
      nanosleep(&pause, nullptr);
    }
  }
  return -1;
}

} // extern "C"
