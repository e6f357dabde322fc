#include <cmath>

#include "softmax_shift.h"
#include "tile_work.h"

namespace pairtile {
Mode::Mode(const Problem& problem, const Plan& plan) : uniform(false), bounds{} {
  if (plan.uniform()) {
    // Sums of softplus never overflow where the scores do not.
    const bool softplus_sum = plan.first_dense()->kind == Kind::kSoftplusSum;
    bounds = bounds_of(problem);
    uniform = bounds.score < (softplus_sum ? std::numeric_limits<double>::infinity() : kSafeScore);
    special = plan.special();
  }
  if (!uniform) {
    shared = Shared(problem, plan);
  }
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
  for (size_t k = 0; k < plan.reductions.size(); ++k) {
    const Reduction& reduction = plan.reductions[k];
    Running each;
    each.reduction = &reduction;
    const int64_t owners = reduction.by_row ? problem.n : problem.m;
    if (!mode.uniform) {
      each.use = mode.shared.uses[k];
    }
    if (reduction.kind == Kind::kChosen) {
      const int64_t partners = reduction.by_row ? problem.m : problem.n;
      each.chooser = std::make_unique<Chooser>(reduction, owners, partners, tiles.cols);
    } else if (reduction.dense()) {
      each.sum.assign(owners, 0.0);
      each.weighted.assign(reduction.kind == Kind::kSoftmaxMean ? owners : 0, 0.0);
      each.slot = reduction.by_row ? -1 : slots_++;
    }
    if (reduction.kind == Kind::kSoftmaxMean) {
      partials_ = 5;
    }
    if (reduction.has_exponent()) {
      each.maximum.assign(owners, each.safe(mode) ? 0.0f : -kInfinity);
    }
    running_.push_back(std::move(each));
  }
}

void Reducer::reduce(Tile& tile, float* partial, int64_t stride, TileScratch& scratch) {
  if (mode_.uniform) {
    reduce_uniform(tile, partial, scratch);
  } else {
    reduce_bands(tile, partial, stride, scratch);
  }
}

void Reducer::reduce_uniform(Tile& tile, float* partial, TileScratch& scratch) {
  Running *by_row = nullptr, *by_col = nullptr;
  for (Running& each : running_) {
    if (each.reduction->dense()) {
      (each.reduction->by_row ? by_row : by_col) = &each;
    }
  }
  fill_padding(tile);
  remove_special(mode_, tile, scratch.removed);
  const float* scale = problem_.scales() + tile.row0;
  const float* offset = problem_.offsets() + tile.row0;
  RowSums rows(scratch.lanes.data(), tile.rows);
  float* columns = Partial(partial, tiles_.cols).sums;
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

void Reducer::reduce_bands(const Tile& tile, float* partial, int64_t stride, TileScratch& scratch) {
  for (const Running& each : running_) {
    if (each.slot >= 0) {
      const Partial own(partial + each.slot * stride, tiles_.cols);
      std::fill_n(own.maxima, tile.ld, -kInfinity);
      if (each.weighted.empty()) {
        std::fill_n(own.sums, tile.ld, 0.0f);
      } else {
        std::fill_n(own.exact_sums, tile.ld, 0.0);
        std::fill_n(own.weighted, tile.ld, 0.0);
      }
    }
  }
  Band band(mode_.shared, tile, scratch.matrices, scratch.band.data(), scratch.columns.data());
  for (int64_t first = 0; first < tile.rows; first += kBandRows) {
    band.move_to(first);
    for (Running& each : running_) {
      if (each.reduction->dense()) {
        reduce_band(band, mode_, each, {partial + std::max<int64_t>(each.slot, 0) * stride, tiles_.cols});
      }
    }
  }
}

void Reducer::merge(Running& running, float* partial, int64_t column, int64_t count) const {
  const Partial of_tile(partial, tiles_.cols);
  const bool shifted = running.reduction->has_exponent() && !running.safe(mode_);
  auto add = [&](double* sums, const auto* added) {
    for (int64_t c = 0; c < count && !shifted; ++c) {
      sums[c] += added[c];
    }
    for (int64_t c = 0; c < count && shifted; ++c) {
      const float before = running.maximum[column + c], raised = larger(before, of_tile.maxima[c]);
      sums[c] = sums[c] * rescale(before, raised) + added[c] * rescale(of_tile.maxima[c], raised);
    }
  };
  if (running.weighted.empty()) {
    add(running.sum.data() + column, of_tile.sums);
  } else {
    add(running.sum.data() + column, of_tile.exact_sums);
    add(running.weighted.data() + column, of_tile.weighted);
  }
  for (int64_t c = 0; c < count && shifted; ++c) {
    running.maximum[column + c] = larger(running.maximum[column + c], of_tile.maxima[c]);
  }
}

std::vector<Statistics> Reducer::statistics(int64_t begin, int64_t end) const {
  std::vector<Statistics> all;
  for (const Running& each : running_) {
    Statistics known;
    if (each.chooser != nullptr) {
      known.scores = each.chooser->scores;
      known.indices = each.chooser->indices;
    }
    const int64_t first = each.reduction->by_row ? begin : 0, last = each.reduction->by_row ? end : problem_.m;
    for (int64_t i = first; i < last && !each.sum.empty(); ++i) {
      const float maximum = each.maximum.empty() ? 0.0f : each.maximum[i];
      known.shift.push_back(finite(maximum));
      known.sum.push_back(std::isnan(maximum) ? maximum : each.sum[i]);  // a NaN does not survive exp
      if (!each.weighted.empty()) {
        known.mean.push_back(known.sum.back() == 0 ? 0.0 : each.weighted[i] / known.sum.back());
      }
    }
    all.push_back(std::move(known));
  }
  return all;
}

}  // namespace pairtile
