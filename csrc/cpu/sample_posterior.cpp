// sample_posterior: latents drawn from stored moments, the noise a function of each row's key
//
// Every float operation is one correctly rounded addition, multiplication, division or square root, in the order that
// kernels/sample_posterior.py has (CMakeLists.txt forbids fusing them here): so this file and the GPU give the same bits,
// whatever the instruction set and the number of threads.
#include "../dtype.h"

#include <algorithm>
#include <cmath>
#include <system_error>
#include <thread>
#include <vector>

// The two hot loops, compiled once for each vector width; the loader picks by the CPU.
#if defined(__x86_64__) && defined(__GLIBC__)
#define FASTLATENT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FASTLATENT_CLONES
#endif

namespace {

using fastlatent::bits_from_float;
using fastlatent::float_from_bits;

// Philox calls done at a time; each gives four numbers. The buffers stay in the first-level cache.
constexpr int64_t kBlocks = 64;
constexpr int64_t kChunk = 4 * kBlocks;
// Word 0 of the counter of the mirror's bit: no row has so many blocks of noise.
constexpr uint32_t kMirror = 0xffffffffu;
// Starting a thread takes 20 us, in which one thread draws about this many numbers.
constexpr int64_t kElementsPerThread = 16384;

struct Words {
  uint32_t w[4];
};

// Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011); Philox4x32, 10 rounds.
inline Words philox(Words c, uint32_t k0, uint32_t k1) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c.w[0], b = uint64_t{0xCD9E8D57u} * c.w[2];
    c = {{static_cast<uint32_t>(b >> 32) ^ c.w[1] ^ k0, static_cast<uint32_t>(b),
          static_cast<uint32_t>(a >> 32) ^ c.w[3] ^ k1, static_cast<uint32_t>(a)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// sqrt(-2 ln u) of u = (word + 1/2) / 2^32 rounded to float32, never 0. Natural logarithm: u = 2^e m with m in
// [sqrt(1/2), sqrt(2)); the polynomial of m - 1 is a minimax fit, 6e-9 of the result.
inline float radius(uint32_t word) {
  const float u = static_cast<float>(word) * 0x1p-32f + 0x1p-33f;
  const uint32_t shifted = bits_from_float(u) - 0x3f3504f3u;
  const float e = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  const float x = float_from_bits((shifted & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
  const float square = x * x;
  float p = -0.0785955935716629f;
  p = p * x + 0.1288164108991623f;
  p = p * x - 0.13128770887851715f;
  p = p * x + 0.14181193709373474f;
  p = p * x - 0.16624552011489868f;
  p = p * x + 0.2000228613615036f;
  p = p * x - 0.25000810623168945f;
  p = p * x + 0.33333316445350647f;
  float y = x * square * p;
  y = y + e * -2.12194440e-4f;  // ln 2 in two parts; the upper one times e is exact
  y = y - 0.5f * square;
  y = x + y;
  y = y + e * 0.693359375f;
  return std::sqrt(-2.0f * y);
}

// Cosine and sine of word / 2^32 of a turn. The nearest quarter turn is taken off as an integer, so that both stay
// relatively exact near their zeros.
inline void turn(uint32_t word, float& cosine, float& sine) {
  const uint32_t quarter = (word + 0x20000000u) >> 30;
  const float a = static_cast<float>(static_cast<int32_t>(word - (quarter << 30))) * 1.4629180792671596e-09f;
  const float square = a * a;
  float s = -0.00019517271721269935f;
  s = s * square + 0.008332177996635437f;
  s = s * square - 0.16666655242443085f;
  s = a + a * square * s;
  float c = 2.4438420950900763e-05f;
  c = c * square - 0.001388736767694354f;
  c = c * square + 0.04166664555668831f;
  c = 1.0f - 0.5f * square + square * square * c;
  // A quarter turn on swaps them; the signs' bits follow from the quarter's.
  const bool odd = quarter & 1u;
  cosine = float_from_bits(bits_from_float(odd ? s : c) ^ ((quarter + 1u) >> 1 << 31));
  sine = float_from_bits(bits_from_float(odd ? c : s) ^ (quarter >> 1 << 31));
}

// z [kChunk] of the Philox blocks `first`, `first` + 1, ... of one key.
FASTLATENT_CLONES void normals(uint32_t first, uint64_t key, uint32_t epoch, uint32_t k0, uint32_t k1, float* z) {
  const uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
  uint32_t w0[kBlocks], w1[kBlocks], w2[kBlocks], w3[kBlocks];
  for (int64_t i = 0; i < kBlocks; ++i) {
    const Words words = philox({{first + static_cast<uint32_t>(i), low, high, epoch}}, k0, k1);
    w0[i] = words.w[0];
    w1[i] = words.w[1];
    w2[i] = words.w[2];
    w3[i] = words.w[3];
  }
  float z0[kBlocks], z1[kBlocks], z2[kBlocks], z3[kBlocks];
  for (int64_t i = 0; i < kBlocks; ++i) {
    const float r = radius(w0[i]);
    float c, s;
    turn(w1[i], c, s);
    z0[i] = r * c;
    z1[i] = r * s;
  }
  for (int64_t i = 0; i < kBlocks; ++i) {
    const float r = radius(w2[i]);
    float c, s;
    turn(w3[i], c, s);
    z2[i] = r * c;
    z3[i] = r * s;
  }
  for (int64_t i = 0; i < kBlocks; ++i) {
    z[4 * i] = z0[i];
    z[4 * i + 1] = z1[i];
    z[4 * i + 2] = z2[i];
    z[4 * i + 3] = z3[i];
  }
}

// x += exp(clamp(logvar, -30, 20) / 2) * z. A NaN passes the comparisons, and then every step.
FASTLATENT_CLONES void add_noise(const float* logvar, const float* z, int64_t count, float* x) {
  for (int64_t i = 0; i < count; ++i) {
    float h = logvar[i];
    h = h < -30.0f ? -30.0f : h;
    h = h > 20.0f ? 20.0f : h;
    h = h * 0.5f;
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
    const float scale = float_from_bits((bits_from_float(sum) - 0x4b400000u + 127u) << 23);
    x[i] = x[i] + p * scale * z[i];
  }
}

// out[i] = values[channel of element begin + i].
void spread(const float* values, int64_t spatial, int64_t begin, int64_t count, float* out) {
  for (int64_t i = 0; i < count;) {
    const int64_t channel = (begin + i) / spatial;
    const int64_t run = std::min(count - i, (channel + 1) * spatial - begin - i);
    std::fill_n(out + i, run, values[channel]);
    i += run;
  }
}

struct Task {
  const void* moments;
  const uint64_t* key_hash;
  const float *mean, *std, *scale;
  float* out;
  int64_t flips, channels, spatial, scales;
  bool has_logvar;
  uint32_t k0, k1, epoch;
};

template <class T>
void read(const Task& task, const T* from, const float* scale, int64_t begin, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[begin + i]);
  if (!scale) return;
  float scales[kChunk];
  // One scale for the whole row: one channel of all its elements.
  spread(scale, task.scales == 1 ? task.channels * task.spatial : task.spatial, begin, count, scales);
  for (int64_t i = 0; i < count; ++i) to[i] = to[i] * scales[i];
}

template <class T>
void draw_row(const Task& task, int64_t row) {
  const int64_t elements = task.channels * task.spatial;
  const uint64_t key = task.key_hash[row];
  int64_t plane = row * task.flips;
  if (task.flips == 2) {
    const Words words = philox({{kMirror, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), task.epoch}},
                               task.k0, task.k1);
    plane += words.w[0] >> 31;
  }
  const T* values = static_cast<const T*>(task.moments) + plane * elements * (task.has_logvar ? 2 : 1);
  const float* scale = task.scale ? task.scale + plane * task.scales : nullptr;
  const float* logvar_scale = scale && task.scales > 1 ? scale + task.channels : scale;
  float logvar[kChunk], z[kChunk];
  for (int64_t begin = 0; begin < elements; begin += kChunk) {
    const int64_t count = std::min(kChunk, elements - begin);
    float* x = task.out + row * elements + begin;
    read(task, values, scale, begin, count, x);
    if (task.has_logvar) {
      read(task, values + elements, logvar_scale, begin, count, logvar);
      normals(static_cast<uint32_t>(begin / 4), key, task.epoch, task.k0, task.k1, z);
      add_noise(logvar, z, count, x);
    }
    if (task.mean) {
      spread(task.mean, task.spatial, begin, count, logvar);
      spread(task.std, task.spatial, begin, count, z);
      for (int64_t i = 0; i < count; ++i) x[i] = (x[i] - logvar[i]) / z[i];
    }
  }
}

template <class T>
int draw(const Task& task, int64_t batch, int64_t threads) {
  const auto part = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) draw_row<T>(task, row);
  };
  threads = std::max<int64_t>(
      1, std::min({threads, batch, batch * task.channels * task.spatial / kElementsPerThread}));
  std::vector<std::thread> workers;
  int status = FASTLATENT_OK;
  try {
    workers.reserve(threads - 1);
    for (int64_t t = 1; t < threads; ++t) workers.emplace_back(part, batch * t / threads, batch * (t + 1) / threads);
    part(0, batch / threads);
  } catch (const std::system_error&) {
    status = FASTLATENT_NO_THREADS;
  }
  for (auto& worker : workers) worker.join();
  return status;
}

}  // namespace

int fastlatent_sample_posterior_cpu(const void* moments, const int64_t* key_hash, const float* mean, const float* std,
                                    const float* scale, float* out, int64_t batch, int64_t flips, int64_t channels,
                                    int64_t spatial, int64_t scales, int64_t has_logvar, int64_t seed, int64_t epoch,
                                    int64_t dtype, int64_t threads) {
  const Task task{moments, reinterpret_cast<const uint64_t*>(key_hash), mean, std, scale, out, flips, channels, spatial,
                  scales, has_logvar != 0, static_cast<uint32_t>(seed),
                  static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32), static_cast<uint32_t>(epoch)};
  if (scale) return draw<int8_t>(task, batch, threads);
  switch (dtype) {
    case FASTLATENT_F32: return draw<float>(task, batch, threads);
    case FASTLATENT_BF16: return draw<fastlatent::BFloat16>(task, batch, threads);
    case FASTLATENT_F16: return draw<fastlatent::Float16>(task, batch, threads);
    default: return FASTLATENT_BAD_DTYPE;
  }
}
