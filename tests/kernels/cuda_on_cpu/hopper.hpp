// csrc/hopper.cuh on a CPU: clusters of two blocks, barriers that count bytes, and copies and
// products that happen some time between their start and the wait for them, at random.
//
// So whatever reads or writes shared memory too early or too late ends in a wrong result, and what
// waits for ever aborts. Layouts are those of the PTX manual: the 128-byte swizzle of boxes, the
// descriptors of operands and the fragments of sums.
#pragma once

#include <cstdint>
#include <map>
#include <set>

#include "cuda_on_cpu.hpp"

#define __grid_constant__
#define __cluster_dims__(...)

using std::max;
using std::min;

static Index gridDim;

namespace corda {

struct alignas(64) TensorMap {
  unsigned char encoded[128];
};
struct Bfloat16 {};
struct Float16 {};

}  // namespace corda

namespace hopper {

using cuda_on_cpu::background;
using cuda_on_cpu::current;
using cuda_on_cpu::fail;
using cuda_on_cpu::randomness;
using cuda_on_cpu::threads;

constexpr int kBlock = 384, kWarpgroup = 128;
constexpr unsigned kBegin = 48;  // of shared memory, which is aligned to 16 bytes only
constexpr int kNames = 16;

// What test_syrk_sm90.py writes in place of the driver's encoding.
struct Matrix {
  unsigned char* data;
  int64_t columns, rows, stride_bytes;
  int32_t box_columns, box_rows, item_bytes;
};

struct Barrier {
  int arrivals, missing;
  int64_t bytes;
  unsigned phase;

