// resize: Pillow's two-pass resampling of one image, its bytes and its floats, of the pixels of a window only
//
// uint8: weights rounded to 22 bits behind the point, sums in int32, a rounding to uint8 after each pass, all of it exact in
// any order. float32: products and sums in double, one after the other as Pillow has them (CMakeLists.txt forbids fusing
// them), a rounding to float32 after each pass.
#include "../fastlatent.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

// The hot loops, compiled once for each vector width; the loader picks by the CPU.
#if defined(__x86_64__) && defined(__GLIBC__)
#define FASTLATENT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FASTLATENT_CLONES
#endif
#define FASTLATENT_INLINE inline __attribute__((always_inline))

namespace {

constexpr double kPi = 3.14159265358979323846;
constexpr int kBits = 22;
// Rows that the horizontal pass works on together, and neighbours in a row that the vertical one does.
constexpr int64_t kLanes = 32;
// Pixels of a row of the source for one chunk of the horizontal pass: 192 KiB of colours, turned.
constexpr int64_t kChunk = 2048;

enum Filter { kBox = 0, kBilinear = 1, kBicubic = 2, kLanczos = 3 };
constexpr double kSupport[] = {0.5, 1.0, 2.0, 3.0};

double sinc(double x) { return x == 0.0 ? 1.0 : std::sin(x * kPi) / (x * kPi); }

// Keys' cubic with a = -1/2, and Lanczos with three lobes.
double filter_value(int64_t filter, double x) {
  if (filter == kBox) return x > -0.5 && x <= 0.5 ? 1.0 : 0.0;
  if (filter == kLanczos) return x >= -3.0 && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0;
  x = std::fabs(x);
  if (filter == kBilinear) return x < 1.0 ? 1.0 - x : 0.0;
  if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1.0;
  return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5 : 0.0;
}

int32_t rounded_weight(double weight, int32_t) {
  return static_cast<int32_t>(weight * (1 << kBits) + (weight < 0 ? -0.5 : 0.5));
}

double rounded_weight(double weight, double) { return weight; }

int64_t taps_of(int64_t in_size, int64_t out_size, int64_t filter) {
  const double scale = static_cast<double>(in_size) / static_cast<double>(out_size);
  return static_cast<int64_t>(std::ceil(kSupport[filter] * std::max(scale, 1.0))) * 2 + 1;
}

// bounds [count, 2] = where the weights of a pixel begin in the source, and how many they are; weights [count, taps].
template <class W>
void find_weights(int64_t in_size, int64_t out_size, int64_t filter, int64_t first, int64_t count, int64_t taps,
                  int32_t* bounds, W* weights) {
  const double scale = static_cast<double>(in_size) / static_cast<double>(out_size);
  const double stretch = std::max(scale, 1.0), support = kSupport[filter] * stretch, shrink = 1.0 / stretch;
  std::vector<double> values(static_cast<size_t>(taps));
  for (int64_t i = 0; i < count; ++i) {
    const double center = (static_cast<double>(first + i) + 0.5) * scale;
    const int64_t begin = std::max<int64_t>(0, static_cast<int64_t>(center - support + 0.5));
    const int64_t end = std::min(in_size, static_cast<int64_t>(center + support + 0.5));
    double sum = 0.0;
    for (int64_t k = 0; k < end - begin; ++k) {
      values[k] = filter_value(filter, (static_cast<double>(k + begin) - center + 0.5) * shrink);
      sum += values[k];
    }
    for (int64_t k = 0; k < taps; ++k) {
      const double value = k >= end - begin ? 0.0 : sum != 0.0 ? values[k] / sum : values[k];
      weights[i * taps + k] = rounded_weight(value, W{});
    }
    bounds[2 * i] = static_cast<int32_t>(begin);
    bounds[2 * i + 1] = static_cast<int32_t>(end - begin);
  }
}

template <class W>
struct Weights {
  int64_t taps;
  std::vector<int32_t> bounds;
  std::vector<W> weights;

