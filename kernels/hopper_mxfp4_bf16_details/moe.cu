// A whole MXFP4 mixture-of-experts layer for a few tokens in one cooperative launch (sm_90a).
//
//   y   = x @ W13.T + b13              GEMM 1: rows of W13 alternate gate and up
//   h   = swiglu(y)                    in the registers of GEMM 1's epilogue
//   out = sum of weight * (h @ W2.T + b2) over a token's slots that belong to this rank     GEMM 2 and the combination
//
// Arithmetic. A bf16 activation times a power of two of its row is the sum of two e4m3 numbers, high + low / 16. Both are columns of one
// matrix product, so they share the weights in registers. A weight's e2m1 code and its block's scale become one e4m3 number by a look-up
// in an 8-byte table that is made from the scale (`layout.py` says how the rest of the row's scale is kept). Tensor cores multiply e4m3
// exactly but add with about 14 bits, so their sums are taken over to fp32 once a stage.
//
// Who does what
//   one lane of the last warp     the producer: copies stages of weights into a ring in shared memory. It runs ahead of everything,
//                                 from GEMM 1's weights into those of GEMM 2, so that memory never waits for the dependency between them.
//   WARPGROUPS warpgroups         the consumers: deal a tile's stages out among themselves (split K), expand codes, multiply. A tile's
//                                 owner, another one for each tile, adds the partial sums of the others and finishes the tile.
//   every block for itself        sorts the (token, slot) pairs by expert: fewer than a microsecond of integer work, no kernel before.
//
// Words
//   pair      index of a (token, slot): token * top_k + slot. Local: its expert is on this rank.
//   pass      up to PASS_TOKENS pairs of one expert, the columns of one product. An expert with more pairs has more passes.
//   tile      64 rows of one expert's W13 or W2 times one pass
//   segment   the tiles of one pass that a block computes, one after another
//   stage     the weights of 64 rows and STAGE_K columns, contiguous in memory: what the ring holds
//
// Everything that shapes the code is a compile-time constant, given as -DNAME=value by `launch.py` from `shape.py`:
//   HIDDEN, INTERMEDIATE, EXPERTS (local), MAX_TOP_K, COLUMNS, STAGE_CHUNKS, STAGE_HALF, RING_STAGES, MAX_TOKENS, SPLIT_ONCE,
//   H_STATIC, OUTLIERS, STATE_BYTES

#include <layer.cuh>

// ---- sizes

constexpr int WARPGROUPS = 3;
constexpr int CONSUMERS = WARPGROUPS * 128;
constexpr int THREADS = CONSUMERS + 32;
constexpr int WARPS = THREADS / 32;
constexpr int PRODUCER_WARP = CONSUMERS / 32;

constexpr int PASS_TOKENS = COLUMNS / 2;  // a high and a low column for each
constexpr int VALUES = COLUMNS / 2;       // of the 64 x COLUMNS accumulator, in each of 128 threads

constexpr int STAGE_LINES = STAGE_CHUNKS + STAGE_HALF;  // chunks of activations that a stage meets; of the last, half
constexpr int STAGE_MMAS = STAGE_K / 32;                // one instruction takes 32 columns
constexpr int STAGE_WORDS = 4 * STAGE_PLANES;           // 8 codes each, of one thread

constexpr int LINE_BYTES = COLUMNS * CHUNK_K;  // one chunk of activations
constexpr int MOST_STAGES = UP_STAGES > DOWN_STAGES ? UP_STAGES : DOWN_STAGES;
constexpr int ACTIVATION_BYTES = MOST_STAGES * STAGE_LINES * LINE_BYTES;
constexpr int RING_BYTES = RING_STAGES * STAGE_BYTES;
constexpr int PARTIAL_BYTES = (WARPGROUPS - 1) * 128 * VALUES * 4;

constexpr int MAX_PAIRS = MAX_TOKENS * MAX_TOP_K;
constexpr int PAIR_GROUPS = (MAX_PAIRS + 31) / 32;
constexpr int GROUP_ROUNDS = (PAIR_GROUPS + WARPS - 1) / WARPS;
constexpr int SPREAD_PASSES = EXPERTS + MAX_PAIRS / PASS_TOKENS;
constexpr int MAX_PASSES = MAX_PAIRS < SPREAD_PASSES ? MAX_PAIRS : SPREAD_PASSES;

