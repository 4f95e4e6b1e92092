// The instructions of sm_90a that C++ has no words for, one function each. Everything else in this folder is plain C++,
// so that tests/cuda/emulator.h, which defines the same functions, runs it on a CPU.
//
// Each function names its place in the PTX ISA manual, version 8.0 or later ("Instruction Set", unless said otherwise).
#ifndef SOFTCLIP_PTX  // defined by the emulator, which takes this file's place
#define SOFTCLIP_PTX

#define DEVICE __device__ __forceinline__

namespace ptx {

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

struct alignas(64) TensorMap {  // what cuTensorMapEncodeTiled fills
  u64 opaque[16];
};

// Special registers: %tid.x, %ctaid.x, %nctaid.x, %cluster_ctarank.
DEVICE u32 thread() { return threadIdx.x; }
DEVICE u32 block() { return blockIdx.x; }
DEVICE u32 blocks() { return gridDim.x; }
DEVICE u32 rank_in_cluster() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// The block's dynamic shared memory, as an address of the shared window. cvta.to.shared
DEVICE u32 shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return static_cast<u32>(__cvta_generic_to_shared(memory));
}
// ld.shared, st.shared
DEVICE float load_shared(u32 address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}
DEVICE void store_shared(u32 address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

// Registers of a warpgroup: setmaxnreg. Every warp of the warpgroup executes it.
template <int kRegisters>
DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Threads that wait for each other. bar.sync and bar.arrive (barrier.cta): `threads` in all, a multiple of 32.
DEVICE void barrier_sync(u32 barrier, u32 threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
DEVICE void barrier_arrive(u32 barrier, u32 threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
DEVICE void block_sync() { __syncthreads(); }
// barrier.cluster.arrive, barrier.cluster.wait
DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// mbarrier.init; a phase completes with so many arrivals and all the bytes that it was told to expect.
DEVICE void mbarrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// fence.mbarrier_init (membar/fence): before the barrier that lets others, and the copy engine, use what was initialized
DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// mbarrier.arrive.expect_tx: an arrival, and bytes that this phase waits for
DEVICE void mbarrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// mbarrier.arrive
DEVICE void mbarrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// mapa, mbarrier.arrive.release.cluster: at the same place in a block of the cluster, one's own too
DEVICE void mbarrier_arrive_at(u32 barrier, u32 rank) {
  asm volatile(
      "{\n .reg .b32 remote;\n mapa.shared::cluster.u32 remote, %0, %1;\n"
      " mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// mbarrier.try_wait.parity: until the phase of this parity is complete. A wait is bounded, so that a kernel that is
// wrong ends with an error instead of a hang.
#ifndef POLLS
#define POLLS (1 << 27)
#endif
DEVICE void mbarrier_wait(u32 barrier, u32 parity) {
  u32 done = 0;
  for (int poll = 0; poll < POLLS; ++poll) {
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    if (done) return;
  }
  asm volatile("trap;");
}

// A box of a matrix, whose corner is at (column, row), to shared memory: cp.async.bulk.tensor. Zeros where the matrix
// ends; the whole box counts on the barrier.
DEVICE void tma_load(u32 destination, const TensorMap& map, int column, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          destination),
      "l"(&map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}
// The same to the same place of every block in `mask` of the cluster, on the barrier of each.
DEVICE void tma_load_multicast(u32 destination, const TensorMap& map, int column, int row, u32 barrier, u16 mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(destination),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "h"(mask)
      : "memory");
}
// A box from shared memory to a matrix; what lies beyond its end is dropped. cp.async.bulk.tensor, .bulk_group
DEVICE void tma_store(const TensorMap& map, int column, int row, u32 source) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map), "r"(source),
               "r"(column), "r"(row)
               : "memory");
}
// cp.async.bulk.commit_group
DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// cp.async.bulk.wait_group.read: until all but kGroups of this thread's groups have left shared memory
template <int kGroups>
DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
}
// fence.proxy.async (membar/fence): what this thread wrote to shared memory is seen by the copy engine
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// wgmma.fence, wgmma.commit_group, wgmma.wait_group
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kGroups>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}
// "Asynchronous Warpgroup Level Matrix Instructions", matrix descriptor: of rows of 128 bytes, swizzled as boxes of
// 128 bytes come, in groups of 8 rows that are 1024 bytes apart. `address` is a multiple of 1024, plus 32 for each step
// of 16 along the rows.
DEVICE u64 matrix(u32 address) {
  return static_cast<u64>((address & 0x3FFFF) >> 4) | 1ull << 16 | static_cast<u64>(1024 >> 4) << 32 | 1ull << 62;
}
// wgmma.mma_async m64n128k16: d = a b^T, or d += a b^T; a (64, 16) and b (128, 16) in shared memory. Register i of a
// thread is at row 16 (thread / 32) + thread % 32 / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (thread % 4) + i % 2.
#ifndef HALF  // float16 instead of bfloat16
#define WGMMA_TYPES "bf16.bf16"
#else
#define WGMMA_TYPES "f16.f16"
#endif
DEVICE void wgmma(float (&d)[64], u64 a, u64 b, bool add) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %66, 0;\n"
      " wgmma.mma_async.sync.aligned.m64n128k16.f32." WGMMA_TYPES " {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63 "
      "}, %64, %65, p, 1, 1, 0, 0;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
        "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
        "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
        "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
      : "l"(a), "l"(b), "r"(static_cast<u32>(add)));
}

// stmatrix: four matrices of 8 x 8 numbers of 16 bits, each in one register of every thread; thread 8 m + r gives the
// address of row r of matrix m.
DEVICE void stmatrix(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}
// cvt: two numbers rounded to the embeddings' dtype, the first in the lower half
DEVICE u32 pack(float low, float high) {
  u32 both;
#ifndef HALF
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
  return both;
}
// ex2.approx
DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// shfl.sync.bfly
DEVICE float shuffle_xor(float value, u32 lanes) { return __shfl_xor_sync(0xFFFFFFFFu, value, lanes); }
// vote.sync.all
DEVICE bool all_of_warp(bool value) { return __all_sync(0xFFFFFFFFu, value); }

}  // namespace ptx

#endif