  Weights(int64_t in_size, int64_t out_size, int64_t filter, int64_t first, int64_t count)
      : taps(taps_of(in_size, out_size, filter)), bounds(2 * count), weights(count * taps) {
    find_weights(in_size, out_size, filter, first, count, taps, bounds.data(), weights.data());
  }
  int64_t begin(int64_t i) const { return bounds[2 * i]; }
  int64_t size(int64_t i) const { return bounds[2 * i + 1]; }
  int64_t end(int64_t i) const { return begin(i) + size(i); }
};

FASTLATENT_INLINE uint8_t pixel(int32_t sum) { return static_cast<uint8_t>(std::min(std::max(sum >> kBits, 0), 255)); }
FASTLATENT_INLINE float pixel(double sum) { return static_cast<float>(sum); }

template <class W>
constexpr W kStart = W{0};
template <>
constexpr int32_t kStart<int32_t> = 1 << (kBits - 1);

// out[i] = the weighted sum over k of in[k * step + i], for kLanes neighbours.
template <class T, class W>
FASTLATENT_INLINE void combine(const T* in, int64_t step, const W* weights, int64_t taps, T* out) {
  W sums[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) sums[i] = kStart<W>;
  for (int64_t k = 0; k < taps; ++k) {
    const T* row = in + k * step;
    for (int64_t i = 0; i < kLanes; ++i) sums[i] += static_cast<W>(row[i]) * weights[k];
  }
  for (int64_t i = 0; i < kLanes; ++i) out[i] = pixel(sums[i]);
}

template <class T, class W>
FASTLATENT_INLINE void vertical(const T* in, int64_t stride, int64_t length, const Weights<W>& table, int64_t rows, T* out) {
  for (int64_t y = 0; y < rows; ++y, out += length) {
    const T* source = in + table.begin(y) * stride;
    const W* weights = &table.weights[y * table.taps];
    const int64_t taps = table.size(y);
    int64_t i = 0;
    for (; i + kLanes <= length; i += kLanes) combine(source + i, stride, weights, taps, out + i);
    if (i < length && length >= kLanes) {  // the last ones again, with those before them
      i = length - kLanes;
      combine(source + i, stride, weights, taps, out + i);
      i = length;
    }
    for (; i < length; ++i) {
      W sum = kStart<W>;
      for (int64_t k = 0; k < taps; ++k) sum += static_cast<W>(source[k * stride + i]) * weights[k];
      out[i] = pixel(sum);
    }
  }
}

constexpr int64_t kTile = 16;
static_assert(kLanes % kTile == 0);

// out[j * out_stride + r] = in[min(r, rows - 1)][j] of a tile of kTile rows, `width` of their columns.
template <class T>
FASTLATENT_INLINE void turn_tile(const T* in, int64_t stride, int64_t rows, int64_t width, T* out, int64_t out_stride) {
  for (int64_t r = 0; r < kTile; ++r)
    for (int64_t j = 0; j < width; ++j) out[j * out_stride + r] = in[std::min(r, rows - 1) * stride + j];
}

#if defined(__SSE2__)
// Bytes in whole tiles: interleaving row r with row r + 8, four times over, exchanges rows and columns.
FASTLATENT_INLINE void turn_bytes(__m128i (&rows)[kTile]) {
  __m128i mixed[kTile];
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      mixed[2 * r] = _mm_unpacklo_epi8(rows[r], rows[r + 8]);
      mixed[2 * r + 1] = _mm_unpackhi_epi8(rows[r], rows[r + 8]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) rows[r] = mixed[r];
  }
}

FASTLATENT_INLINE void turn_tile(const uint8_t* in, int64_t stride, int64_t rows, int64_t width, uint8_t* out,
                                 int64_t out_stride) {
  if (width < kTile) return turn_tile<uint8_t>(in, stride, rows, width, out, out_stride);
  __m128i tile[kTile];
  for (int64_t r = 0; r < kTile; ++r)
    tile[r] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + std::min(r, rows - 1) * stride));
  turn_bytes(tile);
  for (int64_t j = 0; j < kTile; ++j) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j * out_stride), tile[j]);
}
#endif