// A ring slot must always belong to the same warpgroup. Else a warpgroup that is ahead waits for a phase whose parity an older phase had,
// passes, and reads old weights; that was a rare hang.
static_assert(RING_STAGES % WARPGROUPS == 0, "a ring slot must belong to one warpgroup");
static_assert(MAX_TOP_K <= 32, "local slots of a token are bits of a word");
static_assert(SPLIT_ONCE == 0 || SPLIT_ONCE == 1, "");

// ---- arguments

struct Arguments {
  Weights up, down;
  // workspace; x and h rows are in the order of `e4m3_place`, with zeros up to UP_K and DOWN_K
  u8 *x_high, *x_low;  // [MAX_TOKENS, UP_K]
  float* x_factor;     // [MAX_TOKENS]
  u8 *h_high, *h_low;  // [MAX_PAIRS, DOWN_K], if H_STATIC
  u16* h;              // bf16 [MAX_PAIRS, INTERMEDIATE], if not
  float* z;            // [MAX_PAIRS, HIDDEN]: router weight times GEMM 2
  int* counters;       // COUNTERS zeros; zeros again after the launch
  // the call
  const u16* x;           // bf16 [tokens, HIDDEN]
  const int* ids;         // [tokens, top_k], over all ranks
  const float* weights;   // [tokens, top_k]
  u16* out;               // bf16 [tokens, HIDDEN]
  int tokens, top_k, first_expert;
  float alpha, beta, limit;
  float h_scale;  // a power of two; |h| times it is at most 448
};

// counters
constexpr int BLOCKS_DONE = 0;
constexpr int PASS_TILES_DONE = 1;                          // [MAX_PASSES]: tiles of GEMM 1
constexpr int ARRIVED = PASS_TILES_DONE + MAX_PASSES;       // [tokens, DOWN_TILES]: slots whose rows of z are there
constexpr int TOKEN_SPLIT = ARRIVED + MAX_TOKENS * DOWN_TILES;  // [tokens]: x_high, x_low and x_factor are there

// ---- shared memory: activations | ring | partial sums | State

struct State {
  u64 full[RING_STAGES], empty[RING_STAGES];
  u64 partial_full, partial_free;
  int list[MAX_PAIRS];            // local pairs, by expert, then in their own order
  int token[MAX_PAIRS];           // of each pair in the list
  int first_of[EXPERTS];          // where an expert's pairs begin in the list
  int pass_expert[MAX_PASSES];
  int pass_pairs[MAX_PASSES];     // first in the list | how many << 16
  u32 slots[MAX_TOKENS];          // a bit for each local slot of a token
  u32 row_max[PASS_TOKENS];       // bits of the largest |x|, of each row of a pass
  float factor[PASS_TOKENS];      // what the products of each row are multiplied by
  int passes;
  int last;                       // this block is the last to finish
  u8 count[PAIR_GROUPS][EXPERTS];  // pairs of an expert in each group of 32 pairs
};
static_assert(sizeof(State) <= STATE_BYTES, "shape.py reserves too little");
constexpr int STATE_OFFSET = ACTIVATION_BYTES + RING_BYTES + PARTIAL_BYTES;

__device__ __forceinline__ void consumers_meet() { named_barrier(1, CONSUMERS); }

// ---- activations

// Byte offset of `place` in row `row` of the activations in shared memory: 128-byte swizzle, as the descriptor of the tensor core says.
__device__ __forceinline__ int swizzled(int row, int place) {
  int line = place / CHUNK_K, unit = (place >> 4) & 7;
  return line * LINE_BYTES + (row >> 3) * 1024 + (row & 7) * 128 + ((unit ^ (row & 7)) << 4) + (place & 15);
}

// 8 bf16 (columns 8 * unit ..) -> high and low, to shared memory or, if `high` is given, to a row in global memory.
// Not inlined: the first fetch of instructions is in the latency of every call, and unrolled twice this took 13 us of one.
__device__ __noinline__ void split_8(uint4 eight, int row, int unit, u32 row_max, float* factor, u8* activations, u8* high, u8* low) {
  int exponent = row_exponent(row_max);
  float scale = __uint_as_float((u32)exponent << 23);  // the largest power of two that keeps the row within 448
  if (unit == 0) factor[row] = __uint_as_float((u32)(254 - exponent) << 23);  // its inverse
  u32 pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
  for (int p = 0; p < 2; p++) {
    u32 four_high, four_low;
    split_4(pairs[2 * p], pairs[2 * p + 1], scale, four_high, four_low);
    if (high) {
      int place = e4m3_place<STAGE_K>(unit * 8 + 4 * p);
      *(u32*)(high + place) = four_high;
      *(u32*)(low + place) = four_low;
    } else {
      int place = e4m3_place<STAGE_LINES * CHUNK_K>(unit * 8 + 4 * p);
      *(u32*)(activations + swizzled(row, place)) = four_high;
      *(u32*)(activations + swizzled(row + PASS_TOKENS, place)) = four_low;
    }
  }
}

