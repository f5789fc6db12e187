// The kernels under names that a loader can ask for, over raw pointers: no ABI but CUDA's own.
#include "jacobi_svd.cuh"

// One block to a multiprocessor: its shared memory is full of one matrix. With 1024 threads the
// rotations in float64 would have 64 registers, too few for the two columns that they hold.
#define CORDA_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 1)

CORDA_KERNEL(1024) jacobi_svd_float32(const float* a, float* u, float* s, int* info, int l,
                                int max_sweeps) {
  corda::jacobi_svd(a, u, s, info, l, max_sweeps);
}

CORDA_KERNEL(768) jacobi_svd_float64(const double* a, double* u, double* s, int* info, int l,
                                int max_sweeps) {
  corda::jacobi_svd(a, u, s, info, l, max_sweeps);
}
