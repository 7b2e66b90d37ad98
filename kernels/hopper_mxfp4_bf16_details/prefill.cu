// A whole MXFP4 mixture-of-experts layer for many tokens in one launch (sm_90a): what moe.cu computes, where an expert's tokens fill a tile.
//
// Work is a queue of items that blocks take one after another:
//
//   1 item       sort the (token, slot) pairs by expert and cut them into passes
//   some         bring x into the order in which the tensor cores take it
//   "up"         4 tiles of 64 rows of an expert's W13 times one pass, swiglu, to h
//   "down"       4 tiles of W2 times one pass, bias and router weight, to z
//   some         the sum of a token's slots
//
// An item depends on items before it only, and those are in the hands of blocks that run. So nothing waits for a block that has not
// started, whatever else the GPU does, and no launch is too large.
//
// Who does what, in an item of the middle kinds
//   warp 8         takes the next items, and copies their weights into a ring of stages for each warpgroup
//   warps 9 to 11  gather the pass's rows of activations, a line of 128 bytes of each at a time, into a ring of lines
//   warps 0 to 7   two warpgroups of two tiles each: expand codes in registers while the tensor cores multiply the ones before
//
// Arithmetic. BF16: activations as they are, a weight's code times its block's scale as a bf16 number, sums in fp32. If not BF16, as in moe.cu:
// weights and activations are e4m3, and where PARTS is 2 a row of activations is two columns of the product, high and low / 16. Their
// sums stay in the tensor cores' 14 bits over all columns of W.
//
// Words as in moe.cu, and
//   pass      up to PASS_TOKENS pairs of one expert, the columns of one product. Experts with more are cut into equal parts.
//   line      128 bytes of each row of a pass: 64 bf16 or 128 e4m3 columns. What the tensor cores take with a 128-byte swizzle.
//
// Compile-time constants besides those of layer.cuh: MAX_TOP_K, COLUMNS, BF16, PARTS, LINES, WEIGHT_SLOTS, OUTLIERS,
// STATE_BYTES

#include <layer.cuh>

// ---- sizes

constexpr int WARPGROUPS = 2;
constexpr int CONSUMERS = WARPGROUPS * 128;
constexpr int THREADS = CONSUMERS + 128;
constexpr int WARPS = THREADS / 32;
constexpr int SCHEDULER_WARP = CONSUMERS / 32;
constexpr int GATHER_WARPS = 3, GATHERERS = GATHER_WARPS * 32, ROW_STEP = 4 * GATHER_WARPS;
constexpr int CONSUMER_REGISTERS = 232, PRODUCER_REGISTERS = 40;  // 232 * 256 + 40 * 128 are 64512 of 65536

constexpr int GROUP_TILES = 4;       // of an item
constexpr int WARPGROUP_TILES = 2;
constexpr int MOST_EXPERTS = 1024;   // of a rank: what the sort has room for; launch.py refuses more
constexpr int PASS_TOKENS = COLUMNS / PARTS;
constexpr int GATHER_ROWS = (PASS_TOKENS + ROW_STEP - 1) / ROW_STEP;  // of a thread of the gatherers

constexpr int NUMBER_BYTES = BF16 ? 2 : 1;
constexpr int CHUNK_LINES = BF16 ? 2 : 1;                                 // half a chunk is one line either way, not full if e4m3
constexpr int STAGE_LINES = CHUNK_LINES * STAGE_CHUNKS + STAGE_HALF;
constexpr int FRAGMENTS = BF16 ? 2 : 1;                                   // of 16 or 32 columns: the instructions of a step of 32
constexpr int LINE_STEPS = BF16 ? 2 : 4;
constexpr int LINE_SLOT_BYTES = COLUMNS * 128;
constexpr int WEIGHT_SLOT_BYTES = WARPGROUP_TILES * STAGE_BYTES;

constexpr int UP_GROUPS = (UP_TILES + GROUP_TILES - 1) / GROUP_TILES;
constexpr int DOWN_GROUPS = (DOWN_TILES + GROUP_TILES - 1) / GROUP_TILES;

// One number of columns a kernel: with several main loops in one function the compiler finds too few registers for any of them, and waits
// for every single product.
static_assert(COLUMNS % (8 * PARTS) == 0, "tokens come by eights");
static_assert(ROW_STEP % 8 == 4, "every other row of a gatherer is in the other half of its 128 bytes");
static_assert(BF16 == 0 || PARTS == 1, "bf16 numbers are whole");
// Each warpgroup begins a chunk before it frees the lines of the one before.
static_assert(LINES >= 2 * CHUNK_LINES, "the ring is too short");

// ---- arguments

struct Arguments {
  Weights up, down;
  // workspace; x and h rows are in the order of bf16_place or e4m3_place, with zeros up to UP_K and DOWN_K
  u8* x[2];         // [tokens, UP_K]; high and low if PARTS is 2
  float* x_factor;  // [tokens], if not BF16
  u8* h[2];         // [pairs in the order of list, DOWN_K]
  u16* z;           // bf16 or, if PARTS is 2, fp32 [pairs, HIDDEN]: router weight times GEMM 2
  int* counters;    // zeros; zeros again after the launch
  int* routing;     // see Routing
  int* list;        // pairs by expert, then in their own order
  // the call
  const u16* hidden;     // bf16 [tokens, HIDDEN]
  const int* ids;        // [tokens, top_k], over all ranks
  const float* weights;  // [tokens, top_k]
  u16* out;              // bf16 [tokens, HIDDEN]
  int tokens, top_k, first_expert, experts;
  int split_items, sum_items, max_passes;
  float alpha, beta, limit;
  float h_scale;  // if not BF16: a power of two; |h| times it is at most 448
};

// counters
constexpr int NEXT_ITEM = 0, BLOCKS_DONE = 1, ROUTED = 2, SPLIT_DONE = 3, DOWN_TILES_DONE = 4;
constexpr int PASS_TILES_DONE = 5;  // [passes]: tiles of GEMM 1

// What the first item leaves for the others: the number of passes, the first pass of each expert and one more, and of each pass its expert,
// its first pair in the list, and how many it has.
struct Routing {
  int *passes, *first_pass, *expert, *first, *count;
};

__device__ __forceinline__ Routing routing_of(const Arguments& args) {
  int* at = args.routing;
  return {at, at + 1, at + args.experts + 2, at + args.experts + 2 + args.max_passes, at + args.experts + 2 + 2 * args.max_passes};
}

// ---- shared memory: lines | weights | State

enum Phase { UP, DOWN, SUM, END };

