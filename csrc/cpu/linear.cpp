// linear: a product of few rows, bound by reading the weight; and the choice of the vector kernels
#include "../fastlatent.h"
#include "dot_rows.h"

#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>

namespace fastlatent {

const RowKernels& row_kernels(int64_t lanes) {
#ifdef __x86_64__
  // Every CPU with AVX2 has F16C.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512 && lanes >= 16) return kRowKernelsAvx512;
  if (avx2 && lanes >= 8) return kRowKernelsAvx2;
#else
  (void)lanes;
#endif
  return kRowKernelsBaseline;
}

}  // namespace fastlatent

int fastlatent_linear_cpu(const void* x, const void* weight, const void* scale, void* out, int64_t rows, int64_t length,
                          int64_t count, int64_t threads) {
  using namespace fastlatent;
  const RowKernels& kernels = row_kernels(16);
  const int64_t dtype = scale ? kInt8 : int64_t{FASTLATENT_F32}, size = scale ? 1 : 4;
  // Starting a thread takes 20 us, in which one thread reads half a MiB.
  threads = std::max<int64_t>(1, std::min(threads, count * length * size / (int64_t{1} << 20)));
  const auto part = [&](int64_t t) {
    kernels.dot(static_cast<const float*>(x), length, rows, length, weight, dtype,
                static_cast<const float*>(scale), nullptr, count * t / threads, count * (t + 1) / threads,
                static_cast<float*>(out), count);
  };
  std::vector<std::thread> workers;
  int status = FASTLATENT_OK;
  try {
    workers.reserve(threads - 1);
    for (int64_t t = 1; t < threads; ++t) workers.emplace_back(part, t);
    part(0);
  } catch (const std::system_error&) {
    status = FASTLATENT_NO_THREADS;
  }
  for (auto& worker : workers) worker.join();
  return status;
}