// columns [length, kLanes] = kLanes rows of `stride` numbers, turned; the last of `rows` rows fills the rest.
template <class T>
FASTLATENT_INLINE void turn_in(const T* in, int64_t stride, int64_t rows, int64_t length, T* columns) {
  for (int64_t i = 0; i < length; i += kTile)
    for (int64_t r = 0; r < kLanes; r += kTile) {
      const int64_t first = std::min(r, rows - 1);
      turn_tile(in + first * stride + i, stride, rows - first, std::min(kTile, length - i), columns + i * kLanes + r, kLanes);
    }
}

// The way back: rows [rows, length] of columns; whole tiles of what is there, then what is left, number by number.
template <class T>
FASTLATENT_INLINE void turn_out(const T* columns, int64_t rows, int64_t length, T* out, int64_t stride) {
  for (int64_t r = 0; r < rows; r += kTile)
    for (int64_t i = 0; i < length; i += kTile) {
      const T* tile = columns + i * kLanes + r;
      T* target = out + r * stride + i;
      if (r + kTile <= rows && i + kTile <= length) {
        turn_tile(tile, kLanes, kTile, kTile, target, stride);
      } else {
        for (int64_t y = 0; y < std::min(kTile, rows - r); ++y)
          for (int64_t x = 0; x < std::min(kTile, length - i); ++x) target[y * stride + x] = tile[x * kLanes + y];
      }
    }
}

// Pixels of a row of the output that are made together, so that what they read and write stays in the second-level cache.
template <class W>
struct Chunks {
  int64_t size, used = 0;  // `used` pixels of the source are read for one

  Chunks(const Weights<W>& table, int64_t count) {
    const int64_t step = std::max<int64_t>(1, (table.end(count - 1) - table.begin(0)) / count);
    size = std::max<int64_t>(1, kChunk / step);
    for (int64_t x = 0; x < count; x += size)
      used = std::max(used, table.end(std::min(x + size, count) - 1) - table.begin(x));
  }
};

// Each row turned by a quarter, this is the vertical pass with `channels` interleaved images.
template <class T, class W>
FASTLATENT_INLINE void horizontal(const T* in, int64_t stride, int64_t channels, int64_t rows, const Weights<W>& table,
                                  int64_t count, int64_t chunk, T* columns, T* turned, T* out) {
  const int64_t length = count * channels;
  for (int64_t y = 0; y < rows; y += kLanes) {
    const int64_t block = std::min(kLanes, rows - y);
    for (int64_t first = 0; first < count; first += chunk) {
      const int64_t last = std::min(first + chunk, count), begin = table.begin(first);
      turn_in(in + y * stride + begin * channels, stride, block, (table.end(last - 1) - begin) * channels, columns);
      for (int64_t x = first; x < last; ++x) {
        const T* source = columns + (table.begin(x) - begin) * channels * kLanes;
        for (int64_t c = 0; c < channels; ++c)
          combine(source + c * kLanes, channels * kLanes, &table.weights[x * table.taps], table.size(x),
                  turned + ((x - first) * channels + c) * kLanes);
      }
      turn_out(turned, block, (last - first) * channels, out + y * length + first * channels, length);
    }
  }
}

FASTLATENT_CLONES void run_vertical(const uint8_t* in, int64_t stride, int64_t length, const Weights<int32_t>& table,
                                    int64_t rows, uint8_t* out) {
  vertical(in, stride, length, table, rows, out);
}

FASTLATENT_CLONES void run_vertical(const float* in, int64_t stride, int64_t length, const Weights<double>& table,
                                    int64_t rows, float* out) {
  vertical(in, stride, length, table, rows, out);
}

