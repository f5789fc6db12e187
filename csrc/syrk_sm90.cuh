// C += alpha·XᵀX on the lower triangle, with channel statistics of X, for compute capability 9.0.
//
// A cluster of two blocks computes a tile of 256 × 256, each block 128 of its rows. Both need the
// same 256 channels of X as columns: each loads half of them into the shared memory of both. In a
// block two warpgroups multiply 64 rows each. One thread loads, and two warps take the statistics
// of the block's own 128 channels on the stages that are multiplied anyway. They look at every
// (r + 1)-th stage only, because the r + 1 tiles of row r share that work. A cluster goes on to the
// next tile while the last one is added to C, so that loading never pauses.
//
// "Tokens" are rows of X. Several inputs count as one, each filled up with zeros to a whole step.
#pragma once

namespace corda {

constexpr int kTile = 256, kRows = 128, kStep = 64;  // channels of a tile, of a block; tokens
constexpr int kStages = 4;
constexpr int kInputs = 16;
constexpr int kGroup = 128, kThreads = 3 * kGroup;  // threads of a warpgroup, of a block

constexpr int kBox = 64 * kStep * 2;  // bytes of 64 channels, 16 bits each
constexpr int kStage = (kRows + kTile) / 64 * kBox;
constexpr int kStaged = 64 * 32 * 4;  // bytes of 64 rows and 32 columns of sums
constexpr int kStagings = 2;          // of a warpgroup
constexpr int kShared = 1024 + kStages * kStage + 2 * kStagings * kStaged + 2 * kStages * 8;
static_assert(kShared <= 232448, "a block of Hopper has no more shared memory");

// What the host passes, see kernels/syrk_sm90.py.
struct Launch {
  TensorMap c;           // boxes of 32 columns and 64 rows
  TensorMap x[kInputs];  // boxes of 64 channels and 64 tokens
  int first[kInputs];    // token with which each input begins, or that none reaches
  float* absmax;         // (d,), or null
  unsigned long long* count;
  int channels;
  // The first `whole` units are a tile on a chain of tokens. Each further one is cut into `pieces`
  // of `part` tokens. All of that happens on `tokens` tokens from `origin` on.
  int tiles, whole, pieces, chain, part, tokens, origin, units;
  float alpha;
  unsigned limit;  // of outliers, in x's dtype, twice
};

// One cluster's work between two additions to C: tile (r, j), on the tokens from begin to end.
struct Unit {
  int r, j, begin, end;
};

__device__ __forceinline__ Unit unit_of(const Launch& launch, int number) {
  const bool whole = number < launch.whole;
  const int beyond = whole ? 0 : number - launch.whole;
  const int chain = whole ? number : launch.whole + beyond / launch.pieces;
  const int span = chain / launch.tiles * launch.chain;
  const int begin = span + beyond % launch.pieces * launch.part;
  int end = begin + (whole ? launch.chain : launch.part);
  end = min(end, min(span + launch.chain, launch.tokens));
  const int tile = chain % launch.tiles;
  int r = int((sqrtf(8.0f * float(tile) + 1.0f) - 1.0f) * 0.5f);
  r -= r * (r + 1) / 2 > tile;  // the root may be off by one either way
  r += (r + 1) * (r + 2) / 2 <= tile;
  return {r, tile - r * (r + 1) / 2, begin + launch.origin, end + launch.origin};
}

// The units of this cluster, in turn.
template <class Do>
__device__ __forceinline__ void for_each_unit(const Launch& launch, Do&& act) {
  for (int number = blockIdx.x / 2; number < launch.units; number += gridDim.x / 2) {
    act(unit_of(launch, number));
  }
}

// Byte at which a 128-byte swizzle puts the 16 bytes `chunk` of line `line`.
__device__ __forceinline__ unsigned swizzled(int line, int chunk) {
  return line * 128 + ((chunk ^ (line & 7)) << 4);
}

// The descriptor of an operand whose channels are contiguous, as boxes are loaded: a token takes 128
// bytes, 8 tokens 1024, the next 64 channels are a box further. The last bit: a 128-byte swizzle.
__device__ __forceinline__ unsigned long long operand(unsigned address) {
  using Word = unsigned long long;
  return Word(address >> 4) | Word(kBox >> 4) << 16 | Word(1024 >> 4) << 32 | Word(1) << 62;
}

// The parts of shared memory: stages, staged sums, and for each stage a barrier that ends a phase
// when it is full, and one that does when all who read it have.
struct Memory {
  unsigned stages, staged, full, empty;

