#include "token_matching.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "token_tiles.h"

namespace pairtile {
namespace {

// Ascending numbers for falling similarities, NaN first as torch sorts it, and for rising positions among equals.
uint64_t sort_key(float similarity, int64_t position) {
  const float value = similarity + 0.0f;  // -0 and 0 are equal
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t falling = value != value ? 0 : bits >> 31 ? bits : ~bits & 0x7fffffffu;
  return static_cast<uint64_t>(falling) << 32 | static_cast<uint32_t>(position);
}

// One sample: best and partner of each even token give the order of the tokens that are left.
void order_sample(const Bipartite& matching, int64_t tokens, const float* best, const int64_t* partner,
                  std::vector<uint64_t>& keys, int64_t* kept, int64_t* sources, int64_t* places) {
  const int64_t even = (tokens + 1) / 2, odd = tokens / 2, r = matching.r, left = even - r;
  keys.resize(even);
  for (int64_t i = 0; i < even; ++i) {
    keys[i] = sort_key(best[i], i);
  }
  std::nth_element(keys.begin(), keys.begin() + r, keys.end());
  std::sort(keys.begin(), keys.begin() + r);
  auto position = [](uint64_t key) { return static_cast<int64_t>(key & 0xffffffffu); };
  if (matching.ordered()) {
    std::sort(keys.begin() + r, keys.end(), [&](uint64_t a, uint64_t b) { return position(a) < position(b); });
  } else {
    std::sort(keys.begin() + r, keys.end());
  }
  const int64_t front = matching.front(), front_even = (front + 1) / 2, front_odd = front / 2;
  for (int64_t k = 0; k < front; ++k) {
    kept[k] = k % 2 == 0 ? 2 * position(keys[r + k / 2]) : k;
  }
  int64_t* next = kept + front;
  for (int64_t k = front_even; k < left; ++k) {
    *next++ = 2 * position(keys[r + k]);
  }
  for (int64_t j = front_odd; j < odd; ++j) {
    *next++ = 2 * j + 1;
  }
  for (int64_t k = 0; k < r; ++k) {
    const int64_t i = position(keys[k]), j = partner[i];
    sources[k] = 2 * i;
    places[k] = j < front_odd ? 2 * j + 1 : left + j;
  }
}

// Every other token, from `first` on.
TokenBatch every_other(const TokenBatch& metric, int64_t first) {
  TokenBatch half = metric;
  half.tokens = metric.tokens.slice(1, std::min(first, metric.count));
  half.count = (metric.count - first + 1) / 2;
  half.stride = 2 * metric.stride;
  return half;
}

}  // namespace

void match_bipartite(const TokenBatch& metric, const Bipartite& matching, int64_t* kept, int64_t* sources,
                     int64_t* places) {
  const int64_t tokens = metric.count, left = tokens - matching.r;
  const TokenBatch even = every_other(metric, 0), odd = every_other(metric, 1);
  std::vector<float> best(metric.batch * even.count);
  std::vector<int64_t> partner(metric.batch * even.count);
  Buffer<bool> counts(tokens);  // of the even tokens, then of the odd ones
  for (int64_t i = 0; i < tokens; ++i) {
    counts.data()[i % 2 * even.count + i / 2] = !matching.barred(i);
  }
  find_partners(even, odd, true, {counts.data()}, {counts.data() + even.count}, Partners::kAll, best.data(),
                partner.data());
  constexpr int64_t kGrain = 4096;  // tokens whose order is worth a thread
  at::parallel_for(0, metric.batch, std::max<int64_t>(1, kGrain / tokens), [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> keys;
    for (int64_t b = begin; b < end; ++b) {
      order_sample(matching, tokens, best.data() + b * even.count, partner.data() + b * even.count, keys,
                   kept + b * left, sources + b * matching.r, places + b * matching.r);
    }
  });
}

}  // namespace pairtile
