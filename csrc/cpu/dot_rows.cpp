// dot_rows: the vector kernels of the diffusion head for the instruction set this file is compiled for
//
// Everything is in an unnamed namespace and no header with inline functions is included, dtype.h neither: the linker
// keeps one copy of an inline function, and it must not be the one with instructions that an older CPU lacks.
#include "dot_rows.h"

#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

#ifndef FASTLATENT_ROW_KERNELS
#define FASTLATENT_ROW_KERNELS kRowKernelsBaseline
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// Vectors of the compiler (GCC and Clang), not loops it may vectorise: the sums' order is what is written here.
template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N>
using Vector = typename VectorOf<T, N>::type;
using Floats = Vector<float, kLanes>;
using Integers = Vector<int32_t, kLanes>;
using Words = Vector<uint32_t, kLanes>;

enum class BFloat16 : uint16_t {};
enum class Float16 : uint16_t {};

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class To>
inline To read(const void* from) {
  To to;
  std::memcpy(&to, from, sizeof to);
  return to;
}

inline Floats broadcast(float value) { return Floats{} + value; }

inline Floats load(const float* p) { return read<Floats>(p); }

#if defined(__AVX512F__)
// With masks of ones: of the plain ones GCC 12 says that they read uninitialised lanes.
inline Floats load(const int8_t* p) {
  const auto wide = bits_as<Integers>(_mm512_maskz_cvtepi8_epi32(0xffff, read<__m128i>(p)));
  return __builtin_convertvector(wide, Floats);
}
inline Floats load(const BFloat16* p) {
  return bits_as<Floats>(bits_as<Integers>(_mm512_maskz_cvtepu16_epi32(0xffff, read<__m256i>(p))) << 16);
}
inline Floats load(const Float16* p) { return _mm512_maskz_cvtph_ps(0xffff, read<__m256i>(p)); }
#elif defined(__AVX2__)
inline Floats load(const int8_t* p) {
  const auto wide = bits_as<Integers>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  return __builtin_convertvector(wide, Floats);
}
inline Floats load(const BFloat16* p) {
  return bits_as<Floats>(bits_as<Integers>(_mm256_cvtepu16_epi32(read<__m128i>(p))) << 16);
}
inline Floats load(const Float16* p) { return _mm256_cvtph_ps(read<__m128i>(p)); }
#else
inline Floats load(const int8_t* p) { return __builtin_convertvector(read<Vector<int8_t, kLanes>>(p), Floats); }

inline Floats load(const BFloat16* p) {
  return bits_as<Floats>(__builtin_convertvector(read<Vector<uint16_t, kLanes>>(p), Words) << 16);
}

inline Floats load(const Float16* p) {
  // As dtype.h does it.
  const Words bits = __builtin_convertvector(read<Vector<uint16_t, kLanes>>(p), Words);
  const Words wide = (bits & 0x7fffu) << 13;
  const Words finite = bits_as<Words>(bits_as<Floats>(wide) * 0x1p112f);
  const Words special = bits_as<Words>(wide >= (0x7c00u << 13)) & 0x7f800000u;
  return bits_as<Floats>(finite | special | ((bits & 0x8000u) << 16));
}
#endif

// The first `count` lanes; the others are 0.
template <class T>
inline Floats load(const T* p, int64_t count) {
  if (count == kLanes) return load(p);
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, count * sizeof(T));
  return load(lanes);
}

inline void store(float* p, Floats value, int64_t count) {
  if (count == kLanes) count = kLanes;  // a constant: one store
  std::memcpy(p, &value, count * sizeof(float));
}

// The lanes' sum by halves. Without the address of v, which would put the caller's sums into memory.
inline float sum(Vector<float, 4> v) { return (v[0] + v[2]) + (v[1] + v[3]); }
#ifdef __AVX2__
inline float sum(__m256 v) {
  return sum(Vector<float, 4>(_mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1))));
}
#endif
#ifdef __AVX512F__
inline float sum(__m512 v) {
  return sum(_mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, v, 0), _mm512_maskz_extractf32x8_ps(0xff, v, 1)));
}
#endif

// Calls f(i, count) for each vector of [0, length); the count is a constant but for the last.
template <class F>
inline void for_vectors(int64_t length, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) f(i, int64_t{kLanes});
  if (i < length) f(i, length - i);
}

// The R * N sums have a register each: the compiler unrolls these loops, and nothing takes a sum's address.
template <int R, int N, class W>
inline __attribute__((always_inline)) void add_products(const float* x, int64_t x_stride, const W* weight,
                                                        int64_t length, int64_t count, Floats (&sums)[R][N]) {
  Floats rows[R];
  for (int r = 0; r < R; ++r) rows[r] = load(x + r * x_stride, count);
  for (int n = 0; n < N; ++n) {
    const Floats w = load(weight + n * length, count);
    for (int r = 0; r < R; ++r) sums[r][n] += rows[r] * w;
  }
}

// The hardware's prefetcher follows N short streams badly: each turn asks for as many lines as it reads, one block and
// this far ahead, into the second-level cache. (2 rows of 1024, one core: bfloat16 9 to 20 GB/s, int8 5 to 16; float32
// 15 to 21. Into the first-level cache 5 GB/s slower but for int8.)
constexpr int64_t kAheadBytes = 4096;

