// Cholesky factors of small symmetric matrices, each damped as little as it takes.
//
// Without damping first, then with eps times the mean of the diagonal, then ten times as much and
// so on: the rule of corda_kernels.regularized_inverse, without waiting for the device in between.
#pragma once

#include "block.cuh"

namespace corda {

// Where column k of a packed lower triangle begins, less k: entry (i, k) is at this plus i.
__device__ __forceinline__ int packed_column(int d, int k) { return k * (2 * d - k - 1) / 2; }

// The factor of a packed lower triangle in its own place; false, for all threads, if a pivot is not
// positive and finite. Right-looking: rows to the lanes, columns to the warps.
template <class T>
__device__ bool factor_in_place(T* triangle, int d) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  for (int k = 0; k < d; ++k) {
    T* column = triangle + packed_column(d, k);
    const T pivot = column[k];
    if (!(pivot > 0 && is_finite(pivot))) return false;
    const T root = sqrt(pivot);
    for (int i = k + 1 + threadIdx.x; i < d; i += blockDim.x) column[i] /= root;
    __syncthreads();
    if (threadIdx.x == 0) column[k] = root;  // now that every thread has read the pivot
    for (int j = k + 1 + warp; j < d; j += warps) {
      T* updated = triangle + packed_column(d, j);
      for (int i = j + lane; i < d; i += kWarp) updated[i] -= column[i] * column[j];
    }
    __syncthreads();
  }
  return true;
}

// One block: matrix number blockIdx.x of `matrix` (batch, d, d), row-major, of which the lower
// triangle is read. `factor` (batch, d, d) lower triangular with zeros above; `damping` (batch), as
// a multiple of the mean diagonal, and `attempts` (batch) are what it took. A matrix without a
// factor after `max_attempts` gets NaN for one. The shared memory holds the packed triangle.
template <class T>
__device__ void damped_cholesky(const T* matrix, T* factor, T* damping, long long* attempts, int d,
                                int max_attempts) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  T* triangle = reinterpret_cast<T*>(shared_memory);
  const int lane = threadIdx.x % kWarp, size = d * d;
  matrix += static_cast<long long>(blockIdx.x) * size;
  factor += static_cast<long long>(blockIdx.x) * size;

  T mean = 0;  // every warp for itself
  for (int k = lane; k < d; k += kWarp) mean += matrix[k * d + k];
  mean = warp_sum(mean) / d;

  T share = 0;
  int attempt = 1;
  bool factored = false;
  for (;; ++attempt) {
    for (int e = threadIdx.x; e < size; e += blockDim.x) {
      const int i = e / d, j = e % d;
      if (j <= i) triangle[packed_column(d, j) + i] = matrix[e] + (i == j ? share * mean : T(0));
    }
    __syncthreads();
    factored = factor_in_place(triangle, d);
    if (factored || attempt == max_attempts) break;
    __syncthreads();  // every thread has seen the pivot before it is overwritten
    share = share == 0 ? Limits<T>::eps : share * 10;
  }
  if (threadIdx.x == 0) {
    damping[blockIdx.x] = share;
    attempts[blockIdx.x] = attempt;
  }
  for (int e = threadIdx.x; e < size; e += blockDim.x) {
    const int i = e / d, j = e % d;
    const T entry = j <= i ? triangle[packed_column(d, j) + i] : T(0);
    factor[e] = factored ? entry : not_a_number<T>();
  }
}

}  // namespace corda
