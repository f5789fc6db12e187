// Left singular vectors and singular values of small square matrices, by one-sided Jacobi.
//
// Aᵀ·P = Q·R with pivoting, then plane rotations of the columns of L = Rᵀ, so that A·Q = P·L and
// L·J = U·Σ, until every two columns are orthogonal relative to their own lengths. Neither Q nor
// J is formed. The pivoting sorts the columns of L by length, which saves two thirds of the sweeps
// (64 × 64, singular values down to 1e-12: 7 against 24). Where A = D·B with D diagonal and B well
// conditioned, the tiny singular values are right relative to themselves.
//
// Source: Drmač and Veselić, "New fast and accurate Jacobi SVD algorithm I", 2008.
#pragma once

#include "block.cuh"

namespace corda {

constexpr int kNotFinite = -1;
constexpr int kNotConverged = -2;

// Entries of a column that one lane holds: rows lane, lane + 32, ... Enough for the largest matrix
// that fits into shared memory.
template <class T>
struct RowsOfLane;
template <>
struct RowsOfLane<float> {
  static constexpr int value = 8;
};
template <>
struct RowsOfLane<double> {
  static constexpr int value = 6;
};

// The matrix of one block, and what goes with it.
template <class T>
struct SvdMemory {
  T* columns;  // (l, l), column j from j·l
  T* values;   // (l)
  T* scratch;  // (warps)
  int* rows;   // (l), where P takes row i of L
  int* order;  // (l), the columns by descending length