struct Work {
  int phase, expert, pass, first, count;
  int group;   // of tiles, or of tokens
  int shared;  // other passes read the same weights
};

struct State {
  u64 line_full[LINES], line_empty[LINES];
  u64 weights_full[WARPGROUPS][WEIGHT_SLOTS], weights_empty[WARPGROUPS][WEIGHT_SLOTS];
  u64 work_full[2], work_empty[2];
  Work work[2];
  int source[2][PASS_TOKENS];    // the row of x or h of each pair
  int pair[2][PASS_TOKENS];
  float factor[2][PASS_TOKENS];  // of a pair: of its row of x, or the router's
  uint4 bf16_table[16];           // of each scale byte: low bytes of codes 0 to 3, 4 to 7, high bytes of the same
  int item;
};
constexpr int STATE_OFFSET = LINES * LINE_SLOT_BYTES + WARPGROUPS * WEIGHT_SLOTS * WEIGHT_SLOT_BYTES;
static_assert(sizeof(State) <= STATE_BYTES, "shape.py reserves too little");
static_assert((WARPS + 1) * MOST_EXPERTS * 4 <= STATE_OFFSET, "the sort needs room for its counts");

__device__ __forceinline__ int minimum(int a, int b) { return a < b ? a : b; }

// Tiles of a group that a warpgroup has, and the first of them: 2 and 2, 2 and 1, 1 and 1, 1 and none.
__device__ __forceinline__ int own_tiles(int all, int warpgroup) { return warpgroup ? all / 2 : (all + 1) / 2; }

__device__ __forceinline__ int tiles_of(const Work& work) {
  return minimum(GROUP_TILES, (work.phase == UP ? UP_TILES : DOWN_TILES) - work.group * GROUP_TILES);
}

// ---- the first item: sort

constexpr int SORTED_AT_ONCE = 8;  // times 32 pairs of a warp

// Local experts of this lane's pairs from `first` on, -1 for others.
__device__ __forceinline__ void take_experts(int (&expert)[SORTED_AT_ONCE], const Arguments& args, int first, int end) {
#pragma unroll
  for (int i = 0; i < SORTED_AT_ONCE; i++) {
    const int pair = first + 32 * i + (threadIdx.x & 31), local = pair < end ? __ldg(args.ids + pair) - args.first_expert : -1;
    expert[i] = local >= 0 && local < args.experts ? local : -1;
  }
}

// Lanes that have the same expert as this one, bit by bit: all ballots of a bit are under way together, where each match.any takes some 200 cycles.
__device__ __forceinline__ void lanes_with(u32 (&same)[SORTED_AT_ONCE], const int (&expert)[SORTED_AT_ONCE], int experts) {
#pragma unroll
  for (int i = 0; i < SORTED_AT_ONCE; i++) same[i] = ALL_LANES;
#pragma unroll 1
  for (int bit = 0; experts >> bit; bit++)  // one bit more than the last expert has, so that -1 differs
#pragma unroll
    for (int i = 0; i < SORTED_AT_ONCE; i++) {
      const u32 is_set = expert[i] >> bit & 1, set = __ballot_sync(ALL_LANES, is_set);
      same[i] &= is_set ? set : ~set;
    }
}

// Every warp counts, then places, a stretch of the pairs, so that the list is in the order of the pairs within an expert.
__device__ __noinline__ void route(const Arguments& args) {
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
  const int experts = args.experts;
  int* const own_count = (int*)shared_memory + warp * experts;     // of this warp's stretch, then where its next pair goes
  int* const total = (int*)shared_memory + WARPS * experts;        // where an expert's pairs begin
  const int pairs = args.tokens * args.top_k, stretch = ((pairs + WARPS - 1) / WARPS + 31) / 32 * 32;
  const int begin = warp * stretch, end = minimum(begin + stretch, pairs);
  const Routing routing = routing_of(args);
  for (int i = thread; i < WARPS * experts; i += THREADS) ((int*)shared_memory)[i] = 0;
  __syncthreads();
  int expert[SORTED_AT_ONCE];
  u32 same[SORTED_AT_ONCE];
  take_experts(expert, args, begin, end);
  for (int first = begin; first < end; first += 32 * SORTED_AT_ONCE) {
    int next[SORTED_AT_ONCE];
    take_experts(next, args, first + 32 * SORTED_AT_ONCE, end);
    lanes_with(same, expert, experts);
#pragma unroll
    for (int i = 0; i < SORTED_AT_ONCE; i++) {
      if (expert[i] >= 0 && (same[i] & ((1u << lane) - 1)) == 0) own_count[expert[i]] += __popc(same[i]);
      __syncwarp();
      expert[i] = next[i];
    }
  }
  __syncthreads();
  if (warp == 0) {
    int pairs_before = 0, passes_before = 0;
    for (int first = 0; first < experts; first += 32) {
      int expert = first + lane, own_pairs = 0;
      if (expert < experts)
        for (int w = 0; w < WARPS; w++) own_pairs += ((int*)shared_memory)[w * experts + expert];
      const int passes = (own_pairs + PASS_TOKENS - 1) / PASS_TOKENS, size = passes > 0 ? (own_pairs + passes - 1) / passes : 0;
      int pairs_up_to = own_pairs, passes_up_to = passes;
      for (int distance = 1; distance < 32; distance <<= 1) {
        int more_pairs = __shfl_up_sync(ALL_LANES, pairs_up_to, distance), more_passes = __shfl_up_sync(ALL_LANES, passes_up_to, distance);
        if (lane >= distance) {
          pairs_up_to += more_pairs;
          passes_up_to += more_passes;
        }
      }
      const int first_pair = pairs_before + pairs_up_to - own_pairs, first_pass = passes_before + passes_up_to - passes;
      if (expert < experts) {
        total[expert] = first_pair;
        routing.first_pass[expert] = first_pass;
        for (int i = 0; i < passes; i++) {
          routing.expert[first_pass + i] = expert;
          routing.first[first_pass + i] = first_pair + i * size;
          routing.count[first_pass + i] = minimum(size, own_pairs - i * size);
        }
      }
      pairs_before += __shfl_sync(ALL_LANES, pairs_up_to, 31);
      passes_before += __shfl_sync(ALL_LANES, passes_up_to, 31);
    }
    if (lane == 0) {
      routing.first_pass[experts] = passes_before;
      *routing.passes = passes_before;
    }
  }
  __syncthreads();
  for (int e = thread; e < experts; e += THREADS) {
    int at = total[e];
    for (int w = 0; w < WARPS; w++) {
      int& place = ((int*)shared_memory)[w * experts + e];
      int own = place;
      place = at;
      at += own;
    }
  }
  __syncthreads();
  take_experts(expert, args, begin, end);
  for (int first = begin; first < end; first += 32 * SORTED_AT_ONCE) {
    int next[SORTED_AT_ONCE];
    take_experts(next, args, first + 32 * SORTED_AT_ONCE, end);
    lanes_with(same, expert, experts);
#pragma unroll
    for (int i = 0; i < SORTED_AT_ONCE; i++) {
      const int before = __popc(same[i] & ((1u << lane) - 1)), at = expert[i] >= 0 ? own_count[expert[i]] : 0;
      __syncwarp();
      if (expert[i] >= 0) {
        args.list[at + before] = first + 32 * i + lane;
        if (before == 0) own_count[expert[i]] = at + __popc(same[i]);
      }
      __syncwarp();
      expert[i] = next[i];
    }
  }
  __syncthreads();
  if (thread == 0) {
    __threadfence();
    store_release(args.counters + ROUTED, 1);
  }
  show_to_tensor_cores();  // the copy engine writes here next
  __syncthreads();
}

