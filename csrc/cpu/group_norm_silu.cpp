// group_norm_silu: GroupNorm and SiLU in two reads and one write of the image, contiguous or channels_last
//
// Sums are float64: one pass gives mean and variance without cancellation that float32 pixels could show (means up to
// 10^6 deviations), and memory is slower than the conversion. Everything after them is float32 and rounded once. The
// units of work and the order within them are fixed: the same bits for any number of threads.
#include "../dtype.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

// The hot loops, compiled once for each vector width; the loader picks by the CPU.
#if defined(__x86_64__) && defined(__GLIBC__)
#define FASTLATENT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FASTLATENT_CLONES
#endif

namespace {

using fastlatent::BFloat16;
using fastlatent::Float16;
using fastlatent::bits_from_float;
using fastlatent::float_from_bits;

// Elements widened at a time: 16 KiB of float32, half of the first-level cache.
constexpr int64_t kRun = 4096;
// Elements of a channels_last image that one unit of work has.
constexpr int64_t kUnit = 65536;
// Starting a thread takes 20 us, in which one thread passes over about this many elements.
constexpr int64_t kElementsPerThread = 32768;

// Vectors of the compiler, not loops it may vectorise: it must not reorder a sum by itself.
typedef float Floats __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(64)));

struct Sums {
  double sum = 0, square = 0;
};

// What a channel's pixels go through: (x - pivot) * factor + shift. The pivot is the mean in float32. Far from zero its
// rounding would move all pixels alike, so the shift has what it left.
struct Affine {
  float pivot, factor, shift;
};

FASTLATENT_CLONES void add_run(const float* x, int64_t count, Sums* sums) {
  Doubles sum[2] = {}, square[2] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    for (int half = 0; half < 2; ++half) {
      Floats part;
      std::memcpy(&part, x + i + 8 * half, sizeof part);
      const Doubles wide = __builtin_convertvector(part, Doubles);
      sum[half] += wide;
      square[half] += wide * wide;
    }
  }
  const Doubles all_sum = sum[0] + sum[1], all_square = square[0] + square[1];
  for (int lane = 0; lane < 8; ++lane) {
    sums->sum += all_sum[lane];
    sums->square += all_square[lane];
  }
  for (; i < count; ++i) {
    const double wide = x[i];
    sums->sum += wide;
    sums->square += wide * wide;
  }
}

// sum[c] and square[c] of rows of channels. Four rows at a time: a quarter of the traffic of the sums.
FASTLATENT_CLONES void add_rows(const float* x, int64_t rows, int64_t channels, double* __restrict sum,
                                double* __restrict square) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    const float *p = x + row * channels, *q = p + channels, *r = q + channels, *s = r + channels;
    for (int64_t i = 0; i < channels; ++i) {
      const double a = p[i], b = q[i], c = r[i], d = s[i];
      sum[i] += (a + b) + (c + d);
      square[i] += (a * a + b * b) + (c * c + d * d);
    }
  }
  for (; row < rows; ++row) {
    const float* p = x + row * channels;
    for (int64_t i = 0; i < channels; ++i) {
      const double a = p[i];
      sum[i] += a;
      square[i] += a * a;
    }
  }
}

// y / (1 + exp(-y)), the exponential by a polynomial of degree 6 between powers of two: 2 of its last place. A NaN
// passes the comparisons, and then every step.
inline __attribute__((always_inline)) float silu_of(float y) {
  float h = -y;
  h = h > 88.0f ? 88.0f : h;  // 2^127
  h = h < -87.0f ? -87.0f : h;
  // Adding 1.5 * 2^23 rounds to an integer n, whose bits are then the sum's lowest.
  const float sum = h * 1.44269504f + 12582912.0f;
  const float n = sum - 12582912.0f;
  float r = h - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 0.0013950486f;
  p = p * r + 0.008368888f;
  p = p * r + 0.041666206f;
  p = p * r + 0.16666518f;
  p = p * r + 0.5f;
  p = 1.0f + (r + r * r * p);
  return y / (1.0f + p * float_from_bits((bits_from_float(sum) - 0x4b400000u + 127u) << 23));
}

// One channel's pixels. x and out are equal or apart: every element is read before it is written.
FASTLATENT_CLONES void normalise_run(const float* x, int64_t count, Affine affine, bool silu, float* out) {
  const float pivot = affine.pivot, factor = affine.factor, shift = affine.shift;
  if (silu) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) out[i] = silu_of((x[i] - pivot) * factor + shift);
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) out[i] = (x[i] - pivot) * factor + shift;
  }
}

