// Dtype codes to C++ types, once for every kernel. Kernels compute and store in f32 or f64; the half types only load,
// and convert by hand, so any C++17 compiler on any CPU reads them alike.
#pragma once
#include "fastlatent.h"

#include <cstdint>
#include <cstring>

namespace fastlatent {

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct BFloat16 {
  uint16_t bits;
  // bfloat16 is the upper half of a float32.
  operator float() const { return float_from_bits(uint32_t{bits} << 16); }
};

struct Float16 {
  uint16_t bits;
  // Exponent and mantissa land 13 bits higher; 2^112 corrects the exponent's bias (127 - 15). The product is exact and
  // normalises subnormals. Inf and NaN (exponent 31) get float32's exponent 255 instead.
  operator float() const {
    const uint32_t wide = (bits & 0x7fffu) << 13;
    const uint32_t finite = bits_from_float(float_from_bits(wide) * 0x1p112f);
    const uint32_t special = wide < (0x7c00u << 13) ? 0u : 0x7f800000u;
    return float_from_bits(finite | special | ((bits & 0x8000u) << 16));
  }
};

// Calls f with a value of the computing type that `code` names, and returns what it returns.
template <class F>
int dispatch_compute(int64_t code, F&& f) {
  switch (code) {
    case FASTLATENT_F64: return f(double{});
    case FASTLATENT_F32: return f(float{});
    default: return FASTLATENT_BAD_DTYPE;
  }
}

// The same for any type a kernel can load.
template <class F>
int dispatch_load(int64_t code, F&& f) {
  switch (code) {
    case FASTLATENT_BF16: return f(BFloat16{});
    case FASTLATENT_F16: return f(Float16{});
    default: return dispatch_compute(code, f);
  }
}

}  // namespace fastlatent