// ---- the next items: x, a token a warp

__device__ __noinline__ void split(const Arguments& args, int item) {
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
  constexpr int UNITS = UP_K / 8;
  const int begin = (int)((long long)item * args.tokens / args.split_items), end = (int)((long long)(item + 1) * args.tokens / args.split_items);
  for (int token = begin + warp; token < end; token += WARPS) {
    const uint4* const from = (const uint4*)(args.hidden + (u64)token * HIDDEN);
    auto load = [&](int unit) { return unit < HIDDEN / 8 ? __ldg(from + unit) : make_uint4(0, 0, 0, 0); };
    if (BF16) {
      u8* const to = args.x[0] + (u64)token * UP_K * 2;
#pragma unroll 4
      for (int unit = lane; unit < UNITS; unit += 32) {
        uint4 eight = load(unit);
        u32 pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (int i = 0; i < 4; i++) *(u32*)(to + bf16_place(unit * 8 + 2 * i) * 2) = pairs[i];
      }
      continue;
    }
    u32 row_max = 0;
#pragma unroll 4
    for (int unit = lane; unit < UNITS; unit += 32) row_max = max(row_max, largest_of_8(load(unit)));
    row_max = __reduce_max_sync(ALL_LANES, row_max);
    const int exponent = row_exponent(row_max);
    const float scale = __uint_as_float((u32)exponent << 23);
    if (lane == 0) args.x_factor[token] = __uint_as_float((u32)(254 - exponent) << 23);
#pragma unroll 2
    for (int unit = lane; unit < UNITS; unit += 32) {
      uint4 eight = load(unit);
      u32 pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
      for (int p = 0; p < 2; p++) {
        u32 high, low;
        split_4(pairs[2 * p], pairs[2 * p + 1], scale, high, low);
        const u64 at = (u64)token * UP_K + e4m3_place<STAGE_K>(unit * 8 + 4 * p);
        *(u32*)(args.x[0] + at) = high;
        if (PARTS == 2) *(u32*)(args.x[1] + at) = low;
      }
    }
  }
  __syncthreads();
  if (thread == 0) {
    __threadfence();
    add_release(args.counters + SPLIT_DONE, 1);
  }
}

// ---- the scheduler

__device__ __forceinline__ Work work_of(const Arguments& args, const Routing& routing, int passes, int item) {
  int rest = item - 1 - args.split_items;
  const int up_items = passes * UP_GROUPS, down_items = passes * DOWN_GROUPS;
  int phase = UP, groups = UP_GROUPS;
  if (rest >= up_items) {
    rest -= up_items;
    phase = DOWN;
    groups = DOWN_GROUPS;
    if (rest >= down_items) {
      rest -= down_items;
      return {rest < args.sum_items ? SUM : END, 0, 0, 0, 0, rest, 0};
    }
  }
  // by expert, then by rows, then by pass: neighbours in time share weights, and a whole wave shares an expert's activations
  const int expert = __ldcg(routing.expert + rest / groups), first = __ldcg(routing.first_pass + expert);
  const int own = __ldcg(routing.first_pass + expert + 1) - first, inside = rest - first * groups;
  const int group = inside / own, pass = first + inside - group * own, count = __ldcg(routing.count + pass);
  return {phase, expert, pass, __ldcg(routing.first + pass), count, group, own > 1};
}

__device__ __forceinline__ void schedule(const Arguments& args, State& state, u8* weights, int item) {
  const u64 evict_normal = 0x1000000000000000ull, evict_first = 0x12F0000000000000ull;  // the policy words that createpolicy gives
  while (!load_acquire(args.counters + ROUTED)) {
  }
  const Routing routing = routing_of(args);
  const int passes = __ldcg(routing.passes);
  int slot[WARPGROUPS] = {0, 0};
  u32 parity[WARPGROUPS] = {1, 1};  // of a phase that counts as over: the rings start empty
  for (int n = 0;; n++) {
    barrier_wait(shared_address(&state.work_empty[n & 1]), ((n >> 1) & 1) ^ 1);
    const Work work = work_of(args, routing, passes, item);
    state.work[n & 1] = work;
    barrier_arrive(shared_address(&state.work_full[n & 1]));
    if (work.phase == END) return;
    item = atomicAdd(args.counters + NEXT_ITEM, 1);
    if (work.phase == SUM) continue;
    const bool up = work.phase == UP;
    const int tiles = up ? UP_TILES : DOWN_TILES, stages = up ? UP_STAGES : DOWN_STAGES, all = tiles_of(work);
    const u8* from = (up ? args.up.stages : args.down.stages) + (u64)(work.expert * tiles + work.group * GROUP_TILES) * (stages * STAGE_BYTES);
    const u64 policy = work.shared ? evict_normal : evict_first;
    for (int s = 0; s < stages; s++, from += STAGE_BYTES)
#pragma unroll
      for (int warpgroup = 0; warpgroup < WARPGROUPS; warpgroup++) {
        const int own = own_tiles(all, warpgroup), first = warpgroup ? own_tiles(all, 0) : 0;
        if (own == 0) continue;
        barrier_wait(shared_address(&state.weights_empty[warpgroup][slot[warpgroup]]), parity[warpgroup]);
        const u32 full = shared_address(&state.weights_full[warpgroup][slot[warpgroup]]);
        const u32 to = shared_address(weights + (warpgroup * WEIGHT_SLOTS + slot[warpgroup]) * WEIGHT_SLOT_BYTES);
        barrier_arrive_and_expect(full, own * STAGE_BYTES);
        for (int r = 0; r < own; r++)
          bulk_copy(to + r * STAGE_BYTES, from + (u64)(first + r) * (stages * STAGE_BYTES), STAGE_BYTES, full, policy);
        if (++slot[warpgroup] == WEIGHT_SLOTS) {
          slot[warpgroup] = 0;
          parity[warpgroup] ^= 1;
        }
      }
  }
}

