// row_statistics, finite_rows: what the store records of its rows, and whether a row may be stored
//
// Values become float64 a tile at a time, in the first-level cache: one pass over memory, two over the tile (mean, then
// squared distances). A tile is eight lanes wide, and a lane's numbers are its own until lanes and tiles are merged in
// order, so no sum depends on the instruction set (CMakeLists.txt forbids fused products here).
#include "../dtype.h"

#include <algorithm>
#include <limits>

// The hot loops, compiled once for each vector width; the loader picks by the CPU. Only polynomials gain from AVX-512
// (moments of float16 take 610 us/MB for 850); the others were 5 to 25 % slower with it than with AVX2.
#if defined(__x86_64__) && defined(__GLIBC__)
#define FASTLATENT_CLONES __attribute__((target_clones("avx2", "default")))
#define FASTLATENT_WIDE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#define FASTLATENT_VECTOR_BYTES 32
#else
#define FASTLATENT_CLONES
#define FASTLATENT_WIDE_CLONES
#define FASTLATENT_VECTOR_BYTES 16
#endif

namespace {

using fastlatent::BFloat16;
using fastlatent::Float16;

constexpr int64_t kLanes = 8;
// Where the CPU's vectors are shorter than the type, GCC compares element by element: AVX2 took seven times as long
// with 64 bytes.
typedef double Doubles __attribute__((vector_size(FASTLATENT_VECTOR_BYTES)));
constexpr int64_t kWide = sizeof(Doubles) / sizeof(double);

// Values of a tile: 16 KiB of float64, half of the first-level cache.
constexpr int64_t kTile = 2048;
// Channels of a tile where they lie side by side, 32 rows of them. Half and twice as many took 10 and 20 % longer.
constexpr int64_t kTogether = 64;
// Values whose exponents are looked at before the first one that is not finite ends the row.
constexpr int64_t kLook = 4096;

// Rows are read from mapped files, at any address.
template <class T>
inline T load(const char* from, int64_t i) {
  T value;
  std::memcpy(&value, from + i * sizeof value, sizeof value);
  return value;
}

// Where a tile's values come from and go to, as float64: `rows` rows of `count`, these many elements apart.
struct Block {
  int64_t begin, rows, stride, count;
  double* to;
  int64_t to_stride;
};

// What lies behind a row is read soon, but no hardware prefetcher sees it coming where rows are short and far apart:
// channels of 16 values took 345 us/MB without this, 140 with it.
inline void fetch(const char* behind) {
  __builtin_prefetch(behind);
  __builtin_prefetch(behind + 64);
}

template <class T>
inline void widen(const Block& block, const void* values) {
  for (int64_t row = 0; row < block.rows; ++row) {
    const char* from = static_cast<const char*>(values) + (block.begin + row * block.stride) * sizeof(T);
    fetch(from + block.count * sizeof(T));
    double* __restrict to = block.to + row * block.to_stride;
    int64_t i = 0;
    for (; i + kTogether <= block.count; i += kTogether) {
      for (int64_t k = 0; k < kTogether; ++k) to[i + k] = load<T>(from, i + k);
    }
    for (; i < block.count; ++i) to[i] = load<T>(from, i);
  }
}

FASTLATENT_CLONES void widen_f32(const Block& block, const void* values, const float*, int64_t) {
  widen<float>(block, values);
}

FASTLATENT_CLONES void widen_bf16(const Block& block, const void* values, const float*, int64_t) {
  widen<BFloat16>(block, values);
}

FASTLATENT_CLONES void widen_f16(const Block& block, const void* values, const float*, int64_t) {
  widen<Float16>(block, values);
}

// Each row has one scale. The product is exact: 7 bits times 24.
FASTLATENT_CLONES void widen_i8(const Block& block, const void* values, const float* scale, int64_t run) {
  for (int64_t row = 0; row < block.rows; ++row) {
    const int64_t begin = block.begin + row * block.stride;
    const char* from = static_cast<const char*>(values) + begin;
    fetch(from + block.count);
    const double factor = scale[begin / run];
    double* __restrict to = block.to + row * block.to_stride;
    int64_t i = 0;
    for (; i + kTogether <= block.count; i += kTogether) {
      for (int64_t k = 0; k < kTogether; ++k) to[i + k] = load<int8_t>(from, i + k) * factor;
    }
    for (; i < block.count; ++i) to[i] = load<int8_t>(from, i) * factor;
  }
}

// x = exp(clamp(x, -30, 20)); 0.97 ulp off were seen. exp(x) = 2^n exp(r), |r| <= ln(2) / 2, and there Taylor's series
// to r^13 errs by 4e-18. A NaN passes the comparisons, and then every step.
FASTLATENT_WIDE_CLONES void exponentials(double* x, int64_t count) {
  // 1 / k!, k = 13 ... 2
  constexpr double kSeries[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                1.0 / 120,        1.0 / 24,        1.0 / 6,        1.0 / 2};
  for (int64_t i = 0; i < count; ++i) {
    double v = x[i];
    v = v < -30.0 ? -30.0 : v;
    v = v > 20.0 ? 20.0 : v;
    // Adding 1.5 * 2^52 rounds to an integer n, whose bits are then the sum's lowest.
    const double sum = v * 0x1.71547652b82fep+0 + 0x1.8p+52;
    const double n = sum - 0x1.8p+52;
    // ln 2 in two parts; the upper one has 33 bits, so its product with n is exact.
    const double r = (v - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
    double p = kSeries[0];
#pragma GCC unroll 11
    for (int k = 1; k < 12; ++k) p = p * r + kSeries[k];
    p = 1.0 + (r + r * r * p);
    uint64_t bits;
    std::memcpy(&bits, &sum, sizeof bits);
    bits = (bits + 1023) << 52;
    double power;
    std::memcpy(&power, &bits, sizeof power);
    x[i] = p * power;
  }
}

// Of each lane's values. The mean is the sum of two numbers, of which the second is what the first one's rounding left.
struct Lanes {
  double mean[kLanes], rest[kLanes], m2[kLanes], low[kLanes], high[kLanes];
};

// Lane l has the values x[stride * i + l], i < count; count >= 1.
FASTLATENT_CLONES void measure(const double* x, int64_t count, int64_t stride, Lanes* out) {
  for (int64_t side = 0; side < kLanes; side += kWide, x += kWide) {
    Doubles v;
    std::memcpy(&v, x, sizeof v);
    // Four sums each, so that an addition need not wait for the one before.
    Doubles sum[4] = {}, rest[4] = {}, square[4] = {}, low[4] = {v, v, v, v}, high[4] = {v, v, v, v};
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < 4; ++k) {
        std::memcpy(&v, x + stride * (i + k), sizeof v);
        sum[k] += v;
        low[k] = v < low[k] ? v : low[k];
        high[k] = v > high[k] ? v : high[k];
      }
    }
    for (; i < count; ++i) {
      std::memcpy(&v, x + stride * i, sizeof v);
      sum[0] += v;
      low[0] = v < low[0] ? v : low[0];
      high[0] = v > high[0] ? v : high[0];
    }
    const Doubles mean = ((sum[0] + sum[1]) + (sum[2] + sum[3])) / static_cast<double>(count);
    for (i = 0; i + 4 <= count; i += 4) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < 4; ++k) {
        std::memcpy(&v, x + stride * (i + k), sizeof v);
        v -= mean;
        rest[k] += v;
        square[k] += v * v;
      }
    }
    for (; i < count; ++i) {
      std::memcpy(&v, x + stride * i, sizeof v);
      v -= mean;
      rest[0] += v;
      square[0] += v * v;
    }
    const Doubles left = ((rest[0] + rest[1]) + (rest[2] + rest[3])) / static_cast<double>(count);
    const Doubles m2 = (square[0] + square[1]) + (square[2] + square[3]);
    for (int k = 1; k < 4; ++k) {
      low[0] = low[k] < low[0] ? low[k] : low[0];
      high[0] = high[k] > high[0] ? high[k] : high[0];
    }
    std::memcpy(out->mean + side, &mean, sizeof mean);
    std::memcpy(out->rest + side, &left, sizeof left);
    std::memcpy(out->m2 + side, &m2, sizeof m2);
    std::memcpy(out->low + side, &low[0], sizeof m2);
    std::memcpy(out->high + side, &high[0], sizeof m2);
  }
}