FASTLATENT_CLONES void run_horizontal(const uint8_t* in, int64_t stride, int64_t channels, int64_t rows,
                                      const Weights<int32_t>& table, int64_t count, int64_t chunk,
                                      uint8_t* columns, uint8_t* turned, uint8_t* out) {
  horizontal(in, stride, channels, rows, table, count, chunk, columns, turned, out);
}

FASTLATENT_CLONES void run_horizontal(const float* in, int64_t stride, int64_t channels, int64_t rows,
                                      const Weights<double>& table, int64_t count, int64_t chunk,
                                      float* columns, float* turned, float* out) {
  horizontal(in, stride, channels, rows, table, count, chunk, columns, turned, out);
}

struct Geometry {
  int64_t height, width, channels, out_height, out_width, filter, top, left, crop_height, crop_width;
};

template <class T, class W>
void resize(const T* image, const Geometry& g, T* out) {
  const int64_t length = g.crop_width * g.channels;
  int64_t stride = g.width * g.channels;
  const bool rows_stay = g.out_height == g.height, columns_stay = g.out_width == g.width;
  // The rows that the vertical pass reads; without one, those of the window.
  int64_t first = g.top, rows = g.crop_height;
  std::vector<T> between;
  Weights<W> down = rows_stay ? Weights<W>(1, 1, g.filter, 0, 1)
                              : Weights<W>(g.height, g.out_height, g.filter, g.top, g.crop_height);
  if (!rows_stay) {
    first = down.begin(0);
    rows = down.end(g.crop_height - 1) - first;
    for (int64_t y = 0; y < g.crop_height; ++y) down.bounds[2 * y] -= static_cast<int32_t>(first);
  }
  const T* source = image + first * stride;
  if (columns_stay) {
    source += g.left * g.channels;
  } else {
    const Weights<W> across(g.width, g.out_width, g.filter, g.left, g.crop_width);
    T* target = out;
    if (!rows_stay) {
      between.resize(rows * length);
      target = between.data();
    }
    const Chunks<W> chunks(across, g.crop_width);
    std::vector<T> columns(chunks.used * g.channels * kLanes);
    std::vector<T> turned(std::min(chunks.size, g.crop_width) * g.channels * kLanes);
    run_horizontal(source, stride, g.channels, rows, across, g.crop_width, chunks.size, columns.data(), turned.data(),
                   target);
    source = target;
    stride = length;
  }
  if (!rows_stay) {
    run_vertical(source, stride, length, down, g.crop_height, out);
  } else if (columns_stay) {
    for (int64_t y = 0; y < rows; ++y) std::memcpy(out + y * length, source + y * stride, length * sizeof(T));
  }
}

}  // namespace

int fastlatent_resize_cpu(const void* image, void* out, int64_t height, int64_t width, int64_t channels, int64_t out_height, int64_t out_width, int64_t filter, int64_t top, int64_t left, int64_t crop_height, int64_t crop_width, int64_t is_float) {
  const Geometry g{height, width, channels, out_height, out_width, filter, top, left, crop_height, crop_width};
  try {
    if (is_float) {
      resize<float, double>(static_cast<const float*>(image), g, static_cast<float*>(out));
    } else {
      resize<uint8_t, int32_t>(static_cast<const uint8_t*>(image), g, static_cast<uint8_t*>(out));
    }
  } catch (const std::bad_alloc&) {
    return FASTLATENT_NO_MEMORY;
  }
  return FASTLATENT_OK;
}

int fastlatent_resize_weights_cpu(int64_t in_size, int64_t out_size, int64_t filter, int64_t first, int64_t count, int64_t taps, int32_t* bounds, void* weights, int64_t is_float) {
  try {
    if (is_float) {
      find_weights(in_size, out_size, filter, first, count, taps, bounds, static_cast<double*>(weights));
    } else {
      find_weights(in_size, out_size, filter, first, count, taps, bounds, static_cast<int32_t*>(weights));
    }
  } catch (const std::bad_alloc&) {
    return FASTLATENT_NO_MEMORY;
  }
  return FASTLATENT_OK;
}
