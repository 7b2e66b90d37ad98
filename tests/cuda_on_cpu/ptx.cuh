// What our kernels take from kernels/hopper_mxfp4_bf16_details/ptx.cuh and from CUDA, for a CPU; see run.cpp.
#pragma once

#include <cstdint>
#include <cstring>
#include <cmath>
#include <deque>
#include <limits>
#include <vector>

#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct uint4 { u32 x, y, z, w; };
struct uint2 { u32 x, y; };
struct float2 { float x, y; };
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

template <class T> T min(T a, T b) { return a < b ? a : b; }
template <class T> T max(T a, T b) { return a < b ? b : a; }

// ---- one block: its threads take turns in one thread of the CPU

struct Meeting { int count = 0, times = 0; };
struct Mma { const u32* a; u64 b; int accumulate; float* d; int values; bool bf16; };  // a is read when the product is waited for
struct Piece { u32 to; const void* from; };
struct Arrival { std::vector<Piece> pieces; u32 barrier; };
struct Copy { u32 to; const void* from; u32 bytes, barrier; };
struct Barrier { u16 pending, arrivals; int phase_and_bytes; };  // 8 bytes: phase in bit 0, expected bytes above

struct Index { int x; };
struct Thread {
  void* stack_pointer;
  Index index;
  bool done;
  const int* watched;                 // it gets no turn while `*watched & mask` is `old`: it would only look and yield again
  int mask, old;
  std::deque<std::vector<Mma>> mmas;     // groups; the last one is not committed yet
  std::vector<Piece> pieces;          // copies of 16 bytes that nobody waits for yet
};

struct Block {
  u8* memory;
  int threads;
  Index index, grid;
  Thread* thread;
  Thread* current;
  void* scheduler;
  long turns, polls;                  // turns of its threads, and those that ended in a look at memory that another block may change
  Meeting all, named[16], warps[64];
  u64 exchanged[64][32];
  std::vector<Copy> copies;
  std::vector<Arrival> arrivals;
};

extern thread_local Block* emulated_block;
void yield();

#define threadIdx (emulated_block->current->index)
#define blockIdx (emulated_block->index)
#define gridDim (emulated_block->grid)
#define shared_memory (emulated_block->memory)

inline void wait_while(const int* watched, int mask, int old) {
  Thread* thread = emulated_block->current;
  thread->mask = mask;
  thread->old = old;
  thread->watched = watched;
  while ((*(volatile const int*)watched & mask) == old) yield();
  thread->watched = nullptr;
}

inline void meet(Meeting& meeting, int threads) {
  int times = meeting.times;
  if (++meeting.count == threads) {
    meeting.count = 0;
    meeting.times++;
  } else {
    wait_while(&meeting.times, -1, times);
  }
}

inline void __syncthreads() { meet(emulated_block->all, emulated_block->threads); }
inline void named_barrier(int id, int threads) { meet(emulated_block->named[id], threads); }
inline int kept(int value) { return value; }
inline int emulated_warp() { return threadIdx.x >> 5; }
inline int emulated_lane() { return threadIdx.x & 31; }
inline void __syncwarp() { meet(emulated_block->warps[emulated_warp()], 32); }

// ---- within a warp; all of its threads take part

template <class T, class Use> auto with_all_lanes(T value, Use use) {
  u64* lanes = emulated_block->exchanged[emulated_warp()];
  u64 bits = 0;
  memcpy(&bits, &value, sizeof value);
  lanes[emulated_lane()] = bits;
  __syncwarp();
  T values[32];
  for (int i = 0; i < 32; i++) memcpy(&values[i], &lanes[i], sizeof(T));
  __syncwarp();
  return use(values);
}

