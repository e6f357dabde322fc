#include "choose.h"

#include <ATen/ops/full.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace pairtile {
namespace {

constexpr float kLowest = std::numeric_limits<float>::lowest();  // a bar that -inf, a pair left out, does not reach

bool before(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }
bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// Bits of the lanes of v that are not below the bar; a NaN is not.
inline uint32_t reaching(Vec v, Vec bar) {
  const uint32_t all = static_cast<uint32_t>((uint64_t{1} << kLanes) - 1);
  return static_cast<uint32_t>((v < bar).zero_mask()) & all;
}

}  // namespace

Chooser::Chooser(const Reduction& reduction, int64_t owners, int64_t partners, int64_t block)
    : scores(at::full({owners, reduction.k}, -kInfinity, at::TensorOptions().dtype(at::kFloat))),
      indices(at::full({owners, reduction.k}, -1, at::TensorOptions().dtype(at::kLong))),
      reduction_(&reduction),
      k_(reduction.k),
      held_(std::min(reduction.k, partners)),
      values_(scores.mutable_data_ptr<float>()),
      places_(indices.mutable_data_ptr<int64_t>()),
      bars_(round_up(owners, 16), kLowest),
      locks_(reduction.by_row ? nullptr : std::make_unique<std::mutex[]>(ceil_div(owners, block))),
      block_(block) {}

void Chooser::choose(Band& band, int64_t excluded) {
  const float* from = band.scores(reduction_->of);
  const float* mask = band.mask(excluded);
  if (reduction_->by_row) {
    choose_of_rows(band, from, mask);
  } else {
    const std::lock_guard<std::mutex> lock(locks_[band.col0() / block_]);
    choose_of_columns(band, from, mask);
  }
}

void Chooser::choose_of_rows(const Band& band, const float* from, const float* mask) {
  if_present(mask, [&](auto masked) {
    for (int64_t r = 0; r < band.rows; ++r) {
      const int64_t i = band.row0 + r;
      for (int64_t c = 0; c < band.ld(); c += kLanes) {
        const int64_t at = r * band.ld() + c;
        const Vec score = unless<masked.value>(mask, at, Vec::loadu(from + at), -kInfinity);
        for (uint32_t left = reaching(score, Vec(bars_[i])); left != 0; left &= left - 1) {
          const int64_t lane = __builtin_ctz(left);
          insert(i, from[at + lane], band.col0() + c + lane);
        }
      }
    }
  });
}

void Chooser::choose_of_columns(const Band& band, const float* from, const float* mask) {
  if_present(mask, [&](auto masked) {
    for (int64_t c = 0; c < band.ld(); c += kLanes) {
      for (int64_t r = 0; r < band.rows; ++r) {
        const int64_t at = r * band.ld() + c;
        const Vec score = unless<masked.value>(mask, at, Vec::loadu(from + at), -kInfinity);
        for (uint32_t left = reaching(score, Vec::loadu(bars_.data() + band.col0() + c)); left != 0; left &= left - 1) {
          const int64_t lane = __builtin_ctz(left);
          insert(band.col0() + c + lane, from[at + lane], band.row0 + r);
        }
      }
    }
  });
}

void Chooser::insert(int64_t owner, float score, int64_t index) {
  float* const values = values_ + owner * k_;
  int64_t* const places = places_ + owner * k_;
  // -inf, where there is no pair yet, comes after any pair that reaches the bar.
  auto comes_after = [&](int64_t k) {
    return before(score, values[k]) || (same(score, values[k]) && index < places[k]);
  };
  if (!comes_after(held_ - 1)) {
    return;
  }
  int64_t low = 0, high = held_ - 1;  // the first that comes after it
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (comes_after(middle)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  std::memmove(values + low + 1, values + low, (held_ - 1 - low) * sizeof(float));
  std::memmove(places + low + 1, places + low, (held_ - 1 - low) * sizeof(int64_t));
  values[low] = score;
  places[low] = index;
  const float least = values[held_ - 1];
  bars_[owner] = std::isnan(least) ? kInfinity : std::max(least, kLowest);
}

}  // namespace pairtile
