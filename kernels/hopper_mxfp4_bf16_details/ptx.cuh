// Single instructions of sm_90a under names; there is no other inline assembly.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

extern __shared__ __align__(1024) u8 shared_memory[];  // 1024: the period of the 128-byte swizzle

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// The same value, which the compiler keeps instead of computing it again where it is used.
__device__ __forceinline__ int kept(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// ---- bytes and bits

__device__ __forceinline__ u32 permute_bytes(u32 low, u32 high, u32 selector) {
  u32 result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
}

// (value & mask) | other, which is look-up table 0xEA of lop3
__device__ __forceinline__ u32 and_or(u32 value, u32 mask, u32 other) {
  u32 result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(value), "r"(mask), "r"(other));
  return result;
}

// ---- number formats; of a pair, the first is the low half

__device__ __forceinline__ u32 e4m3_pair(float first, float second) {
  u16 result;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(result) : "f"(second), "f"(first));
  return result;
}

__device__ __forceinline__ void e4m3_values(u32 pair, float& first, float& second) {
  u32 halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((u16)pair));
  asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(first), "=f"(second) : "r"(halves));
}

__device__ __forceinline__ u32 bf16_pair(float first, float second) {
  u32 result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
  return result;
}

__device__ __forceinline__ float bf16_value(float rounded) { return __uint_as_float(bf16_pair(rounded, 0.0f) << 16); }

// Unlike fminf and fmaxf these keep a NaN, which a clamp would turn into its limit.
__device__ __forceinline__ float least(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ float largest(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// e^x is exp2_fast(x * log2(e)); both have errors of 2 in the last place, and what is too small for a normal number is 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ float inverse_fast(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Of a matrix of 8 by 8 numbers of 16 bits, of which lane l has two neighbours in row l / 4, each lane gets those of the transposed matrix.
__device__ __forceinline__ u32 transpose_8x8(u32 two) {
  u32 result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(two));
  return result;
}

// ---- barriers in shared memory

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_arrive_and_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// All lanes of a warp arrive, one of them for all. compute-sanitizer's racecheck does not follow a __syncwarp into another lane's arrival: for
// its sake every lane can arrive for itself.
#ifndef EACH_LANE_ARRIVES
#define EACH_LANE_ARRIVES 0
#endif
constexpr int WARP_ARRIVALS = EACH_LANE_ARRIVES ? 32 : 1;  // of a warp, for barrier_init

__device__ __forceinline__ void warp_arrives(u32 barrier, int lane) {
  __syncwarp();
  if (EACH_LANE_ARRIVES || lane == 0) barrier_arrive(barrier);
}

// Returns once the phase of this parity is over. Whoever waits must wait for every phase: a parity says nothing about a phase before.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again%=: mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@over bra done%=;\n"
      "bra again%=;\n"
      "done%=:\n"
      "}" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ---- copies to shared memory

// One thread, any multiple of 16 bytes; the bytes are counted at the barrier.
__device__ __forceinline__ void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier, u64 l2_policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier), "l"(l2_policy)
               : "memory");
}

