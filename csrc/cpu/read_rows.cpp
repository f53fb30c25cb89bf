// read_rows: rows of many files into one batch without mapping them, by threads or io_uring; and what mapped rows need
#include "../fastlatent.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <sys/syscall.h>
#if defined(IORING_FEAT_RW_CUR_POS) && defined(__NR_io_uring_setup)  // headers of Linux 5.6: they have IORING_OP_READ
#define FASTLATENT_IO_URING 1
#endif
#endif

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // headers older than Linux 5.14; the kernel may know it nevertheless
#endif

namespace {

// Rows beside each other become one read, but no longer than this: threads share the work, and a read's end stays near.
constexpr int64_t kMaxRead = 1 << 20;

// One contiguous read: `bytes` from `offset` of `fd` to `to`; its first row is out's `row`.
struct Read {
  int fd;
  int64_t offset, bytes;
  char* to;
  int64_t row;
};

int64_t page_bytes() {
  static const int64_t bytes = sysconf(_SC_PAGESIZE);
  return bytes;
}

// Keeps the failure of the smallest row, whatever order the reads end in.
void keep_first(int64_t* failure, int64_t row, int64_t error) {
  if (failure[0] < 0 || row < failure[0]) {
    failure[0] = row;
    failure[1] = error;
  }
}

// table [shard_count, stride], its last column the number of rows.
bool in_range(const int64_t* table, int64_t shard_count, int64_t stride, const int64_t* shard_index,
              const int64_t* row_index, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) {
    if (shard_index[i] < 0 || shard_index[i] >= shard_count) return false;
    if (row_index[i] < 0 || row_index[i] >= table[stride * shard_index[i] + stride - 1]) return false;
  }
  return true;
}

std::vector<Read> plan_reads(const int64_t* files, const int64_t* shard_index, const int64_t* row_index, int64_t rows,
                             int64_t row_bytes, char* out) {
  std::vector<Read> reads;
  if (row_bytes == 0) return reads;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t* file = files + 3 * shard_index[i];
    const int64_t offset = file[1] + row_index[i] * row_bytes;
    if (i && shard_index[i] == shard_index[i - 1] && reads.back().offset + reads.back().bytes == offset &&
        reads.back().bytes + row_bytes <= kMaxRead) {
      reads.back().bytes += row_bytes;
    } else {
      reads.push_back({static_cast<int>(file[0]), offset, row_bytes, out + i * row_bytes, i});
    }
  }
  return reads;
}

void read_by_threads(const std::vector<Read>& reads, int64_t row_bytes, int64_t threads, int64_t* failure) {
  std::atomic<size_t> next{0};
  std::mutex mutex;
  const auto work = [&] {
    for (size_t j = next++; j < reads.size(); j = next++) {
      const Read& read = reads[j];
      for (int64_t done = 0; done < read.bytes;) {
        const ssize_t got = pread(read.fd, read.to + done, read.bytes - done, read.offset + done);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) {
          const int64_t error = got < 0 ? errno : 0;
          const std::lock_guard<std::mutex> lock(mutex);
          keep_first(failure, read.row + done / row_bytes, error);
          break;
        }
        done += got;
      }
    }
  };
  std::vector<std::thread> workers;
  try {
    for (int64_t t = 1; t < std::min<int64_t>(threads, reads.size()); ++t) workers.emplace_back(work);
  } catch (const std::system_error&) {  // fewer threads do the same work
  } catch (const std::bad_alloc&) {
  }
  work();
  for (auto& worker : workers) worker.join();
}

#ifdef FASTLATENT_IO_URING

