// The bodies of the CUDA kernels of token merging on a CPU: a block and a warp whose threads run one after another, in
// an order drawn anew between any two barriers, and for ctypes what launches them.

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#include "token_moves.h"
#include "token_selection.h"

namespace pairtile {

// bfloat16, rounded to the nearest and, in the middle, to the even one. No NaN.
struct BFloat16 {
  uint16_t bits;
};
inline float to_float(BFloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float found;
  std::memcpy(&found, &bits, sizeof(found));
  return found;
}
template <>
inline BFloat16 rounded<BFloat16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}

namespace {

std::mt19937 shuffle_state;

std::vector<int> any_order(int count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), shuffle_state);
  return order;
}

template <int kThreads_, int kItems_>
class SerialBlock {
 public:
  static constexpr int kThreads = kThreads_, kItems = kItems_;
  using Thread = SelectionThread<kThreads, kItems>;

  SerialBlock() : threads_(kThreads), merged_(kThreads * kItems) {
    merged = reinterpret_cast<bool*>(merged_.data());
    for (int index = 0; index < kThreads; ++index) {
      threads_[index].index = index;
    }
  }

  template <class F>
  void each(F&& f) {
    for (int index : any_order(kThreads)) {
      f(threads_[index]);
    }
  }

  void sort() {
    // The arrangements are spelled out as CUB defines "blocked" and "striped".
    std::vector<std::pair<uint32_t, int>> keys(kThreads * kItems);
    for (int index = 0; index < kThreads; ++index) {
      for (int item = 0; item < kItems; ++item) {
        keys[index * kItems + item] = {threads_[index].keys[item], threads_[index].positions[item]};
      }
    }
    std::stable_sort(keys.begin(), keys.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    for (int index = 0; index < kThreads; ++index) {
      for (int item = 0; item < kItems; ++item) {
        std::tie(threads_[index].keys[item], threads_[index].positions[item]) = keys[item * kThreads + index];
      }
    }
  }

  void exclusive_sum() {
    int sum = 0;
    for (Thread& thread : threads_) {
      sum += std::exchange(thread.count, sum);
    }
  }

  bool* merged;

 private:
  std::vector<Thread> threads_;
  std::vector<char> merged_;
};

template <class State>
struct SerialWarp {
  State states[kLanes];

  template <class F>
  void each(F&& f) {
    for (int lane : any_order(kLanes)) {
      f(lane, states[lane]);
    }
  }
  template <class F>
  uint32_t ballot(F&& f) {
    uint32_t found = 0;
    for (int lane : any_order(kLanes)) {
      found |= uint32_t{f(lane)} << lane;
    }
    return found;
  }
};

template <class Slab, class Problem, class Body>
void each_slab(const Problem& problem, Body body) {
  const int rows = static_cast<int>(problem.rows());
  for (int row : any_order(rows)) {
    for (int channel = 0; channel < std::max(1, problem.width); channel += Slab::kChannels) {
      body(row, channel);
    }
  }
}

template <class Slab, class T>
void run(const CombineProblem<T>& problem) {
  each_slab<Slab>(problem, [&](int row, int channel) {
    SerialWarp<LaneSums<Slab>> warp;
    combine_place<Slab>(warp, problem, row, channel);
  });
}

template <class Slab, class T>
void run(const SpreadProblem<T>& problem) {
  each_slab<Slab>(problem, [&](int row, int channel) {
    SerialWarp<int> warp;
    spread_token<Slab>(warp, problem, row, channel);
  });
}

template <class Problem>
void run_for(const Problem& problem) {
  with_slab(problem, [&](auto slab) { run<decltype(slab)>(problem); });
}

template <class T>
void combine(const void* x, int64_t sample_stride, int64_t token_stride, int tokens, const int64_t* kept,
             const int64_t* sources, const int64_t* places, int batch, int count, int merged, int width,
             const float* factors, const float* sizes, const float* divisors, float* totals, void* out) {
  const Tokens<T> rows{static_cast<const T*>(x), sample_stride, token_stride, tokens};
  run_for(CombineProblem<T>{rows, kept, sources, places, batch, count, merged, width, {factors}, {sizes}, {divisors},
                            totals, static_cast<T*>(out)});
}

template <class T>
void spread(const void* x, int64_t sample_stride, int64_t token_stride, int places, const int64_t* place_of, int batch,
            int count, int width, const float* factors, const float* divisors, void* out) {
  const Tokens<T> rows{static_cast<const T*>(x), sample_stride, token_stride, places};
  run_for(SpreadProblem<T>{rows, place_of, batch, count, width, {factors}, {divisors}, static_cast<T*>(out)});
}

}  // namespace
}  // namespace pairtile

extern "C" {

int most_selection_tokens() { return pairtile::kMostSelectionTokens; }

uint32_t sort_key(float similarity) { return pairtile::sort_key(similarity); }

int select_pairs(const float* best, const int64_t* partner, int batch, int tokens, int r, int protected_count,
                 bool class_token, bool distill_token, int64_t* kept, int64_t* sources, int64_t* places) {
  using namespace pairtile;
  const Bipartite matching{tokens, r, protected_count, class_token, distill_token};
  const SelectionSample first{best, partner, kept, sources, places};
  return with_selection_size(matching.even(), [&](auto size) {
    for (int64_t sample = 0; sample < batch; ++sample) {
      SerialBlock<decltype(size)::kThreads, decltype(size)::kItems> block;
      select_pairs(block, matching, first.of_batch(matching, sample));
    }
  });
}

bool in_packets(const void* x, int64_t sample_stride, int64_t token_stride, const void* out, int width) {
  return pairtile::in_packets<float>({static_cast<const float*>(x), sample_stride, token_stride, 1}, out, width);
}

#define PAIRTILE_MOVES(name, T)                                                                                        \
  void combine_##name(const void* x, int64_t sample_stride, int64_t token_stride, int tokens, const int64_t* kept,     \
                      const int64_t* sources, const int64_t* places, int batch, int count, int merged, int width,      \
                      const float* factors, const float* sizes, const float* divisors, float* totals, void* out) {     \
    pairtile::combine<T>(x, sample_stride, token_stride, tokens, kept, sources, places, batch, count, merged, width,   \
                         factors, sizes, divisors, totals, out);                                                       \
  }                                                                                                                    \
  void spread_##name(const void* x, int64_t sample_stride, int64_t token_stride, int places, const int64_t* place_of,  \
                     int batch, int count, int width, const float* factors, const float* divisors, void* out) {        \
    pairtile::spread<T>(x, sample_stride, token_stride, places, place_of, batch, count, width, factors, divisors,      \
                        out);                                                                                          \
  }
PAIRTILE_MOVES(float32, float)
PAIRTILE_MOVES(bfloat16, pairtile::BFloat16)
}
