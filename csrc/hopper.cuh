// Instructions of compute capability 9.0 (sm_90a) that C++ has no word for, one small function each.
//
// Shared memory is addressed by 32-bit numbers, the same in both blocks of a cluster. The tests run
// the kernels on a CPU with these functions replaced: see tests/kernels/cuda_on_cpu/hopper.hpp.
#pragma once

namespace corda {

// What the host's driver encodes of a matrix: address, shape, stride, box and swizzle.
struct alignas(64) TensorMap {
  unsigned char encoded[128];
};

struct Bfloat16 {};
struct Float16 {};

// --- Clusters, warpgroups and registers ---

// Where the dynamic shared memory begins.
__device__ __forceinline__ unsigned shared_begin() {
  extern __shared__ unsigned char dynamic_shared[];
  return unsigned(__cvta_generic_to_shared(dynamic_shared));
}

// Which of the cluster's blocks this is.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of the cluster meet, and see what the others have written.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}

// The 128 threads that use barrier `name` meet.
__device__ __forceinline__ void warpgroup_sync(int name) {
  asm volatile("bar.sync %0, 128;" ::"r"(name) : "memory");
}

template <int Registers>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <int Registers>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// --- Barriers in shared memory: a phase ends with its last arrival and its last byte ---

__device__ __forceinline__ void barrier_init(unsigned barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Shows the cluster the barriers that this thread has initialised; `cluster_sync` must follow.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the barrier of this address in block `rank` of the cluster. With .release.cluster there
// would be a fence of the whole device in every step; what we release has only been read.
__device__ __forceinline__ void arrive_at(unsigned barrier, unsigned rank) {
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;"
      " mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Arrives, and makes the phase last until so many more bytes have been loaded.
__device__ __forceinline__ void arrive_expecting(unsigned barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity has ended. Before the first phase the one of parity 1 has.
__device__ __forceinline__ void wait(unsigned barrier, unsigned parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// --- Bulk copies of boxes between a matrix and shared memory; outside the matrix there are zeros ---

__device__ __forceinline__ void load_box(unsigned to, const TensorMap* from, int column, int row,
                                         unsigned barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(from), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// The same into both blocks of a cluster, each of whose barriers counts its own bytes.
__device__ __forceinline__ void load_box_for_both(unsigned to, const TensorMap* from, int column,
                                                  int row, unsigned barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(from), "r"(column), "r"(row), "r"(barrier), "h"((unsigned short)3)
      : "memory");
}

// Adds a box of shared memory to the matrix, as a group of its own among this thread's additions.
__device__ __forceinline__ void add_box(const TensorMap* to, int column, int row, unsigned from) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%0, {%1, %2}], [%3];\n"
      "cp.async.bulk.commit_group;" ::"l"(to),
      "r"(column), "r"(row), "r"(from)
      : "memory");
}

// Waits until all but the last `Running` additions of this thread have read shared memory.
template <int Running>
__device__ __forceinline__ void wait_for_reads() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Running) : "memory");
}

// Waits until all additions of this thread are done.
__device__ __forceinline__ void wait_for_additions() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Shows this thread's stores to the copies that are started after a barrier.
__device__ __forceinline__ void show_stores_to_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void store_pair(unsigned to, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(first), "f"(second) : "memory");
}

__device__ __forceinline__ void load_16_bytes(unsigned from, unsigned (&words)[4]) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(from)
               : "memory");
}

// --- Products of a warpgroup: 64 × 256 sums over 16 tokens, asynchronous until they are waited for ---

__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until all but the last `Running` committed groups are done.
template <int Running>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Running) : "memory");
}

#define CORDA_SUMS                                                                                \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "   \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "    \
  "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "    \
  "%56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, "    \
  "%74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, "    \
  "%92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, "      \
  "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, "    \
  "%123, %124, %125, %126, %127}"
#define CORDA_4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define CORDA_16(i) CORDA_4(i), CORDA_4(i + 4), CORDA_4(i + 8), CORDA_4(i + 12)
#define CORDA_64(i) CORDA_16(i), CORDA_16(i + 16), CORDA_16(i + 32), CORDA_16(i + 48)
// Operands 1, 1: no sign changes; 1, 1: the channels of both are contiguous.
#define CORDA_MULTIPLY(Type, type)                                                                \
  __device__ __forceinline__ void multiply(Type, float (&sums)[128], unsigned long long a,        \
                                           unsigned long long b, bool keep) {                     \
    asm volatile(                                                                                 \
        "{ .reg .pred keep; setp.ne.b32 keep, %130, 0;\n"                                         \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " " CORDA_SUMS               \
        ", %128, %129, keep, 1, 1, 1, 1; }"                                                       \
        : CORDA_64(0), CORDA_64(64)                                                               \
        : "l"(a), "l"(b), "r"(int(keep)));                                                        \
  }

// sums = a·b, or sums + a·b with `keep`.
CORDA_MULTIPLY(Bfloat16, "bf16")
CORDA_MULTIPLY(Float16, "f16")

#undef CORDA_MULTIPLY
#undef CORDA_64
#undef CORDA_16
#undef CORDA_4
#undef CORDA_SUMS

// --- Two numbers of 16 bits at once ---

#define CORDA_PAIRS(Type, type)                                                                   \
  /* The larger of m and |x| in each half; NaN never is. */                                       \
  __device__ __forceinline__ unsigned larger(Type, unsigned m, unsigned x) {                      \
    unsigned found;                                                                               \
    asm("{ .reg .b32 size; abs." type "x2 size, %2; max." type "x2 %0, %1, size; }"               \
        : "=r"(found)                                                                             \
        : "r"(m), "r"(x));                                                                        \
    return found;                                                                                 \
  }                                                                                               \
  /* 1 in each half in which |x| is above the limit. */                                           \
  __device__ __forceinline__ unsigned above(Type, unsigned x, unsigned limit) {                   \
    unsigned found;                                                                               \
    asm("{ .reg .b32 size; abs." type "x2 size, %1; set.gt.u32." type "x2 %0, size, %2; }"        \
        : "=r"(found)                                                                             \
        : "r"(x), "r"(limit));                                                                    \
    return found & 0x00010001;                                                                    \
  }

CORDA_PAIRS(Bfloat16, "bf16")
CORDA_PAIRS(Float16, "f16")

#undef CORDA_PAIRS

__device__ __forceinline__ float widened(Bfloat16, unsigned bits) {
  return __uint_as_float(bits << 16);
}

__device__ __forceinline__ float widened(Float16, unsigned bits) {
  float found;
  asm("cvt.f32.f16 %0, %1;" : "=f"(found) : "h"((unsigned short)bits));
  return found;
}

}  // namespace corda