// Of each channel; the means as distances from pivots near them, so that the squares of their differences keep their
// digits far from zero.
struct Statistics {
  double *mean, *m2, *low, *high, *pivot;

  // A lane of `count` values joins the `seen` values of a channel. Chan, Golub, LeVeque (1979).
  void merge(int64_t channel, int64_t seen, const Lanes& lanes, int64_t lane, int64_t count) const {
    const double share = static_cast<double>(count) / static_cast<double>(seen + count);
    if (!seen) pivot[channel] = lanes.mean[lane];
    const double delta = (lanes.mean[lane] - pivot[channel] + lanes.rest[lane]) - mean[channel];
    mean[channel] += delta * share;
    m2[channel] += lanes.m2[lane] + delta * delta * (static_cast<double>(seen) * share);
    low[channel] = std::min(low[channel], lanes.low[lane]);
    high[channel] = std::max(high[channel], lanes.high[lane]);
  }
};

struct Task {
  const void* values;
  const float* scale;
  Statistics out;
  int64_t first, last, channels, inner, run, logvars;
  void (*widen)(const Block&, const void*, const float*, int64_t);

  void read(const Block& block) const { widen(block, values, scale, run); }
};

// A channel's values lie side by side, `inner` of them: it has its tiles for itself.
void measure_planes(const Task& task) {
  alignas(64) double x[kTile] = {};
  Lanes lanes;
  const int64_t together = std::max<int64_t>(1, kTile / task.inner), stride = task.channels * task.inner;
  for (int64_t row = task.first; row < task.last; row += together) {
    const int64_t rows = std::min(together, task.last - row);
    for (int64_t channel = 0; channel < task.channels; ++channel) {
      int64_t seen = (row - task.first) * task.inner;
      for (int64_t begin = 0; begin < task.inner; begin += kTile) {  // one piece but where a row alone is too long
        const int64_t piece = std::min(kTile, task.inner - begin);
        task.read({row * stride + channel * task.inner + begin, rows, stride, piece, x, piece});
        const int64_t count = rows * piece, whole = count / kLanes;
        if (channel >= task.logvars) exponentials(x, count);
        if (whole) {
          measure(x, whole, kLanes, &lanes);
          for (int64_t lane = 0; lane < kLanes; ++lane, seen += whole) {
            task.out.merge(channel, seen, lanes, lane, whole);
          }
        }
        if (count % kLanes) {  // one vector more; of its lanes only the first ones count
          measure(x + whole * kLanes, 1, kLanes, &lanes);
          for (int64_t lane = 0; lane < count % kLanes; ++lane, ++seen) task.out.merge(channel, seen, lanes, lane, 1);
        }
      }
    }
  }
}

