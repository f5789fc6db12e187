// csrc/syrk_sm90.cuh as a library for a CPU.
#include "hopper.hpp"

#include "syrk_sm90.cuh"

extern "C" int launch_bytes() { return sizeof(corda::Launch); }

extern "C" void launch_syrk(const corda::Launch* launch, int bfloat16, int statistics, int grid,
                            unsigned shared_bytes, int seed) {
  static_assert(hopper::kBlock == corda::kThreads, "the emulation has blocks of that size");
  hopper::launch(grid, shared_bytes, seed, [=] {
    if (bfloat16 && statistics) corda::syrk<corda::Bfloat16, true>(*launch);
    if (bfloat16 && !statistics) corda::syrk<corda::Bfloat16, false>(*launch);
    if (!bfloat16 && statistics) corda::syrk<corda::Float16, true>(*launch);
    if (!bfloat16 && !statistics) corda::syrk<corda::Float16, false>(*launch);
  });
}