// The two rings that the kernel shares with us, for one call: no state outlives it, so a fork is safe. Set up and taken
// down in 20 to 40 us, beside the milliseconds that a batch from a disk takes.
class Ring {
 public:
  explicit Ring(unsigned entries) {
    io_uring_params params{};
    fd_ = static_cast<int>(syscall(__NR_io_uring_setup, entries, &params));
    if (fd_ < 0) {
      error_ = errno;
      return;
    }
    if (!(params.features & IORING_FEAT_SINGLE_MMAP)) {  // before Linux 5.4; IORING_OP_READ needs 5.6
      error_ = ENOSYS;
      return;
    }
    entries_ = params.sq_entries;
    ring_bytes_ = std::max<size_t>(params.sq_off.array + params.sq_entries * sizeof(unsigned),
                                   params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
    void* ring = map(ring_bytes_, IORING_OFF_SQ_RING);
    void* sqes = map(params.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES);
    ring_ = ring == MAP_FAILED ? nullptr : static_cast<char*>(ring);
    sqes_ = sqes == MAP_FAILED ? nullptr : static_cast<io_uring_sqe*>(sqes);
    if (!ring_ || !sqes_) {
      error_ = errno;
      return;
    }
    sq_tail_ = at(params.sq_off.tail);
    sq_mask_ = *at(params.sq_off.ring_mask);
    sq_array_ = at(params.sq_off.array);
    cq_head_ = at(params.cq_off.head);
    cq_tail_ = at(params.cq_off.tail);
    cq_mask_ = *at(params.cq_off.ring_mask);
    cqes_ = reinterpret_cast<io_uring_cqe*>(ring_ + params.cq_off.cqes);
  }
  ~Ring() {
    if (sqes_) munmap(sqes_, entries_ * sizeof(io_uring_sqe));
    if (ring_) munmap(ring_, ring_bytes_);
    if (fd_ >= 0) close(fd_);
  }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  int error() const { return error_; }
  unsigned entries() const { return entries_; }

  void queue(const Read& read, int64_t done, uint64_t number) {
    const unsigned tail = *sq_tail_;
    io_uring_sqe& sqe = sqes_[tail & sq_mask_];
    sqe = io_uring_sqe{};
    sqe.opcode = IORING_OP_READ;
    sqe.fd = read.fd;
    sqe.addr = reinterpret_cast<uint64_t>(read.to + done);
    sqe.len = static_cast<unsigned>(std::min(read.bytes - done, int64_t{1} << 30));
    sqe.off = static_cast<uint64_t>(read.offset + done);
    sqe.user_data = number;
    sq_array_[tail & sq_mask_] = tail & sq_mask_;
    __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
  }

  // Hands over `queued` entries and waits for one completion at least; how many were taken, or -errno.
  int enter(unsigned queued) {
    const int64_t taken = syscall(__NR_io_uring_enter, fd_, queued, 1u, IORING_ENTER_GETEVENTS, nullptr, 0);
    return taken < 0 ? -errno : static_cast<int>(taken);
  }

  bool next(io_uring_cqe* cqe) {
    const unsigned head = *cq_head_;
    if (head == __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE)) return false;
    *cqe = cqes_[head & cq_mask_];
    __atomic_store_n(cq_head_, head + 1, __ATOMIC_RELEASE);
    return true;
  }

 private:
  void* map(size_t bytes, int64_t offset) {
    return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, offset);
  }
  unsigned* at(unsigned offset) { return reinterpret_cast<unsigned*>(ring_ + offset); }

  int fd_ = -1, error_ = 0;
  unsigned entries_ = 0;
  size_t ring_bytes_ = 0;
  char* ring_ = nullptr;
  io_uring_sqe* sqes_ = nullptr;
  unsigned *sq_tail_ = nullptr, *sq_array_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
  unsigned sq_mask_ = 0, cq_mask_ = 0;
  io_uring_cqe* cqes_ = nullptr;
};

void read_by_ring(const std::vector<Read>& reads, int64_t rows, int64_t row_bytes, int64_t depth, int64_t* failure) {
  Ring ring(static_cast<unsigned>(std::min<int64_t>(depth, 4096)));
  if (ring.error()) {
    failure[0] = rows;
    failure[1] = ring.error();
    return;
  }
  std::vector<int64_t> done(reads.size(), 0);
  std::vector<size_t> again;  // short reads, to be gone on with
  again.reserve(ring.entries());
  size_t next = 0;
  unsigned in_flight = 0, queued = 0;  // in_flight: those queued among them
  for (;;) {
    while (in_flight < ring.entries() && (!again.empty() || next < reads.size())) {
      size_t j = next;
      if (again.empty()) {
        ++next;
      } else {
        j = again.back();
        again.pop_back();
      }
      ring.queue(reads[j], done[j], j);
      ++in_flight;
      ++queued;
    }
    if (!in_flight) return;
    const int taken = ring.enter(queued);
    if (taken >= 0) {
      queued -= static_cast<unsigned>(taken);
    } else if (in_flight == queued && taken != -EINTR && taken != -EAGAIN && taken != -EBUSY) {
      // Refused, and the kernel holds none of our addresses: until then the loop goes on to collect what is under way.
      failure[0] = rows;
      failure[1] = -taken;
      return;
    }
    io_uring_cqe cqe;
    while (ring.next(&cqe)) {
      --in_flight;
      const size_t j = cqe.user_data;
      if (cqe.res > 0) {
        done[j] += cqe.res;
        if (done[j] < reads[j].bytes) again.push_back(j);
      } else if (cqe.res == -EINTR || cqe.res == -EAGAIN) {
        again.push_back(j);
      } else {
        keep_first(failure, reads[j].row + done[j] / row_bytes, -cqe.res);
      }
    }
  }
}