// ---- the gatherers

__device__ __forceinline__ void gather(const Arguments& args, State& state, u8* lines) {
  const int thread = threadIdx.x - CONSUMERS - 32, warp = thread >> 5, lane = thread & 31;
  const u32 lines_address = shared_address(lines);
  int line = 0;    // slot of the ring
  u32 parity = 1;  // of a phase that counts as over: the ring starts empty
  for (int n = 0;; n++) {
    const int slot = n & 1;
    barrier_wait(shared_address(&state.work_full[slot]), (n >> 1) & 1);
    const Work work = state.work[slot];
    if (work.phase == END) return;
    if (work.phase < SUM) {
      const bool up = work.phase == UP;
      const int* const flag = up ? args.counters + SPLIT_DONE : args.counters + PASS_TILES_DONE + work.pass;
      const int wanted = up ? args.split_items : UP_TILES;
      if (lane == 0)
        while (load_acquire(flag) < wanted) {
        }
      __syncwarp();
      for (int row = thread; row < work.count; row += GATHERERS) {
        const int pair = __ldcg(args.list + work.first + row), token = pair / args.top_k;
        state.source[slot][row] = up ? token : work.first + row;
        state.pair[slot][row] = pair;
        state.factor[slot][row] = !up ? __ldg(args.weights + pair) : BF16 ? 1.0f : __ldcg(args.x_factor + token);
      }
      named_barrier(3, GATHERERS);
      const int stages = up ? UP_STAGES : DOWN_STAGES, row_bytes = (up ? UP_K : DOWN_K) * NUMBER_BYTES;
      // Eight lanes copy a row's 128 bytes. A thread's rows are 12 apart, so their places in a line differ by a constant and, every other one, in
      // which of the eight 16 bytes they are. With all of it computed for each row the copies took longer than the products.
      const int unit = lane & 7, first_row = 4 * warp + (lane >> 3), own = (work.count - first_row + ROW_STEP - 1) / ROW_STEP;
      const u32 place = first_row * 128 + ((unit ^ (first_row & 7)) << 4);
      u32 row_offset[GATHER_ROWS];
#pragma unroll
      for (int i = 0; i < GATHER_ROWS; i++)
        row_offset[i] = i < own ? state.source[slot][first_row + i * ROW_STEP] * row_bytes + unit * 16 : 0;
      const u8* from[PARTS];
      from[0] = up ? args.x[0] : args.h[0];
      if (PARTS == 2) from[PARTS - 1] = up ? args.x[1] : args.h[1];
#pragma unroll 1
      for (int s = 0; s < stages; s++)
#pragma unroll 1
        for (int l = 0; l < STAGE_LINES; l++) {
          const bool is_full = BF16 || !STAGE_HALF || l < STAGE_CHUNKS;
          barrier_wait(shared_address(&state.line_empty[line]), parity);
          // columns without a pair keep what was there; a column's products are its own, and nobody looks at theirs
          if (is_full || unit < 4) {
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
              const u32 to = lines_address + line * LINE_SLOT_BYTES + part * PASS_TOKENS * 128 + place;
#pragma unroll
              for (int i = 0; i < GATHER_ROWS; i++)
                if (i < own) copy_16_bytes((i & 1 ? to ^ 64 : to) + i * ROW_STEP * 128, from[part] + row_offset[i]);
            }
          }
#pragma unroll
          for (int part = 0; part < PARTS; part++) from[part] += is_full ? 128 : 64;
          // Each thread arrives when its copies have. Waiting for them here and then arriving tied each line to a later one's free slot.
          arrive_after_copies(shared_address(&state.line_full[line]));
          if (++line == LINES) {
            line = 0;
            parity ^= 1;
          }
        }
    }
    warp_arrives(shared_address(&state.work_empty[slot]), lane);
  }
}

// ---- the consumers

// Where a warpgroup is in its streams.
struct Place {
  int line_slot, weight_slot;
  u32 line_parity, weight_parity;
  int first_used, used_lines;  // lines whose last product may be under way, to be freed
};

// The codes of a thread in one chunk of one tile.
struct Codes {
  u32 words[2][4];  // row half, j
  E4m3Table e4m3[2];
  uint4 bf16[2];
};

// Scale bytes of a thread in a stage of one tile: two of each chunk, of the rows' halves.
struct Scales {
  u32 chunks, half;
};

__device__ __forceinline__ void take_scales(Scales (&scales)[WARPGROUP_TILES], const u8* stage, int place) {
#pragma unroll
  for (int r = 0; r < WARPGROUP_TILES; r++) {
    const u8* const from = stage + r * STAGE_BYTES + CODE_BYTES;
    scales[r].chunks = STAGE_CHUNKS == 2 ? *(const u32*)(from + place * 4) : *(const u16*)(from + place * 2);
    if (STAGE_HALF) scales[r].half = *(const u16*)(from + CHUNK_SCALE_BYTES + (place >> 1) * 2);
  }
}

template <int CHUNK>
__device__ __forceinline__ void take_codes(Codes& codes, const Scales& of_stage, const State& state, const u8* tile, int place) {
  constexpr bool IS_HALF = CHUNK == STAGE_CHUNKS;
  const uint4* const planes = (const uint4*)tile + 2 * CHUNK * 128 + place;
  const uint4 first = planes[0];
  codes.words[0][0] = first.x;
  codes.words[0][1] = first.y;
  if (IS_HALF) {
    codes.words[1][0] = first.z;
    codes.words[1][1] = first.w;
  } else {
    const uint4 second = planes[128];
    codes.words[0][2] = first.z;
    codes.words[0][3] = first.w;
    codes.words[1][0] = second.x;
    codes.words[1][1] = second.y;
    codes.words[1][2] = second.z;
    codes.words[1][3] = second.w;
  }
  const u32 scales = IS_HALF ? of_stage.half : of_stage.chunks >> (16 * CHUNK % 32);
  if (BF16) {
    codes.bf16[0] = state.bf16_table[scales & 15];
    codes.bf16[1] = state.bf16_table[(scales >> 8) & 15];  // a tile that is not there has any byte
  } else {
    codes.e4m3[0] = e4m3_table(permute_bytes(scales, 0, 0x0000));
    codes.e4m3[1] = e4m3_table(permute_bytes(scales, 0, 0x1111));
  }
}

