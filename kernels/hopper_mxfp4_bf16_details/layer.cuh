// What both kernels know of a layer: how `layout.py` packs its weights, where columns of activations are, how codes become numbers.
//
// Compile-time constants from `shape.py`: HIDDEN, INTERMEDIATE, STAGE_CHUNKS, STAGE_HALF.
#pragma once

#include <ptx.cuh>

constexpr u32 ALL_LANES = ~0u;

constexpr int TILE_ROWS = 64;
constexpr int CHUNK_K = 128;  // a thread of a quad has a block of 32 columns of it, with one scale
constexpr int STAGE_K = STAGE_CHUNKS * CHUNK_K + STAGE_HALF * (CHUNK_K / 2);
constexpr int STAGE_PLANES = 2 * STAGE_CHUNKS + STAGE_HALF;  // of 16 bytes of codes for each of 128 threads
constexpr int PLANE_BYTES = 128 * 16;
constexpr int CODE_BYTES = STAGE_PLANES * PLANE_BYTES;
constexpr int CHUNK_SCALE_BYTES = 128 * 2 * STAGE_CHUNKS;  // thread, chunk, row half
constexpr int HALF_SCALE_BYTES = STAGE_HALF * 64 * 2;      // two threads share a block of 32
constexpr int STAGE_BYTES = CODE_BYTES + CHUNK_SCALE_BYTES + HALF_SCALE_BYTES;

// Rows of W13 and columns of h: up to the end of the last chunk that has any of them. The rest of a chunk is zeros.
constexpr int LAST_STAGE_K = INTERMEDIATE % STAGE_K;
constexpr int LAST_CHUNKS_K = (LAST_STAGE_K + CHUNK_K - 1) / CHUNK_K * CHUNK_K;
constexpr int H_COLUMNS = INTERMEDIATE - LAST_STAGE_K + (LAST_CHUNKS_K < STAGE_K ? LAST_CHUNKS_K : STAGE_K);

constexpr int UP_STAGES = (HIDDEN + STAGE_K - 1) / STAGE_K;  // of a tile in GEMM 1
constexpr int DOWN_STAGES = (INTERMEDIATE + STAGE_K - 1) / STAGE_K;
constexpr int UP_K = UP_STAGES * STAGE_K;  // with the zeros that fill the last stage
constexpr int DOWN_K = DOWN_STAGES * STAGE_K;
constexpr int UP_TILES = 2 * H_COLUMNS / TILE_ROWS;  // of an expert
constexpr int DOWN_TILES = HIDDEN / TILE_ROWS;

static_assert(HIDDEN % TILE_ROWS == 0 && INTERMEDIATE % 32 == 0, "sizes that layout.py packs");
static_assert(STAGE_BYTES % 16 == 0, "what a bulk copy takes");

struct Outlier {  // 32 weights of one row whose scale is too small for the table; zero in the stages
  int place;      // row of the tile + 64 * (column / 32)
  float scale;    // relative to the row's factor
  int unused[2];
  u8 codes[16];   // as in the checkpoint: the even column in the low nibble
};

struct Weights {
  const u8* stages;           // [experts of this rank, tiles, stages of a tile, STAGE_BYTES]
  const float* row_factor;    // [experts, tiles * 64], rows in the order of the accumulator
  const float* bias;          // the same
  const int* outlier_starts;  // [experts * tiles + 1]
  const Outlier* outliers;
};

// ---- columns of activations

// Column k of a row: within each chunk of 128, a thread of a quad gets a whole block of 32 weights, number c, and takes them 8 at a time:
// logical 32c + 8j + 4p + e. A stage's half chunk does it with 16 columns for 32.
struct Column {
  int stage, chunk, c, j, p, e;  // chunk: its first column in the stage
};

__device__ __forceinline__ Column column_of(int k) {
  int stage = k / STAGE_K, rest = k - stage * STAGE_K, p = (rest >> 2) & 1, e = rest & 3;
  if (!STAGE_HALF || rest < STAGE_CHUNKS * CHUNK_K) return {stage, rest & ~(CHUNK_K - 1), (rest >> 5) & 3, (rest >> 3) & 3, p, e};
  return {stage, STAGE_CHUNKS * CHUNK_K, ((rest - STAGE_CHUNKS * CHUNK_K) >> 4) & 3, (rest >> 3) & 1, p, e};
}

// Where it is in a row of e4m3 numbers. STRIDE: what a stage takes up, STAGE_K in global memory, whole lines in shared memory.
template <int STRIDE>
__device__ __forceinline__ int e4m3_place(int k) {
  Column at = column_of(k);
  return at.stage * STRIDE + at.chunk + 32 * at.j + 16 * at.p + 4 * at.c + at.e;
}

// Where it is in a row of bf16 numbers: an instruction takes 16 columns, a thread of a quad has two pairs of them, 8 apart.
__device__ __forceinline__ int bf16_place(int k) {
  Column at = column_of(k);
  return at.stage * STAGE_K + at.chunk + 32 * at.j + 16 * at.p + 8 * (at.e >> 1) + 2 * at.c + (at.e & 1);
}

// A tile of W13 has the gates (rows r) and ups (rows r + 8) of the 32 columns of h whose bf16 places are 32 * tile + 8 * warp + row8, so
// that a warp writes neighbours. `fragment_rows` of layout.py is the inverse of bf16_place.
__device__ __forceinline__ int h_bf16_place(int tile, int warp, int row8) { return 32 * tile + 8 * warp + row8; }

