#include <cmath>

#include "masks.h"
#include "tile_work.h"

namespace pairtile {
namespace {

float finite(float maximum) { return std::isinf(maximum) ? 0.0f : maximum; }

// What a sum relative to the maximum `before` is multiplied by to be relative to `after`.
double rescale(float before, float after) {
  return before == after || before == -kInfinity ? 1.0 : std::exp(static_cast<double>(finite(before)) - finite(after));
}

bool is_log_sum_exp(const Running& running) { return running.reduction->kind == Kind::kLogSumExp; }

}  // namespace

Mode::Mode(const Problem& problem, const Plan& plan) : uniform(false), bounds{} {
  if (!plan.uniform()) {
    return;
  }
  // Sums of softplus never overflow where the scores do not.
  const bool softplus_sum = plan.first_dense()->kind == Kind::kSoftplusSum;
  bounds = bounds_of(problem);
  uniform = bounds.score < (softplus_sum ? std::numeric_limits<double>::infinity() : kSafeScore);
  special = plan.special();
}

void remove_special(const Mode& mode, Tile& tile, Removed& removed) {
  if (!mode.special) {
    return;
  }
  const Partner& partner = *mode.special;
  const int64_t end = tile.col0 + tile.cols;
  if (partner.targets == nullptr &&
      (tile.row0 + partner.offset >= end || tile.row0 + tile.rows + partner.offset <= tile.col0)) {
    return;
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t column = partner.column_of(tile.row0 + r);
    if (column >= tile.col0 && column < end) {
      removed.remove(tile, r, column - tile.col0);
    }
  }
}

PositiveTerm positive_term(const Removed::Pair& pair, const float* scale, const float* offset) {
  const double score = std::fma(static_cast<double>(scale[pair.r]), pair.cosine, offset[pair.r]);
  return {std::max(-score, 0.0) + std::log1p(std::exp(-std::abs(score))),
          static_cast<float>(-1.0 / (1.0 + std::exp(score)))};
}

Reducer::Reducer(const Problem& problem, const Plan& plan, const Tiles& tiles, const Mode& mode)
    : problem_(problem), plan_(plan), tiles_(tiles), mode_(mode) {
  for (const Reduction& reduction : plan.reductions) {
    Running each{&reduction, {}, {}};
    if (reduction.dense()) {
      const int64_t owners = reduction.by_row ? problem.n : problem.m;
      each.maximum.assign(owners, mode.uniform ? 0.0f : -kInfinity);
      each.sum.assign(owners, 0.0);
      each.slot = reduction.by_row ? -1 : slots_++;
    }
    running_.push_back(std::move(each));
  }
}

void Reducer::reduce(Tile& tile, float* partial, int64_t stride, TileScratch& scratch) {
  fill_padding(tile);
  if (mode_.uniform) {
    reduce_uniform(tile, partial, scratch);
  } else {
    reduce_general(tile, partial, stride, scratch);
  }
}

void Reducer::reduce_uniform(Tile& tile, float* partial, TileScratch& scratch) {
  Running *by_row = nullptr, *by_col = nullptr;
  for (Running& each : running_) {
    if (each.reduction->dense()) {
      (each.reduction->by_row ? by_row : by_col) = &each;
    }
  }
  remove_special(mode_, tile, scratch.removed);
  const float* scale = problem_.scales() + tile.row0;
  const float* offset = problem_.offsets() + tile.row0;
  RowSums rows(scratch.lanes.data(), tile.rows);
  float* columns = partial + tiles_.cols;
  auto sum = [&](auto f) {
    if (by_row != nullptr && by_col != nullptr) {
      sum_tile<true, true>(tile, scale, offset, &rows, columns, f);
    } else if (by_row != nullptr) {
      sum_tile<true, false>(tile, scale, offset, &rows, columns, f);
    } else {
      sum_tile<false, true>(tile, scale, offset, nullptr, columns, f);
    }
  };
  if (plan_.first_dense()->kind == Kind::kLogSumExp) {
    sum([](Vec v) { return exp(v); });
  } else {
    sum([](Vec v) { return softplus(v); });
  }
  if (by_row != nullptr) {
    rows.add_to(by_row->sum.data() + tile.row0);
  }
  if (plan_.first_dense()->kind == Kind::kSoftplusSum) {
    for (const Removed::Pair& pair : scratch.removed.pairs()) {
      const double loss = positive_term(pair, scale, offset).loss;
      if (by_row != nullptr) {
        by_row->sum[tile.row0 + pair.r] += loss;
      }
      if (by_col != nullptr) {
        columns[pair.c] += static_cast<float>(loss);
      }
    }
  }
  scratch.removed.restore();
}

void Reducer::reduce_general(const Tile& cosines, float* partial, int64_t stride, TileScratch& scratch) {
  const int64_t size = tiles_.rows * tiles_.cols;
  float* scores = scratch.general.data();
  float* masked = scores + size;
  scores_of(cosines, problem_.scales() + cosines.row0, problem_.offsets() + cosines.row0, problem_.col_biases(), scores);
  for (Running& each : running_) {
    if (!each.reduction->dense()) {
      continue;
    }
    mask_tile(*each.reduction, cosines, scores, masked, masked + size);
    Tile tile = cosines;
    tile.data = masked;
    if (each.reduction->by_row) {
      reduce_rows(tile, each);
    } else {
      reduce_columns(tile, each, partial + each.slot * stride);
    }
  }
}

void Reducer::reduce_rows(const Tile& masked, Running& running) const {
  const float* weights = running.reduction->weights == nullptr ? nullptr : running.reduction->weights + masked.col0;
  const bool log_sum_exp = is_log_sum_exp(running);
  for (int64_t r = 0; r < masked.rows; ++r) {
    const float* row = masked.row(r);
    float& maximum = running.maximum[masked.row0 + r];
    double& sum = running.sum[masked.row0 + r];
    float shift = 0;
    if (log_sum_exp) {
      Vec largest(maximum);
      for (int64_t c = 0; c < masked.ld; c += kLanes) {
        largest = at::vec::maximum(largest, Vec::loadu(row + c));
      }
      const float raised = max_lanes(largest);
      sum *= rescale(maximum, raised);
      maximum = raised;
      shift = finite(raised);
    }
    Vec lanes(0.0f);
    for (int64_t c = 0; c < masked.ld; c += kLanes) {
      const Vec score = Vec::loadu(row + c);
      Vec term = log_sum_exp ? exp(score - Vec(shift)) : softplus(score);
      if (weights != nullptr) {
        term = term * Vec::loadu(weights + c, std::clamp<int64_t>(masked.cols - c, 0, kLanes));
      }
      lanes = lanes + term;
    }
    sum += std::isnan(maximum) ? maximum : sum_lanes(lanes);  // a NaN does not survive exp
  }
}

void Reducer::reduce_columns(const Tile& masked, const Running& running, float* maxima) const {
  const float* weights = running.reduction->weights == nullptr ? nullptr : running.reduction->weights + masked.row0;
  const bool log_sum_exp = is_log_sum_exp(running);
  float* sums = maxima + tiles_.cols;
  for (int64_t c = 0; c < masked.ld; c += kLanes) {
    Vec largest(log_sum_exp ? -kInfinity : 0.0f);
    for (int64_t r = 0; r < masked.rows && log_sum_exp; ++r) {
      largest = at::vec::maximum(largest, Vec::loadu(masked.row(r) + c));
    }
    const Vec shift = Vec::blendv(largest, Vec(0.0f), largest.abs() == Vec(kInfinity));
    Vec sum(0.0f);
    for (int64_t r = 0; r < masked.rows; ++r) {
      const Vec score = Vec::loadu(masked.row(r) + c);
      const Vec term = log_sum_exp ? exp(score - shift) : softplus(score);
      sum = sum + (weights != nullptr ? term * Vec(weights[r]) : term);
    }
    largest.store(maxima + c);
    sum.store(sums + c);
  }
}

void Reducer::merge(Running& running, const float* partial, int64_t column, int64_t count) const {
  const float* maxima = partial;
  const float* sums = partial + tiles_.cols;
  double* sum = running.sum.data() + column;
  if (mode_.uniform || !is_log_sum_exp(running)) {
    for (int64_t c = 0; c < count; ++c) {
      sum[c] += sums[c];
    }
    return;
  }
  for (int64_t c = 0; c < count; ++c) {
    float& maximum = running.maximum[column + c];
    const float raised = std::isnan(maxima[c]) || maxima[c] > maximum ? maxima[c] : maximum;
    sum[c] = sum[c] * rescale(maximum, raised) + sums[c] * rescale(maxima[c], raised);
    maximum = raised;
    if (std::isnan(raised)) {
      sum[c] = raised;
    }
  }
}

std::vector<Statistics> Reducer::statistics(int64_t begin, int64_t end) const {
  std::vector<Statistics> all;
  for (const Running& each : running_) {
    Statistics known;
    if (each.reduction->dense()) {
      const int64_t first = each.reduction->by_row ? begin : 0, last = each.reduction->by_row ? end : problem_.m;
      for (int64_t i = first; i < last; ++i) {
        known.shift.push_back(is_log_sum_exp(each) ? finite(each.maximum[i]) : 0.0);
        known.sum.push_back(each.sum[i]);
      }
    }
    all.push_back(std::move(known));
  }
  return all;
}

}  // namespace pairtile