// Eight codes as bf16: low and high bytes of four numbers at a time come from two tables, and two permutations bring them together.
__device__ __forceinline__ void expand_bf16(u32 word, uint4 table, u32& first01, u32& first23, u32& last01, u32& last23) {
  u32 selector = word & MAGNITUDES;
  u32 low = permute_bytes(table.x, table.y, selector), high = and_or(word, SIGNS, permute_bytes(table.z, table.w, selector));
  first01 = permute_bytes(low, high, 0x5140);
  first23 = permute_bytes(low, high, 0x7362);
  low = permute_bytes(table.x, table.y, selector >> 16);
  high = and_or(word << 4, SIGNS, permute_bytes(table.z, table.w, selector >> 16));
  last01 = permute_bytes(low, high, 0x5140);
  last23 = permute_bytes(low, high, 0x7362);
}

struct Fragments {
  u32 of_step[LINE_STEPS][FRAGMENTS][4];
};

__device__ __forceinline__ void expand(u32 (&fragments)[FRAGMENTS][4], const Codes& codes, int j) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (BF16)
      expand_bf16(codes.words[half][j], codes.bf16[half], fragments[0][half], fragments[0][2 + half], fragments[FRAGMENTS - 1][half],
                  fragments[FRAGMENTS - 1][2 + half]);
    else
      expand_e4m3(codes.words[half][j], codes.e4m3[half], fragments[0][half], fragments[0][2 + half]);
  }
}

// A lane each: the tensor cores have read them for the whole warp.
__device__ __forceinline__ void free_lines(State& state, Place& at, int lane) {
  for (int other = 0; other < WARP_ARRIVALS; other++) {
    const int i = lane + other & 31;
    if (i >= at.used_lines) continue;
    int slot = at.first_used + i;
    barrier_arrive(shared_address(&state.line_empty[slot < LINES ? slot : slot - LINES]));
  }
  at.used_lines = 0;
}

__device__ __forceinline__ void next_line(Place& at) {
  if (++at.line_slot == LINES) {
    at.line_slot = 0;
    at.line_parity ^= 1;
  }
}

// What a warpgroup multiplies next.
struct Weight {
  const u8* stage;
  Scales scales[WARPGROUP_TILES];
  Codes codes;
};

__device__ __forceinline__ void wait_for_stage(Weight& weight, State& state, const Place& at, const u8* weights, int warpgroup, int place) {
  barrier_wait(shared_address(&state.weights_full[warpgroup][at.weight_slot]), at.weight_parity);
  weight.stage = weights + (warpgroup * WEIGHT_SLOTS + at.weight_slot) * WEIGHT_SLOT_BYTES;
  take_scales(weight.scales, weight.stage, place);
}

// Codes are taken one tile ahead and scales one stage: loads from shared memory take 30 cycles, a table's two in a row.
template <int CHUNK>
__device__ __forceinline__ void take_next_tile(Weight& weight, const State& state, int tile, int place, bool is_last_stage) {
  constexpr int NEXT_CHUNK = CHUNK + 1 == STAGE_CHUNKS + STAGE_HALF ? 0 : CHUNK + 1;
  if (tile + 1 < WARPGROUP_TILES)
    take_codes<CHUNK>(weight.codes, weight.scales[tile + 1], state, weight.stage + (tile + 1) * STAGE_BYTES, place);
  else if (NEXT_CHUNK > 0 || !is_last_stage)
    take_codes<NEXT_CHUNK>(weight.codes, weight.scales[0], state, weight.stage, place);
}

// One chunk, or half of one, of this warpgroup's tiles, in units of a line. While the tensor cores multiply a unit the codes of the next are
// expanded, in one stretch: with a commit and a wait for every 32 columns the warps spent two thirds of their time waiting for single
// instructions, and with a whole chunk of bf16 at once there are not enough registers.
template <int CHUNK, int VALUES>
__device__ __forceinline__ void multiply_chunk(float (&sum)[WARPGROUP_TILES][VALUES], Weight& weight, Fragments (&fragments)[2], State& state,
                                               Place& at, u32 lines_low, const u8* weights, int tiles, bool is_last_stage, int warpgroup, int place) {
  constexpr bool IS_HALF = CHUNK == STAGE_CHUNKS, IS_LAST_CHUNK = CHUNK + 1 == STAGE_CHUNKS + STAGE_HALF;
  constexpr int UNITS = IS_HALF ? 1 : CHUNK_LINES, STEPS = IS_HALF ? 2 : LINE_STEPS;
  const int lane = place & 31;
  const int first_line = at.line_slot;
  u32 b[UNITS];  // where the lines of this chunk are
#pragma unroll
  for (int r = 0; r < WARPGROUP_TILES; r++) {
    const bool has_tile = r == 0 || tiles > r;
    if (IS_LAST_CHUNK && r + 1 == WARPGROUP_TILES) {  // all of this stage is in registers
      warp_arrives(shared_address(&state.weights_empty[warpgroup][at.weight_slot]), lane);
      if (++at.weight_slot == WEIGHT_SLOTS) {
        at.weight_slot = 0;
        at.weight_parity ^= 1;
      }
      if (!is_last_stage) wait_for_stage(weight, state, at, weights, warpgroup, place);
    }
    if (!has_tile) {
      take_next_tile<CHUNK>(weight, state, r, place, is_last_stage);
      if (BF16 && UNITS == 1) mma_wait_but<0>();  // the next unit's fragments go to the same registers
      break;
    }
#pragma unroll
    for (int unit = 0; unit < UNITS; unit++) {
      Fragments& own = fragments[UNITS == 2 ? unit : r];
#pragma unroll
      for (int j = 0; j < STEPS; j++) expand(own.of_step[j], weight.codes, unit * LINE_STEPS + j);
      if (unit == UNITS - 1) take_next_tile<CHUNK>(weight, state, r, place, is_last_stage);
      if (r == 0) {
        b[unit] = lines_low + at.line_slot * (LINE_SLOT_BYTES / 16);
        barrier_wait(shared_address(&state.line_full[at.line_slot]), at.line_parity);
        show_to_tensor_cores();  // here, since who copied does not wait
        next_line(at);
      }
      mma_begin();
#pragma unroll
      for (int j = 0; j < STEPS; j++) {
        if constexpr (BF16)
          mma_bf16(sum[r], own.of_step[j], b[unit] + j * 4);
        else
          mma(sum[r], own.of_step[j][0], b[unit] + j * 2, 1);
      }
      mma_commit();
      // the same for e4m3. Where the compiler cannot see that no fragment in use is written it waits for every single product, so the waits
      // are where it sees it; the compile gate counts them
      if (!BF16 && tiles == 1)
        mma_wait_but<0>();
      else
        mma_wait_but<1>();
      if (r == 0 && unit == 0) free_lines(state, at, lane);
    }
  }
  at.first_used = first_line;
  at.used_lines = UNITS;
}

