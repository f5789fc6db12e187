// csrc/ as a library for a CPU. Arguments after those of a kernel: blocks, threads in a block,
// bytes of shared memory, and the order of the threads.
#include "cuda_on_cpu.hpp"

#include "kernels.cu"

#define EXPORT_SVD(name, T)                                                                     \
  extern "C" void launch_##name(const T* a, T* u, T* s, int* info, int l, int max_sweeps,       \
                                int blocks, int threads, size_t shared, int order) {            \
    cuda_on_cpu::launch(blocks, threads, shared, order,                                         \
                        [=] { name(a, u, s, info, l, max_sweeps); });                           \
  }

EXPORT_SVD(jacobi_svd_float32, float)
EXPORT_SVD(jacobi_svd_float64, double)

// Faults that the launcher must notice: see test_csrc_host.py.
extern "C" void launch_fault(int kind) {
  cuda_on_cpu::launch(1, 64, 16, 0, [=] {
    if (kind == 0 && threadIdx.x < 7) __syncthreads();                    // not all threads
    if (kind == 1 && threadIdx.x % 32 < 7) __shfl_xor_sync(~0u, 1.0, 1);  // not all lanes
    if (kind == 2) shared_memory[16] = 0;                                 // out of bounds
  });
}