FASTLATENT_CLONES void normalise_rows(const float* x, int64_t rows, int64_t channels, const float* pivot,
                                      const float* factor, const float* shift, bool silu, float* out) {
  for (int64_t row = 0; row < rows; ++row, x += channels, out += channels) {
    if (silu) {
#pragma GCC ivdep
      for (int64_t c = 0; c < channels; ++c) out[c] = silu_of((x[c] - pivot[c]) * factor[c] + shift[c]);
    } else {
#pragma GCC ivdep
      for (int64_t c = 0; c < channels; ++c) out[c] = (x[c] - pivot[c]) * factor[c] + shift[c];
    }
  }
}

// The elements as float32: where they are, or widened into the buffer.
inline const float* widen(const float* from, int64_t, float*) { return from; }

FASTLATENT_CLONES const float* widen(const BFloat16* from, int64_t count, float* buffer) {
  for (int64_t i = 0; i < count; ++i) buffer[i] = from[i];
  return buffer;
}

FASTLATENT_CLONES const float* widen(const Float16* from, int64_t count, float* buffer) {
  for (int64_t i = 0; i < count; ++i) buffer[i] = from[i];
  return buffer;
}

// Where float32 results go that narrow() then stores in `to`, rounded to nearest even.
inline float* results(float* to, float*) { return to; }
template <class T>
float* results(T*, float* buffer) {
  return buffer;
}

inline void narrow(const float*, int64_t, float*) {}

FASTLATENT_CLONES void narrow(const float* from, int64_t count, BFloat16* to) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_from_float(from[i]);
    const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to[i].bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : nearest);
  }
}

FASTLATENT_CLONES void narrow(const float* from, int64_t count, Float16* to) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_from_float(from[i]), size = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
    // Below 2^-14 a half is a multiple of 2^-24: adding 1/2 rounds to that, into the sum's lowest bits.
    const uint32_t small = bits_from_float(float_from_bits(size) + 0.5f) - 0x3f000000u;
    // 127 - 15 = 112 off the exponent. From 65520 on this is infinity's exponent or more.
    const uint32_t normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
    const uint32_t large = size > 0x7f800000u ? 0x7e00u : std::min(normal, 0x7c00u);
    to[i].bits = static_cast<uint16_t>(sign | (size < 0x38800000u ? small : large));
  }
}

struct Task {
  const float *weight, *bias;
  int64_t batch, channels, pixels, groups;
  double eps;
  bool silu;
};

struct Statistics {
  double mean, rstd;
};

Statistics statistics(const Task& task, const Sums& sums) {
  const double size = static_cast<double>(task.channels / task.groups) * static_cast<double>(task.pixels);
  const double mean = sums.sum / size;
  const double square = sums.square / size - mean * mean;
  const double variance = square < 0 ? 0 : square;  // a NaN stays
  return {mean, 1 / std::sqrt(variance + task.eps)};
}

Affine affine(const Task& task, const Statistics& of, int64_t channel) {
  const float pivot = static_cast<float>(of.mean);
  const double factor = of.rstd * task.weight[channel];
  return {pivot, static_cast<float>(factor), static_cast<float>(task.bias[channel] - (of.mean - pivot) * factor)};
}

// Calls part(unit, thread) for every unit, in contiguous shares.
template <class F>
int share(int64_t units, int64_t threads, F&& part) {
  threads = std::min(threads, units);
  const auto work = [&](int64_t t) {
    for (int64_t unit = units * t / threads; unit < units * (t + 1) / threads; ++unit) part(unit, t);
  };
  std::vector<std::thread> workers;
  int status = FASTLATENT_OK;
  try {
    workers.reserve(threads - 1);
    for (int64_t t = 1; t < threads; ++t) workers.emplace_back(work, t);
    work(0);
  } catch (const std::system_error&) {
    status = FASTLATENT_NO_THREADS;
  }
  for (auto& worker : workers) worker.join();
  return status;
}

// A group is one run of memory, and a unit.
template <class T>
int contiguous(const Task& task, const T* x, T* out, int64_t threads) {
  const int64_t per_group = task.channels / task.groups;
  std::vector<float> buffers(threads * kRun);
  return share(task.batch * task.groups, threads, [&](int64_t unit, int64_t thread) {
    float* buffer = buffers.data() + thread * kRun;
    const int64_t begin = unit * per_group * task.pixels, size = per_group * task.pixels;
    Sums sums;
    for (int64_t i = 0; i < size; i += kRun) {
      const int64_t count = std::min(kRun, size - i);
      add_run(widen(x + begin + i, count, buffer), count, &sums);
    }
    const Statistics found = statistics(task, sums);
    for (int64_t d = 0; d < per_group; ++d) {
      const int64_t from = begin + d * task.pixels;
      const Affine channel = affine(task, found, unit % task.groups * per_group + d);
      for (int64_t i = 0; i < task.pixels; i += kRun) {
        const int64_t count = std::min(kRun, task.pixels - i);
        float* to = results(out + from + i, buffer);
        normalise_run(widen(x + from + i, count, buffer), count, channel, task.silu, to);
        narrow(to, count, out + from + i);
      }
    }
  });
}

