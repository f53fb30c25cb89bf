// diffusion_head_sample: K solver steps of the whole head for a few rows, which is bound by reading the weights
//
// Threads are started once. Each owns a contiguous part of every weight's rows; barriers separate the products.
#include "../fastlatent.h"
#include "dot_rows.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace fastlatent {
namespace {

// One cache line, and the widest vector.
constexpr int64_t kAlignment = 64;
constexpr int64_t kLineFloats = kAlignment / sizeof(float);

// All threads leave wait() once all have entered it.
class Barrier {
 public:
  explicit Barrier(int64_t threads) : threads_(threads) {}
  void wait() {
    const int64_t round = round_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      waiting_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    spin([&] { return round_.load(std::memory_order_acquire) != round; });
  }
  // A product takes 0.1 to 1 ms. A thread that has waited for a tenth of that may be waiting for one that has no core.
  template <class Done>
  static void spin(Done&& done) {
    for (int64_t tries = 0; !done(); ++tries) {
      if (tries >= kSpins) {
        std::this_thread::yield();
      } else {
#ifdef __x86_64__
        __builtin_ia32_pause();
#endif
      }
    }
  }

 private:
  static constexpr int64_t kSpins = 1000;
  const int64_t threads_;
  std::atomic<int64_t> waiting_{0};
  std::atomic<int64_t> round_{0};
};

struct Slice {
  int64_t begin, end;
};

// The part of thread t of so many output rows, in whole cache lines of float32 outputs.
Slice slice(int64_t count, int64_t t, int64_t threads) {
  const int64_t lines = (count + kLineFloats - 1) / kLineFloats;
  return {std::min(count, lines * t / threads * kLineFloats), std::min(count, lines * (t + 1) / threads * kLineFloats)};
}

struct Head {
  float* state;
  const char* modulations;
  const float *table, *guidance, *noise;
  const void* input_weight;
  const float* input_bias;
  const char* up_weight;
  const float* up_bias;
  const char* down_weight;
  const float* down_bias;
  const void* output_weight;
  const float *output_bias, *up_scale, *down_scale;
  int64_t steps, ways, batch, channels, out_channels, hidden, width, blocks, gated, layer_norm;
  float eps;
  int64_t dtype;
};

// A row of float32 as the next starts: whole cache lines, and one more, so that rows a power of two long do not fall
// into the same sets of the first-level cache.
int64_t padded(int64_t length) { return (length + 2 * kLineFloats - 1) / kLineFloats * kLineFloats; }

class Run {
 public:
  Run(const Head& head, const RowKernels& kernels, int64_t threads)
      : a_(head), kernels_(kernels), threads_(threads), barrier_(threads), rows_(head.ways * head.batch),
        hidden_stride_(padded(head.hidden)), width_stride_(padded(head.width)) {
    const int64_t floats = rows_ * ((2 + threads) * hidden_stride_ + 2 * width_stride_ + head.out_channels);
    const size_t lines = floats * sizeof(float) / kAlignment + 1;
    buffer_.reset(static_cast<float*>(std::aligned_alloc(kAlignment, lines * kAlignment)));
    if (!buffer_) throw std::bad_alloc();
    std::memset(buffer_.get(), 0, floats * sizeof(float));
    residual_ = buffer_.get();
    update_ = residual_ + rows_ * hidden_stride_;
    first_ = update_ + rows_ * hidden_stride_;
    second_ = first_ + rows_ * width_stride_;
    normed_ = second_ + rows_ * width_stride_;
    output_ = normed_ + threads * rows_ * hidden_stride_;
  }

  // All steps, as thread t.
  void steps(int64_t t) {
    const int64_t weight_size = a_.up_scale ? 1 : size_of(a_.dtype);
    const int64_t weight_dtype = a_.up_scale ? kInt8 : a_.dtype;
    const int64_t up_rows = a_.gated ? 2 * a_.width : a_.width;
    const Slice up = slice(a_.width, t, threads_), down = slice(a_.hidden, t, threads_);
    float* normed = normed_ + t * rows_ * hidden_stride_;
    if (t == 0) input();
    barrier_.wait();
    for (int64_t k = 0; k < a_.steps; ++k) {
      for (int64_t i = 0; i < a_.blocks; ++i) {
        // Every thread norms all rows: cheaper than another barrier.
        norm(k, 3 * i, normed);
        const char* weight = a_.up_weight + i * up_rows * a_.hidden * weight_size;
        const float* scale = a_.up_scale ? a_.up_scale + i * up_rows : nullptr;
        const float* bias = a_.up_bias + i * up_rows;
        kernels_.dot(normed, hidden_stride_, rows_, a_.hidden, weight, weight_dtype, scale, bias, up.begin, up.end,
                     first_, width_stride_);
        if (a_.gated) {
          kernels_.dot(normed, hidden_stride_, rows_, a_.hidden, weight + a_.width * a_.hidden * weight_size,
                       weight_dtype, scale ? scale + a_.width : nullptr, bias + a_.width, up.begin, up.end, second_,
                       width_stride_);
        }
        for (int64_t r = 0; r < rows_; ++r) {
          const int64_t at = r * width_stride_ + up.begin;
          kernels_.silu_gate(first_ + at, a_.gated ? second_ + at : nullptr, up.end - up.begin);
        }
        barrier_.wait();
        kernels_.dot(first_, width_stride_, rows_, a_.width, a_.down_weight + i * a_.hidden * a_.width * weight_size,
                     weight_dtype, a_.down_scale ? a_.down_scale + i * a_.hidden : nullptr,
                     a_.down_bias + i * a_.hidden, down.begin, down.end, update_, hidden_stride_);
        for (int64_t r = 0; r < rows_; ++r) {
          const int64_t at = r * hidden_stride_ + down.begin;
          kernels_.add_gated(residual_ + at, modulation(k, r, 3 * i + 2) + down.begin * size_of(a_.dtype), a_.dtype,
                             update_ + at, down.end - down.begin);
        }
        barrier_.wait();
      }
      // The output, the solver and the next input read two small weights: one thread.
      if (t == 0) {
        norm(k, 3 * a_.blocks, normed);
        kernels_.dot(normed, hidden_stride_, rows_, a_.hidden, a_.output_weight, a_.dtype, nullptr, a_.output_bias, 0,
                     a_.out_channels, output_, a_.out_channels);
        fastlatent_solver_step_cpu(a_.state, output_, a_.guidance, a_.table + 16 * k,
                                   a_.noise ? a_.noise + k * a_.batch * a_.channels : nullptr, a_.ways, a_.batch,
                                   a_.channels, a_.out_channels, FASTLATENT_F32, FASTLATENT_F32);
        if (k + 1 < a_.steps) input();
      }
      barrier_.wait();
    }
  }