// Products of this warpgroup's tiles over all stages.
template <int VALUES>
__device__ __forceinline__ void multiply(float (&sum)[WARPGROUP_TILES][VALUES], State& state, Place& at, const u8* lines, const u8* weights,
                                         int warpgroup, int place, int tiles, int stages) {
  static_assert(STAGE_CHUNKS == 1 || STAGE_CHUNKS == 2, "stages that layout.py makes");
  const u32 lines_low = descriptor_low(shared_address(lines));
  Fragments fragments[2];
  Weight weight;
  wait_for_stage(weight, state, at, weights, warpgroup, place);
  take_codes<0>(weight.codes, weight.scales[0], state, weight.stage, place);
#pragma unroll 1
  for (int s = 0; s < stages; s++) {
    const bool is_last = s + 1 == stages;
    multiply_chunk<0>(sum, weight, fragments, state, at, lines_low, weights, tiles, is_last, warpgroup, place);
    if constexpr (STAGE_CHUNKS + STAGE_HALF > 1)
      multiply_chunk<1>(sum, weight, fragments, state, at, lines_low, weights, tiles, is_last, warpgroup, place);
    if constexpr (STAGE_CHUNKS + STAGE_HALF > 2)
      multiply_chunk<2>(sum, weight, fragments, state, at, lines_low, weights, tiles, is_last, warpgroup, place);
  }
#pragma unroll
  for (int r = 0; r < WARPGROUP_TILES; r++) mma_wait(sum[r]);
}

// Adds the blocks that the table of a row cannot hold, in fp32, to the sums of columns that this thread has. Rare, and slow.
template <int VALUES>
__device__ __noinline__ void add_outliers(float (&sum)[VALUES], const Arguments& args, const Work& work, const int* source, int tile) {
  const Weights& matrix = work.phase == UP ? args.up : args.down;
  const int place = threadIdx.x & 127, warp_row = 16 * (place >> 5), row8 = (place & 31) >> 2, column4 = place & 3;
  const u64 width = work.phase == UP ? UP_K : DOWN_K;
  for (int i = __ldg(matrix.outlier_starts + tile); i < __ldg(matrix.outlier_starts + tile + 1); i++) {
    const Outlier& outlier = matrix.outliers[i];
    int row = outlier.place & 63, group = outlier.place >> 6;
    if ((row & 7) != row8 || (row & ~15) != warp_row) continue;
    for (int v = 0; v < VALUES; v++) {
      if (((v >> 1) & 1) != ((row >> 3) & 1)) continue;  // of each four values, two are of row r and two of row r + 8
      const int column = 8 * (v >> 2) + 2 * column4 + (v & 1);
      const int part = column / PASS_TOKENS, pair = column - part * PASS_TOKENS;
      if (pair >= work.count) continue;
      const u8* const from = (work.phase == UP ? args.x : args.h)[part] + source[pair] * width * NUMBER_BYTES;
      float products = 0.0f;
      for (int k = 0; k < 32; k++) {
        float activation, other;
        if (BF16)
          activation = __uint_as_float((u32)__ldcg((const u16*)from + bf16_place(group * 32 + k)) << 16);
        else
          e4m3_values(__ldcg(from + e4m3_place<STAGE_K>(group * 32 + k)), activation, other);
        products += e2m1_value(outlier.codes[k >> 1] >> (4 * (k & 1))) * activation;
      }
      sum[v] += products * outlier.scale;
    }
  }
  __syncwarp();
}

// Of products in rows 2n and 2n + 1 of one column: of two columns and a row, this thread has a and b; even rows get the first column.
__device__ __forceinline__ void pair_rows(float a, float b, bool odd, float& even_row, float& odd_row) {
  const float other = __shfl_xor_sync(ALL_LANES, odd ? a : b, 4);
  even_row = odd ? other : a;
  odd_row = odd ? b : other;
}

// A tile of GEMM 1: gates and ups of 32 columns of h. A thread has one column and two tokens each time;
// transposed, two neighbours of one token.
__device__ __forceinline__ void finish_up(const float (&sum)[COLUMNS / 2], const Arguments& args, const State& state, const Work& work, int slot,
                                          int tile, const float (&factor)[2], const float (&bias)[2]) {
  constexpr int LOW = COLUMNS / 4;  // a low column's values come so many later
  const int place = threadIdx.x & 127, warp = place >> 5, row8 = (place & 31) >> 2, column4 = place & 3;
  const int at_h = BF16 ? h_bf16_place(tile, warp, 2 * column4) : h_e4m3_place(tile, warp, 2 * column4);
  u8* const to = args.h[0] + ((u64)(work.first + row8) * DOWN_K + at_h) * NUMBER_BYTES;
  u8* const low_to = args.h[PARTS - 1] + ((u64)(work.first + row8) * DOWN_K + at_h);
#pragma unroll
  for (int q = 0; q < PASS_TOKENS / 8; q++) {
    float h[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float gate = sum[4 * q + i], up = sum[4 * q + 2 + i];
      if (PARTS == 2) {
        gate += sum[(4 * q + LOW + i) % (COLUMNS / 2)] * (1.0f / LOW_FACTOR);
        up += sum[(4 * q + LOW + 2 + i) % (COLUMNS / 2)] * (1.0f / LOW_FACTOR);
      }
      const float x_factor = BF16 ? 1.0f : state.factor[slot][8 * q + 2 * column4 + i];
      h[i] = swiglu(gate * (factor[0] * x_factor) + bias[0], up * (factor[1] * x_factor) + bias[1], args.alpha, args.beta, args.limit);
    }
    // h of two columns of the product. As the only part it is rounded once: by way of bf16, one of 16 numbers would lie between two of e4m3
    const u32 only = e4m3_pair(h[0] * args.h_scale, h[1] * args.h_scale);
    const u32 two = transpose_8x8(BF16 || PARTS == 2 ? bf16_pair(h[0], h[1]) : permute_bytes(only, 0, 0x4140));
    if (8 * q + row8 >= work.count) continue;
    const int at = 8 * q * DOWN_K;
    if (BF16) {
      *(u32*)(to + 2 * at) = two;
    } else if (PARTS == 1) {
      *(u16*)(to + at) = (u16)permute_bytes(two, 0, 0x4420);
    } else {
      const float even = __uint_as_float(two << 16) * args.h_scale, odd = __uint_as_float(two & 0xFFFF0000u) * args.h_scale;
      const u32 high = e4m3_pair(even, odd);
      float even_high, odd_high;
      e4m3_values(high, even_high, odd_high);
      *(u16*)(to + at) = (u16)high;
      *(u16*)(low_to + at) = (u16)e4m3_pair((even - even_high) * LOW_FACTOR, (odd - odd_high) * LOW_FACTOR);
    }
  }
}