__device__ __forceinline__ void copy_16_bytes(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// An arrival of this thread at a barrier, once its copies of 16 bytes so far have arrived; one of those that the barrier expects.
__device__ __forceinline__ void arrive_after_copies(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// What a thread stored to shared memory becomes visible to the tensor cores, after the barrier that must follow.
__device__ __forceinline__ void show_to_tensor_cores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void prefetch_to_l2(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// ---- flags between blocks

__device__ __forceinline__ int load_acquire(const int* flag) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

__device__ __forceinline__ void store_release(int* flag, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ __forceinline__ void add_release(int* counter, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

// ---- registers of a warpgroup's threads, which all of them change together

template <int COUNT>
__device__ __forceinline__ void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT>
__device__ __forceinline__ void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }

// ---- tensor cores: D [64, COLUMNS] (+)= A [64, K] in registers times B [COLUMNS, K] in shared memory, into fp32; K is 32 e4m3 or 16 bf16
// numbers. Until `mma_wait` the products may not be read and A may not be changed.

__device__ __forceinline__ void mma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// All but the newest PENDING commits are done.
template <int PENDING>
__device__ __forceinline__ void mma_wait_but() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

template <int VALUES>
__device__ __forceinline__ void mma_wait(float (&d)[VALUES]) {
  mma_wait_but<0>();
#pragma unroll
  for (int i = 0; i < VALUES; i++) asm volatile("" : "+f"(d[i])::"memory");  // no use of d moves above the wait
}

#define D_4 "%0,%1,%2,%3"
#define D_8 D_4 ",%4,%5,%6,%7"
#define D_16 D_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define D_32 D_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define D_40 D_32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define D_48 D_40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define D_56 D_48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define D_64 D_56 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define D_72 D_64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define D_80 D_72 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define INTO_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define INTO_8(d, i) INTO_4(d, i), INTO_4(d, i + 4)
#define INTO_16(d, i) INTO_8(d, i), INTO_8(d, i + 8)
#define INTO_32(d, i) INTO_16(d, i), INTO_16(d, i + 16)
#define INTO_40(d, i) INTO_32(d, i), INTO_8(d, i + 32)
#define INTO_48(d, i) INTO_32(d, i), INTO_16(d, i + 32)
#define INTO_56(d, i) INTO_48(d, i), INTO_8(d, i + 48)
#define INTO_64(d, i) INTO_32(d, i), INTO_32(d, i + 32)
#define INTO_72(d, i) INTO_64(d, i), INTO_8(d, i + 64)
#define INTO_80(d, i) INTO_64(d, i), INTO_16(d, i + 64)

// VALUES of D in a thread are columns / 2; the operands after them are four of A, where B is, and whether D had a value before. The bf16
// form takes two steps of 16 columns at once, 32 bytes of B apart, and adds: half as many operands for the compiler to bring together.
//
// Where B is: rows of 128 bytes, 128-byte swizzle, groups of 8 rows 1024 bytes apart. Low word: address / 16; bit 16 is a stride of 16
// bytes that this swizzle ignores. High word: 1024 / 16, swizzle mode 1 in its two upper bits; as a constant of the instruction it takes no moves.
#define DESCRIPTOR_HIGH "0x40000040"
#define E4M3_MMA(VALUES, N, A0, A1, A2, A3, B, P)                                                                                        \
  __device__ __forceinline__ void mma(float (&d)[VALUES], const u32 (&a)[4], u32 b, int accumulate) {                                    \
    asm volatile("{.reg .pred p; .reg .b32 high; .reg .b64 b; mov.b32 high, " DESCRIPTOR_HIGH "; mov.b64 b, {%" #B ", high}; "            \
                 "setp.ne.b32 p, %" #P ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" D_##VALUES                      \
                 "}, {%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, b, p, 1, 1;}"                                                                \
                 : INTO_##VALUES(d, 0)                                                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(accumulate));                                                 \
  }
#define BF16_MMA(VALUES, N, A0, A1, A2, A3, A4, A5, A6, A7, B, C)                                                                        \
  __device__ __forceinline__ void mma_bf16(float (&d)[VALUES], const u32 (&a)[2][4], u32 b) {                                            \
    asm volatile("{.reg .pred p; .reg .b32 high; .reg .b64 b, c; mov.b32 high, " DESCRIPTOR_HIGH "; mov.b64 b, {%" #B ", high}; "         \
                 "mov.b64 c, {%" #C ", high}; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n" #N                                  \
                 "k16.f32.bf16.bf16 {" D_##VALUES "}, {%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, b, p, 1, 1, 0; "                              \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" D_##VALUES                                                  \
                 "}, {%" #A4 ",%" #A5 ",%" #A6 ",%" #A7 "}, c, p, 1, 1, 0;}"                                                             \
                 : INTO_##VALUES(d, 0)                                                                                                   \
                 : "r"(a[0][0]), "r"(a[0][1]), "r"(a[0][2]), "r"(a[0][3]), "r"(a[1][0]), "r"(a[1][1]), "r"(a[1][2]), "r"(a[1][3]),       \
                   "r"(b), "r"(b + 2));                                                                                                  \
  }
E4M3_MMA(4, 8, 4, 5, 6, 7, 8, 9)
E4M3_MMA(8, 16, 8, 9, 10, 11, 12, 13)
E4M3_MMA(16, 32, 16, 17, 18, 19, 20, 21)
E4M3_MMA(32, 64, 32, 33, 34, 35, 36, 37)
E4M3_MMA(40, 80, 40, 41, 42, 43, 44, 45)
E4M3_MMA(48, 96, 48, 49, 50, 51, 52, 53)
E4M3_MMA(56, 112, 56, 57, 58, 59, 60, 61)
E4M3_MMA(64, 128, 64, 65, 66, 67, 68, 69)
E4M3_MMA(72, 144, 72, 73, 74, 75, 76, 77)
E4M3_MMA(80, 160, 80, 81, 82, 83, 84, 85)
BF16_MMA(16, 32, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25)
BF16_MMA(32, 64, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41)
BF16_MMA(40, 80, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49)
BF16_MMA(48, 96, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57)
BF16_MMA(56, 112, 56, 57, 58, 59, 60, 61, 62, 63, 64, 65)
BF16_MMA(64, 128, 64, 65, 66, 67, 68, 69, 70, 71, 72, 73)
BF16_MMA(72, 144, 72, 73, 74, 75, 76, 77, 78, 79, 80, 81)
BF16_MMA(80, 160, 80, 81, 82, 83, 84, 85, 86, 87, 88, 89)

__device__ __forceinline__ u32 descriptor_low(u32 address) { return ((address >> 4) & 0x3FFF) | 0x10000; }