 private:
  static int64_t size_of(int64_t dtype) { return dtype == FASTLATENT_F32 ? 4 : 2; }

  // Part `part` of the modulations of row r at step k.
  const char* modulation(int64_t k, int64_t r, int64_t part) const {
    return a_.modulations + ((k * rows_ + r) * (3 * a_.blocks + 2) + part) * a_.hidden * size_of(a_.dtype);
  }

  void norm(int64_t k, int64_t part, float* out) const {
    for (int64_t r = 0; r < rows_; ++r) {
      kernels_.norm_modulate(residual_ + r * hidden_stride_, modulation(k, r, part), modulation(k, r, part + 1),
                             a_.dtype, a_.hidden, a_.layer_norm, a_.eps, out + r * hidden_stride_);
    }
  }

  // All ways start from the same x.
  void input() const {
    kernels_.dot(a_.state, a_.channels, a_.batch, a_.channels, a_.input_weight, a_.dtype, nullptr, a_.input_bias, 0,
                 a_.hidden, residual_, hidden_stride_);
    const int64_t way = a_.batch * hidden_stride_;
    for (int64_t w = 1; w < a_.ways; ++w) std::memcpy(residual_ + w * way, residual_, way * sizeof(float));
  }

  struct Free {
    void operator()(float* p) const { std::free(p); }
  };

  const Head a_;
  const RowKernels& kernels_;
  const int64_t threads_;
  Barrier barrier_;
  const int64_t rows_, hidden_stride_, width_stride_;
  std::unique_ptr<float, Free> buffer_;
  // [rows, hidden] twice, [rows, width] twice, [threads, rows, hidden], [rows, out_channels]
  float *residual_, *update_, *first_, *second_, *normed_, *output_;
};

}  // namespace
}  // namespace fastlatent

int fastlatent_diffusion_head_sample_cpu(
    void* state, const void* modulations, const void* table, const void* guidance, const void* noise,
    const void* input_weight, const void* input_bias, const void* up_weight, const void* up_bias,
    const void* down_weight, const void* down_bias, const void* output_weight, const void* output_bias,
    const void* up_scale, const void* down_scale, int64_t steps, int64_t ways, int64_t batch, int64_t channels,
    int64_t out_channels, int64_t hidden, int64_t width, int64_t blocks, int64_t gated, int64_t layer_norm, double eps,
    int64_t dtype, int64_t threads, int64_t lanes) {
  using namespace fastlatent;
  if (dtype != FASTLATENT_F32 && dtype != FASTLATENT_BF16 && dtype != FASTLATENT_F16) return FASTLATENT_BAD_DTYPE;
  const auto floats = [](const void* p) { return static_cast<const float*>(p); };
  const auto bytes = [](const void* p) { return static_cast<const char*>(p); };
  const Head head = {
      static_cast<float*>(state), bytes(modulations), floats(table), floats(guidance), floats(noise),
      input_weight, floats(input_bias), bytes(up_weight), floats(up_bias), bytes(down_weight), floats(down_bias),
      output_weight, floats(output_bias), floats(up_scale), floats(down_scale),
      steps, ways, batch, channels, out_channels, hidden, width, blocks, gated, layer_norm,
      static_cast<float>(eps), dtype};
  threads = std::max<int64_t>(1, threads);
  std::vector<std::thread> workers;
  // Threads begin when all are there: a barrier that waits for one that could not be started would never open.
  enum { kWait, kBegin, kCancel };
  std::atomic<int> signal{kWait};
  int status = FASTLATENT_OK;
  try {
    Run run(head, row_kernels(lanes), threads);
    try {
      workers.reserve(threads - 1);
      for (int64_t t = 1; t < threads; ++t) {
        workers.emplace_back([&run, &signal, t] {
          Barrier::spin([&] { return signal.load(std::memory_order_acquire) != kWait; });
          if (signal.load(std::memory_order_relaxed) == kBegin) run.steps(t);
        });
      }
      signal.store(kBegin, std::memory_order_release);
      run.steps(0);
    } catch (const std::system_error&) {
      signal.store(kCancel, std::memory_order_release);
      status = FASTLATENT_NO_THREADS;
    }
    for (auto& worker : workers) worker.join();
  } catch (const std::bad_alloc&) {
    status = FASTLATENT_NO_MEMORY;
  }
  return status;
}