// A tile of GEMM 2: 64 columns of z, of each pair.
__device__ __forceinline__ void finish_down(const float (&sum)[COLUMNS / 2], const Arguments& args, const State& state, const Work& work, int slot,
                                            int tile, const float (&factor)[2], const float (&bias)[2]) {
  constexpr int LOW = COLUMNS / 4;
  const int place = threadIdx.x & 127, row8 = (place & 31) >> 2, column4 = place & 3;
  const int column = tile * TILE_ROWS + 16 * (place >> 5);
  const bool is_odd = row8 & 1;
  const float h_factor = BF16 ? 1.0f : 1.0f / args.h_scale;
#pragma unroll
  for (int q = 0; q < PASS_TOKENS / 8; q++) {
    const float2 weight = *(const float2*)&state.factor[slot][8 * q + 2 * column4];
    // the token of which this thread stores two neighbouring columns: fp32 z goes by pairs of rows, bf16 z is transposed
    const int token = 8 * q + (PARTS == 2 ? 2 * column4 + is_odd : row8);
    const bool has_pair = token < work.count;
    u16* const z = args.z + (u64)(has_pair ? state.pair[slot][token] : 0) * (HIDDEN * PARTS) +
                   (column + (PARTS == 2 ? row8 & 6 : 2 * (column4 & 2) + 8 * (column4 & 1))) * PARTS;
    u32 two[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float value[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float product = sum[4 * q + 2 * half + i];
        if (PARTS == 2) product += sum[(4 * q + LOW + 2 * half + i) % (COLUMNS / 2)] * (1.0f / LOW_FACTOR);
        value[i] = (product * (factor[half] * h_factor) + bias[half]) * (i ? weight.y : weight.x);
      }
      if (PARTS == 2) {
        float even_row, odd_row;
        pair_rows(value[0], value[1], is_odd, even_row, odd_row);
        if (has_pair) __stcg((float2*)(z + 8 * half * PARTS), make_float2(even_row, odd_row));
      } else {
        two[half] = transpose_8x8(bf16_pair(value[0], value[1]));
      }
    }
    if (PARTS == 1) {
      const bool is_right = column4 & 1;  // it gets four columns of the right half, its neighbour four of the left: 32 bytes of a row at a time
      const u32 other = __shfl_xor_sync(ALL_LANES, is_right ? two[0] : two[1], 1);
      if (has_pair) __stcg((uint2*)z, is_right ? make_uint2(other, two[1]) : make_uint2(two[0], other));
    }
  }
}

__device__ __forceinline__ void run(const Arguments& args, State& state, Place& at, const u8* lines, const u8* weights, const Work& work, int slot,
                                    int warpgroup, int place, int first_tile, int own) {
  const int lane = place & 31;
  const bool up = work.phase == UP;
  const int tiles = up ? UP_TILES : DOWN_TILES, stages = up ? UP_STAGES : DOWN_STAGES;
  const Weights& matrix = up ? args.up : args.down;
  float sum[WARPGROUP_TILES][COLUMNS / 2];
#pragma unroll
  for (int r = 0; r < WARPGROUP_TILES; r++)
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; i++) sum[r][i] = 0.0f;
  multiply(sum, state, at, lines, weights, warpgroup, place, own, stages);
  free_lines(state, at, lane);
#pragma unroll
  for (int r = 0; r < WARPGROUP_TILES; r++) {
    if (r >= own) break;
    const int tile = work.expert * tiles + first_tile + r;
    float factor[2], bias[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = tile * TILE_ROWS + 16 * (place >> 5) + 8 * half + (lane >> 2);
      factor[half] = __ldg(matrix.row_factor + row);
      bias[half] = __ldg(matrix.bias + row);
    }
    if (OUTLIERS) {
      float total[COLUMNS / 2];  // a copy: what a function gets by address lives in memory
#pragma unroll
      for (int i = 0; i < COLUMNS / 2; i++) total[i] = sum[r][i];
      add_outliers(total, args, work, state.source[slot], tile);
#pragma unroll
      for (int i = 0; i < COLUMNS / 2; i++) sum[r][i] = total[i];
    }
    if (up)
      finish_up(sum[r], args, state, work, slot, first_tile + r, factor, bias);
    else
      finish_down(sum[r], args, state, work, slot, first_tile + r, factor, bias);
  }
}

// A warpgroup without a tile of its own lets the lines pass.
__device__ __forceinline__ void skip_lines(State& state, Place& at, int count, int lane) {
  for (int i = 0; i < count; i++) {
    barrier_wait(shared_address(&state.line_full[at.line_slot]), at.line_parity);
    warp_arrives(shared_address(&state.line_empty[at.line_slot]), lane);
    next_line(at);
  }
}

