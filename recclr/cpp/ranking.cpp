// The k largest products of each query with a corpus, exactly: scores are made a block at a time and
// compared, while they are in cache, with the worst that a query keeps. Items are below 2^31.
// Shape letters: Q queries, V corpus, D dimension, K kept.

#include "product.h"

namespace {

// Most rows of a block of scores, and its columns: a quarter of a second-level cache.
const int64_t HEIGHT = 96, WIDTH = 512, LINE = WIDTH + 16;

// Scores as integers of the same order; -0 equals 0.
int32_t rank_of(float score) {
  int32_t bits;
  score += 0.f;
  memcpy(&bits, &score, 4);
  return bits ^ (bits >> 31 & 0x7fffffff);
}

float score_of(int32_t rank) {
  rank ^= rank >> 31 & 0x7fffffff;
  float score;
  memcpy(&score, &rank, 4);
  return score;
}

int64_t count_from(const int32_t *ranks, int64_t size, int64_t lowest) {
  int32_t count = 0, bound = (int32_t)lowest;
  for (int64_t i = 0; i < size; i++) count += ranks[i] >= bound;
  return count;
}

// What one query keeps, in the order of the items: the best so far and newcomers behind them, sorted
// out when room is short.
struct Kept {
  int32_t *ranks, *items;
  int64_t size, most, room;
  float floor; // what a score must exceed; of equals the first, which is kept, is better

  void add(float score, int64_t item) {
    ranks[size] = rank_of(score), items[size++] = (int32_t)item;
    if (size == room) shrink();
  }

  // The K-th largest by halving the range of values: counting has no branches to guess, partitions
  // are nothing but such.
  void shrink() {
    int64_t low = ranks[0], high = ranks[0];
    for (int64_t i = 1; i < size; i++) {
      low = ranks[i] < low ? ranks[i] : low;
      high = ranks[i] > high ? ranks[i] : high;
    }
    while (low < high) {
      int64_t middle = low + (high - low + 1) / 2;
      if (count_from(ranks, size, middle) >= most) low = middle;
      else high = middle - 1;
    }
    int32_t last = (int32_t)low;
    int64_t larger = 0, kept = 0;
    for (int64_t i = 0; i < size; i++) larger += ranks[i] > last;
    int64_t equals = most - larger;
    for (int64_t i = 0; i < size; i++) {
      int32_t rank = ranks[i];
      int64_t equal = rank == last && equals > 0, stays = rank > last || equal;
      equals -= equal;
      ranks[kept] = rank, items[kept] = items[i];
      kept += stays;
    }
    size = kept, floor = score_of(last);
  }

  // Best first, of equals the earlier item; -1 and -inf where nothing was left to keep.
  void finish(float *scores, int64_t *result) {
    if (size > most) shrink();
    if (size <= 64) insertion();
    else by_digits();
    for (int64_t i = 0; i < most; i++) {
      scores[i] = i < size ? score_of(ranks[i]) : -INFINITY;
      result[i] = i < size ? items[i] : -1;
    }
  }

  void insertion() {
    for (int64_t i = 1; i < size; i++) {
      int32_t rank = ranks[i], item = items[i];
      int64_t at = i;
      for (; at && ranks[at - 1] < rank; at--) ranks[at] = ranks[at - 1], items[at] = items[at - 1];
      ranks[at] = rank, items[at] = item;
    }
  }

