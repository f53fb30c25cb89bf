// list_files: every file below a folder, with its size and time, in the order of the paths' bytes
#include "../fastlatent.h"

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace {

struct Folder;

struct Entry {
  size_t name;  // where it begins in Folder::names
  uint32_t length;
  int64_t size;
  int64_t mtime_ns;
  int error;  // errno why it cannot be read, or listed
  bool is_folder;
  Folder* folder;  // null where it cannot be listed, or runs through itself
};

struct Folder {
  const Folder* parent;
  std::string path;  // below the root, and the root's own begins it
  dev_t device;
  ino_t inode;
  std::string names;
  std::vector<Entry> entries;

  const char* name(const Entry& entry) const { return names.data() + entry.name; }
};

// A folder's name counts as if it ended in "/": then the order within folders is that of whole paths. 0 ends a file's.
bool precedes(const Folder& folder, const Entry& a, const Entry& b) {
  const uint32_t shared = std::min(a.length, b.length);
  const int order = std::memcmp(folder.name(a), folder.name(b), shared);
  if (order != 0) return order < 0;
  const auto next = [&](const Entry& entry) -> int {
    if (entry.length > shared) return static_cast<unsigned char>(folder.name(entry)[shared]);
    return entry.is_folder ? '/' : 0;
  };
  return next(a) < next(b);
}

int64_t mtime_ns(const struct stat& status) {
#if defined(__APPLE__)
  const timespec time = status.st_mtimespec;
#else
  const timespec time = status.st_mtim;
#endif
  return static_cast<int64_t>(time.tv_sec) * 1000000000 + time.tv_nsec;
}

class Walk {
 public:
  // errno where the root itself cannot be listed.
  int run(const char* root, int64_t threads) {
    struct stat status;
    if (stat(root, &status) != 0) return errno;
    add(nullptr, root, status);
    if (const int error = list(*folders_.front())) return error;
    std::vector<std::thread> workers;
    try {
      for (int64_t i = 1; i < threads; ++i) workers.emplace_back([this] { work(); });
    } catch (const std::system_error&) {  // fewer threads do the same work
    } catch (const std::bad_alloc&) {
    }
    work();
    for (std::thread& worker : workers) worker.join();
    return out_of_memory_ ? ENOMEM : 0;
  }

  const Folder& root() const { return *folders_.front(); }

 private:
  Folder* add(const Folder* parent, std::string path, const struct stat& status) {
    auto folder = std::make_unique<Folder>();
    folder->parent = parent;
    folder->path = std::move(path);
    folder->device = status.st_dev;
    folder->inode = status.st_ino;
    const std::lock_guard<std::mutex> hold(mutex_);
    folders_.push_back(std::move(folder));
    return folders_.back().get();
  }

  // Folders are taken until none waits and none is being listed. A folder's entry in its parent is where an error goes.
  void work() {
    std::unique_lock<std::mutex> hold(mutex_);
    while (true) {
      wake_.wait(hold, [this] { return !waiting_.empty() || busy_ == 0 || out_of_memory_; });
      if (waiting_.empty() || out_of_memory_) break;
      Entry* entry = waiting_.back();
      waiting_.pop_back();
      ++busy_;
      hold.unlock();
      bool failed = false;
      try {
        entry->error = list(*entry->folder);
      } catch (const std::bad_alloc&) {
        failed = true;
      }
      hold.lock();
      out_of_memory_ |= failed;
      --busy_;
      wake_.notify_all();
    }
  }

  int list(Folder& folder) {
    DIR* directory = opendir(folder.path.c_str());
    if (directory == nullptr) return errno;
    const std::unique_ptr<DIR, int (*)(DIR*)> close(directory, closedir);
    const int descriptor = dirfd(directory);
    int error = 0;
    while (true) {
      errno = 0;
      const dirent* found = readdir(directory);
      if (found == nullptr) {
        error = errno;
        break;
      }
      if (found->d_name[0] != '.') look(folder, descriptor, *found);
    }
    std::sort(folder.entries.begin(), folder.entries.end(),
              [&](const Entry& a, const Entry& b) { return precedes(folder, a, b); });
    std::vector<Entry*> below;
    for (Entry& entry : folder.entries)
      if (entry.folder != nullptr) below.push_back(&entry);
    const std::lock_guard<std::mutex> hold(mutex_);
    waiting_.insert(waiting_.end(), below.rbegin(), below.rend());
    wake_.notify_all();
    return error;
  }

  void look(Folder& folder, int descriptor, const dirent& found) {
    Entry entry{};
    struct stat status;
    if (fstatat(descriptor, found.d_name, &status, 0) != 0) {
      entry.error = errno;
      // Without a link in between, a name that is gone was removed just now.
      if (entry.error == ENOENT && fstatat(descriptor, found.d_name, &status, AT_SYMLINK_NOFOLLOW) != 0) return;
    } else if (S_ISDIR(status.st_mode)) {
      entry.is_folder = true;
      if (!runs_through(folder, status)) entry.folder = add(&folder, folder.path + "/" + found.d_name, status);
    } else if (S_ISREG(status.st_mode)) {
      entry.size = status.st_size;
      entry.mtime_ns = mtime_ns(status);
      // Whoever it is, may read what all may read; the kernel is asked about the others only.
      constexpr mode_t kAll = S_IRUSR | S_IRGRP | S_IROTH;
      if ((status.st_mode & kAll) != kAll && faccessat(descriptor, found.d_name, R_OK, AT_EACCESS) != 0)
        entry.error = errno;
    } else {
      return;  // a pipe, a socket, a device
    }
    entry.name = folder.names.size();
    entry.length = static_cast<uint32_t>(std::strlen(found.d_name));
    folder.names.append(found.d_name, entry.length);
    folder.entries.push_back(entry);
  }

  static bool runs_through(const Folder& folder, const struct stat& status) {
    for (const Folder* one = &folder; one != nullptr; one = one->parent)
      if (one->device == status.st_dev && one->inode == status.st_ino) return true;
    return false;
  }

  std::deque<std::unique_ptr<Folder>> folders_;
  std::vector<Entry*> waiting_;
  std::mutex mutex_;
  std::condition_variable wake_;
  int busy_ = 0;
  bool out_of_memory_ = false;
};

// visit(folder, entry) for every entry below the root in key order; a stack, since a path may have 2048 levels.
template <class Visit>
void in_order(const Folder& root, Visit visit) {
  std::vector<std::pair<const Folder*, size_t>> stack{{&root, 0}};
  while (!stack.empty()) {
    const Folder* folder = stack.back().first;
    if (stack.back().second == folder->entries.size()) {
      stack.pop_back();
      continue;
    }
    const Entry& entry = folder->entries[stack.back().second++];
    visit(*folder, entry);
    if (entry.folder != nullptr) stack.emplace_back(entry.folder, 0);
  }
}

}  // namespace