  __device__ SvdMemory(unsigned char* memory, int l)
      : columns(reinterpret_cast<T*>(memory)),
        values(columns + l * l),
        scratch(values + l),
        rows(reinterpret_cast<int*>(scratch + kWarp)),
        order(rows + l) {}
};

// The index of the largest of values[first … last - 1]. Every warp finds it for itself.
template <class T>
__device__ int argmax(const T* values, int first, int last) {
  T largest = -infinity<T>();
  int index = last;
  for (int i = first + threadIdx.x % kWarp; i < last; i += kWarp) {
    if (values[i] > largest) {
      largest = values[i];
      index = i;
    }
  }
  return -warp_max(largest == warp_max(largest) ? -index : -last);
}

// Σ x[i]·y[i] over first ≤ i < last. Every warp for itself.
template <class T>
__device__ T dot(const T* x, const T* y, int first, int last) {
  T sum = 0;
  for (int i = first + threadIdx.x % kWarp; i < last; i += kWarp) sum += x[i] * y[i];
  return warp_sum(sum);
}

// Overwrites the columns, which hold Aᵀ, with L. Householder reflections.
template <class T>
__device__ void triangularize(const SvdMemory<T>& memory, int l) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  for (int j = warp; j < l; j += warps) {
    const T* column = memory.columns + j * l;
    const T square = dot(column, column, 0, l);
    if (lane == 0) {
      memory.values[j] = square;
      memory.rows[j] = j;
    }
  }
  __syncthreads();
  for (int k = 0; k < l; ++k) {
    const int pivot = argmax(memory.values, k, l);
    T* column = memory.columns + k * l;
    __syncthreads();
    if (pivot != k) {
      T* other = memory.columns + pivot * l;
      for (int row = threadIdx.x; row < l; row += blockDim.x) exchange(column[row], other[row]);
      if (threadIdx.x == 0) {
        exchange(memory.rows[k], memory.rows[pivot]);
        memory.values[pivot] = memory.values[k];
      }
      __syncthreads();
    }
    const T square = dot(column, column, k, l);
    if (square <= Limits<T>::negligible) break;  // and nothing longer is left
    const T norm = sqrt(square), head = column[k];
    const T diagonal = head > 0 ? -norm : norm;
    const T scale = 1 / (norm * (norm + fabs(head)));
    for (int j = k + 1 + warp; j < l; j += warps) {
      T* reflected = memory.columns + j * l;
      T along = 0;
      for (int row = k + lane; row < l; row += kWarp) {
        along += (row == k ? head - diagonal : column[row]) * reflected[row];
      }
      along = scale * warp_sum(along);
      T left = 0;
      for (int row = k + lane; row < l; row += kWarp) {
        reflected[row] -= along * (row == k ? head - diagonal : column[row]);
        if (row > k) left += reflected[row] * reflected[row];
      }
      left = warp_sum(left);
      if (lane == 0) memory.values[j] = left;
    }
    __syncthreads();
    for (int row = k + threadIdx.x; row < l; row += blockDim.x) {
      column[row] = row == k ? diagonal : T(0);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < l * l; i += blockDim.x) {
    const int row = i % l, j = i / l;
    if (row > j) exchange(memory.columns[i], memory.columns[row * l + j]);
  }
  __syncthreads();
}

// Makes columns p and q orthogonal. Returns the |cosine| between them as they were. Called by all
// lanes of a warp.
template <class T>
__device__ T rotate(T* p, T* q, int l, T tolerance) {
  const int lane = threadIdx.x % kWarp;
  T x[RowsOfLane<T>::value], y[RowsOfLane<T>::value];
  T xx = 0, yy = 0, xy = 0;
#pragma unroll
  for (int k = 0; k < RowsOfLane<T>::value; ++k) {
    const int row = lane + k * kWarp;
    x[k] = row < l ? p[row] : T(0);
    y[k] = row < l ? q[row] : T(0);
    xx += x[k] * x[k];
    yy += y[k] * y[k];
    xy += x[k] * y[k];
  }
  xx = warp_sum(xx);
  yy = warp_sum(yy);
  xy = warp_sum(xy);

  if (fmin(xx, yy) <= Limits<T>::negligible) return 0;
  const T cosine = fabs(xy) / (sqrt(xx) * sqrt(yy));
  if (cosine <= tolerance) return cosine;
  // tan of the smaller angle, in a form whose squares do not overflow: hypot scales them.
  const T difference = yy - xx;
  const T tangent = 2 * xy / (difference + copysign(hypot(difference, 2 * xy), difference));
  const T c = 1 / sqrt(1 + tangent * tangent), s = c * tangent;
#pragma unroll
  for (int k = 0; k < RowsOfLane<T>::value; ++k) {
    const int row = lane + k * kWarp;
    if (row < l) {
      p[row] = c * x[k] - s * y[k];
      q[row] = s * x[k] + c * y[k];
    }
  }
  return cosine;
}

// Rotates every pair of columns once, and returns the largest |cosine| met. In each round of the
// tournament (the circle method: player n - 1 stays, the others move on) no column has two
// opponents, and each warp takes some of the pairs.
template <class T>
__device__ T sweep(const SvdMemory<T>& memory, int l, T tolerance) {
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int half = (l + 1) / 2, n = 2 * half;  // an odd l has one player too many
  T worst = 0;
  for (int round = 0; round < n - 1; ++round) {
    for (int k = warp; k < half; k += warps) {
      const int one = k == 0 ? n - 1 : (round + k) % (n - 1);
      const int other = (round + n - 1 - k) % (n - 1);
      const int p = one < other ? one : other, q = one < other ? other : one;
      if (q < l) {
        worst = fmax(worst, rotate(memory.columns + p * l, memory.columns + q * l, l, tolerance));
      }
    }
    __syncthreads();
  }
  return block_max(worst, memory.scratch);
}

// Divides the columns by their lengths, which become `values`; those without direction become 0.
// Then ranks them, and returns how many have a direction.
template <class T>
__device__ int normalize_and_rank(const SvdMemory<T>& memory, int l) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  for (int j = warp; j < l; j += warps) {
    T* column = memory.columns + j * l;
    const T square = dot(column, column, 0, l);
    const T length = square > Limits<T>::negligible ? sqrt(square) : T(0);
    for (int row = lane; row < l; row += kWarp) {
      column[row] = length > 0 ? column[row] / length : T(0);
    }
    if (lane == 0) memory.values[j] = length;
  }
  __syncthreads();
  int directed = 0;
  for (int j = 0; j < l; ++j) directed += memory.values[j] > 0;
  for (int j = threadIdx.x; j < l; j += blockDim.x) {
    int rank = 0;
    for (int k = 0; k < l; ++k) {
      const T length = memory.values[k];
      rank += length > memory.values[j] || (length == memory.values[j] && k < j);
    }
    memory.order[rank] = j;
  }
  __syncthreads();
  return directed;
}