// A unit is some rows of pixels of one image: all add to sums, then all are normalised.
template <class T>
int channels_last(const Task& task, const T* x, T* out, int64_t threads) {
  const int64_t channels = task.channels, groups = task.groups, per_group = channels / groups;
  const int64_t rows = std::max<int64_t>(1, kUnit / channels), step = std::max<int64_t>(1, kRun / channels);
  const int64_t chunks = (task.pixels + rows - 1) / rows, units = task.batch * chunks;
  std::vector<Sums> partial(units * groups);
  std::vector<double> all_sums(threads * 2 * channels);
  std::vector<float> all_buffers(threads * (3 + step) * channels);
  // Calls f(first element, rows) for parts of a unit that fit the buffer.
  const auto parts = [&](int64_t unit, auto&& f) {
    const int64_t begin = unit % chunks * rows, end = std::min(task.pixels, begin + rows);
    const int64_t image = unit / chunks * task.pixels;
    for (int64_t row = begin; row < end; row += step) f((image + row) * channels, std::min(step, end - row));
  };
  const int status = share(units, threads, [&](int64_t unit, int64_t thread) {
    double *sum = all_sums.data() + thread * 2 * channels, *square = sum + channels;
    float* buffer = all_buffers.data() + thread * (3 + step) * channels;
    std::fill_n(sum, 2 * channels, 0.0);
    parts(unit, [&](int64_t first, int64_t count) {
      add_rows(widen(x + first, count * channels, buffer), count, channels, sum, square);
    });
    for (int64_t c = 0; c < channels; ++c) {
      Sums& to = partial[unit * groups + c / per_group];
      to.sum += sum[c];
      to.square += square[c];
    }
  });
  if (status != FASTLATENT_OK) return status;
  std::vector<Statistics> found(task.batch * groups);
  for (int64_t i = 0; i < task.batch * groups; ++i) {
    Sums sums;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const Sums& part = partial[(i / groups * chunks + chunk) * groups + i % groups];
      sums.sum += part.sum;
      sums.square += part.square;
    }
    found[i] = statistics(task, sums);
  }
  return share(units, threads, [&](int64_t unit, int64_t thread) {
    float *pivot = all_buffers.data() + thread * (3 + step) * channels, *factor = pivot + channels;
    float *shift = factor + channels, *buffer = shift + channels;
    for (int64_t c = 0; c < channels; ++c) {
      const Affine channel = affine(task, found[unit / chunks * groups + c / per_group], c);
      pivot[c] = channel.pivot;
      factor[c] = channel.factor;
      shift[c] = channel.shift;
    }
    parts(unit, [&](int64_t first, int64_t count) {
      float* to = results(out + first, buffer);
      normalise_rows(widen(x + first, count * channels, buffer), count, channels, pivot, factor, shift, task.silu, to);
      narrow(to, count * channels, out + first);
    });
  });
}

template <class T>
int run(const Task& task, const void* x, void* out, bool last, int64_t threads) {
  const int64_t elements = task.batch * task.channels * task.pixels;
  threads = std::max<int64_t>(1, std::min(threads, elements / kElementsPerThread));
  try {
    if (last) return channels_last(task, static_cast<const T*>(x), static_cast<T*>(out), threads);
    return contiguous(task, static_cast<const T*>(x), static_cast<T*>(out), threads);
  } catch (const std::bad_alloc&) {
    return FASTLATENT_NO_MEMORY;
  }
}

}  // namespace

int fastlatent_group_norm_silu_cpu(const void* x, const float* weight, const float* bias, void* out, int64_t batch,
                                   int64_t channels, int64_t pixels, int64_t groups, double eps, int64_t silu,
                                   int64_t channels_last, int64_t dtype, int64_t threads) {
  const Task task{weight, bias, batch, channels, pixels, groups, eps, silu != 0};
  switch (dtype) {
    case FASTLATENT_F32: return run<float>(task, x, out, channels_last != 0, threads);
    case FASTLATENT_BF16: return run<BFloat16>(task, x, out, channels_last != 0, threads);
    case FASTLATENT_F16: return run<Float16>(task, x, out, channels_last != 0, threads);
    default: return FASTLATENT_BAD_DTYPE;
  }
}