int fastlatent_list_files_cpu(const char* root, int64_t threads, int64_t* listing) {
  std::fill(listing, listing + 4, 0);
  try {
    auto walk = std::make_unique<Walk>();
    const int error = walk->run(root, threads);
    if (error == ENOMEM) return FASTLATENT_NO_MEMORY;
    listing[3] = error;
    if (error) return FASTLATENT_OK;
    const size_t prefix = walk->root().path.size() + 1;
    in_order(walk->root(), [&](const Folder& folder, const Entry& entry) {
      listing[1] += 1;
      listing[2] += static_cast<int64_t>(folder.path.size() + 1 - prefix + entry.length);
    });
    listing[0] = reinterpret_cast<int64_t>(walk.release());
  } catch (const std::bad_alloc&) {
    return FASTLATENT_NO_MEMORY;
  }
  return FASTLATENT_OK;
}

int fastlatent_take_listing_cpu(int64_t handle, void* paths, int64_t* offsets, int64_t* sizes, int64_t* mtimes_ns,
                                int64_t* states) {
  const std::unique_ptr<const Walk> walk(reinterpret_cast<const Walk*>(handle));
  char* const begin = static_cast<char*>(paths);
  char* to = begin;
  *offsets++ = 0;
  try {
    const size_t prefix = walk->root().path.size() + 1;
    in_order(walk->root(), [&](const Folder& folder, const Entry& entry) {
      if (folder.parent != nullptr) {
        to = std::copy(folder.path.begin() + prefix, folder.path.end(), to);
        *to++ = '/';
      }
      to = std::copy_n(folder.name(entry), entry.length, to);
      *offsets++ = to - begin;
      *sizes++ = entry.size;
      *mtimes_ns++ = entry.mtime_ns;
      *states++ = entry.is_folder ? -1 - entry.error : entry.error;
    });
  } catch (const std::bad_alloc&) {
    return FASTLATENT_NO_MEMORY;
  }
  return FASTLATENT_OK;
}
