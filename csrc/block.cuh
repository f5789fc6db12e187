// What the kernels share: reductions over a warp and a block, and the limits of the number types.
// One matrix lies in the dynamic shared memory of one block, whose size is a multiple of a warp.
// Plain C++17 without headers, so that nvcc, NVRTC and (in the tests) a host compiler take it.
#pragma once

namespace corda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// `scaled`: the exponent that a matrix's largest entry is brought to before entries are squared, so
// that the squared Frobenius norm of up to 256 × 256 of them is finite.
// `negligible`: the squared length up to which a column then counts as zero, 2^-97 of the largest
// entry in float32. For anything longer, the tangents of rotations are normal numbers.
template <class T>
struct Limits;

template <>
struct Limits<float> {
  static constexpr float eps = 0x1p-23f;
  static constexpr float negligible = 0x1p-86f;
  static constexpr float largest = 0x1.fffffep127f;
  static constexpr int scaled = 54;
};

template <>
struct Limits<double> {
  static constexpr double eps = 0x1p-52;
  static constexpr double negligible = 0x1p-926;
  static constexpr double largest = 0x1.fffffffffffffp1023;
  static constexpr int scaled = 502;
};

template <class T>
__device__ __forceinline__ T infinity() {
  return Limits<T>::largest * T(2);
}

template <class T>
__device__ __forceinline__ T not_a_number() {
  return infinity<T>() - infinity<T>();
}

template <class T>
__device__ __forceinline__ bool is_finite(T value) {
  return fabs(value) <= Limits<T>::largest;  // false for NaN
}

template <class T>
__device__ __forceinline__ void exchange(T& a, T& b) {
  const T kept = a;
  a = b;
  b = kept;
}

// The sum over a warp's lanes, the same bits in every lane.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int distance = kWarp / 2; distance; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

template <class T>
__device__ __forceinline__ T warp_max(T value) {
  for (int distance = kWarp / 2; distance; distance /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

// The maximum over a block's threads; `scratch` has an entry for each warp.
template <class T>
__device__ __forceinline__ T block_max(T value, T* scratch) {
  value = warp_max(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (int warp = 0; warp < int(blockDim.x) / kWarp; ++warp) value = fmax(value, scratch[warp]);
  __syncthreads();
  return value;
}

}  // namespace corda