// The sum of each token's local slots, in their order. All loads of a step are under way before the first of them is used: with a load and an
// addition in turn this took 7 % of 4096 tokens.
__device__ __forceinline__ void add_slots(const Arguments& args, int item, int thread) {
  constexpr int UNITS = HIDDEN / 8, SLOTS_AT_ONCE = PARTS == 2 ? 2 : 4, UNITS_AT_ONCE = 4;
  const int begin = (int)((long long)item * args.tokens / args.sum_items), end = (int)((long long)(item + 1) * args.tokens / args.sum_items);
  for (int first = thread; first < (end - begin) * UNITS; first += UNITS_AT_ONCE * CONSUMERS) {
    float total[UNITS_AT_ONCE][8] = {};
    for (int k = 0; k < args.top_k; k += SLOTS_AT_ONCE) {
      uint4 z[UNITS_AT_ONCE][SLOTS_AT_ONCE][PARTS];
#pragma unroll
      for (int u = 0; u < UNITS_AT_ONCE; u++)
#pragma unroll
        for (int m = 0; m < SLOTS_AT_ONCE; m++) {
          const int i = first + u * CONSUMERS, token = begin + i / UNITS, pair = token * args.top_k + k + m;
          const bool is_pair = token < end && k + m < args.top_k;
          const int local = is_pair ? __ldg(args.ids + pair) - args.first_expert : -1;
          const uint4* const from = (const uint4*)(args.z + ((u64)pair * HIDDEN + i % UNITS * 8) * PARTS);
#pragma unroll
          for (int part = 0; part < PARTS; part++)
            z[u][m][part] = local >= 0 && local < args.experts ? __ldcg(from + part) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
      for (int u = 0; u < UNITS_AT_ONCE; u++)
#pragma unroll
        for (int m = 0; m < SLOTS_AT_ONCE; m++)
#pragma unroll
          for (int part = 0; part < PARTS; part++) {
            const u32 words[4] = {z[u][m][part].x, z[u][m][part].y, z[u][m][part].z, z[u][m][part].w};
#pragma unroll
            for (int w = 0; w < 4; w++)
              if (PARTS == 2) {
                total[u][4 * part + w] += __uint_as_float(words[w]);
              } else {
                total[u][2 * w] += __uint_as_float(words[w] << 16);
                total[u][2 * w + 1] += __uint_as_float(words[w] & 0xFFFF0000u);
              }
          }
    }
#pragma unroll
    for (int u = 0; u < UNITS_AT_ONCE; u++) {
      const int i = first + u * CONSUMERS, token = begin + i / UNITS;
      if (token < end)
        ((uint4*)(args.out + (u64)token * HIDDEN))[i % UNITS] = make_uint4(bf16_pair(total[u][0], total[u][1]), bf16_pair(total[u][2], total[u][3]),
                                                                           bf16_pair(total[u][4], total[u][5]), bf16_pair(total[u][6], total[u][7]));
    }
  }
}

__device__ __forceinline__ void consume(const Arguments& args, State& state, const u8* lines, const u8* weights) {
  const int thread = kept(threadIdx.x), warpgroup = thread >> 7, lane = thread & 31;
  Place at{0, 0, 0, 0, 0, 0};
  for (int n = 0;; n++) {
    const int slot = n & 1;
    barrier_wait(shared_address(&state.work_full[slot]), (n >> 1) & 1);
    const Work work = state.work[slot];
    if (work.phase == END) break;
    if (work.phase == SUM) {
      if (lane == 0)
        while (load_acquire(args.counters + DOWN_TILES_DONE) < __ldcg(routing_of(args).passes) * DOWN_TILES) {
        }
      __syncwarp();
      add_slots(args, work.group, thread);
    } else {
      const int all = tiles_of(work), own = own_tiles(all, warpgroup);
      const int first_tile = work.group * GROUP_TILES + (warpgroup ? own_tiles(all, 0) : 0);
      if (own == 0)
        skip_lines(state, at, (work.phase == UP ? UP_STAGES : DOWN_STAGES) * STAGE_LINES, lane);
      else
        run(args, state, at, lines, weights, work, slot, warpgroup, thread & 127, first_tile, own);
      if (own > 0) {
        named_barrier(1 + warpgroup, 128);  // this warpgroup's stores are before the release of one thread
        if ((thread & 127) == 0) add_release(args.counters + (work.phase == UP ? PASS_TILES_DONE + work.pass : DOWN_TILES_DONE), own);
      }
    }
    warp_arrives(shared_address(&state.work_empty[slot]), lane);
  }
}

// ---- the kernel

extern "C" __global__ void __launch_bounds__(THREADS, 1) hopper_mxfp4_prefill(const __grid_constant__ Arguments args) {
  u8* const lines = shared_memory;
  u8* const weights = shared_memory + LINES * LINE_SLOT_BYTES;
  State& state = *(State*)(shared_memory + STATE_OFFSET);
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;

  if (thread == 0) {
    for (int i = 0; i < LINES; i++) {
      barrier_init(shared_address(&state.line_full[i]), GATHERERS);
      barrier_init(shared_address(&state.line_empty[i]), CONSUMERS / 32 * WARP_ARRIVALS);
    }
    for (int w = 0; w < WARPGROUPS; w++)
      for (int i = 0; i < WEIGHT_SLOTS; i++) {
        barrier_init(shared_address(&state.weights_full[w][i]), 1);
        barrier_init(shared_address(&state.weights_empty[w][i]), 4 * WARP_ARRIVALS);
      }
    for (int i = 0; i < 2; i++) {
      barrier_init(shared_address(&state.work_full[i]), 1);
      barrier_init(shared_address(&state.work_empty[i]), (GATHER_WARPS + CONSUMERS / 32) * WARP_ARRIVALS);
    }
    barrier_init_fence();
  }
  if (BF16 && thread < 16) {  // numbers of scale byte d: 1.0 has the biased exponent 121 + d
    u32 low[2] = {0, 0}, high[2] = {0, 0};
    for (int code = 1; code < 8; code++) {  // 0.5, 1, 1.5, 2, 3, 4, 6
      const int exponent = 120 + thread + (code >> 1), mantissa = code > 1 ? code & 1 : 0;
      low[code >> 2] |= (u32)((exponent & 1) << 7 | mantissa << 6) << (8 * (code & 3));
      high[code >> 2] |= (u32)(exponent >> 1) << (8 * (code & 3));
    }
    state.bf16_table[thread] = make_uint4(low[0], low[1], high[0], high[1]);
  }

  int item;
  for (;;) {
    if (thread == 0) state.item = atomicAdd(args.counters + NEXT_ITEM, 1);
    __syncthreads();
    item = state.item;
    __syncthreads();
    if (item > args.split_items) break;
    if (item == 0)
      route(args);
    else
      split(args, item - 1);
  }

  if (warp >= SCHEDULER_WARP) {
    fewer_registers<PRODUCER_REGISTERS>();
    if (warp > SCHEDULER_WARP)
      gather(args, state, lines);
    else if (lane == 0)
      schedule(args, state, weights, item);
    return;
  }
  more_registers<CONSUMER_REGISTERS>();
  consume(args, state, lines, weights);

  // ---- the last block to finish leaves the counters as it found them, for the next launch
  named_barrier(4, CONSUMERS);
  if (warp > 0) return;
  int others = 0;
  if (lane == 0) {
    __threadfence();
    others = atomicAdd(args.counters + BLOCKS_DONE, 1);
    __threadfence();
  }
  if (__shfl_sync(ALL_LANES, others, 0) < (int)gridDim.x - 1) return;
  const int passes = __ldcg(routing_of(args).passes);
  for (int i = lane; i < PASS_TILES_DONE + passes; i += 32) args.counters[i] = 0;
}