constexpr int AT_ONCE = 3;  // 16-byte loads of a thread under way together

// The consumers split `rows` rows of bf16 [.., K] into shared memory. row_of(i) is where row i of the pass begins.
// FRESH: written by other blocks of this launch, so not through the read-only cache.
template <int K, int PADDED_K, bool FRESH, class RowOf>
__device__ __forceinline__ void split_rows(State& state, u8* activations, int rows, int thread, RowOf row_of) {
  constexpr int UNITS = PADDED_K / 8;  // of a row; those from K on are zeros
  const int units = rows * UNITS, lane = thread & 31;
  auto load = [&](int index) {
    int row = index / UNITS, unit = index - row * UNITS;
    if (index >= units || (PADDED_K > K && unit >= K / 8)) return make_uint4(0, 0, 0, 0);
    const uint4* from = (const uint4*)row_of(row) + unit;
    return FRESH ? __ldcg(from) : __ldg(from);
  };
  auto split = [&](const uint4(&eight)[AT_ONCE], int first) {
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      int index = first + i * CONSUMERS + thread, row = index / UNITS;
      if (index < units) split_8(eight[i], row, index - row * UNITS, state.row_max[row], state.factor, activations, nullptr, nullptr);
    }
  };
  const bool one_round = units <= CONSUMERS * AT_ONCE;  // then nothing is loaded twice
  if (thread < PASS_TOKENS) state.row_max[thread] = 0;
#pragma unroll 1
  for (int first = 0; first < units; first += CONSUMERS * AT_ONCE) {
    uint4 eight[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) eight[i] = load(first + i * CONSUMERS + thread);
    if (first == 0) consumers_meet();
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      int index = first + i * CONSUMERS + thread, row = index < units ? index / UNITS : -1;
      u32 here = largest_of_8(eight[i]);
      if (UNITS >= 32) {  // a warp's units are of one row, or of two
        int row_a = __shfl_sync(ALL_LANES, row, 0);
        u32 max_a = __reduce_max_sync(ALL_LANES, row == row_a ? here : 0), max_b = __reduce_max_sync(ALL_LANES, row == row_a ? 0 : here);
        if (lane == 0 && row_a >= 0) atomicMax(&state.row_max[row_a], max_a);
        if (lane == 31 && row_a >= 0 && row_a + 1 < rows) atomicMax(&state.row_max[row_a + 1], max_b);
      } else if (row >= 0) {
        atomicMax(&state.row_max[row], here);
      }
    }
    if (one_round) {
      consumers_meet();
      split(eight, first);
    }
  }
  if (!one_round) {
    consumers_meet();
#pragma unroll 1
    for (int first = 0; first < units; first += CONSUMERS * AT_ONCE) {
      uint4 eight[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) eight[i] = load(first + i * CONSUMERS + thread);
      split(eight, first);
    }
  }
}

// Adds the blocks that the table of a row cannot hold, in fp32, to the sums of columns that this thread has. Rare, and slow.
__device__ __noinline__ void add_outliers(float (&sum)[VALUES], const Weights& matrix, int tile, const u8* activations, int warp_row,
                                          int row8, int column4) {
  for (int i = __ldg(matrix.outlier_starts + tile); i < __ldg(matrix.outlier_starts + tile + 1); i++) {
    const Outlier& outlier = matrix.outliers[i];
    int row = outlier.place & 63, group = outlier.place >> 6;
    if ((row & 7) != row8 || (row & ~15) != warp_row) continue;
    for (int v = 0; v < VALUES; v++) {
      if (((v >> 1) & 1) != ((row >> 3) & 1)) continue;  // of each four values, two are of row r and two of row r + 8
      int column = 8 * (v >> 2) + 2 * column4 + (v & 1);
      float products = 0.0f;
      for (int k = 0; k < 32; k++) {
        float weight = e2m1_value(outlier.codes[k >> 1] >> (4 * (k & 1)));
        float activation, other;
        e4m3_values(activations[swizzled(column, e4m3_place<STAGE_LINES * CHUNK_K>(group * 32 + k))], activation, other);
        products += weight * activation;
      }
      sum[v] += products * outlier.scale;
    }
  }
  __syncwarp();
}

// ---- weights

// Codes and scales of one stage as a thread holds them.
struct Stage {
  u32 words[STAGE_WORDS];
  u32 scales;  // bytes: chunk, row half
  u32 half_scales;
};