template <class T> T __shfl_sync(u32, T value, int lane) {
  return with_all_lanes(value, [=](const T* v) { return v[lane]; });
}
template <class T> T __shfl_up_sync(u32, T value, int distance) {
  int lane = emulated_lane();
  return with_all_lanes(value, [=](const T* v) { return v[lane < distance ? lane : lane - distance]; });
}
template <class T> T __shfl_xor_sync(u32, T value, int mask) {
  int lane = emulated_lane();
  return with_all_lanes(value, [=](const T* v) { return v[lane ^ mask]; });
}
inline u32 transpose_8x8(u32 two) {
  int lane = emulated_lane(), row = lane >> 2, column = 2 * (lane & 3);
  return with_all_lanes(two, [=](const u32* v) {
    auto number = [=](int r, int c) { return v[4 * r + c / 2] >> (16 * (c & 1)) & 0xFFFF; };
    return number(column, row) | number(column + 1, row) << 16;
  });
}
inline u32 __match_any_sync(u32, int value) {
  return with_all_lanes(value, [=](const int* v) {
    u32 same = 0;
    for (int i = 0; i < 32; i++) same |= (u32)(v[i] == value) << i;
    return same;
  });
}
inline u32 __ballot_sync(u32, int value) {
  return with_all_lanes(value, [](const int* v) {
    u32 set = 0;
    for (int i = 0; i < 32; i++) set |= (u32)(v[i] != 0) << i;
    return set;
  });
}
inline u32 __reduce_max_sync(u32, u32 value) {
  return with_all_lanes(value, [](const u32* v) {
    u32 most = 0;
    for (int i = 0; i < 32; i++) most = max(most, v[i]);
    return most;
  });
}
inline int __popc(u32 bits) { return __builtin_popcount(bits); }

// ---- memory

template <class T> T __ldg(const T* at) { return *at; }
template <class T> T __ldcg(const T* at) { return *at; }
template <class T> void __stcg(T* at, T value) { *at = value; }
inline void __threadfence() { __sync_synchronize(); }
inline int atomicAdd(int* at, int value) { return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST); }
inline u32 atomicOr(u32* at, u32 value) { return __atomic_fetch_or(at, value, __ATOMIC_SEQ_CST); }
inline u32 atomicMax(u32* at, u32 value) {
  u32 before = *at;
  *at = max(before, value);
  return before;
}
inline int load_acquire(const int* flag) {
  emulated_block->polls++;
  yield();
  return __atomic_load_n(flag, __ATOMIC_ACQUIRE);
}
inline void store_release(int* flag, int value) { __atomic_store_n(flag, value, __ATOMIC_RELEASE); }
inline void add_release(int* counter, int value) { __atomic_fetch_add(counter, value, __ATOMIC_SEQ_CST); }
inline u32 shared_address(const void* pointer) { return (u32)((const u8*)pointer - shared_memory); }
inline void copy_16_bytes(u32 to, const void* from) { emulated_block->current->pieces.push_back({to, from}); }
inline void wait_for_copies() {
  for (const Piece& piece : emulated_block->current->pieces) memcpy(shared_memory + piece.to, piece.from, 16);
  emulated_block->current->pieces.clear();
}
inline void arrive_after_copies(u32 barrier) {
  for (const Piece& piece : emulated_block->current->pieces) memset(shared_memory + piece.to, 0xFF, 16);
  emulated_block->arrivals.push_back({std::move(emulated_block->current->pieces), barrier});
  emulated_block->current->pieces.clear();
}
template <int COUNT> void fewer_registers() {}
template <int COUNT> void more_registers() {}
inline void show_to_tensor_cores() {}
inline void prefetch_to_l2(const void*) {}

// ---- barriers in shared memory

inline Barrier& barrier_at(u32 address) { return *(Barrier*)(shared_memory + address); }
inline void barrier_init(u32 address, u32 arrivals) { barrier_at(address) = {(u16)arrivals, (u16)arrivals, 0}; }
inline void barrier_init_fence() {}
inline void barrier_settle(Barrier& barrier) {
  if (barrier.pending == 0 && barrier.phase_and_bytes >> 1 == 0) {
    barrier.pending = barrier.arrivals;
    barrier.phase_and_bytes ^= 1;
  }
}
inline void barrier_arrive(u32 address) {
  Barrier& barrier = barrier_at(address);
  if (barrier.pending == 0) __builtin_trap();  // more arrivals than a phase has
  barrier.pending--;
  barrier_settle(barrier);
}
inline void barrier_arrive_and_expect(u32 address, u32 bytes) {
  barrier_at(address).phase_and_bytes += 2 * bytes;
  barrier_arrive(address);
}
#define EACH_LANE_ARRIVES 0
constexpr int WARP_ARRIVALS = 1;
inline void warp_arrives(u32 address, int lane) {
  __syncwarp();
  if (lane == 0) barrier_arrive(address);
}
inline void barrier_wait(u32 address, u32 parity) {
  wait_while(&barrier_at(address).phase_and_bytes, 1, (int)parity);
}
inline void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier, u64) {
  memset(shared_memory + to, 0xFF, bytes);  // nobody may read it any more, nor yet
  emulated_block->copies.push_back({to, from, bytes, barrier});
}

