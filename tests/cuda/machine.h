// A block from its start to its end.
#pragma once

#include <string>
#include <vector>

#include "wgmma.h"

namespace emulator {

struct Machine {
  Machine(u32 index, u32 blocks, u32 shared_bytes, u32 threads, u64 seed, const std::function<void()>& body)
      : scheduler(seed, threads / 32, body),
        loads(scheduler),
        stores(scheduler),
        tensor_cores(scheduler),
        grid(blocks),
        block(index, threads, shared_bytes),
        all_threads(threads),
        all_warps(threads / 32),
        pipes((threads + 127) / 128) {
    scheduler.sources[kLoad] = &loads, scheduler.sources[kStore] = &stores, scheduler.sources[kProduct] = &tensor_cores;
    scheduler.finished = [this](Fibre& fibre) { end(static_cast<Thread&>(fibre)); };
    for (Pipe& pipe : pipes) {
      pipe.block = &block;
      block.pipes.push_back(&pipe);
      tensor_cores.pipes.push_back(&pipe);
    }
    for (u32 i = 0; i < threads; ++i) {
      all_threads[i].index = i;
      all_threads[i].block = &block;
      all_warps[i / 32].lanes[i % 32] = &all_threads[i];
    }
    for (Warp& warp : all_warps) scheduler.add(warp);
  }

  void run() {
    try {
      const bool ended = scheduler.run();
      statistics.steps += scheduler.steps;
      if (!ended) fail("nothing can happen any more:\n%s", report().c_str());
    } catch (const Error& error) {
      const Thread* thread = static_cast<Thread*>(scheduler.self);
      throw Error(thread == nullptr
                      ? error.what()
                      : text("block %u, thread %u: ", thread->block->index, thread->index) + error.what());
    }
  }

  // A barrier of all live threads (named barrier 0), for a warp.
  void block_barrier() { block.arrive_at_named(scheduler, "block_sync", 0, block.live_warps * 32); }

  Thread& self() { return static_cast<Thread&>(*scheduler.self); }

  std::string report() const {
    std::string lines;
    for (const Warp& warp : all_warps) {
      for (u32 lane = 0; lane < 32; ++lane) {
        const Thread& thread = static_cast<Thread&>(*warp.lanes[lane]);
        const auto same = [&](const Fibre* other) {
          return thread.state == other->state && thread.detail[0] == other->detail[0] &&
                 thread.detail[1] == other->detail[1];
        };
        if (thread.finished || (lane > 0 && same(warp.lanes[lane - 1]))) continue;
        u32 last = lane;
        while (last < 31 && same(warp.lanes[last + 1])) ++last;
        lines += text("  block %u, threads %u to %u: %s", thread.block->index, thread.index, thread.index + last - lane,
                      thread.state);
        if (thread.detail[0] >= kSharedBase) {
          lines += text(" at +%u, parity %u", thread.detail[0] - kSharedBase, thread.detail[1]);
        } else if (thread.detail[1] != 0) {
          lines += text(" %u of %u threads", thread.detail[0], thread.detail[1]);
        }
        lines += "\n";
      }
    }
    for (const auto& [address, barrier] : block.mbarriers) {
      lines += text("  block %u, barrier at +%u: phase %llu, %u of %u arrivals and %lld bytes to come\n", block.index,
                    address - kSharedBase, barrier.phase, barrier.left, barrier.arrivals, barrier.bytes);
    }
    for (u32 i = 0; i < 16; ++i) {
      const NamedBarrier& barrier = block.named[i];
      if (barrier.arrived == 0) continue;
      lines +=
          text("  block %u, named barrier %u: %u of %u threads\n", block.index, i, barrier.arrived, barrier.threads);
    }
    if (block.free_registers > 0) lines += text("  block %u: %u free registers\n", block.index, block.free_registers);
    return lines;
  }

  Scheduler scheduler;
  Loads loads;
  Stores stores;
  TensorCores tensor_cores;
  const u32 grid;
  Block block;
  std::vector<Thread> all_threads;
  std::vector<Warp> all_warps;
  std::vector<Pipe> pipes;

 private:
  void end(Thread& thread) {
    if (thread.stores_needed > thread.stores_awaited) fail("ends without tma_store_wait_read for its stores");
    for (const Accumulator& accumulator : thread.accumulators) {
      if (accumulator.in_flight) fail("ends without wgmma_wait for its products");
    }
    --block.live;
    if (thread.warp->present != 0) return;
    // Whoever waits for all waits for one warp less.
    NamedBarrier& everyone = block.named[0];
    if (everyone.arrived > 0 && everyone.threads == block.live_warps * 32) everyone.threads -= 32;
    --block.live_warps;
    Block::settle(scheduler, everyone);
    if (block.live > 0) return;
    if (!loads.under_way.empty()) fail("block %u ends while a load into it is under way", block.index);
    block.check_end();
  }
};

extern Machine* machine;  // that runs

}  // namespace emulator