// Takes stage `sequence` of this block's stream out of the ring and frees its slot.
__device__ __forceinline__ void take_stage(Stage& stage, State& state, const u8* ring, int sequence, int thread, int lane) {
  int slot = sequence % RING_STAGES;
  barrier_wait(shared_address(&state.full[slot]), (sequence / RING_STAGES) & 1);
  const u8* from = ring + slot * STAGE_BYTES;
#pragma unroll
  for (int i = 0; i < STAGE_PLANES; i++) {  // a plane is 16 bytes of each thread in turn: no bank conflicts; 32 in a row would have them
    uint4 plane = ((const uint4*)from)[i * 128 + thread];
    stage.words[4 * i] = plane.x;
    stage.words[4 * i + 1] = plane.y;
    stage.words[4 * i + 2] = plane.z;
    stage.words[4 * i + 3] = plane.w;
  }
  if (STAGE_CHUNKS == 1)
    stage.scales = *(const u16*)(from + CODE_BYTES + thread * 2);
  else
    stage.scales = *(const u32*)(from + CODE_BYTES + thread * 4);
  if (STAGE_HALF) stage.half_scales = *(const u16*)(from + CODE_BYTES + CHUNK_SCALE_BYTES + (thread >> 1) * 2);
  warp_arrives(shared_address(&state.empty[slot]), lane);
}

// Fragments of the tensor core: rows r and r + 8 (`half`), columns 4c.. and 16 + 4c.. of each 32.
__device__ __forceinline__ void expand(u32 (&fragments)[STAGE_MMAS][4], const Stage& stage) {
#pragma unroll
  for (int chunk = 0; chunk < STAGE_LINES; chunk++) {
    const bool is_half = chunk == STAGE_CHUNKS;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 d = permute_bytes(is_half ? stage.half_scales : stage.scales, 0, 0x1111 * (is_half ? half : 2 * chunk + half));  // four times
      E4m3Table table = e4m3_table(d);
#pragma unroll
      for (int j = 0; j < (is_half ? 2 : 4); j++) {
        u32 word = stage.words[is_half ? 8 * STAGE_CHUNKS + 2 * half + j : (2 * chunk + half) * 4 + j];
        expand_e4m3(word, table, fragments[chunk * 4 + j][half], fragments[chunk * 4 + j][2 + half]);
      }
    }
  }
}

// ---- the kernel