  void end_if_complete() {
    if (missing < 0) fail("more arrivals than a barrier counts");
    if (missing || bytes) return;
    phase ^= 1;
    missing = arrivals;
  }
};

struct Addition {
  const Matrix* to;
  int column, row, rank;
  unsigned from;
  int thread;
};

// One wgmma of a warpgroup, and where each thread has its sums.
struct Product {
  uint64_t a, b;
  bool keep, bfloat16;
  float* sums[kWarpgroup];
};

struct Warpgroup {
  std::vector<std::vector<Product>> groups;
  std::vector<int> committed;  // threads that have committed each group
  size_t done = 0;             // groups
};

struct Meeting {
  int arrived = 0;
  int turn = 0;
};

struct Load {
  const Matrix* from;
  int column, row, rank;
  unsigned to, barrier;
};

static unsigned char memory[2][kSharedBytes];
static unsigned asked;  // bytes of it
static std::map<unsigned, Barrier> barriers[2];
static std::vector<Load> loads;
static std::vector<Addition> additions;
static std::set<std::pair<int, unsigned>> unseen;  // stores that copies cannot see yet
static std::map<int, std::vector<unsigned>> stored;
static std::map<int, Meeting> meetings;
static std::map<int, Warpgroup> warpgroups;
static std::map<int, size_t> my_groups, my_products;
static std::set<int> adding;  // threads that have not awaited their additions

inline int rank() { return current / kBlock; }

inline bool has_ended(int rank) {
  return cuda_on_cpu::all_done(rank * kBlock, (rank + 1) * kBlock);
}

inline unsigned char* at(int rank, unsigned address, unsigned bytes) {
  if (address < kBegin || address + bytes > kBegin + asked) fail("outside of shared memory");
  return memory[rank] + address;
}

inline Barrier& barrier_at(int rank, unsigned address) {
  const auto found = barriers[rank].find(address);
  if (found == barriers[rank].end()) fail("there is no barrier at this address");
  return found->second;
}

inline unsigned swizzle(unsigned address) { return address ^ (address >> 7 & 7) << 4; }

// Calls act(bytes in shared memory, bytes of the matrix or null) for each element of a box.
template <class Act>
inline void for_each_element(const Matrix& matrix, int column, int row, int rank, unsigned box,
                             Act&& act) {
  if (box % 1024) fail("a box is not aligned to its swizzle");
  if (matrix.box_columns * matrix.item_bytes != 128) fail("a line of a box is not 128 bytes");
  for (int r = 0; r < matrix.box_rows; ++r) {
    for (int c = 0; c < matrix.box_columns; ++c) {
      const bool inside = row + r < matrix.rows && column + c < matrix.columns;
      const unsigned address = swizzle(box + r * 128 + c * matrix.item_bytes);
      act(at(rank, address, matrix.item_bytes),
          inside ? matrix.data + (row + r) * matrix.stride_bytes +
                       int64_t(column + c) * matrix.item_bytes
                 : nullptr);
    }
  }
}

inline void land(const Load& load) {
  const Matrix& from = *load.from;
  if (has_ended(load.rank)) fail("a load into a block that has ended");
  for_each_element(from, load.column, load.row, load.rank, load.to, [&](auto* to, auto* value) {
    if (value) std::memcpy(to, value, from.item_bytes);
    else std::memset(to, 0, from.item_bytes);
  });
  Barrier& barrier = barrier_at(load.rank, load.barrier);
  barrier.bytes -= 128 * from.box_rows;
  barrier.end_if_complete();
}

inline void land(const Addition& addition) {
  const Matrix& to = *addition.to;
  for_each_element(to, addition.column, addition.row, addition.rank, addition.from,
                   [&](auto* from, auto* sum) {
                     float value, total;
                     if (!sum) return;
                     std::memcpy(&value, from, 4);
                     std::memcpy(&total, sum, 4);
                     total += value;
                     std::memcpy(sum, &total, 4);
                   });
}

inline float number(const unsigned char* bytes, bool bfloat16) {
  uint16_t bits;
  std::memcpy(&bits, bytes, 2);
  if (bfloat16) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return float(value);
}

// Element (channel, token) of an operand whose channels are contiguous.
inline float element(uint64_t operand, int channel, int token, int rank, bool bfloat16) {
  if (operand >> 62 != 1) fail("an operand without a swizzle of 128 bytes");
  const auto field = [&](int shift) { return unsigned(operand >> shift & 0x3FFF) << 4; };
  const unsigned linear = field(0) + channel / 64 * field(16) + token / 8 * field(32) +
                          token % 8 * 128 + channel % 64 * 2;
  return number(at(rank, swizzle(linear), 2), bfloat16);
}

inline void land(const Product& product, int rank) {
  static float a[16][64], b[16][256], sums[64][256];
  for (int token = 0; token < 16; ++token) {
    for (int m = 0; m < 64; ++m) a[token][m] = element(product.a, m, token, rank, product.bfloat16);
    for (int n = 0; n < 256; ++n) b[token][n] = element(product.b, n, token, rank, product.bfloat16);
  }
  std::memset(sums, 0, sizeof sums);
  for (int token = 0; token < 16; ++token) {
    for (int m = 0; m < 64; ++m) {
      for (int n = 0; n < 256; ++n) sums[m][n] += a[token][m] * b[token][n];
    }
  }
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    for (int i = 0; i < 128; ++i) {
      const int m = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
      const int n = i / 4 * 8 + thread % 4 * 2 + i % 2;
      float& sum = product.sums[thread][i];
      sum = (product.keep ? sum : 0) + sums[m][n];
    }
  }
}

// Runs one group of products of a warpgroup, if one is committed.
inline bool land_products(int which, Warpgroup& warpgroup) {
  if (warpgroup.done == warpgroup.groups.size() ||
      warpgroup.committed[warpgroup.done] != kWarpgroup) {
    return false;
  }
  for (const Product& product : warpgroup.groups[warpgroup.done]) {
    land(product, which * kWarpgroup / kBlock);
  }
  ++warpgroup.done;
  return true;
}

// Lets some of what is running end.
inline bool some_end() {
  bool any = !loads.empty() || !additions.empty();
  const auto lucky = [] { return randomness() % 4 == 0; };
  std::shuffle(loads.begin(), loads.end(), randomness);
  while (!loads.empty() && lucky()) {
    land(loads.back());
    loads.pop_back();
  }
  for (size_t i = 0; i < additions.size();) {
    if (lucky()) {
      land(additions[i]);
      additions.erase(additions.begin() + i);
    } else {
      ++i;
    }
  }
  for (auto& [which, warpgroup] : warpgroups) {
    const bool running = warpgroup.done < warpgroup.groups.size() &&
                         warpgroup.committed[warpgroup.done] == kWarpgroup;
    any |= running;
    if (running && lucky()) land_products(which, warpgroup);
  }
  return any;
}

