// A kernel in small, for the emulator's own tests: a ring of stages between a producer and two consumers, results by
// way of shared memory. It runs as it should, or with one fault.
#pragma once

#include <cstring>

#include "emulator.h"

namespace pipeline {

using namespace ptx;

struct Shape {
  const char* fault;
  u32 stages, rows, depth;
  bool has(const char* name) const { return std::strcmp(fault, name) == 0; }
};

constexpr u32 kStage = 128 * 128, kStaging = 64 * 128;

struct Maps {
  TensorMap x, y, out;
};

struct Kernel {
  const Shape& s;
  const Maps& maps;
  const u32 steps = s.depth / 64, tiles = (s.rows + 127) / 128;
  const u32 panel = shared_memory(), ring = panel + steps * kStage, staging = ring + s.stages * kStage;
  const u32 panel_full = staging + 4 * kStaging;
  u32 full(u32 stage) const { return panel_full + 8 + 8 * stage; }
  u32 empty(u32 stage) const { return full(s.stages + stage); }

  void run() const {
    if (thread() == 0) {
      mbarrier_init(panel_full, 1);
      for (u32 i = 0; i < s.stages; ++i) {
        mbarrier_init(full(i), 1);
        const u32 missing = s.has("an arrival less than consumers") ? 1 : 0;
        mbarrier_init(empty(i), 2 - missing + (s.has("an arrival more than consumers") ? 1 : 0));
      }
      if (!s.has("no fence of the initialization")) mbarrier_init_fence();
    }
    if (!s.has("no sync after the initialization")) block_sync();
    if (thread() < 128) {
      give_registers<24>();
      if (thread() == 0) produce();
    } else {
      take_registers<240>();
      consume();
    }
  }

  void produce() const {
    mbarrier_expect(panel_full, steps * kStage);
    for (u32 k = 0; k < steps; ++k) tma_load(panel + k * kStage, maps.y, k * 64, block() * 128, panel_full);
    for (u32 i = 0; i < tiles * steps; ++i) {
      const u32 stage = i % s.stages, turn = i / s.stages;
      const u32 parity = (turn & 1) ^ (s.has("the producer's parity") ? 0 : 1);
      if (!s.has("no wait for an empty stage")) mbarrier_wait(empty(stage), parity);
      u32 bytes = kStage;
      if (s.has("too few bytes expected")) bytes -= 1024;
      if (s.has("too many bytes expected")) bytes += 1024;
      mbarrier_expect(full(stage), bytes);
      tma_load(ring + stage * kStage, maps.x, static_cast<int>(i % steps * 64), static_cast<int>(i / steps * 128),
               full(stage));
    }
  }

  void release(u32 stage) const {
    if (thread() % 128 == 0) mbarrier_arrive(empty(stage));
  }

  void consume() const {
    const u32 group = thread() / 128 - 1, own = thread() % 128, boxes = staging + group * 2 * kStaging;
    float d[64];
    if (!s.has("no wait for the panel")) mbarrier_wait(panel_full, 0);
    for (u32 tile = 0; tile < tiles; ++tile) {
      for (u32 k = 0; k < steps; ++k) {
        const u32 i = tile * steps + k, stage = i % s.stages;
        const u32 parity = (i / s.stages & 1) ^ (s.has("the consumers' parity") ? 1 : 0);
        if (!s.has("no wait for a full stage")) mbarrier_wait(full(stage), parity);
        if (!s.has("no fence of the registers")) wgmma_fence();
        const u32 a = ring + stage * kStage + group * 64 * 128, b = panel + k * kStage;
        for (u32 step = 0; step < 4; ++step) wgmma(d, matrix(a + 32 * step), matrix(b + 32 * step), k + step > 0);
        if (!s.has("no commit")) wgmma_commit();
        if (s.has("released before its product")) release(stage);
        if (s.has("released before the wait") && k > 0) release((i - 1) % s.stages);
        wgmma_wait<1>();
        if (k > 0 && !s.has("released before its product") && !s.has("released before the wait")) {
          release((i - 1) % s.stages);
        }
      }
      if (!s.has("no wait for the last product")) wgmma_wait<0>();
      if (!s.has("released before its product") && !s.has("the last stage is kept")) {
        release((tile * steps + steps - 1) % s.stages);
      }
      write(tile, group, own, boxes, d);
    }
    if (own == 0 && !s.has("no wait for the last store")) tma_store_wait_read<0>();
  }

  void write(u32 tile, u32 group, u32 own, u32 boxes, const float (&d)[64]) const {
    if (own == 0 && !s.has("no wait for the store before")) tma_store_wait_read<0>();
    if (!s.has("no sync after the wait for the store")) barrier_sync(1 + group, 128);
    const u32 row = own / 32 * 16 + own % 32 % 16;
    for (u32 column = 0; column < 128; column += 16) {
      const u32 i = column / 2, byte = (column % 64 + own % 32 / 16 * 8) * 2;
      const u32 address = boxes + column / 64 * kStaging + row * 128 + byte;
      stmatrix(s.has("no swizzle") ? address : address ^ row % 8 * 16, pack(d[i], d[i + 1]), pack(d[i + 2], d[i + 3]),
               pack(d[i + 4], d[i + 5]), pack(d[i + 6], d[i + 7]));
    }
    if (!s.has("no proxy fence") && !s.has("the proxy fence after the sync")) fence_proxy_async();
    if (!s.has("no sync before the store")) barrier_sync(1 + group, 128);
    if (s.has("the proxy fence after the sync")) fence_proxy_async();
    if (own != 0) return;
    for (u32 half = 0; half < 2; ++half) {
      tma_store(maps.out, static_cast<int>(block() * 128 + half * 64), static_cast<int>(tile * 128 + group * 64),
                boxes + half * kStaging);
    }
    if (!s.has("no commit of the store")) tma_store_commit();
  }
};

inline void run(const Shape& s, u64 seed, void* x, void* y, void* out) {
  const u32 blocks = 2;
  const Maps maps = {emulator::tensor_map(x, s.depth, s.rows, s.depth * 2, 64, 128),
                     emulator::tensor_map(y, s.depth, blocks * 128, s.depth * 2, 64, 128),
                     emulator::tensor_map(out, blocks * 128, s.rows, blocks * 256, 64, 64)};
  const u32 bytes = (s.depth / 64 + s.stages) * kStage + 4 * kStaging + 8 + 16 * s.stages;
  emulator::launch(blocks, bytes, 384, seed, [&] { Kernel{s, maps}.run(); });
}

}  // namespace pipeline
