// Dtype codes to C++ types, once for every kernel. The half types only load: kernels compute and store in f32 or f64.
// They are plain bits with hand-written conversions, so any C++17 compiler on any CPU reads them alike.
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

struct BFloat16 {
  uint16_t bits;
  // bfloat16 is the upper half of a float32.
  operator float() const { return float_from_bits(uint32_t{bits} << 16); }
};

struct Float16 {
  uint16_t bits;
  operator float() const {
    const uint32_t sign = uint32_t{bits & 0x8000u} << 16;
    const uint32_t magnitude = bits & 0x7fffu;
    // Exponent and mantissa land 13 bits higher; 2^112 corrects the exponent bias (127 - 15). The product is exact,
    // and it normalises float16 subnormals (2^-24 to 2^-14), which read as float32 subnormals before it.
    const float finite = float_from_bits(magnitude << 13) * 0x1p112f;
    // Inf and NaN (exponent 31) need float32's exponent 255 instead.
    const float special = float_from_bits(0x7f800000u | (magnitude << 13));
    uint32_t result;
    const float value = magnitude < 0x7c00u ? finite : special;
    std::memcpy(&result, &value, sizeof result);
    return float_from_bits(result | sign);
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