#else

void read_by_ring(const std::vector<Read>&, int64_t rows, int64_t, int64_t, int64_t* failure) {
  failure[0] = rows;
  failure[1] = ENOSYS;
}

#endif

}  // namespace

int fastlatent_read_rows_cpu(const int64_t* files, int64_t file_count, const int64_t* shard_index,
                             const int64_t* row_index, int64_t rows, int64_t row_bytes, void* out, int64_t threads,
                             int64_t depth, int64_t* failure) {
  failure[0] = -1;
  failure[1] = 0;
  if (!in_range(files, file_count, 3, shard_index, row_index, rows)) return FASTLATENT_BAD_INDEX;
  try {
    const auto reads = plan_reads(files, shard_index, row_index, rows, row_bytes, static_cast<char*>(out));
    if (depth > 0) {
      read_by_ring(reads, rows, row_bytes, depth, failure);
    } else {
      read_by_threads(reads, row_bytes, threads, failure);
    }
  } catch (const std::bad_alloc&) {
    return FASTLATENT_NO_MEMORY;
  }
  return FASTLATENT_OK;
}

int fastlatent_populate_rows_cpu(const int64_t* table, int64_t shard_count, const int64_t* shard_index,
                                 const int64_t* row_index, int64_t rows, int64_t row_bytes, int64_t* failure) {
  failure[0] = -1;
  failure[1] = 0;
  if (!in_range(table, shard_count, 2, shard_index, row_index, rows)) return FASTLATENT_BAD_INDEX;
  if (row_bytes == 0) return FASTLATENT_OK;
  struct Range {
    int64_t begin, end, row;
  };
  try {
    std::vector<Range> ranges;
    ranges.reserve(rows);
    const int64_t page = page_bytes();
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t begin = table[2 * shard_index[i]] + row_index[i] * row_bytes;
      ranges.push_back({begin / page * page, (begin + row_bytes + page - 1) / page * page, i});
    }
    std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    size_t last = 0;
    for (size_t j = 1; j < ranges.size(); ++j) {  // neighbours and overlaps become one
      if (ranges[j].begin <= ranges[last].end) {
        ranges[last].end = std::max(ranges[last].end, ranges[j].end);
        ranges[last].row = std::min(ranges[last].row, ranges[j].row);
      } else {
        ranges[++last] = ranges[j];
      }
    }
    ranges.resize(rows ? last + 1 : 0);
    // All are asked for before the first is waited for: the disk sees the whole batch.
    for (const Range& r : ranges) madvise(reinterpret_cast<void*>(r.begin), r.end - r.begin, MADV_WILLNEED);
    for (const Range& r : ranges) {
      if (madvise(reinterpret_cast<void*>(r.begin), r.end - r.begin, MADV_POPULATE_READ) == 0) continue;
      if (errno == EINVAL) break;  // before Linux 5.14
      keep_first(failure, r.row, errno);
    }
  } catch (const std::bad_alloc&) {
    return FASTLATENT_NO_MEMORY;
  }
  return FASTLATENT_OK;
}

int fastlatent_count_resident_cpu(int64_t address, int64_t bytes, int64_t* counts) {
  counts[0] = counts[1] = 0;
  constexpr int64_t kPages = 4096;
  unsigned char resident[kPages];
  const int64_t page = page_bytes(), end = (address + bytes + page - 1) / page * page;
  for (int64_t at = address / page * page; at < end; at += kPages * page) {
    const int64_t pages = std::min(kPages, (end - at) / page);
    if (mincore(reinterpret_cast<void*>(at), pages * page, resident) != 0) return FASTLATENT_NO_MEMORY;
    for (int64_t i = 0; i < pages; ++i) counts[0] += resident[i] & 1;
    counts[1] += pages;
  }
  return FASTLATENT_OK;
}

int fastlatent_advise_random_cpu(int64_t address, int64_t bytes) {
  const int64_t page = page_bytes();
  const int64_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_RANDOM);  // advice: no error matters
  return FASTLATENT_OK;
}
