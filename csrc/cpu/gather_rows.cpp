// gather_rows: rows of many shards into one batch, by threads
#include "../fastlatent.h"

#include <algorithm>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

namespace {

// Five rows are copied side by side, 128 bytes of each in turn, while the next five are fetched into the level-2 cache,
// as much of them as is being copied. A random row does not teach the hardware prefetcher its way before it ends; five
// at once keep five of its streams, and more misses in flight. 256 rows of 8 KiB, one thread, p20 on a quiet machine
// (contiguous memcpy of as many bytes: 85 us):
//   row by row 234; the first 512 B two rows ahead prefetched 195; whole rows ahead into level 1 231, into level 2 177;
//   2, 3, 4, 5, 6, 8, 16 rows side by side 171, 150, 129, 129, 128, 140, 180; 4 with the next 4 prefetched 117, 5 112.
// Tried and dropped: non-temporal stores (138 for 118), AVX-512 (133, the same), rep movsb (179), rows sorted by address
// (no gain), pages as streams instead of rows (131), prefetching the destination for writing (no gain). Page-table walks
// cost 8 to 15 us of it: that is what the same copy gains from huge pages, which a mapped file does not get.
constexpr int64_t kTogether = 5;
constexpr int64_t kPiece = 128;
constexpr int64_t kCacheLine = 64;
constexpr int kLevel2 = 2;  // __builtin_prefetch's locality; prefetcht1
// Rows shorter than half a page end before five streams are worth it: one after another, the row eight places ahead
// being fetched into level 2. 12,544 tokens of 1536 B, a quarter of 32 clips (p50; contiguous memcpy 2.00 ms):
//   five side by side 2.71; the row 1, 2, 4, 8, 16 ahead prefetched 2.16, 2.08, 2.07, 2.00, 2.07. At 2.5 KiB a row both
//   are equal.
constexpr int64_t kShortRow = 2048;
constexpr int64_t kAhead = 8;
constexpr int64_t kShortPiece = 256;
// Starting a thread takes as long as copying half a MiB, and one thread comes near what memory gives: with 2 threads
// 256 rows of 8 KiB took 218 us, with one 190.
constexpr int64_t kBytesPerThread = 4 << 20;

void copy_range(const int64_t* table, const int64_t* shard_index, const int64_t* row_index, int64_t row_bytes,
                char* out, int64_t begin, int64_t end) {
  const auto source = [&](int64_t i) {
    return reinterpret_cast<const char*>(table[2 * shard_index[i]]) + row_index[i] * row_bytes;
  };
  int64_t i = begin;
  if (row_bytes <= kShortRow) {
    const int64_t pieces = row_bytes / kShortPiece * kShortPiece;
    for (; i < end; ++i) {
      const char* from = source(i);
      const char* later = source(std::min(i + kAhead, end - 1));
      char* to = out + i * row_bytes;
      for (int64_t b = 0; b < pieces; b += kShortPiece) {
        for (int64_t line = 0; line < kShortPiece; line += kCacheLine) __builtin_prefetch(later + b + line, 0, kLevel2);
        std::memcpy(to + b, from + b, kShortPiece);
      }
      __builtin_prefetch(later + pieces, 0, kLevel2);
      std::memcpy(to + pieces, from + pieces, row_bytes - pieces);
    }
    return;
  }
  const int64_t whole = row_bytes / kPiece * kPiece;
  for (; i + kTogether <= end; i += kTogether) {
    const char* from[kTogether];
    const char* next[kTogether];
    for (int64_t k = 0; k < kTogether; ++k) {
      from[k] = source(i + k);
      next[k] = source(std::min(i + kTogether + k, end - 1));
    }
    char* to = out + i * row_bytes;
    for (int64_t b = 0; b < whole; b += kPiece) {
      for (int64_t k = 0; k < kTogether; ++k) {
        for (int64_t line = 0; line < kPiece; line += kCacheLine) __builtin_prefetch(next[k] + b + line, 0, kLevel2);
        std::memcpy(to + k * row_bytes + b, from[k] + b, kPiece);
      }
    }
    for (int64_t k = 0; k < kTogether; ++k) {
      __builtin_prefetch(next[k] + whole, 0, kLevel2);
      std::memcpy(to + k * row_bytes + whole, from[k] + whole, row_bytes - whole);
    }
  }
  for (; i < end; ++i) std::memcpy(out + i * row_bytes, source(i), row_bytes);
}

}  // namespace

int fastlatent_gather_rows_cpu(const int64_t* table, int64_t shard_count,
                               const int64_t* shard_index, const int64_t* row_index, int64_t rows, int64_t row_bytes,
                               void* out, int64_t threads) {
  // Checked before the first byte is written, so a bad index leaves the batch untouched.
  for (int64_t i = 0; i < rows; ++i) {
    if (shard_index[i] < 0 || shard_index[i] >= shard_count) return FASTLATENT_BAD_INDEX;
    if (row_index[i] < 0 || row_index[i] >= table[2 * shard_index[i] + 1]) return FASTLATENT_BAD_INDEX;
  }
  threads = std::max<int64_t>(1, std::min({threads, rows, rows * row_bytes / kBytesPerThread}));
  std::vector<std::thread> workers;
  int status = FASTLATENT_OK;
  try {
    workers.reserve(threads - 1);
    for (int64_t t = 1; t < threads; ++t) {
      workers.emplace_back(copy_range, table, shard_index, row_index, row_bytes, static_cast<char*>(out),
                           rows * t / threads, rows * (t + 1) / threads);
    }
    copy_range(table, shard_index, row_index, row_bytes, static_cast<char*>(out), 0, rows / threads);
  } catch (const std::system_error&) {
    status = FASTLATENT_NO_THREADS;
  }
  for (auto& worker : workers) worker.join();
  return status;
}
