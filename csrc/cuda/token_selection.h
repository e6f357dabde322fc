// ToMe's choice of the r best pairs of a sample and the order of the tokens that are left (arXiv:2210.09461):
// kernels/token_merging/similarity.py documents what it computes.
#pragma once

#include <cassert>
#include <cstring>

#include "host_device.h"

namespace pairtile {

// r tokens at even positions are merged into tokens at odd ones.
struct Bipartite {
  int tokens, r, protected_count;
  bool class_token, distill_token;

  PAIRTILE_HOST_DEVICE int even() const { return (tokens + 1) / 2; }
  PAIRTILE_HOST_DEVICE int odd() const { return tokens / 2; }
  PAIRTILE_HOST_DEVICE int left() const { return even() - r; }
  // Tokens that stay in front, and whether the unmerged ones at even positions keep their order.
  PAIRTILE_HOST_DEVICE int front() const {
    return distill_token && protected_count < 2 ? 2 : protected_count;
  }
  PAIRTILE_HOST_DEVICE bool ordered() const { return class_token || protected_count > 0; }

  // Places of the k-th unmerged token at an even position and of the j-th token at an odd one: the front takes from
  // both in turns, then come the others of the first, then those of the second.
  PAIRTILE_HOST_DEVICE int place_of_unmerged(int k) const {
    const int front_even = (front() + 1) / 2;
    return k < front_even ? 2 * k : front() + k - front_even;
  }
  PAIRTILE_HOST_DEVICE int place_of_odd(int j) const { return j < front() / 2 ? 2 * j + 1 : left() + j; }
};

// Of one sample. best and partner [even]: the largest similarity of each token at an even position, -inf where there is
// none or where it may not be merged, and which of the odd ones has it. kept [tokens - r], sources [r], places [r].
struct SelectionSample {
  const float* best;
  const int64_t* partner;
  int64_t *kept, *sources, *places;

  // That sample of a batch whose first one this is.
  PAIRTILE_HOST_DEVICE SelectionSample of_batch(const Bipartite& matching, int64_t sample) const {
    const int64_t even = sample * matching.even(), r = sample * matching.r;
    return {best + even, partner + even, kept + sample * (matching.tokens - matching.r), sources + r, places + r};
  }
};

// Behind the key of every number.
constexpr uint32_t kLastKey = 0xffffffffu;

// Ascending numbers for falling similarities, NaN first as torch sorts it.
PAIRTILE_HOST_DEVICE uint32_t sort_key(float similarity) {
  const float value = similarity + 0.0f;  // -0 and 0 are equal
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return value != value ? 0 : bits >> 31 ? bits : ~bits & 0x7fffffffu;
}

// What one thread of a block holds of at most kThreads * kItems keys: items that lie side by side before the sort, and
// items that lie kThreads apart behind it, so that neighbouring threads write to neighbouring places.
template <int kThreads, int kItems>
struct SelectionThread {
  int index;
  int count;
  uint32_t keys[kItems];
  int positions[kItems];

  PAIRTILE_HOST_DEVICE int side_by_side(int item) const { return index * kItems + item; }
  PAIRTILE_HOST_DEVICE int apart(int item) const { return item * kThreads + index; }
};

// One block's work, one sample. Between two barriers threads write to different addresses and read what was written
// before the last. The block provides
//   each(f): f(thread) for every thread, and a barrier;
//   sort(): the keys of all threads with their positions, stable, from side by side to apart;
//   exclusive_sum(): the count of each thread becomes the sum of those before it;
//   merged: a byte for each position at hand.
// Equal keys are in the order of their positions since the sort is stable, which makes the choice deterministic.
template <class Block>
PAIRTILE_DEVICE void select_pairs(Block& block, const Bipartite& matching, const SelectionSample& sample) {
  constexpr int kThreads = Block::kThreads, kItems = Block::kItems;
  using Thread = SelectionThread<kThreads, kItems>;
  const int even = matching.even(), r = matching.r;

  block.each([&](Thread& thread) {
    PAIRTILE_UNROLL
    for (int item = 0; item < kItems; ++item) {
      const int position = thread.side_by_side(item);
      thread.positions[item] = position;
      thread.keys[item] = position < even ? sort_key(sample.best[position]) : kLastKey;
    }
  });
  block.sort();

  block.each([&](Thread& thread) {
    PAIRTILE_UNROLL
    for (int item = 0; item < kItems; ++item) {
      const int rank = thread.apart(item), position = thread.positions[item];
      if (rank < r) {
        const int64_t partner = sample.partner[position];
        assert(partner >= 0 && partner < matching.odd());
        sample.sources[rank] = 2 * position;
        sample.places[rank] = matching.place_of_odd(static_cast<int>(partner));
      } else if (rank < even && !matching.ordered()) {
        sample.kept[matching.place_of_unmerged(rank - r)] = 2 * position;
      }
      block.merged[position] = rank < r;
    }
    for (int j = thread.index; j < matching.odd(); j += kThreads) {
      sample.kept[matching.place_of_odd(j)] = 2 * j + 1;
    }
  });
  if (!matching.ordered()) {
    return;
  }

  block.each([&](Thread& thread) {
    thread.count = 0;
    PAIRTILE_UNROLL
    for (int item = 0; item < kItems; ++item) {
      const int position = thread.side_by_side(item);
      thread.count += position < even && !block.merged[position];
    }
  });
  block.exclusive_sum();
  block.each([&](Thread& thread) {
    PAIRTILE_UNROLL
    for (int item = 0; item < kItems; ++item) {
      const int position = thread.side_by_side(item);
      if (position < even && !block.merged[position]) {
        sample.kept[matching.place_of_unmerged(thread.count++)] = 2 * position;
      }
    }
  });
}

template <int kThreads_, int kItems_>
struct SelectionSize {
  static constexpr int kThreads = kThreads_, kItems = kItems_;
};

// The most tokens of a sample that a block sorts.
constexpr int kMostSelectionTokens = 16384;

// f(SelectionSize) of the smallest block that sorts so many keys: ViTs at 224 pixels, at 384 to 512, at 1024, clips.
// False, and no call: there is none.
template <class F>
bool with_selection_size(int even, F&& f) {
  if (even <= 64 * 3) {
    f(SelectionSize<64, 3>{});
  } else if (even <= 128 * 5) {
    f(SelectionSize<128, 5>{});
  } else if (even <= 256 * 10) {
    f(SelectionSize<256, 10>{});
  } else if (even <= kMostSelectionTokens / 2) {
    f(SelectionSize<512, 16>{});
  } else {
    return false;
  }
  return true;
}

}  // namespace pairtile
