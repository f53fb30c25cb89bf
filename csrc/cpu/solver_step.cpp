// solver_step: one solver step in place, every dtype by one template
#include "../dtype.h"

#include <algorithm>
#include <cmath>

namespace {

// Columns of the coefficient row, as in fastlatent/ops/solver_step.py.
enum Column { P, Q, R, A, F, B, C, D, E, S, L0, L1, BASE };

// Channels done at a time: the buffers stay in the first-level cache, and plain loops over them vectorise.
constexpr int64_t kBlock = 256;

// The order of operations is the reference's, so that without fused multiply-adds both give the same bits.
template <class T, class O>
void solver_step(T* state, const O* output, const T* guidance, const T* row, const T* noise, int64_t ways,
                 int64_t batch, int64_t channels, int64_t out_channels) {
  // A local copy cannot alias the state, so it stays in registers.
  T k[BASE + 1];
  for (int i = 0; i <= BASE; ++i) k[i] = row[i];
  const bool new_base = k[BASE] != T(0);
  const int64_t plane = batch * channels;
  T o[kBlock], noise_term[kBlock];
  for (int64_t n = 0; n < batch; ++n) {
    for (int64_t begin = 0; begin < channels; begin += kBlock) {
      const int64_t count = std::min(kBlock, channels - begin);
      const O* first = output + n * out_channels + begin;
      const T first_weight = guidance[n];
      for (int64_t i = 0; i < count; ++i) o[i] = first_weight * static_cast<T>(first[i]);
      for (int64_t w = 1; w < ways; ++w) {
        const T weight = guidance[w * batch + n];
        const O* way = first + w * batch * out_channels;
        for (int64_t i = 0; i < count; ++i) o[i] += weight * static_cast<T>(way[i]);
      }
      if (noise) {
        const T* z = noise + n * channels + begin;
        if (out_channels == channels) {
          for (int64_t i = 0; i < count; ++i) noise_term[i] = k[S] * z[i];
        } else {
          for (int64_t i = 0; i < count; ++i) {
            const T v = static_cast<T>(first[channels + i]);
            const T scale = k[S] * std::exp(T(0.5) * (k[L0] + k[L1] * (T(0.5) * (v + T(1)))));
            noise_term[i] = scale * z[i];
          }
        }
      }
      T* __restrict x = state + n * channels + begin;
      T* __restrict d1 = x + plane;
      T* __restrict d2 = x + 2 * plane;
      T* __restrict x_base = x + 3 * plane;
      for (int64_t i = 0; i < count; ++i) {
        // Written so that a NaN passes through, as in torch.clamp.
        T data = k[P] * x[i] + k[Q] * o[i];
        data = data < -k[R] ? -k[R] : data;
        data = data > k[R] ? k[R] : data;
        const T base = new_base ? x[i] : x_base[i];
        T next = k[A] * x[i] + k[F] * base + k[B] * data + k[C] * d1[i] + k[D] * d2[i] + k[E] * o[i];
        if (noise) next += noise_term[i];
        d2[i] = d1[i];
        d1[i] = data;
        x_base[i] = base;
        x[i] = next;
      }
    }
  }
}

}  // namespace

int fastlatent_solver_step_cpu(void* state, const void* output, const void* guidance, const void* row,
                               const void* noise, int64_t ways, int64_t batch, int64_t channels,
                               int64_t out_channels, int64_t state_dtype, int64_t output_dtype) {
  return fastlatent::dispatch_compute(state_dtype, [&](auto compute) {
    using T = decltype(compute);
    return fastlatent::dispatch_load(output_dtype, [&](auto load) {
      using O = decltype(load);
      solver_step(static_cast<T*>(state), static_cast<const O*>(output), static_cast<const T*>(guidance),
                  static_cast<const T*>(row), static_cast<const T*>(noise), ways, batch, channels, out_channels);
      return static_cast<int>(FASTLATENT_OK);
    });
  });
}
