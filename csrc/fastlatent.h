// The C ABI of every compiled kernel: one declaration and one comment each. No torch or Python header
// is included anywhere under csrc/. Every function returns 0, or a code below that _native.py turns
// into an error. fastlatent/_native.py reads the argument types from this file, so a signature is written once.
#pragma once
#include <cstdint>

#define FASTLATENT_API __attribute__((visibility("default")))

// Return codes.
enum { FASTLATENT_OK = 0, FASTLATENT_BAD_DTYPE = 1, FASTLATENT_BAD_INDEX = 2, FASTLATENT_NO_THREADS = 3, FASTLATENT_NO_MEMORY = 4 };

// Dtype codes shared with fastlatent/_native.py.
enum { FASTLATENT_F64 = 0, FASTLATENT_F32 = 1, FASTLATENT_BF16 = 2, FASTLATENT_F16 = 3 };

extern "C" {

// out[i] = bytes of row row_index[i] of shard shard_index[i], for i in [0, rows). table [shard_count, 2] holds the address
// of each shard's first row and its number of rows. Rows are row_bytes long.
FASTLATENT_API int fastlatent_gather_rows_cpu(const int64_t* table, int64_t shard_count, const int64_t* shard_index, const int64_t* row_index, int64_t rows, int64_t row_bytes, void* out, int64_t threads);

// The same rows, and out as above, read from files by pread instead of mapped memory: files [file_count, 3] holds the
// descriptor, the byte where row 0 begins and the number of rows of each. Rows that follow each other in a file and in out
// are read together. depth = 0: by `threads` threads; else through one io_uring of that many entries. failure [2]: -1, 0; or
// the first position in out that could not be read (rows where the io_uring itself was refused) and errno, 0 at the file's end.
FASTLATENT_API int fastlatent_read_rows_cpu(const int64_t* files, int64_t file_count, const int64_t* shard_index, const int64_t* row_index, int64_t rows, int64_t row_bytes, void* out, int64_t threads, int64_t depth, int64_t* failure);

// Brings the pages of these rows into memory, all at once, and into the page tables: MADV_WILLNEED, then MADV_POPULATE_READ
// where the kernel has it. table as for gather_rows, failure as for read_rows: a file that was cut is EFAULT, not SIGBUS.
FASTLATENT_API int fastlatent_populate_rows_cpu(const int64_t* table, int64_t shard_count, const int64_t* shard_index, const int64_t* row_index, int64_t rows, int64_t row_bytes, int64_t* failure);

// Of the pages that [address, address + bytes) of a mapped file touches: counts [2] = how many are in memory, how many there are.
FASTLATENT_API int fastlatent_count_resident_cpu(int64_t address, int64_t bytes, int64_t* counts);

// Tells the kernel that the whole pages within [address, address + bytes) are read at random: MADV_RANDOM, no read-ahead.
FASTLATENT_API int fastlatent_advise_random_cpu(int64_t address, int64_t bytes);

// One solver step in place. state [4, batch, channels] = (x, D1, D2, x_base) of dtype state_dtype (f64 or f32);
// output [ways, batch, out_channels] of dtype output_dtype; guidance [ways, batch] and row [16] of state_dtype;
// noise [batch, channels] of state_dtype or null. out_channels is channels, or 2 * channels for learned variance.
FASTLATENT_API int fastlatent_solver_step_cpu(void* state, const void* output, const void* guidance, const void* row, const void* noise, int64_t ways, int64_t batch, int64_t channels, int64_t out_channels, int64_t state_dtype, int64_t output_dtype);

// out [rows, count] = x [rows, length] times weight [count, length] transposed, all f32; weight is int8 with a scale [count]
// for each of its rows where scale is not null.
FASTLATENT_API int fastlatent_linear_cpu(const void* x, const void* weight, const void* scale, void* out, int64_t rows, int64_t length, int64_t count, int64_t threads);

// `steps` solver steps of a whole diffusion head in place, as fastlatent/ops/diffusion_head_sample.py defines them. dtype
// (f32, bf16 or f16) is that of modulations [steps, ways, batch, (3 * blocks + 2) * hidden] and of the weights; up and down
// are int8 where up_scale and down_scale are not null. Everything else is f32. Activations stay f32: they are not rounded
// to the weights' dtype. The same bits for any number of threads; the last bits depend on the vector width, which is the
// widest that the CPU has and `lanes` (float32 lanes: 16, 8, 4) allows.
FASTLATENT_API int fastlatent_diffusion_head_sample_cpu(void* state, const void* modulations, const void* table, const void* guidance, const void* noise, const void* input_weight, const void* input_bias, const void* up_weight, const void* up_bias, const void* down_weight, const void* down_bias, const void* output_weight, const void* output_bias, const void* up_scale, const void* down_scale, int64_t steps, int64_t ways, int64_t batch, int64_t channels, int64_t out_channels, int64_t hidden, int64_t width, int64_t blocks, int64_t gated, int64_t layer_norm, double eps, int64_t dtype, int64_t threads, int64_t lanes);

// Every folder and file below a folder whose path is `root`, links followed except into a folder that the path already runs
// through; no name that begins with a dot, no pipe, socket or device. Folders are listed by `threads` threads at once.
// listing [4]: a handle that take_listing needs to be given, the number of entries, the bytes of all their paths, and errno
// where the root cannot be listed (there is no handle then).
FASTLATENT_API int fastlatent_list_files_cpu(const char* root, int64_t threads, int64_t* listing);

// The entries of such a listing, and its end. Entry i has the path paths[offsets[i] : offsets[i + 1]], relative to the root,
// and entries are in the order of their paths' bytes where a folder's counts as ending in "/". sizes in bytes, mtimes in
// ns. states: of a file 0, or errno why it cannot be read; of a folder -1, or -1 - errno where it cannot be listed.
FASTLATENT_API int fastlatent_take_listing_cpu(int64_t handle, void* paths, int64_t* offsets, int64_t* sizes, int64_t* mtimes_ns, int64_t* states);

// Latents drawn from moments, as fastlatent/ops/sample_posterior.py defines them. moments [batch, flips, channels, spatial],
// twice the channels with has_logvar; int8 where scale [batch, flips, scales] is not null, else of `dtype` (f32, bf16, f16).
// scales is 1 or the moments' channels. mean and std [channels] or both null. out f32 [batch, channels, spatial]. seed is 64
// bits, epoch 32.
FASTLATENT_API int fastlatent_sample_posterior_cpu(const void* moments, const int64_t* key_hash, const float* mean, const float* std, const float* scale, float* out, int64_t batch, int64_t flips, int64_t channels, int64_t spatial, int64_t scales, int64_t has_logvar, int64_t seed, int64_t epoch, int64_t dtype, int64_t threads);

// The window [crop_height, crop_width] at (top, left) of an image [height, width, channels] resized to out_height x out_width,
// as fastlatent/ops/resize.py defines it; image and out f32 where is_float, else uint8. filter: 0 box, 1 bilinear, 2 bicubic,
// 3 lanczos.
FASTLATENT_API int fastlatent_resize_cpu(const void* image, void* out, int64_t height, int64_t width, int64_t channels, int64_t out_height, int64_t out_width, int64_t filter, int64_t top, int64_t left, int64_t crop_height, int64_t crop_width, int64_t is_float);

// The weights of one of its passes, for `count` pixels from `first`: bounds [count, 2] = the first source pixel and how many;
// weights [count, taps] f64 where is_float, else int32 with 22 bits behind the point. taps = 2 * ceil(the filter's reach) + 1.
FASTLATENT_API int fastlatent_resize_weights_cpu(int64_t in_size, int64_t out_size, int64_t filter, int64_t first, int64_t count, int64_t taps, int32_t* bounds, void* weights, int64_t is_float);

// out = silu(group_norm(x) * weight + bias), or without the SiLU: x and out [batch, channels, pixels], with channels_last
// [batch, pixels, channels], of dtype f32, bf16 or f16; weight and bias [channels]. The same bits for any number of threads.
FASTLATENT_API int fastlatent_group_norm_silu_cpu(const void* x, const float* weight, const float* bias, void* out, int64_t batch, int64_t channels, int64_t pixels, int64_t groups, double eps, int64_t silu, int64_t channels_last, int64_t dtype, int64_t threads);

// Of every channel of the rows [first, last) of values [rows, channels, inner], at least one: out f64 [5, channels] = mean, sum
// of squared distances from it, minimum, maximum and a scratch row; of the channels from `logvars` on those of
// exp(clamp(x, -30, 20)). values int8 where scale is not null, and then value i is multiplied by scale[i / run]; else of
// `dtype` (f32, bf16, f16); at any address. The same bits for every instruction set.
FASTLATENT_API int fastlatent_row_statistics_cpu(const void* values, const float* scale, double* out, int64_t first, int64_t last, int64_t channels, int64_t inner, int64_t run, int64_t logvars, int64_t dtype);

// finite [rows] bool: row i holds no infinity and no NaN. table [rows, 2]: its address and its number of values, which are of
// `dtype` (f32, bf16, f16).
FASTLATENT_API int fastlatent_finite_rows_cpu(const int64_t* table, int64_t rows, int64_t dtype, void* finite);

}
