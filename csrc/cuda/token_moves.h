// Tokens to their new places, and back: kernels/token_merging/combine.py documents what they compute.
#pragma once

#include <cassert>
#include <cmath>

#include "host_device.h"
#include "token_numbers.h"

namespace pairtile {

constexpr int kLanes = 32;
// What a lane reads or writes at once, where rows allow it.
constexpr int kPacketBytes = 16;

// Tokens [batch, count, width] as they lie; neighbouring channels are neighbours in memory.
template <class T>
struct Tokens {
  const T* data;
  int64_t sample_stride, token_stride;
  int count;

  PAIRTILE_HOST_DEVICE const T* row(int64_t sample, int64_t token) const {
    assert(token >= 0 && token < count);
    return data + sample * sample_stride + token * token_stride;
  }
};

// Neighbouring channels of a token that one lane moves at once.
template <class T, int kVector>
struct alignas(sizeof(T) * kVector) Packet {
  T entries[kVector];
};

// Numbers for each token or each place of a batch, [batch, count]; null: 1.
struct Numbers {
  const float* data;

  PAIRTILE_HOST_DEVICE float at(int64_t index) const { return data == nullptr ? 1.0f : data[index]; }
};

// The sum of factor * token over the kept token and the sources of each place, in that order, over its divisor. Where
// `totals` is given, the divisor is the sum of the tokens' sizes instead, which goes there.
template <class T>
struct CombineProblem {
  using Element = T;

  Tokens<T> x;
  const int64_t *kept, *sources, *places;  // [batch, count], [batch, merged], [batch, merged]
  int batch, count, merged, width;
  Numbers factors, sizes;  // [batch, x.count]
  Numbers divisors;        // [batch, count]
  float* totals;           // [batch, count], or null
  T* out;                  // [batch, count, width]

  int64_t rows() const { return int64_t{batch} * count; }
};

// factor * the row of the token's place over its divisor.
template <class T>
struct SpreadProblem {
  using Element = T;

  Tokens<T> x;              // of places
  const int64_t* place_of;  // [batch, count]
  int batch, count, width;
  Numbers factors;   // [batch, count]
  Numbers divisors;  // [batch, x.count]
  T* out;            // [batch, count, width]

  int64_t rows() const { return int64_t{batch} * count; }
};

// The channels of a row that one warp owns, and the lanes' shares of them.
template <int kVector_, int kPackets_>
struct Slab {
  static constexpr int kVector = kVector_, kPackets = kPackets_;
  static constexpr int kChannels = kLanes * kVector * kPackets;

  // f(packet, channel) for the lane's packets that are within the row.
  template <class F>
  PAIRTILE_DEVICE static void each(int lane, int first, int width, F&& f) {
    PAIRTILE_UNROLL
    for (int packet = 0; packet < kPackets; ++packet) {
      const int channel = first + (packet * kLanes + lane) * kVector;
      if (channel < width) {
        f(packet, channel);
      }
    }
  }
};

template <class T>
bool in_packets(const Tokens<T>& x, const void* out, int width) {
  constexpr int kVector = kPacketBytes / sizeof(T);
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % kPacketBytes == 0; };
  return aligned(x.data) && aligned(out) && width % kVector == 0 && x.sample_stride % kVector == 0 &&
         x.token_stride % kVector == 0;
}

// f(Slab) of 512 channels in two or four packets of a lane; of 128 where rows allow one number at a time.
template <class Problem, class F>
void with_slab(const Problem& problem, F&& f) {
  constexpr int kVector = kPacketBytes / sizeof(typename Problem::Element);
  if (in_packets(problem.x, problem.out, problem.width)) {
    f(Slab<kVector, 512 / kLanes / kVector>{});
  } else {
    f(Slab<1, 4>{});
  }
}

template <class Slab>
struct LaneSums {
  float sums[Slab::kPackets][Slab::kVector];
};

PAIRTILE_HOST_DEVICE int lowest_bit(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __ffs(static_cast<int>(bits)) - 1;
#else
  return __builtin_ctz(bits);
#endif
}