extern "C" __global__ void __launch_bounds__(THREADS, 1) hopper_mxfp4_bf16(const __grid_constant__ Arguments args) {
  u8* const activations = shared_memory;
  u8* const ring = shared_memory + ACTIVATION_BYTES;
  float* const partial = (float*)(shared_memory + ACTIVATION_BYTES + RING_BYTES);
  State& state = *(State*)(shared_memory + STATE_OFFSET);
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
  const int block = blockIdx.x, blocks = gridDim.x;
  const int pairs = args.tokens * args.top_k;

  if (thread == 0) {
    for (int i = 0; i < RING_STAGES; i++) {
      barrier_init(shared_address(&state.full[i]), 1);
      barrier_init(shared_address(&state.empty[i]), 4 * WARP_ARRIVALS);  // the warps of the warpgroup that owns the slot
    }
    barrier_init(shared_address(&state.partial_full), (WARPGROUPS - 1) * 4 * WARP_ARRIVALS);
    barrier_init(shared_address(&state.partial_free), 4 * WARP_ARRIVALS);
    barrier_init_fence();
  }

  // ---- x: for few tokens every block splits the rows of its experts when it needs them, for more of them block t splits token t, before
  // the producer's first burst is in its way, and the others copy.
  constexpr int TOKEN_UNITS = HIDDEN / 8, TOKEN_ROUNDS = (TOKEN_UNITS + CONSUMERS - 1) / CONSUMERS;
  const bool splits_token = SPLIT_ONCE && block < args.tokens;
  uint4 token_x[TOKEN_ROUNDS];
  if (SPLIT_ONCE) {
#pragma unroll
    for (int i = 0; i < TOKEN_ROUNDS; i++) {
      int unit = i * CONSUMERS + thread;
      token_x[i] = make_uint4(0, 0, 0, 0);
      if (splits_token && thread < CONSUMERS && unit < TOKEN_UNITS) token_x[i] = __ldg((const uint4*)(args.x + (u64)block * HIDDEN) + unit);
    }
    if (thread == 0) state.row_max[0] = 0;
  } else {
    for (int i = block + thread * blocks; i < args.tokens * (HIDDEN * 2 / 128); i += blocks * THREADS)
      prefetch_to_l2((const u8*)args.x + i * 128);
  }

  // ---- routing: the same lists in every block, in the order of the pairs, so that a repeated launch adds in the same order
  int expert_of[GROUP_ROUNDS], before[GROUP_ROUNDS];
#pragma unroll
  for (int r = 0; r < GROUP_ROUNDS; r++) {
    int pair = (warp + r * WARPS) * 32 + lane;
    expert_of[r] = -1;
    if (pair < pairs) {
      int local = args.ids[pair] - args.first_expert;
      if (local >= 0 && local < EXPERTS) expert_of[r] = local;
    }
  }
  for (int i = thread; i < PAIR_GROUPS * EXPERTS; i += THREADS) (&state.count[0][0])[i] = 0;
  for (int i = thread; i < args.tokens; i += THREADS) state.slots[i] = 0;
  __syncthreads();
#pragma unroll
  for (int r = 0; r < GROUP_ROUNDS; r++) {
    int group = warp + r * WARPS, pair = group * 32 + lane;
    if (group < PAIR_GROUPS) {
      u32 same = __match_any_sync(ALL_LANES, expert_of[r]);
      before[r] = __popc(same & ((1u << lane) - 1));
      if (before[r] == 0 && expert_of[r] >= 0) state.count[group][expert_of[r]] = (u8)__popc(same);
      if (expert_of[r] >= 0) atomicOr(&state.slots[pair / args.top_k], 1u << (pair % args.top_k));
    }
  }
  if (splits_token) {
    u32 here = 0;
#pragma unroll
    for (int i = 0; i < TOKEN_ROUNDS; i++) here = max(here, largest_of_8(token_x[i]));
    here = __reduce_max_sync(ALL_LANES, here);
    if (lane == 0) atomicMax(&state.row_max[0], here);
  }
  __syncthreads();
  if (warp == 0) {
    int list_end = 0, passes = 0;
    for (int first = 0; first < EXPERTS; first += 32) {
      int expert = first + lane, count = 0;
      if (expert < EXPERTS)
        for (int group = 0; group < PAIR_GROUPS; group++) count += state.count[group][expert];
      int own = (count + PASS_TOKENS - 1) / PASS_TOKENS, pairs_up_to = count, passes_up_to = own;
      for (int distance = 1; distance < 32; distance <<= 1) {
        int more_pairs = __shfl_up_sync(ALL_LANES, pairs_up_to, distance), more_passes = __shfl_up_sync(ALL_LANES, passes_up_to, distance);
        if (lane >= distance) {
          pairs_up_to += more_pairs;
          passes_up_to += more_passes;
        }
      }
      int begin = list_end + pairs_up_to - count;
      if (expert < EXPERTS) state.first_of[expert] = begin;
      for (int i = 0; i < own; i++) {
        state.pass_expert[passes + passes_up_to - own + i] = expert;
        state.pass_pairs[passes + passes_up_to - own + i] = (begin + i * PASS_TOKENS) | (min(PASS_TOKENS, count - i * PASS_TOKENS) << 16);
      }
      list_end += __shfl_sync(ALL_LANES, pairs_up_to, 31);
      passes += __shfl_sync(ALL_LANES, passes_up_to, 31);
    }
    if (lane == 0) state.passes = passes;
  }
  if (splits_token && thread < CONSUMERS) {
#pragma unroll
    for (int i = 0; i < TOKEN_ROUNDS; i++) {
      int unit = i * CONSUMERS + thread;
      if (unit < TOKEN_UNITS)
        split_8(token_x[i], block, unit, state.row_max[0], args.x_factor, activations, args.x_high + (u64)block * UP_K,
                args.x_low + (u64)block * UP_K);
    }
  }
  __syncthreads();
  if (splits_token && thread == CONSUMERS - 32) {
    __threadfence();
    store_release(args.counters + TOKEN_SPLIT + block, 1);
  }
#pragma unroll
  for (int r = 0; r < GROUP_ROUNDS; r++) {
    int group = warp + r * WARPS;
    if (expert_of[r] >= 0) {
      int place = state.first_of[expert_of[r]] + before[r];
      for (int earlier = 0; earlier < group; earlier++) place += state.count[earlier][expert_of[r]];
      state.list[place] = group * 32 + lane;
      state.token[place] = (group * 32 + lane) / args.top_k;
    }
  }
  for (int token = block; token < args.tokens; token += blocks)  // tokens that no expert of this rank serves
    if (state.slots[token] == 0)
      for (int i = thread; i < HIDDEN / 8; i += THREADS) ((uint4*)(args.out + (u64)token * HIDDEN))[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  const int passes = state.passes;

  if (warp == PRODUCER_WARP) {
    if (lane == 0) {
      int slot = 0;
      u32 parity = 1;  // of a phase that counts as over: the ring starts empty
      const u64 evict_first = 0x12F0000000000000ull;  // weights are read once; the policy word is what createpolicy gives
      for (int phase = 0; phase < 2; phase++) {
        const int tiles = phase ? DOWN_TILES : UP_TILES, stages = phase ? DOWN_STAGES : UP_STAGES;
        const u8* const all = phase ? args.down.stages : args.up.stages;
        const int all_tiles = passes * tiles;
        int tile = all_tiles * block / blocks;
        const int last_tile = all_tiles * (block + 1) / blocks;
        while (tile < last_tile) {
          int pass = tile / tiles, segment_end = min(last_tile, (pass + 1) * tiles);
          const u8* from = all + (u64)(state.pass_expert[pass] * tiles + tile - pass * tiles) * (stages * STAGE_BYTES);
          for (int i = (segment_end - tile) * stages; i > 0; i--) {
            barrier_wait(shared_address(&state.empty[slot]), parity);
            u32 full = shared_address(&state.full[slot]);
            barrier_arrive_and_expect(full, STAGE_BYTES);
            bulk_copy(shared_address(ring + slot * STAGE_BYTES), from, STAGE_BYTES, full, evict_first);
            from += STAGE_BYTES;
            if (++slot == RING_STAGES) {
              slot = 0;
              parity ^= 1;
            }
          }
          tile = segment_end;
        }
      }
    }
    return;
  }

  // ---- consumers
  const int warpgroup = thread >> 7, place = thread & 127, warp_row = 16 * (place >> 5), row8 = lane >> 2, column4 = lane & 3;
  const u32 activations_address = shared_address(activations);
  int tiles_done = 0;  // of this block, in both GEMMs
  int sequence = 0;    // of the current tile's first stage in this block's stream; stage s belongs to warpgroup s % WARPGROUPS
  bool taken = false;  // the next stage of this warpgroup is in registers already
  Stage stage;

  for (int phase = 0; phase < 2; phase++) {
    const int tiles = phase ? DOWN_TILES : UP_TILES, stages = phase ? DOWN_STAGES : UP_STAGES;
    const Weights& matrix = phase ? args.down : args.up;
    const int all_tiles = passes * tiles;
    int tile = all_tiles * block / blocks;
    const int last_tile = all_tiles * (block + 1) / blocks;
    while (tile < last_tile) {
      const int pass = tile / tiles, segment_end = min(last_tile, (pass + 1) * tiles), expert = state.pass_expert[pass];
      const int first = state.pass_pairs[pass] & 0xFFFF, rows = state.pass_pairs[pass] >> 16;
      consumers_meet();  // nobody reads the last segment's activations any more

      // ---- activations of the pass
      if (phase == 1 && thread == 0)
        while (load_acquire(args.counters + PASS_TILES_DONE + pass) < UP_TILES) {
        }
      if (phase == 0 && !SPLIT_ONCE) {
        split_rows<HIDDEN, UP_K, false>(state, activations, rows, thread,
                                        [&](int i) { return args.x + (u64)state.token[first + i] * HIDDEN; });
      } else if (phase == 1 && !H_STATIC) {
        consumers_meet();
        split_rows<INTERMEDIATE, DOWN_K, true>(state, activations, rows, thread,
                                               [&](int i) { return args.h + (u64)state.list[first + i] * INTERMEDIATE; });
      } else {
        if (phase == 0 && thread < rows) {
          int token = state.token[first + thread];
          while (!load_acquire(args.counters + TOKEN_SPLIT + token)) {
          }
          state.factor[thread] = __ldcg(args.x_factor + token);
        }
        consumers_meet();
        const u8* const high = phase ? args.h_high : args.x_high;
        const u8* const low = phase ? args.h_low : args.x_low;
        const int* const row_of = phase ? state.list : state.token;
        const int width = phase ? DOWN_K : UP_K, units = width / 16;
        for (int i = thread; i < rows * 2 * units; i += CONSUMERS) {
          int r = i / units, unit = i - r * units;
          bool is_low = r >= rows;
          int row = is_low ? r - rows : r;
          const u8* from = (is_low ? low : high) + (u64)row_of[first + row] * width + unit * 16;
          int in_stage = unit / (STAGE_K / 16), rest = unit - in_stage * (STAGE_K / 16);
          copy_16_bytes(activations_address + swizzled(row + is_low * PASS_TOKENS, (in_stage * STAGE_LINES * 8 + rest) * 16), from);
        }
        wait_for_copies();
      }
      show_to_tensor_cores();
      consumers_meet();

      const int sequence_end = sequence + (segment_end - tile) * stages;
      for (int t = tile; t < segment_end; t++, tiles_done++, sequence += stages) {
        const int row_tile = t - pass * tiles, owner = tiles_done % WARPGROUPS;
        float sum[VALUES];
#pragma unroll
        for (int i = 0; i < VALUES; i++) sum[i] = 0.0f;
        float factor_a, factor_b, bias_a, bias_b;  // of this thread's rows r and r + 8
        if (owner == warpgroup) {
          int row = (expert * tiles + row_tile) * TILE_ROWS + warp_row + row8;
          factor_a = __ldg(matrix.row_factor + row);
          factor_b = __ldg(matrix.row_factor + row + 8);
          bias_a = __ldg(matrix.bias + row);
          bias_b = __ldg(matrix.bias + row + 8);
        }

        // ---- the main loop: this warpgroup's stages of the tile
        const int my_first = (warpgroup + WARPGROUPS - sequence % WARPGROUPS) % WARPGROUPS;
#pragma unroll 1
        for (int s = my_first; s < stages; s += WARPGROUPS) {
          if (!taken) take_stage(stage, state, ring, sequence + s, place, lane);
          taken = false;
          u32 fragments[STAGE_MMAS][4];
          expand(fragments, stage);
          float d[VALUES];
          const u32 b = descriptor_low(activations_address) + s * (STAGE_LINES * LINE_BYTES / 16);
          mma_begin();
#pragma unroll
          for (int i = 0; i < STAGE_MMAS; i++)  // the first one ignores what is in d
            mma(d, fragments[i], b + (i >> 2) * (LINE_BYTES / 16) + (i & 3) * 2, i > 0);
          mma_commit();
          if (sequence + s + WARPGROUPS < sequence_end) {  // the next stage's loads fly while the tensor cores work
            take_stage(stage, state, ring, sequence + s + WARPGROUPS, place, lane);
            taken = true;
          }
          mma_wait(d);
#pragma unroll
          for (int i = 0; i < VALUES; i++) sum[i] += d[i];  // promotion to fp32
        }

        // ---- partial sums meet at the owner. Every warpgroup, the owner too, waits for each phase of `partial_free`: one that skips a
        // phase takes the next one's parity for it, which was a rare launch failure.
        float* const mine = partial + place;
        if (tiles_done > 0) barrier_wait(shared_address(&state.partial_free), (tiles_done - 1) & 1);
        if (owner != warpgroup) {
          int seat = warpgroup < owner ? warpgroup : warpgroup - 1;
#pragma unroll
          for (int i = 0; i < VALUES; i++) mine[(seat * VALUES + i) * 128] = sum[i];
          warp_arrives(shared_address(&state.partial_full), lane);
          continue;
        }
        barrier_wait(shared_address(&state.partial_full), tiles_done & 1);
#pragma unroll
        for (int seat = 0; seat < WARPGROUPS - 1; seat++)
#pragma unroll
          for (int i = 0; i < VALUES; i++) sum[i] += mine[(seat * VALUES + i) * 128];
        warp_arrives(shared_address(&state.partial_free), lane);
        if (OUTLIERS) {
          float total[VALUES];  // a copy: what a function gets by address lives in memory, and the main loop needs registers
#pragma unroll
          for (int i = 0; i < VALUES; i++) total[i] = sum[i];
          add_outliers(total, matrix, expert * tiles + row_tile, activations, warp_row, row8, column4);
#pragma unroll
          for (int i = 0; i < VALUES; i++) sum[i] = total[i];
        }

        // ---- epilogue: of four values two are of row r and two of r + 8; a token's low column is in the same thread, or with 8 columns
        // in the lane two further
        const int column = h_column(row_tile, warp_row >> 4, row8);  // GEMM 1: r is a gate, r + 8 its up
        const int h_place = h_e4m3_place(row_tile, warp_row >> 4, row8);
#pragma unroll
        for (int q = 0; q < COLUMNS / 4; q += 4) {
#pragma unroll
          for (int parity = 0; parity < 2; parity++) {
            float low_a, low_b;
            if (COLUMNS == 8) {
              low_a = __shfl_xor_sync(ALL_LANES, sum[parity], 2);
              low_b = __shfl_xor_sync(ALL_LANES, sum[2 + parity], 2);
            } else {
              low_a = sum[(q + COLUMNS / 4 + parity) % VALUES];
              low_b = sum[(q + COLUMNS / 4 + 2 + parity) % VALUES];
            }
            const int row = 2 * q + 2 * column4 + parity;  // of the pass
            if ((COLUMNS == 8 && column4 >= 2) || row >= rows) continue;
            const int pair = state.list[first + row];
            const float a = sum[q + parity] + low_a * (1.0f / LOW_FACTOR), b = sum[q + 2 + parity] + low_b * (1.0f / LOW_FACTOR);
            if (phase == 0) {
              const float x_factor = state.factor[row];
              const float h = swiglu(a * factor_a * x_factor + bias_a, b * factor_b * x_factor + bias_b, args.alpha, args.beta, args.limit);
              if (H_STATIC) {
                // rounded to bf16 first, as everywhere, so that its two parts are all of it
                float high, low, unused;
                const float scaled = bf16_value(h) * args.h_scale;
                const u32 high_bits = e4m3_pair(scaled, 0.0f);
                e4m3_values(high_bits, high, unused);
                low = (scaled - high) * LOW_FACTOR;
                const u64 at = (u64)pair * DOWN_K + h_place;
                args.h_high[at] = (u8)high_bits;
                args.h_low[at] = (u8)e4m3_pair(low, 0.0f);
              } else if (column < INTERMEDIATE) {
                args.h[(u64)pair * INTERMEDIATE + column] = (u16)bf16_pair(h, 0.0f);
              }
            } else {
              const float h_factor = H_STATIC ? 1.0f / args.h_scale : state.factor[row];
              const float weight = __ldg(args.weights + pair);
              float* const z = args.z + (u64)pair * HIDDEN + row_tile * TILE_ROWS + warp_row + row8;
              __stcg(z, (a * factor_a * h_factor + bias_a) * weight);
              __stcg(z + 8, (b * factor_b * h_factor + bias_b) * weight);
            }
          }
        }
      }

      // ---- a segment is done: one fence for all of its tiles (a fence for each took 2 us of a single token's 33)
      consumers_meet();
      if (phase == 0) {
        if (thread == 0) {
          __threadfence();
          add_release(args.counters + PASS_TILES_DONE + pass, segment_end - tile);
        }
      } else {  // who brings the last slot of 64 columns of a token adds up all of them, in the order of the slots
        if (lane == 0) __threadfence();
        __syncwarp();
        const int done = segment_end - tile;
        for (int i = warp; i < rows * done; i += CONSUMERS / 32) {
          const int row = i / done, row_tile = tile - pass * tiles + i - row * done, token = state.token[first + row];
          const u32 slots = state.slots[token];
          int others = 0;
          if (lane == 0) others = atomicAdd(args.counters + ARRIVED + token * DOWN_TILES + row_tile, 1);
          others = __shfl_sync(ALL_LANES, others, 0);
          if (others + 1 < __popc(slots)) continue;
          __threadfence();
          const float2* const z = (const float2*)(args.z + (u64)(token * args.top_k) * HIDDEN + row_tile * TILE_ROWS) + lane;
          float2 parts[MAX_TOP_K];
#pragma unroll
          for (int slot = 0; slot < MAX_TOP_K; slot++)
            parts[slot] = (slots >> slot) & 1 ? __ldcg(z + slot * (HIDDEN / 2)) : make_float2(0.0f, 0.0f);
          float first_sum = parts[0].x, second_sum = parts[0].y;
#pragma unroll
          for (int slot = 1; slot < MAX_TOP_K; slot++) {
            first_sum += parts[slot].x;
            second_sum += parts[slot].y;
          }
          *((u32*)(args.out + (u64)token * HIDDEN + row_tile * TILE_ROWS) + lane) = bf16_pair(first_sum, second_sum);
        }
      }
      tile = segment_end;
    }
  }

  // ---- the last block to finish leaves the counters as it found them, for the next launch
  consumers_meet();
  if (thread == 0) {
    __threadfence();
    state.last = atomicAdd(args.counters + BLOCKS_DONE, 1) == blocks - 1;
    __threadfence();
  }
  consumers_meet();
  if (state.last) {
    for (int i = thread; i < ARRIVED + args.tokens * DOWN_TILES; i += CONSUMERS) args.counters[i] = 0;
    for (int i = thread; i < args.tokens; i += CONSUMERS) args.counters[TOKEN_SPLIT + i] = 0;
  }
}