inline void meet(int name, int count) {
  Meeting& meeting = meetings[name];
  const int turn = meeting.turn;
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    ++meeting.turn;
  }
  cuda_on_cpu::wait_until([&meeting, turn] { return meeting.turn != turn; });
}

inline const Matrix* matrix_of(const corda::TensorMap* map) {
  return reinterpret_cast<const Matrix*>(map->encoded);
}

// Runs `body` as a grid of clusters, one after the other, in an order that `seed` chooses.
inline void launch(int grid, unsigned shared_bytes, int seed, std::function<void()> body) {
  if (grid % 2) fail("the grid is no multiple of a cluster");
  asked = shared_bytes;
  if (kBegin + asked > kSharedBytes) fail("too much shared memory");
  cuda_on_cpu::kernel = std::move(body);
  blockDim.x = kBlock;
  gridDim.x = grid;
  randomness.seed(seed);
  background = some_end;
  cuda_on_cpu::laziness.resize(2 * kBlock / 32);
  for (int cluster = 0; cluster < grid / 2; ++cluster) {
    cuda_on_cpu::first_block = 2 * cluster;
    std::memset(memory, 0xff, sizeof memory);
    for (int& lazy : cuda_on_cpu::laziness) lazy = randomness() % 4 ? 1 : 1 << randomness() % 7;
    for (auto& of_block : barriers) of_block.clear();
    meetings.clear();
    warpgroups.clear();
    my_groups.clear();
    my_products.clear();
    cuda_on_cpu::run(2 * kBlock, 2);
    if (!loads.empty() || !adding.empty()) fail("a cluster ends while its copies are running");
  }
  background = nullptr;
  cuda_on_cpu::laziness.clear();
}

}  // namespace hopper