  __device__ __forceinline__ Memory() {
    stages = (shared_begin() + 1023) & ~1023u;
    staged = stages + kStages * kStage;
    full = staged + 2 * kStagings * kStaged;
    empty = full + 8 * kStages;
  }
  __device__ __forceinline__ unsigned rows(int stage) const { return stages + stage * kStage; }
  __device__ __forceinline__ unsigned columns(int stage) const {
    return rows(stage) + kRows / 64 * kBox;
  }
};

// The stages in turn, with the parity of the phase that is waited for.
struct Ring {
  int stage = 0;
  unsigned parity;

  __device__ __forceinline__ explicit Ring(unsigned parity) : parity(parity) {}
  __device__ __forceinline__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

__device__ __forceinline__ void load(const Launch& launch, const Memory& memory, int rank) {
  Ring ring(1);
  for_each_unit(launch, [&](const Unit& unit) {
    const int rows = unit.r * kTile + rank * kRows, columns = unit.j * kTile + rank * 128;
    int input = 0;
    for (int token = unit.begin; token < unit.end; token += kStep) {
      while (input + 1 < kInputs && launch.first[input + 1] <= token) ++input;
      const TensorMap* x = &launch.x[input];
      const int line = token - launch.first[input];
      const unsigned full = memory.full + 8 * ring.stage;
      const unsigned a = memory.rows(ring.stage), b = memory.columns(ring.stage) + rank * 2 * kBox;
      wait(memory.empty + 8 * ring.stage, ring.parity);
      arrive_expecting(full, kStage);
      for (int box = 0; box < 2; ++box) {
        load_box(a + box * kBox, x, rows + box * 64, line, full);
        load_box_for_both(b + box * kBox, x, columns + box * 64, line, full);
      }
      ring.advance();
    }
  });
}

// Largest |x| and number of outliers of 8 channels, on every fourth token: a lane's share.
template <class Type>
struct Seen {
  unsigned largest[4] = {}, outliers[4] = {};  // 16 bits a channel