// R rows times N rows of the weight.
template <int R, int N, class W>
__attribute__((noinline)) void dot_block(const float* x, int64_t x_stride, int64_t length, const W* weight,
                                         const float* scale, const float* bias, float* out, int64_t out_stride) {
  Floats sums[R][N] = {};
  const char* ahead = reinterpret_cast<const char*>(weight + N * length) + kAheadBytes;
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) {
    for (size_t b = 0; b < N * kLanes * sizeof(W); b += 64) __builtin_prefetch(ahead + i * N * sizeof(W) + b, 0, 2);
    add_products<R, N>(x + i, x_stride, weight + i, length, kLanes, sums);
  }
  if (i < length) add_products<R, N>(x + i, x_stride, weight + i, length, length - i, sums);
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) {
      const float total = sum(sums[r][n]);
      out[r * out_stride + n] = (bias ? bias[n] : 0.0f) + (scale ? scale[n] * total : total);
    }
  }
}

// 4 x 4 sums and what they are made of fit the 32 registers of AVX-512, 3 x 4 the 16 of AVX2.
constexpr int kRows = kLanes == 16 ? 4 : 3;
constexpr int kOutputs = 4;

template <int N, class W>
void dot_outputs(const float* x, int64_t x_stride, int64_t rows, int64_t length, const W* weight, const float* scale,
                 const float* bias, float* out, int64_t out_stride) {
  for (; rows >= kRows; rows -= kRows, x += kRows * x_stride, out += kRows * out_stride) {
    dot_block<kRows, N>(x, x_stride, length, weight, scale, bias, out, out_stride);
  }
  if (rows == 3) dot_block<3, N>(x, x_stride, length, weight, scale, bias, out, out_stride);
  if (rows == 2) dot_block<2, N>(x, x_stride, length, weight, scale, bias, out, out_stride);
  if (rows == 1) dot_block<1, N>(x, x_stride, length, weight, scale, bias, out, out_stride);
}

// Calls f with a pointer of the type that `dtype` names.
template <class F>
inline void typed(const void* data, int64_t dtype, F&& f) {
  switch (dtype) {
    case FASTLATENT_BF16: return f(static_cast<const BFloat16*>(data));
    case FASTLATENT_F16: return f(static_cast<const Float16*>(data));
    case FASTLATENT_F32: return f(static_cast<const float*>(data));
  }
}

void dot(const float* x, int64_t x_stride, int64_t rows, int64_t length, const void* weight, int64_t dtype,
         const float* scale, const float* bias, int64_t begin, int64_t end, float* out, int64_t out_stride) {
  const auto run = [&](const auto* w) {
    int64_t n = begin;
    for (; n + kOutputs <= end; n += kOutputs) {
      dot_outputs<kOutputs>(x, x_stride, rows, length, w + n * length, scale ? scale + n : nullptr, bias ? bias + n : nullptr,
                            out + n, out_stride);
    }
    for (; n < end; ++n) {
      dot_outputs<1>(x, x_stride, rows, length, w + n * length, scale ? scale + n : nullptr, bias ? bias + n : nullptr,
                     out + n, out_stride);
    }
  };
  if (dtype == fastlatent::kInt8) return run(static_cast<const int8_t*>(weight));
  typed(weight, dtype, run);
}

void norm_modulate(const float* x, const void* shift, const void* scale, int64_t dtype, int64_t length,
                   bool layer_norm, float eps, float* out) {
  Floats sums = {};
  float mean = 0.0f;
  if (layer_norm) {
    for_vectors(length, [&](int64_t i, int64_t count) { sums += load(x + i, count); });
    mean = sum(sums) / static_cast<float>(length);
  }
  for_vectors(length, [&](int64_t i, int64_t count) { store(out + i, load(x + i, count) - mean, count); });
  sums = Floats{};
  for_vectors(length, [&](int64_t i, int64_t count) {
    const Floats value = load(out + i, count);
    sums += value * value;
  });
  const float inverse = 1.0f / __builtin_sqrtf(sum(sums) / static_cast<float>(length) + eps);
  typed(shift, dtype, [&](const auto* shifts) {
    const auto* scales = static_cast<decltype(shifts)>(scale);
    for_vectors(length, [&](int64_t i, int64_t count) {
      store(out + i, load(out + i, count) * inverse * (load(scales + i, count) + 1.0f) + load(shifts + i, count),
            count);
    });
  });
}

// exp within 2 units in the last place for |x| <= 88, where 2^n below is a normal number; clamped outside, NaN stays.
inline Floats exponential(Floats x) {
  x = x > 88.0f ? broadcast(88.0f) : x;
  x = x < -87.0f ? broadcast(-87.0f) : x;
  // x = n ln 2 + r. Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits. ln 2 in two parts: n times
  // the first (9 bits) is exact.
  const Floats shifted = x * 0x1.715476p+0f + 0x1.8p23f;
  const Floats n = shifted - 0x1.8p23f;
  const Floats r = x - n * 0x1.62p-1f - n * 0x1.c85fep-10f;
  // Taylor's series: for |r| <= ln(2) / 2 the next term is 5e-9.
  constexpr float kTerms[] = {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f};
  Floats series = broadcast(1.0f / 5040.0f);
  for (const float term : kTerms) series = series * r + term;
  return series * bits_as<Floats>((bits_as<Words>(shifted) + 127u) << 23);
}

void silu_gate(float* first, const float* second, int64_t length) {
  for_vectors(length, [&](int64_t i, int64_t count) {
    const Floats x = load(first + i, count);
    const Floats activated = x / (exponential(-x) + 1.0f);
    store(first + i, second ? activated * load(second + i, count) : activated, count);
  });
}

void add_gated(float* x, const void* gate, int64_t dtype, const float* update, int64_t length) {
  typed(gate, dtype, [&](const auto* gates) {
    for_vectors(length, [&](int64_t i, int64_t count) {
      store(x + i, load(x + i, count) + load(gates + i, count) * load(update + i, count), count);
    });
  });
}

}  // namespace

namespace fastlatent {
const RowKernels FASTLATENT_ROW_KERNELS = {dot, norm_modulate, silu_gate, add_gated};
}
