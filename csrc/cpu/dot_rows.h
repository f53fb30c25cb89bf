// The vector parts of the diffusion head: products of a few rows with a weight that is read once, and what runs between
// them. dot_rows.cpp is compiled once for every instruction set (CMakeLists.txt); row_kernels picks one at run time.
#pragma once
#include "../fastlatent.h"

#include <cstdint>

namespace fastlatent {

// A weight's dtype besides those of fastlatent.h; the ABI tells int8 by its scales.
constexpr int64_t kInt8 = -1;

// All strides and counts are in elements. Sums are float32, in an order that depends on nothing but the length and the
// vector width: not on the number of rows, the thread, or the place of an output row.
struct RowKernels {
  // out[r, n] = bias[n] + scale[n] * sum over k of x[r, k] * weight[n, k], for n in [begin, end). weight is
  // [*, length] of `dtype`; a null scale is 1, a null bias 0.
  void (*dot)(const float* x, int64_t x_stride, int64_t rows, int64_t length, const void* weight, int64_t dtype,
              const float* scale, const float* bias, int64_t begin, int64_t end, float* out, int64_t out_stride);
  // out[i] = norm(x)[i] * (1 + scale[i]) + shift[i]; shift and scale of `dtype`.
  void (*norm_modulate)(const float* x, const void* shift, const void* scale, int64_t dtype, int64_t length,
                        bool layer_norm, float eps, float* out);
  // first[i] = silu(first[i]) * second[i]; a null second is 1.
  void (*silu_gate)(float* first, const float* second, int64_t length);
  // x[i] += gate[i] * update[i]; gate of `dtype`.
  void (*add_gated)(float* x, const void* gate, int64_t dtype, const float* update, int64_t length);
};

// One for each instruction set; only x86-64 has the wider two.
const RowKernels& row_kernels(int64_t lanes);  // the widest that this CPU has, of at most so many float32 lanes
extern const RowKernels kRowKernelsBaseline;
extern const RowKernels kRowKernelsAvx2;
extern const RowKernels kRowKernelsAvx512;

}  // namespace fastlatent
