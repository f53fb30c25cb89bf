// The C ABI of every compiled kernel: one declaration and one comment each. No torch or Python header
// is included anywhere under csrc/. Every function returns 0, or a code below that _native.py turns
// into an error. fastlatent/_native.py reads the argument types from this file, so a signature is written once.
#pragma once
#include <cstdint>

#define FASTLATENT_API __attribute__((visibility("default")))

// Return codes.
enum { FASTLATENT_OK = 0, FASTLATENT_BAD_DTYPE = 1, FASTLATENT_BAD_INDEX = 2, FASTLATENT_NO_THREADS = 3 };

// Dtype codes shared with fastlatent/_native.py.
enum { FASTLATENT_F64 = 0, FASTLATENT_F32 = 1, FASTLATENT_BF16 = 2, FASTLATENT_F16 = 3 };

extern "C" {

// out[i] = bytes of row row_index[i] of shard shard_index[i], for i in [0, rows). table [shard_count, 2] holds the address
// of each shard's first row and its number of rows. Rows are row_bytes long.
FASTLATENT_API int fastlatent_gather_rows_cpu(const int64_t* table, int64_t shard_count, const int64_t* shard_index, const int64_t* row_index, int64_t rows, int64_t row_bytes, void* out, int64_t threads);

// One solver step in place. state [4, batch, channels] = (x, D1, D2, x_base) of dtype state_dtype (f64 or f32);
// output [ways, batch, out_channels] of dtype output_dtype; guidance [ways, batch] and row [16] of state_dtype;
// noise [batch, channels] of state_dtype or null. out_channels is channels, or 2 * channels for learned variance.
FASTLATENT_API int fastlatent_solver_step_cpu(void* state, const void* output, const void* guidance, const void* row, const void* noise, int64_t ways, int64_t batch, int64_t channels, int64_t out_channels, int64_t state_dtype, int64_t output_dtype);

}