__device__ __forceinline__ int h_e4m3_place(int tile, int warp, int row8) {
  return 32 * tile + 16 * (warp >> 1) + 4 * (row8 >> 1) + 2 * (warp & 1) + (row8 & 1);
}

__device__ __forceinline__ int h_column(int tile, int warp, int row8) {
  int place = h_bf16_place(tile, warp, row8), stage = place / STAGE_K, rest = place - stage * STAGE_K;
  bool is_half = STAGE_HALF && rest >= STAGE_CHUNKS * CHUNK_K;
  int inside = is_half ? rest - STAGE_CHUNKS * CHUNK_K : rest & (CHUNK_K - 1), j = inside >> 5;
  return stage * STAGE_K + rest - inside + (is_half ? 16 : 32) * (row8 >> 1) + 8 * j + 2 * warp + (row8 & 1);
}

// ---- numbers

// A row of e4m3 numbers is its numbers times a power of two that brings the largest to 224..448.
constexpr float E4M3_MAX = 448.0f;
constexpr float LEAST_ROW_MAX = 5.3e-36f;  // 448 * 2^-126: the factor of a row is a normal number, and so is its inverse
constexpr float LOW_FACTOR = 16.0f;        // e4m3 keeps 4 bits, so what is left of 8 is at most 1/16 of the number

// Biased exponent of that power; row_max: the bits of the largest |x|, a bf16.
__device__ __forceinline__ int row_exponent(u32 row_max) {
  return (int)(__float_as_uint(__fdividef(E4M3_MAX, fmaxf(__uint_as_float(row_max << 16), LEAST_ROW_MAX))) >> 23);
}

// Four bf16 numbers in two words times `scale`, as e4m3 numbers, and what is left of each times LOW_FACTOR.
__device__ __forceinline__ void split_4(u32 first, u32 second, float scale, u32& high, u32& low) {
  float scaled[4] = {__uint_as_float(first << 16) * scale, __uint_as_float(first & 0xFFFF0000u) * scale,
                     __uint_as_float(second << 16) * scale, __uint_as_float(second & 0xFFFF0000u) * scale};
  float rest[4];
  u32 high01 = e4m3_pair(scaled[0], scaled[1]), high23 = e4m3_pair(scaled[2], scaled[3]);
  e4m3_values(high01, rest[0], rest[1]);
  e4m3_values(high23, rest[2], rest[3]);
#pragma unroll
  for (int m = 0; m < 4; m++) rest[m] = (scaled[m] - rest[m]) * LOW_FACTOR;
  high = high01 | (high23 << 16);
  low = e4m3_pair(rest[0], rest[1]) | (e4m3_pair(rest[2], rest[3]) << 16);
}

// Magnitudes of bf16 are ordered as their bits.
__device__ __forceinline__ u32 largest_of_8(uint4 v) {
  return max(max(max(v.x & 0x7FFF, (v.x >> 16) & 0x7FFF), max(v.y & 0x7FFF, (v.y >> 16) & 0x7FFF)),
             max(max(v.z & 0x7FFF, (v.z >> 16) & 0x7FFF), max(v.w & 0x7FFF, (v.w >> 16) & 0x7FFF)));
}

__device__ __forceinline__ float e2m1_value(int code) {
  int magnitude = code & 7;
  float value = magnitude < 4 ? 0.5f * magnitude : magnitude < 6 ? magnitude - 2.0f : 2.0f * magnitude - 8.0f;
  return code & 8 ? -value : value;
}

// gate and up of gpt-oss and its relatives; the gate has no lower limit.
__device__ __forceinline__ float swiglu(float gate, float up, float alpha, float beta, float limit) {
  gate = least(gate, limit);
  up = largest(least(up, limit), -limit);
  constexpr float LOG2_E = 1.44269504f;
  return gate * inverse_fast(1.0f + exp2_fast(gate * (-LOG2_E * alpha))) * (up + beta);
}

// ---- codes

// A word has the magnitudes of 8 codes in the low three bits of its nibbles, as a byte permutation's selector wants them, and their signs
// where the sign bits of the first four, then (shifted by 4) of the last four results are.
constexpr u32 MAGNITUDES = 0x77777777, SIGNS = 0x80808080;

// A scale byte d, four times, makes the table: codes 0 to 3 are 0, 2^(d-7), 2^(d-6), 1.5 * 2^(d-6) as e4m3, codes 4 to 7 go on from there.
// All of them are exact for 1 <= d <= 12.
struct E4m3Table {
  u32 low, high;
};

__device__ __forceinline__ E4m3Table e4m3_table(u32 d) {
  constexpr u32 LOW_CODES = 0x0C080000, HIGH_CODES = 0x1C181410;  // exponents and mantissas of e2m1's 0 0.5 1 1.5 and 2 3 4 6, less d
  u32 exponents = d << 3;
  return {(exponents & 0xF8F8F800u) + LOW_CODES, exponents + HIGH_CODES};  // code 0 is 0 at any scale
}

__device__ __forceinline__ void expand_e4m3(u32 word, E4m3Table table, u32& first, u32& last) {
  u32 selector = word & MAGNITUDES;
  first = and_or(word, SIGNS, permute_bytes(table.low, table.high, selector));
  last = and_or(word << 4, SIGNS, permute_bytes(table.low, table.high, selector >> 16));
}