// f(k) for every k with places[k] = place, in rising order. A look at the places of a few hundred sources, which the
// warps of a sample share in cache, is cheaper than a sorted list of them, and needs no atomics.
template <class Warp, class F>
PAIRTILE_DEVICE void each_arrival(Warp& warp, const int64_t* places, int merged, int place, F&& f) {
  for (int first = 0; first < merged; first += kLanes) {
    uint32_t here = warp.ballot([&](int lane) { return first + lane < merged && places[first + lane] == place; });
    for (; here != 0; here &= here - 1) {
      f(first + lowest_bit(here));
    }
  }
}

// One warp's work: a slab of the channels of one place. The warp provides each(f): f(lane, state) for every lane, and
// ballot(f): a bit for each lane. No lane needs what another one holds.
template <class Slab, class Warp, class T>
PAIRTILE_DEVICE void combine_place(Warp& warp, const CombineProblem<T>& problem, int row, int first_channel) {
  constexpr int kVector = Slab::kVector;
  using Chunk = Packet<T, kVector>;
  const int sample = row / problem.count, place = row % problem.count;
  const int64_t tokens = int64_t{sample} * problem.x.count, sources = int64_t{sample} * problem.merged;
  const int64_t kept = problem.kept[row];

  warp.each([&](int lane, LaneSums<Slab>& state) {
    const T* from = problem.x.row(sample, kept);
    Slab::each(lane, first_channel, problem.width, [&](int packet, int channel) {
      const Chunk chunk = *reinterpret_cast<const Chunk*>(from + channel);
      PAIRTILE_UNROLL
      for (int e = 0; e < kVector; ++e) {
        state.sums[packet][e] = to_float(chunk.entries[e]);
      }
    });
  });

  const float own = problem.factors.at(tokens + kept);
  float scale = own, total = problem.sizes.at(tokens + kept);
  each_arrival(warp, problem.places + sources, problem.merged, place, [&](int k) {
    const int64_t token = problem.sources[sources + k];
    const T* from = problem.x.row(sample, token);
    const float factor = problem.factors.at(tokens + token);
    total += problem.sizes.at(tokens + token);
    warp.each([&](int lane, LaneSums<Slab>& state) {
      Slab::each(lane, first_channel, problem.width, [&](int packet, int channel) {
        const Chunk chunk = *reinterpret_cast<const Chunk*>(from + channel);
        PAIRTILE_UNROLL
        for (int e = 0; e < kVector; ++e) {
          float& sum = state.sums[packet][e];
          sum = fmaf(to_float(chunk.entries[e]), factor, sum * scale);
        }
      });
    });
    scale = 1.0f;  // the kept token's factor is in the sum
  });

  const float divisor = problem.totals != nullptr ? total : problem.divisors.at(row);
  warp.each([&](int lane, LaneSums<Slab>& state) {
    if (problem.totals != nullptr && first_channel == 0 && lane == 0) {
      problem.totals[row] = total;
    }
    Slab::each(lane, first_channel, problem.width, [&](int packet, int channel) {
      Chunk chunk;
      PAIRTILE_UNROLL
      for (int e = 0; e < kVector; ++e) {
        // A share of all of it leaves the token its bits.
        const float sum = state.sums[packet][e];
        chunk.entries[e] = rounded<T>(scale == divisor ? sum : sum * scale / divisor);
      }
      *reinterpret_cast<Chunk*>(problem.out + int64_t{row} * problem.width + channel) = chunk;
    });
  });
}

// One warp's work: a slab of the channels of one token.
template <class Slab, class Warp, class T>
PAIRTILE_DEVICE void spread_token(Warp& warp, const SpreadProblem<T>& problem, int row, int first_channel) {
  constexpr int kVector = Slab::kVector;
  using Chunk = Packet<T, kVector>;
  const int64_t sample = row / problem.count, place = problem.place_of[row];
  const T* from = problem.x.row(sample, place);
  const float factor = problem.factors.at(row), divisor = problem.divisors.at(sample * problem.x.count + place);
  warp.each([&](int lane, auto&) {
    Slab::each(lane, first_channel, problem.width, [&](int, int channel) {
      Chunk chunk = *reinterpret_cast<const Chunk*>(from + channel);
      if (factor != divisor) {
        PAIRTILE_UNROLL
        for (int e = 0; e < kVector; ++e) {
          chunk.entries[e] = rounded<T>(to_float(chunk.entries[e]) * factor / divisor);
        }
      }
      *reinterpret_cast<Chunk*>(problem.out + int64_t{row} * problem.width + channel) = chunk;
    });
  });
}

}  // namespace pairtile