  __device__ __forceinline__ void look(const unsigned (&words)[4], unsigned limit) {
    for (int i = 0; i < 4; ++i) {
      largest[i] = larger(Type(), largest[i], words[i]);
      outliers[i] += above(Type(), words[i], limit);
    }
  }
  // Joins the four lanes that have seen the same channels.
  __device__ __forceinline__ void join() {
    for (int i = 0; i < 4; ++i) {
      for (int other = 8; other < 32; other *= 2) {
        largest[i] = larger(Type(), largest[i], __shfl_xor_sync(~0u, largest[i], other));
        outliers[i] += __shfl_xor_sync(~0u, outliers[i], other);
      }
    }
  }
  __device__ __forceinline__ void fold(const Launch& launch, int channel) const {
    for (int i = 0; i < 8 && channel + i < launch.channels; ++i) {
      const int shift = i % 2 * 16;
      const float top = widened(Type(), largest[i / 2] >> shift & 0xFFFF);
      const unsigned many = outliers[i / 2] >> shift & 0xFFFF;
      // Numbers of at least 0 are in the order of their bits.
      if (launch.absmax) atomicMax((int*)launch.absmax + channel + i, __float_as_int(top));
      if (launch.count && many) atomicAdd(launch.count + channel + i, (unsigned long long)many);
    }
  }
};

// By one warp: the statistics of 64 channels, the first or the second half of the block's.
template <class Type>
__device__ __forceinline__ void take_statistics(const Launch& launch, const Memory& memory,
                                                int rank, int half) {
  const int lane = threadIdx.x % 32, chunk = lane % 8, quarter = lane / 8;
  Ring ring(0);
  for_each_unit(launch, [&](const Unit& unit) {
    const int sharers = unit.r + 1;
    int until = (unit.j + sharers - unit.begin / kStep % sharers) % sharers;  // it is our turn
    Seen<Type> seen;
    for (int token = unit.begin; token < unit.end; token += kStep) {
      wait(memory.full + 8 * ring.stage, ring.parity);
      if (until == 0) {
#pragma unroll 8
        for (int line = quarter; line < kStep; line += 4) {
          unsigned words[4];
          load_16_bytes(memory.rows(ring.stage) + half * kBox + swizzled(line, chunk), words);
          seen.look(words, launch.limit);
        }
        until = sharers;
      }
      --until;
      __syncwarp();
      if (lane == 0) arrive(memory.empty + 8 * ring.stage);
      ring.advance();
    }
    seen.join();
    if (quarter == 0) {
      seen.fold(launch, unit.r * kTile + rank * kRows + half * 64 + chunk * 8);
    }
  });
}

// By a warpgroup: adds its 64 × 256 sums to C from row `row` and column `column` on. Boxes go by
// way of staged copies in turn, so that one is written while another is added.
__device__ __forceinline__ void add_to_c(const Launch& launch, const float (&sums)[128],
                                         unsigned staged, int row, int column, int group) {
  const int thread = threadIdx.x % kGroup, lane = thread % 32;
  const int line = thread / 32 * 16 + lane / 4;  // the thread has this one and the 8th below
#pragma unroll
  for (int box = 0; box < kTile / 32; ++box) {
    if (column + box * 32 > row + 63) continue;  // above the diagonal
    const unsigned to = staged + box % kStagings * kStaged;
    if (thread == 0) wait_for_reads<kStagings - 1>();
    warpgroup_sync(group);
#pragma unroll
    for (int eight = 0; eight < 4; ++eight) {  // columns of the box, two of them the thread's
      const float* mine = sums + (box * 4 + eight) * 4;
      const unsigned at = to + swizzled(line, eight * 2 + lane % 4 / 2) + lane % 2 * 8;
      store_pair(at, mine[0] * launch.alpha, mine[1] * launch.alpha);
      store_pair(at + 8 * 128, mine[2] * launch.alpha, mine[3] * launch.alpha);
    }
    show_stores_to_copies();
    warpgroup_sync(group);
    if (thread == 0) add_box(&launch.c, column + box * 32, row, to);
  }
}

// By warpgroup 1 or 2 of the block.
template <class Type>
__device__ __forceinline__ void compute(const Launch& launch, const Memory& memory, int rank,
                                        int group) {
  const int thread = threadIdx.x % kGroup, half = group - 1;
  const unsigned staged = memory.staged + half * kStagings * kStaged;
  float sums[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) sums[i] = 0.0f;
  Ring ring(0);
  // Of both blocks: the columns in this stage come from both.
  const auto release = [&](int stage) {
    if (thread < 2) arrive_at(memory.empty + 8 * stage, thread);
  };
  for_each_unit(launch, [&](const Unit& unit) {
    if (unit.begin >= unit.end) return;
    const int row = unit.r * kTile + rank * kRows + half * 64;
    const bool inside = row < launch.channels;  // the last row of tiles reaches beyond C
    int last = -1;  // the stage whose products are still running
    for (int token = unit.begin; token < unit.end; token += kStep) {
      wait(memory.full + 8 * ring.stage, ring.parity);
      const auto a = operand(memory.rows(ring.stage) + half * kBox);
      const auto b = operand(memory.columns(ring.stage));
      if (inside) {
        begin_products();
#pragma unroll
        for (int part = 0; part < kStep / 16; ++part) {
          const int further = part * 16 * 128 >> 4;  // 16 tokens, in the operands' units
          multiply(Type(), sums, a + further, b + further, part || last >= 0);
        }
        commit_products();
      } else {
        // As products would: a warp that is two phases late would wait for the wrong one.
        warpgroup_sync(group);
      }
      wait_for_products<1>();
      if (last >= 0) release(last);
      last = ring.stage;
      ring.advance();
    }
    wait_for_products<0>();
    release(last);
    if (inside) add_to_c(launch, sums, staged, row, unit.j * kTile, group);
  });
  if (thread == 0) wait_for_additions();
}

template <class Type, bool Statistics>
__device__ __forceinline__ void syrk(const Launch& launch) {
  const Memory memory;
  const int rank = int(cluster_rank()), group = int(threadIdx.x) / kGroup;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(memory.full + 8 * stage, 1);
      // Two warpgroups of each block, and the warps that look at this block's rows.
      barrier_init(memory.empty + 8 * stage, Statistics ? 6 : 4);
    }
    publish_barriers();
  }
  cluster_sync();
  if (group == 0) {
    lower_registers<72>();
    const int warp = threadIdx.x / 32;
    if (threadIdx.x == 0) load(launch, memory, rank);
    if (Statistics && warp >= 2) take_statistics<Type>(launch, memory, rank, warp - 2);
  } else {
    raise_registers<216>();
    compute<Type>(launch, memory, rank, group);
  }
  // Neither block leaves while the other may still write into its memory.
  __syncwarp();
  cluster_sync();
}

}  // namespace corda