// ---- bits and number formats

inline float __uint_as_float(u32 bits) { float value; memcpy(&value, &bits, 4); return value; }
inline u32 __float_as_uint(float value) { u32 bits; memcpy(&bits, &value, 4); return bits; }
inline float __fdividef(float a, float b) { return a / b; }
inline float exp2_fast(float x) { return exp2f(x); }
inline float inverse_fast(float x) { return 1.0f / x; }
inline u32 and_or(u32 value, u32 mask, u32 other) { return (value & mask) | other; }
inline u32 permute_bytes(u32 low, u32 high, u32 selector) {
  u64 bytes = (u64)high << 32 | low;
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    if (selector >> (4 * i) & 8) __builtin_trap();  // would spread a sign
    result |= (u32)(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xFF) << (8 * i);
  }
  return result;
}
inline float least(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : fminf(a, b); }
inline float largest(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : fmaxf(a, b); }

inline float e4m3_value(u8 bits) {
  int exponent = bits >> 3 & 15, mantissa = bits & 7;
  float value = (bits & 0x7F) == 0x7F ? NAN : exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
  return bits & 0x80 ? -value : value;
}
inline u8 e4m3_bits(float value) {
  if (std::isnan(value)) return 0x7F;
  u8 sign = std::signbit(value) ? 0x80 : 0;
  float size = fminf(fabsf(value), 448.0f);
  int exponent = size < 0.015625f ? -6 : ilogbf(size);  // subnormals are in steps of 2^-9, as the binade of 2^-6
  int steps = (int)nearbyintf(ldexpf(size, 3 - exponent));  // nearest, ties to even; 16 carries into the exponent
  return sign | (u8)(((exponent + 6) << 3) + steps);
}
inline u32 e4m3_pair(float first, float second) { return e4m3_bits(first) | (u32)e4m3_bits(second) << 8; }
inline void e4m3_values(u32 pair, float& first, float& second) {
  first = e4m3_value((u8)pair);
  second = e4m3_value((u8)(pair >> 8));
}
inline u32 bf16_bits(float value) {
  u32 bits = __float_as_uint(value);
  return std::isnan(value) ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline u32 bf16_pair(float first, float second) { return bf16_bits(first) | bf16_bits(second) << 16; }
inline float bf16_value(float rounded) { return __uint_as_float(bf16_bits(rounded) << 16); }

// ---- tensor cores: the four threads of a row share its fragments when they wait for the products

inline u32 descriptor_low(u32 address) { return address >> 4; }
inline void mma_begin() {}
inline void mma_commit() { emulated_block->current->mmas.emplace_back(); }
template <int VALUES> void mma(float (&d)[VALUES], const u32 (&a)[4], u32 b, int accumulate) {
  emulated_block->current->mmas.back().push_back({a, b, accumulate, d, VALUES, false});
}
template <int VALUES> void mma_bf16(float (&d)[VALUES], const u32 (&a)[2][4], u32 b) {
  emulated_block->current->mmas.back().push_back({a[0], b, 1, d, VALUES, true});
  emulated_block->current->mmas.back().push_back({a[1], b + 2, 1, d, VALUES, true});
}
float product(const u32 (&fragments)[4][4], bool bf16, int half, const u8* memory, u32 address, int column);

template <int PENDING> void mma_wait_but() {
  __syncwarp();
  const int lane = emulated_lane(), first = threadIdx.x & ~3;
  auto& groups = emulated_block->current->mmas;
  while (groups.size() > PENDING + 1) {
    for (size_t i = 0; i < groups.front().size(); i++) {
      const Mma& mma = groups.front()[i];
      u32 fragments[4][4];
      for (int c = 0; c < 4; c++) memcpy(fragments[c], emulated_block->thread[first + c].mmas.front()[i].a, 16);
      for (int v = 0; v < mma.values; v++) {
        float sum = product(fragments, mma.bf16, v >> 1 & 1, shared_memory, (u32)mma.b << 4, 8 * (v >> 2) + 2 * (lane & 3) + (v & 1));
        mma.d[v] = mma.accumulate ? mma.d[v] + sum : sum;
      }
    }
    __syncwarp();  // all four have read the fragments
    groups.pop_front();
    __syncwarp();
  }
  __syncwarp();
}
template <int VALUES> void mma_wait(float (&)[VALUES]) { mma_wait_but<0>(); }