// Fills the columns without direction so that all are orthonormal: each with the unit vector that
// lies furthest outside the columns so far, less its part inside. `values` is overwritten.
template <class T>
__device__ void complete(const SvdMemory<T>& memory, int l, int directed) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  for (int rank = directed; rank < l; ++rank) {
    T* added = memory.columns + memory.order[rank] * l;
    for (int row = threadIdx.x; row < l; row += blockDim.x) {
      T outside = 1;
      for (int k = 0; k < rank; ++k) {
        const T entry = memory.columns[memory.order[k] * l + row];
        outside -= entry * entry;
      }
      memory.values[row] = outside;
    }
    __syncthreads();
    const int unit = argmax(memory.values, 0, l);
    for (int row = threadIdx.x; row < l; row += blockDim.x) {
      T entry = row == unit;
      for (int k = 0; k < rank; ++k) {
        const T* column = memory.columns + memory.order[k] * l;
        entry -= column[unit] * column[row];
      }
      added[row] = entry;
    }
    __syncthreads();
    // At least 1/l of the unit vector's square was outside, so that one correction is enough.
    for (int k = warp; k < rank; k += warps) {
      const T inside = dot(memory.columns + memory.order[k] * l, added, 0, l);
      if (lane == 0) memory.values[k] = inside;
    }
    __syncthreads();
    for (int row = threadIdx.x; row < l; row += blockDim.x) {
      T entry = added[row];
      for (int k = 0; k < rank; ++k) {
        entry -= memory.values[k] * memory.columns[memory.order[k] * l + row];
      }
      added[row] = entry;
    }
    __syncthreads();
    const T length = sqrt(dot(added, added, 0, l));
    __syncthreads();
    for (int row = threadIdx.x; row < l; row += blockDim.x) added[row] /= length;
    __syncthreads();
  }
}

// One block: matrix number blockIdx.x of `a` (batch, l, l), row-major like `u` (batch, l, l), whose
// columns are the left singular vectors; `s` (batch, l) descending. `info` (batch): the sweeps it
// took, or kNotFinite or kNotConverged, with NaN in u and s. The shared memory is that of SvdMemory.
template <class T>
__device__ void jacobi_svd(const T* a, T* u, T* s, int* info, int l, int max_sweeps) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const SvdMemory<T> memory(shared_memory, l);
  const int size = l * l;
  a += static_cast<long long>(blockIdx.x) * size;
  u += static_cast<long long>(blockIdx.x) * size;
  s += static_cast<long long>(blockIdx.x) * l;

  T largest = 0;
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    largest = fmax(largest, is_finite(a[i]) ? fabs(a[i]) : infinity<T>());
  }
  largest = block_max(largest, memory.scratch);

  int result = kNotFinite, shift = 0;
  if (largest <= Limits<T>::largest) {
    // Exact, being a power of two.
    if (largest > 0) {
      frexp(largest, &shift);
      shift = Limits<T>::scaled - shift;
    }
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
      memory.columns[i] = ldexp(a[i], shift);
    }
    __syncthreads();
    triangularize(memory, l);
    // The rounding of a cosine grows with the square root of its terms.
    const T tolerance = Limits<T>::eps * fmax(T(8), sqrt(T(l)));
    result = kNotConverged;
    for (int count = 1; count <= max_sweeps && result < 0; ++count) {
      if (sweep(memory, l, tolerance) <= tolerance) result = count;
    }
  }
  if (threadIdx.x == 0) info[blockIdx.x] = result;
  if (result < 0) {
    for (int i = threadIdx.x; i < size; i += blockDim.x) u[i] = not_a_number<T>();
    for (int j = threadIdx.x; j < l; j += blockDim.x) s[j] = not_a_number<T>();
    return;
  }
  const int directed = normalize_and_rank(memory, l);
  for (int j = threadIdx.x; j < l; j += blockDim.x) {
    s[j] = ldexp(memory.values[memory.order[j]], -shift);
  }
  __syncthreads();
  complete(memory, l, directed);
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    u[memory.rows[i / l] * l + i % l] = memory.columns[memory.order[i % l] * l + i / l];
  }
}

}  // namespace corda