namespace corda {

inline unsigned shared_begin() { return hopper::kBegin; }
inline unsigned cluster_rank() { return hopper::rank(); }
inline void cluster_sync() { hopper::meet(-1, 2 * hopper::kBlock); }
inline void warpgroup_sync(int name) {
  if (name < 1 || name >= hopper::kNames) hopper::fail("no barrier has this name");
  hopper::meet(hopper::rank() * hopper::kNames + name, hopper::kWarpgroup);
}
template <int Registers>
void lower_registers() {}
template <int Registers>
void raise_registers() {}

inline void barrier_init(unsigned barrier, int arrivals) {
  hopper::at(hopper::rank(), barrier, 8);
  hopper::barriers[hopper::rank()][barrier] = {arrivals, arrivals, 0, 0};
}
inline void publish_barriers() {}
inline void arrive_at(unsigned barrier, unsigned rank) {
  hopper::Barrier& found = hopper::barrier_at(rank, barrier);
  if (hopper::has_ended(rank)) hopper::fail("an arrival at a barrier of a block that has ended");
  --found.missing;
  found.end_if_complete();
}
inline void arrive(unsigned barrier) { arrive_at(barrier, hopper::rank()); }
inline void arrive_expecting(unsigned barrier, int bytes) {
  hopper::barrier_at(hopper::rank(), barrier).bytes += bytes;
  arrive(barrier);
}
inline void wait(unsigned barrier, unsigned parity) {
  const hopper::Barrier& found = hopper::barrier_at(hopper::rank(), barrier);
  cuda_on_cpu::wait_until([&found, parity] { return found.phase != parity; });
}

inline void load_box(unsigned to, const TensorMap* from, int column, int row, unsigned barrier) {
  hopper::loads.push_back({hopper::matrix_of(from), column, row, hopper::rank(), to, barrier});
}
inline void load_box_for_both(unsigned to, const TensorMap* from, int column, int row,
                              unsigned barrier) {
  for (int rank = 0; rank < 2; ++rank) {
    hopper::loads.push_back({hopper::matrix_of(from), column, row, rank, to, barrier});
  }
}
inline void add_box(const TensorMap* to, int column, int row, unsigned from) {
  const auto unseen = hopper::unseen.lower_bound({hopper::rank(), from});
  if (unseen != hopper::unseen.end() && *unseen < std::pair(hopper::rank(), from + 64 * 128)) {
    hopper::fail("a copy of stores that it cannot see");
  }
  hopper::adding.insert(hopper::current);
  hopper::additions.push_back(
      {hopper::matrix_of(to), column, row, hopper::rank(), from, hopper::current});
}
template <int Running>
void wait_for_reads() {
  int mine = 0;
  for (const auto& addition : hopper::additions) mine += addition.thread == hopper::current;
  for (size_t i = 0; i < hopper::additions.size() && mine > Running;) {
    if (hopper::additions[i].thread == hopper::current) {
      hopper::land(hopper::additions[i]);
      hopper::additions.erase(hopper::additions.begin() + i);
      --mine;
    } else {
      ++i;
    }
  }
}
inline void wait_for_additions() {
  wait_for_reads<0>();
  hopper::adding.erase(hopper::current);
}
inline void show_stores_to_copies() {
  for (unsigned address : hopper::stored[hopper::current]) {
    hopper::unseen.erase({hopper::rank(), address});
  }
  hopper::stored[hopper::current].clear();
}
inline void store_pair(unsigned to, float first, float second) {
  const float both[2] = {first, second};
  std::memcpy(hopper::at(hopper::rank(), to, 8), both, 8);
  hopper::unseen.insert({hopper::rank(), to});
  hopper::stored[hopper::current].push_back(to);
}
inline void load_16_bytes(unsigned from, unsigned (&words)[4]) {
  if (from % 16) hopper::fail("16 bytes that are not aligned");
  std::memcpy(words, hopper::at(hopper::rank(), from, 16), 16);
}

inline void begin_products() {}

inline void multiply_as(bool bfloat16, float (&sums)[128], uint64_t a, uint64_t b, bool keep) {
  auto& warpgroup = hopper::warpgroups[hopper::current / hopper::kWarpgroup];
  const size_t group = hopper::my_groups[hopper::current];
  const size_t index = hopper::my_products[hopper::current]++;
  if (warpgroup.groups.size() == group) {
    warpgroup.groups.emplace_back();
    warpgroup.committed.push_back(0);
  }
  auto& products = warpgroup.groups[group];
  if (products.size() == index) products.push_back({a, b, keep, bfloat16, {}});
  hopper::Product& product = products[index];
  if (product.a != a || product.b != b || product.keep != keep) {
    hopper::fail("the threads of a warpgroup disagree on a product");
  }
  product.sums[hopper::current % hopper::kWarpgroup] = sums;
}
inline void multiply(Bfloat16, float (&sums)[128], uint64_t a, uint64_t b, bool keep) {
  multiply_as(true, sums, a, b, keep);
}
inline void multiply(Float16, float (&sums)[128], uint64_t a, uint64_t b, bool keep) {
  multiply_as(false, sums, a, b, keep);
}
inline void commit_products() {
  auto& warpgroup = hopper::warpgroups[hopper::current / hopper::kWarpgroup];
  ++warpgroup.committed[hopper::my_groups[hopper::current]++];
  hopper::my_products[hopper::current] = 0;
}
template <int Running>
void wait_for_products() {
  auto& warpgroup = hopper::warpgroups[hopper::current / hopper::kWarpgroup];
  const size_t committed = hopper::my_groups[hopper::current];
  cuda_on_cpu::wait_until([&warpgroup, committed] { return warpgroup.done + Running >= committed; });
}

inline float widened(Bfloat16, unsigned bits) {
  const unsigned char bytes[2] = {(unsigned char)bits, (unsigned char)(bits >> 8)};
  return hopper::number(bytes, true);
}
inline float widened(Float16, unsigned bits) {
  const unsigned char bytes[2] = {(unsigned char)bits, (unsigned char)(bits >> 8)};
  return hopper::number(bytes, false);
}
template <class Type>
unsigned larger(Type, unsigned m, unsigned x) {
  unsigned found = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const unsigned size = x >> shift & 0x7FFF, before = m >> shift & 0xFFFF;
    const bool more = widened(Type(), size) > widened(Type(), before);
    found |= (more ? size : before) << shift;
  }
  return found;
}
template <class Type>
unsigned above(Type, unsigned x, unsigned limit) {
  unsigned found = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const float size = widened(Type(), x >> shift & 0x7FFF);
    found |= unsigned(size > widened(Type(), limit >> shift & 0xFFFF)) << shift;
  }
  return found;
}

}  // namespace corda

inline int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline int atomicMax(int* address, int value) {
  const int before = *address;
  *address = max(before, value);
  return before;
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  const unsigned long long before = *address;
  *address += value;
  return before;
}
