// Runs a kernel of ours, moe.cu or with -DPREFILL prefill.cu, on a CPU: every thread of a block has its own stack and they take turns, every block is a thread of the CPU.
//
// It shows what is computed and whether threads wait for the right thing. `seed` lets warps run at uneven, random speeds and copies arrive
// late, and a copy that is under way leaves NaNs, so that a wait that is missing or waits for the wrong phase is seen. It does not show the
// order in which a GPU makes memory visible, the precision of its tensor cores, or time.

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <chrono>
#include <random>
#include <thread>

#include "ptx.cuh"

thread_local Block* emulated_block;

// saves the callee's registers and the stack pointer, and continues where another stack left off
extern "C" void switch_stack(void** save, void* load);
asm(R"(
.text
.globl switch_stack
switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

__attribute__((noinline)) void yield() { switch_stack(&emulated_block->current->stack_pointer, emulated_block->scheduler); }

static float E4M3[256];

float product(const u32 (&fragments)[4][4], bool bf16, int half, const u8* memory, u32 address, int column) {
  float sum = 0;
  for (int part = 0; part < 2; part++) {
    u32 at = address + (column >> 3) * 1024 + (column & 7) * 128 + 16 * part;
    at ^= (at >> 7 & 7) << 4;  // 128-byte swizzle, of the address: 16 bytes stay together
    const u8* b = memory + at;
    for (int c = 0; c < 4; c++) {
      u32 word = fragments[c][half + 2 * part];
      if (bf16) {
        u32 values;
        memcpy(&values, b + 4 * c, 4);
        sum += __uint_as_float(word << 16) * __uint_as_float(values << 16);
        sum += __uint_as_float(word & 0xFFFF0000) * __uint_as_float(values & 0xFFFF0000);
      } else {
        for (int i = 0; i < 4; i++) sum += E4M3[word >> (8 * i) & 0xFF] * E4M3[b[4 * c + i]];
      }
    }
  }
  return sum;
}

#ifdef PREFILL
#include "prefill.cu"
#define KERNEL hopper_mxfp4_prefill
#else
#include "moe.cu"
#define KERNEL hopper_mxfp4_bf16
#endif

static const Arguments* arguments;
static std::atomic<bool> stuck;

static void thread_main() {
  KERNEL(*arguments);
  emulated_block->current->done = true;
  for (;;) yield();
}

static void run_block(int index, int blocks, unsigned seed, double seconds) {
  constexpr size_t STACK = 1 << 16;
  Block block{};
  emulated_block = &block;
  std::vector<Thread> threads(THREADS);
  u8* stacks = (u8*)malloc(STACK * THREADS);
  block.memory = (u8*)aligned_alloc(1024, (STATE_OFFSET + STATE_BYTES + 1023) / 1024 * 1024);
  memset(block.memory, 0xFF, STATE_OFFSET + STATE_BYTES);  // NaN as a number, no barrier
  block.threads = THREADS;
  block.index = {index};
  block.grid = {blocks};
  block.thread = threads.data();
  for (int i = 0; i < THREADS; i++) {
    void** top = (void**)(stacks + STACK * (i + 1)) - 2;
    *top = (void*)thread_main;  // the stack as if thread_main had just been called
    threads[i] = {top - 6, {i}, false, nullptr, 0, 0, {{}}, {}};
  }
  std::mt19937 random(seed * 1000 + index);
  unsigned slowness[64] = {};
  auto begin = std::chrono::steady_clock::now();
  int alive = THREADS;
  for (long round = 0; alive && !stuck; round++) {
    if (seed && round % 256 == 0)
      for (auto& s : slowness) s = random() % 3 ? random() % 4 : 60;
    for (size_t i = 0; i < block.copies.size();) {
      if (seed && random() % 16) {
        i++;
        continue;
      }
      const Copy copy = block.copies[i];
      block.copies.erase(block.copies.begin() + i);
      memcpy(block.memory + copy.to, copy.from, copy.bytes);
      Barrier& barrier = barrier_at(copy.barrier);
      barrier.phase_and_bytes -= 2 * copy.bytes;
      barrier_settle(barrier);
    }
    for (size_t i = 0; i < block.arrivals.size();) {
      if (seed && random() % 16) {
        i++;
        continue;
      }
      const Arrival arrival = std::move(block.arrivals[i]);
      block.arrivals.erase(block.arrivals.begin() + i);
      for (const Piece& piece : arrival.pieces) memcpy(block.memory + piece.to, piece.from, 16);
      Barrier& barrier = barrier_at(arrival.barrier);
      barrier.pending--;
      barrier_settle(barrier);
    }
    for (int warp = 0; warp < WARPS; warp++) {
      if (slowness[warp] && random() % (slowness[warp] + 1)) continue;
      for (int i = warp * 32; i < warp * 32 + 32; i++) {
        if (threads[i].done || (threads[i].watched && (*threads[i].watched & threads[i].mask) == threads[i].old)) continue;
        block.turns++;
        block.current = &threads[i];
        switch_stack(&block.scheduler, threads[i].stack_pointer);
        alive -= threads[i].done;
      }
    }
    // There are more blocks than cores: one that waits for the others lets them have its core.
    if (block.polls && block.turns == block.polls) std::this_thread::yield();
    block.turns = block.polls = 0;
    if (round % 1024 == 1023) {
      std::this_thread::yield();
      if (std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() > seconds) stuck = true;
    }
  }
  free(block.memory);
  free(stacks);
}

// 0, or 1 if it did not end within `seconds`.
extern "C" int run(const Arguments* args, int blocks, unsigned seed, double seconds) {
  for (int i = 0; i < 256; i++) E4M3[i] = e4m3_value((u8)i);
  arguments = args;
  stuck = false;
  std::vector<std::thread> running;
  for (int i = 0; i < blocks; i++) running.emplace_back(run_block, i, blocks, seed, seconds);
  for (auto& thread : running) thread.join();
  return stuck;
}

extern "C" int size_of(int what) {
#ifdef PREFILL
  constexpr int sizes[] = {sizeof(Arguments), STAGE_BYTES, PASS_TILES_DONE, STATE_OFFSET + STATE_BYTES, sizeof(State), UP_K, DOWN_K, UP_TILES};
#else
  constexpr int sizes[] = {sizeof(Arguments), STAGE_BYTES, TOKEN_SPLIT + MAX_TOKENS, STATE_OFFSET + STATE_BYTES,
                           sizeof(State),     UP_K,        DOWN_K,                   MAX_PASSES};
#endif
  return sizes[what];
}