  // Stable, largest digits first; there is room for as many again.
  void by_digits() {
    int32_t *from[2] = {ranks, items}, *to[2] = {ranks + size, items + size};
    for (int shift = 0; shift < 32; shift += 8) {
      int64_t starts[257] = {0};
      // Digits are turned round, and the highest has the sign.
      auto digit = [shift](int32_t rank) {
        return 255 - (((uint32_t)rank ^ 0x80000000u) >> shift & 255);
      };
      for (int64_t i = 0; i < size; i++) starts[digit(from[0][i]) + 1]++;
      for (int i = 0; i < 256; i++) starts[i + 1] += starts[i];
      for (int64_t i = 0; i < size; i++) {
        int64_t at = starts[digit(from[0][i])]++;
        to[0][at] = from[0][i], to[1][at] = from[1][i];
      }
      for (int i = 0; i < 2; i++) {
        int32_t *other = from[i];
        from[i] = to[i], to[i] = other;
      }
    }
  }
};

// Room of what a query keeps: few sortings, each of twice as many as are kept.
int64_t room_of(int64_t kept) { return 2 * kept + 48; }

// Rows of a block, so that what they keep stays in cache too.
int64_t height_of(int64_t kept) {
  int64_t height = (1 << 18) / room_of(kept) / TALL * TALL;
  return height < TALL ? TALL : height > HEIGHT ? HEIGHT : height;
}

int64_t own_room(int64_t dim, int64_t kept) {
  int64_t height = height_of(kept);
  return up(height * dim, 16) + height * LINE + up(2 * height * room_of(kept), 16);
}

bool has(const int64_t *rising, int64_t size, int64_t value) {
  int64_t at = count_below(rising, size, value);
  return at < size && rising[at] == value;
}

} // namespace

extern "C" {

int64_t recclr_top_k_room(int64_t columns, int64_t dim, int64_t kept, int64_t threads) {
  return up(up(columns, PANEL) * dim, 16) + threads * own_room(dim, kept);
}

// Corpus to panels, at the beginning of ``buffer``: once for all queries.
void recclr_top_k_pack(int64_t columns, int64_t dim, const float *corpus, int64_t threads,
                       float *buffer) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < columns; first += PANEL)
    pack_panel(corpus, columns, dim, first, buffer + first * dim);
}

// scores, items: [Q, K]. seen: columns to leave out, those of query q rising between offsets[q] and
// offsets[q + 1], or null. Gives how many groups of scores hold one that is no number.
int64_t recclr_top_k(int64_t rows, int64_t columns, int64_t dim, int64_t kept, const float *queries,
                     const int64_t *offsets, const int64_t *seen, int64_t threads, float *buffer,
                     float *scores, int64_t *items) {
  const int64_t groups = (rows + TALL - 1) / TALL, padded = up(columns, PANEL);
  const int64_t height = height_of(kept), room = room_of(kept);
  if (threads > groups) threads = groups < 1 ? 1 : groups;
  int64_t odd = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : odd)
  for (int64_t t = 0; t < threads; t++) {
    float *own = buffer + up(padded * dim, 16) + t * own_room(dim, kept);
    float *block_scores = own + up(height * dim, 16);
    int32_t *ranks = (int32_t *)(block_scores + height * LINE), *places = ranks + height * room;
    int64_t end = least(groups * (t + 1) / threads * TALL, rows);
    Kept found[HEIGHT];
    for (int64_t top = groups * t / threads * TALL; top < end; top += height) {
      int64_t count = least(height, end - top), tall = take_rows(queries, top, count, dim, own);
      for (int64_t i = 0; i < count; i++)
        found[i] = {ranks + i * room, places + i * room, 0, kept, room, -INFINITY};
      for (int64_t left = 0; left < columns; left += WIDTH) {
        int64_t width = least(WIDTH, padded - left), real = least(WIDTH, columns - left);
        multiply(own, tall, dim, buffer + left * dim, width, block_scores, LINE);
        for (int64_t i = 0; i < count; i++) {
          float *row = block_scores + i * LINE;
          // Beside the last item lie zeros, which nothing may keep.
          for (int64_t j = real; j < width; j++) row[j] = -INFINITY;
          for (int64_t j = 0; j < width; j += LANES) {
            vec x = load(row + j);
            odd += broken(x);
            for (uint32_t bits = above(x, found[i].floor); bits; bits &= bits - 1) {
              int64_t place = j + __builtin_ctz(bits), item = left + place;
              const int64_t *own_seen = offsets ? offsets + top + i : 0;
              if (own_seen && has(seen + own_seen[0], own_seen[1] - own_seen[0], item)) continue;
              found[i].add(row[place], item);
            }
          }
        }
      }
      for (int64_t i = 0; i < count; i++)
        found[i].finish(scores + (top + i) * kept, items + (top + i) * kept);
    }
  }
  return odd;
}

} // extern "C"
