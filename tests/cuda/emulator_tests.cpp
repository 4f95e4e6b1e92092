// Small programs for tests/cuda/test_emulator.py, each by its name: what it does to `in` and `out` is said there.
#include <algorithm>
#include <functional>
#include <map>
#include <string>

#include "emulator.h"
#include "machine.h"
#include "pipeline.h"

namespace {

using namespace ptx;

struct Call {
  u64 seed;
  const int* arguments;
  void *in, *out;
};

u32 base() { return shared_memory(); }

void require(bool condition, const char* what) {
  if (!condition) emulator::fail(what);
}

void block_of(u32 threads, const Call& call, const std::function<void()>& body) {
  emulator::launch(1, 64 << 10, threads, call.seed, body);
}

// A barrier that everyone may use.
void make_barrier(u32 barrier, u32 arrivals) {
  if (thread() == 0) {
    mbarrier_init(barrier, arrivals);
    mbarrier_init_fence();
  }
  block_sync();
}

// arguments: columns, rows, column, row, swizzle. A box of 64 x 64; out: shared memory, words.
void load(const Call& call) {
  const int* n = call.arguments;
  const TensorMap map = emulator::tensor_map(call.in, n[0], n[1], n[0] * 2, 64, 64, 2, n[4] != 0);
  block_of(128, call, [&] {
    const u32 barrier = base() + 8192;
    make_barrier(barrier, 1);
    if (thread() == 0) {
      mbarrier_expect(barrier, 8192);
      tma_load(base(), map, n[2], n[3], barrier);
    }
    mbarrier_wait(barrier, 0);
    for (u32 i = thread(); i < 2048; i += 128) static_cast<float*>(call.out)[i] = load_shared(base() + 4 * i);
  });
}

// in: 64 rows of a, 128 rows of b, of 128. arguments: first step and steps of 16, add. out: registers of every thread.
void product(const Call& call) {
  const int* n = call.arguments;
  const auto* in = static_cast<const u16*>(call.in);
  const TensorMap a = emulator::tensor_map(in, 128, 64, 256, 64, 64);
  const TensorMap b = emulator::tensor_map(in + 64 * 128, 128, 128, 256, 64, 128);
  block_of(128, call, [&] {
    const u32 barrier = base() + 49152;
    make_barrier(barrier, 1);
    if (thread() == 0) {
      mbarrier_expect(barrier, 49152);
      for (int i = 0; i < 2; ++i) {
        tma_load(base() + i * 8192, a, i * 64, 0, barrier);
        tma_load(base() + 16384 + i * 16384, b, i * 64, 0, barrier);
      }
    }
    mbarrier_wait(barrier, 0);
    float d[64];
    for (int i = 0; i < 64; ++i) d[i] = static_cast<float>(thread() * 64 + i);
    wgmma_fence();
    for (int step = n[0]; step < n[0] + n[1]; ++step) {
      const u32 offset = step % 4 * 32;
      wgmma(d, matrix(base() + step / 4 * 8192 + offset), matrix(base() + 16384 + step / 4 * 16384 + offset),
            n[2] != 0 || step > n[0]);
    }
    wgmma_commit();
    wgmma_wait<0>();
    std::copy(d, d + 64, static_cast<float*>(call.out) + thread() * 64);
  });
}

// Thread t gives registers 4 t .. 4 t + 3 of in; matrix m's row r goes to 16 (8 m + r). arguments: transposed. out:
// shared memory, words.
void store_matrix(const Call& call) {
  block_of(32, call, [&] {
    const auto* in = static_cast<const u32*>(call.in) + 4 * thread();
    (call.arguments[0] != 0 ? stmatrix_transposed : stmatrix)(base() + 16 * thread(), in[0], in[1], in[2], in[3]);
    block_sync();
    for (u32 i = thread(); i < 128; i += 32) static_cast<float*>(call.out)[i] = load_shared(base() + 4 * i);
  });
}

// in: 64 x 64 numbers, stored as a box at (column, row) of out. arguments: columns, rows, column, row, whether added.
void store(const Call& call) {
  const int* n = call.arguments;
  const TensorMap map = emulator::tensor_map(call.out, n[0], n[1], n[0] * 2, 64, 64);
  block_of(128, call, [&] {
    const auto* in = static_cast<const float*>(call.in);
    for (u32 i = thread(); i < 2048; i += 128) store_shared(emulator::swizzled(base() + 4 * i), in[i]);
    fence_proxy_async();
    barrier_sync(1, 128);
    if (thread() == 0) {
      (n[4] != 0 ? tma_add : tma_store)(map, n[2], n[3], base());
      tma_store_commit();
      tma_store_wait_read<0>();
    }
  });
}

// Two of three groups wait for one that only arrives, and for each other, in turn.
void named_barriers(const Call& call) {
  block_of(96, call, [&] {
    const u32 group = thread() / 32, own = base() + 4 * thread();
    for (u32 turn = 0; turn < 5; ++turn) {
      if (group == 2) {
        store_shared(own, static_cast<float>(turn));
        barrier_arrive(1, 96);
        barrier_sync(2, 96);
      } else {
        barrier_sync(1, 96);
        require(load_shared(base() + 4 * (64 + thread() % 32)) == static_cast<float>(turn), "another turn's number");
        barrier_arrive(2, 96);
        barrier_sync(3, 64);
      }
    }
    block_sync();
    if (group == 1) return;
    block_sync();  // of those that are left
  });
}

void complete(u32 barrier, u32 bytes, u64 phase) {
  emulator::machine->self().block->complete(emulator::machine->scheduler, barrier, bytes, phase);
}

// Phases and parities of a barrier of two arrivals and some bytes.
void phases(const Call& call) {
  block_of(64, call, [&] {
    const u32 barrier = base();
    make_barrier(barrier, 2);
    mbarrier_wait(barrier, 1);  // the phase before the first counts as complete
    block_sync();
    const emulator::Mbarrier& state = emulator::machine->self().block->mbarriers.at(barrier);
    if (thread() == 0) {
      mbarrier_arrive(barrier);
      require(state.phase == 0 && state.left == 1, "one arrival is not two");
      mbarrier_arrive(barrier);
      require(state.phase == 1 && state.left == 2, "two arrivals are a phase");
    }
    mbarrier_wait(barrier, 0);
    block_sync();
    if (thread() == 0) {
      mbarrier_expect(barrier, 100);
      mbarrier_arrive(barrier);
      require(state.phase == 1 && state.left == 0 && state.bytes == 100, "bytes are to come");
      complete(barrier, 60, 1);
      require(state.phase == 1 && state.bytes == 40, "40 are left");
      complete(barrier, 40, 1);
      require(state.phase == 2, "all are there");
      complete(barrier, 16, 2);  // before it is told of them
      mbarrier_arrive(barrier);
      require(state.phase == 2 && state.bytes == -16, "they count");
      mbarrier_expect(barrier, 16);
      require(state.phase == 3, "and complete it with its arrivals");
    }
    block_sync();
    mbarrier_wait(barrier, 0);  // phase 2
  });
}

// A block's number and how many there are; each has shared memory and barriers of its own.
void blocks_alone(const Call& call) {
  auto* ran = static_cast<u16*>(call.out);
  emulator::launch(3, 64 << 10, 64, call.seed, [&] {
    require(block() < 3 && blocks() == 3, "numbers of blocks");
    make_barrier(base(), 1);
    store_shared(base() + 4096 + 4 * thread(), static_cast<float>(block()));
    if (thread() == 0) mbarrier_arrive(base()), ++ran[block()];
    mbarrier_wait(base(), 0);
    require(load_shared(base() + 4096 + 4 * thread()) == static_cast<float>(block()), "another block's number");
  });
}

// in: 32 numbers. out: x from lane ^ 5; 2^x; whether all x > arguments[0]; pack(x, -x), rows of 32.
void lanes(const Call& call) {
  block_of(32, call, [&] {
    const u32 lane = thread();
    const float x = static_cast<float*>(call.in)[lane];
    auto* out = static_cast<float*>(call.out) + lane;
    out[0] = shuffle_xor(x, 5);
    out[32] = ptx::exp2(x);
    out[64] = all_of_warp(x > static_cast<float>(call.arguments[0])) ? 1.0f : 0.0f;
    out[96] = emulator::bits_to_float(pack(x, -x));
  });
}

// One warpgroup gives what two others take, and never are there more than a block has. arguments: what these take.
void registers(const Call& call) {
  block_of(384, call, [&] {
    if (thread() >= 256) return give_registers<24>();
    if (call.arguments[0] == 240) return take_registers<240>();
    take_registers<248>();
  });
}

// What must fail, alone.
void unfit(const Call& call) {
  const TensorMap map = emulator::tensor_map(call.in, 64, 64, 128, 64, 64);
  const int what = call.arguments[0];
  block_of(128, call, [&] {
    const u32 barrier = base() + 32768;
    make_barrier(barrier, 1);
    float d[64] = {};
    const bool first = thread() == 0;
    if (what == 0 && first) tma_load(base() + 128, map, 0, 0, barrier);
    if (what == 1 && first) tma_load(base() + (60 << 10), map, 0, 0, barrier);
    if (what == 2 && first) tma_load(base() + 28672, map, 0, 0, barrier);
    if (what == 3 && first) mbarrier_expect(barrier, 1 << 20);
    if (what == 4 && first) mbarrier_expect(barrier, 8), mbarrier_arrive(barrier);
    if (what == 5) wgmma_fence(), wgmma(d, matrix(base() + 256), matrix(base()), false);
    if (what == 6) wgmma_fence(), wgmma(d, matrix(base()), matrix(base()) & ~(3ull << 62), false);
    if (what == 7) shuffle_xor(first ? 0.0f : (wgmma_fence(), 1.0f), 1);
    if (what == 8) barrier_sync(1, thread() < 32 ? 64 : 128);
    if (what == 9 && first) store_shared(barrier, 0);
    if (what == 10 && thread() < 32) barrier_arrive(3, 64);
    if (what == 11 && first) load_shared(base() + 2);
    if (what == 12 && first) tma_load(base(), map, 0, 0, barrier), tma_load(base(), map, 0, 0, barrier);
    if (what == 13 && first) mbarrier_wait(barrier + 8, 0);
    if (what == 14 && thread() < 32) give_registers<24>();
    if (what == 15 && first) store_shared(base(), 1), tma_load(base(), map, 0, 0, barrier);
    if (what == 16)
      wgmma_fence(), wgmma(d, matrix(base()), matrix(base()), false), d[5] = 0, wgmma_commit(), wgmma_wait<0>();
    if (what == 17)
      wgmma_fence(), wgmma(d, matrix(base() + thread() / 64 * 1024), matrix(base()), false), wgmma_commit(),
          wgmma_wait<0>();
  });
}

const std::map<std::string, void (*)(const Call&)> kPrograms = {
    {"load", load},
    {"product", product},
    {"store_matrix", store_matrix},
    {"store", store},
    {"phases", phases},
    {"named_barriers", named_barriers},
    {"lanes", lanes},
    {"blocks_alone", blocks_alone},
    {"unfit", unfit},
    {"registers", registers},
};

}  // namespace

extern "C" int run(const char* name, u64 seed, const int* arguments, void* in, void* out, char* message, u64 size) {
  return emulator::guarded(message, size, [&] { kPrograms.at(name)({seed, arguments, in, out}); });
}

// x of `rows` x depth, y of 128 rows a block x depth; out is x y^T. 16 bits each.
extern "C" int run_pipeline(const char* fault, u64 seed, u32 stages, u32 rows, u32 depth, void* x, void* y, void* out,
                            char* message, u64 size) {
  return emulator::guarded(message, size, [&] { pipeline::run({fault, stages, rows, depth}, seed, x, y, out); });
}
extern "C" const emulator::u64* counts() { return reinterpret_cast<const u64*>(&emulator::statistics); }