// Channels lie side by side: a lane is a channel.
void measure_columns(const Task& task) {
  alignas(64) double x[kTile] = {};
  Lanes lanes;
  for (int64_t row = task.first; row < task.last; row += kTile / kTogether) {
    const int64_t rows = std::min(kTile / kTogether, task.last - row);
    for (int64_t begin = 0, end; begin < task.channels; begin = end) {
      end = std::min(begin + kTogether, begin < task.logvars ? task.logvars : task.channels);
      const int64_t stride = (end - begin + kLanes - 1) / kLanes * kLanes;
      task.read({row * task.channels + begin, rows, task.channels, end - begin, x, stride});
      if (begin >= task.logvars) exponentials(x, rows * stride);
      for (int64_t channel = begin; channel < end; channel += kLanes) {
        measure(x + channel - begin, rows, stride, &lanes);
        for (int64_t lane = 0; lane < std::min(kLanes, end - channel); ++lane) {
          task.out.merge(channel + lane, row - task.first, lanes, lane, rows);
        }
      }
    }
  }
}

// Adding one to an exponent of all ones carries into the sign's bit, which was cleared.
template <class T>
inline bool all_finite(const char* row, int64_t count, T one) {
  constexpr T kSign = static_cast<T>(T{1} << (8 * sizeof(T) - 1));
  for (int64_t begin = 0; begin < count; begin += kLook) {
    const char* from = row + begin * sizeof(T);
    const int64_t some = std::min(kLook, count - begin);
    T carry = 0;
    for (int64_t i = 0; i < some; ++i) carry |= static_cast<T>((load<T>(from, i) & ~kSign) + one);
    if (carry & kSign) return false;
  }
  return true;
}

FASTLATENT_CLONES bool finite_f32(const char* row, int64_t count) {
  return all_finite<uint32_t>(row, count, 0x00800000u);
}

FASTLATENT_CLONES bool finite_bf16(const char* row, int64_t count) { return all_finite<uint16_t>(row, count, 0x0080u); }

FASTLATENT_CLONES bool finite_f16(const char* row, int64_t count) { return all_finite<uint16_t>(row, count, 0x0400u); }

}  // namespace

int fastlatent_row_statistics_cpu(const void* values, const float* scale, double* out, int64_t first, int64_t last,
                                  int64_t channels, int64_t inner, int64_t run, int64_t logvars, int64_t dtype) {
  const Statistics statistics{out, out + channels, out + 2 * channels, out + 3 * channels, out + 4 * channels};
  std::fill_n(out, 2 * channels, 0.0);
  std::fill_n(statistics.low, channels, std::numeric_limits<double>::infinity());
  std::fill_n(statistics.high, channels, -std::numeric_limits<double>::infinity());
  Task task{values, scale, statistics, first, last, channels, inner, run, logvars, nullptr};
  if (scale) {
    task.widen = widen_i8;
  } else {
    switch (dtype) {
      case FASTLATENT_F32: task.widen = widen_f32; break;
      case FASTLATENT_BF16: task.widen = widen_bf16; break;
      case FASTLATENT_F16: task.widen = widen_f16; break;
      default: return FASTLATENT_BAD_DTYPE;
    }
  }
  // A scale for each channel alone cannot be a tile's row's.
  if (inner == 1 && (!scale || run % channels == 0)) {
    measure_columns(task);
  } else {
    measure_planes(task);
  }
  for (int64_t i = 0; i < channels; ++i) out[i] += statistics.pivot[i];
  return FASTLATENT_OK;
}

int fastlatent_finite_rows_cpu(const int64_t* table, int64_t rows, int64_t dtype, void* finite) {
  bool (*check)(const char*, int64_t);
  switch (dtype) {
    case FASTLATENT_F32: check = finite_f32; break;
    case FASTLATENT_BF16: check = finite_bf16; break;
    case FASTLATENT_F16: check = finite_f16; break;
    default: return FASTLATENT_BAD_DTYPE;
  }
  for (int64_t i = 0; i < rows; ++i) {
    static_cast<bool*>(finite)[i] = check(reinterpret_cast<const char*>(table[2 * i]), table[2 * i + 1]);
  }
  return FASTLATENT_OK;
}
