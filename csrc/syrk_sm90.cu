// The kernels under names that a loader can ask for.
#include "hopper.cuh"
#include "syrk_sm90.cuh"

#define CORDA_SYRK(name, Type, statistics)                                                        \
  extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(corda::kThreads, 1)      \
      name(const __grid_constant__ corda::Launch launch) {                                        \
    corda::syrk<corda::Type, statistics>(launch);                                                 \
  }

CORDA_SYRK(syrk_bfloat16, Bfloat16, false)
CORDA_SYRK(syrk_bfloat16_statistics, Bfloat16, true)
CORDA_SYRK(syrk_float16, Float16, false)
CORDA_SYRK(syrk_float16_statistics, Float16, true)
