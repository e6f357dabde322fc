#include "masks.h"
#include "tile_work.h"

namespace pairtile {

void Weigher::weigh(Tile& tile, float* out, std::vector<double>* losses, TileScratch& scratch) const {
  fill_padding(tile);
  if (mode_.uniform) {
    weigh_uniform(tile, out, losses, scratch);
  } else {
    weigh_general(tile, out, scratch);
  }
  for (size_t k = 0; k < plan_.reductions.size(); ++k) {
    if (!plan_.reductions[k].dense()) {
      add_pair_weights(tile, plan_.reductions[k], upstream_[k], out);
    }
  }
}

void Weigher::weigh_uniform(Tile& tile, float* out, std::vector<double>* losses, TileScratch& scratch) const {
  const Upstream *by_row = nullptr, *by_col = nullptr;
  for (size_t k = 0; k < plan_.reductions.size(); ++k) {
    if (plan_.reductions[k].dense()) {
      (plan_.reductions[k].by_row ? by_row : by_col) = &upstream_[k];
    }
  }
  remove_special(mode_, tile, scratch.removed);
  const float* scale = problem_.scales() + tile.row0;
  const float* offset = problem_.offsets() + tile.row0;
  const float* rows = by_row == nullptr ? nullptr : by_row->coefficient.data() + tile.row0;
  float* columns = scratch.columns.data();
  if (by_col != nullptr) {  // a copy, since the padding is read too
    std::copy_n(by_col->coefficient.data() + tile.col0, tile.cols, columns);
    std::fill(columns + tile.cols, columns + tile.ld, 0.0f);
  }
  auto apply = [&](auto f) {
    if (rows != nullptr && by_col != nullptr) {
      weigh_tile<true, true>(tile, scale, offset, rows, columns, out, f);
    } else if (rows != nullptr) {
      weigh_tile<true, false>(tile, scale, offset, rows, columns, out, f);
    } else {
      weigh_tile<false, true>(tile, scale, offset, rows, columns, out, f);
    }
  };
  const bool softplus_sum = plan_.first_dense()->kind == Kind::kSoftplusSum;
  if (!softplus_sum) {
    apply([](int64_t, Vec v) { return exp(v); });
  } else if (losses == nullptr) {
    apply([](int64_t, Vec v) { return sigmoid(v); });
  } else {
    RowSums sums(scratch.lanes.data(), tile.rows);
    apply([&](int64_t r, Vec v) {
      const SoftplusSigmoid both = softplus_sigmoid(v);
      sums.add(r, both.softplus);
      return both.sigmoid;
    });
    sums.add_to(losses->data() + tile.row0);
  }
  if (softplus_sum) {
    for (const Removed::Pair& pair : scratch.removed.pairs()) {
      const PositiveTerm positive = positive_term(pair, scale, offset);
      const float factor = (rows != nullptr ? rows[pair.r] : 0.0f) + (by_col != nullptr ? columns[pair.c] : 0.0f);
      if (losses != nullptr) {
        (*losses)[tile.row0 + pair.r] += positive.loss;
      }
      out[pair.r * tile.ld + pair.c] = positive.weight * factor;
    }
  }
  if (tile.data == out) {
    scratch.removed.forget();
  } else {
    scratch.removed.restore();
  }
}

void Weigher::weigh_general(const Tile& cosines, float* out, TileScratch& scratch) const {
  const int64_t size = tiles_.rows * tiles_.cols;
  float* scores = scratch.general.data();
  float* masked = scores + size;
  float* sign = masked + size;
  scores_of(cosines, problem_.scales() + cosines.row0, problem_.offsets() + cosines.row0, problem_.col_biases(), scores);
  std::fill_n(out, cosines.rows * cosines.ld, 0.0f);
  for (size_t k = 0; k < plan_.reductions.size(); ++k) {
    const Reduction& reduction = plan_.reductions[k];
    if (reduction.dense()) {
      mask_tile(reduction, cosines, scores, masked, sign);
      Tile tile = cosines;
      tile.data = masked;
      add_weights(tile, reduction, upstream_[k], sign, out, scratch);
    }
  }
}

// out += coefficient * weight * (exp(S - shift), or -z sigmoid(-z S)).
void Weigher::add_weights(const Tile& masked, const Reduction& reduction, const Upstream& upstream, const float* sign,
                          float* out, TileScratch& scratch) const {
  const bool log_sum_exp = reduction.kind == Kind::kLogSumExp;
  const bool signs = !log_sum_exp && !reduction.positive.empty();
  const bool weighted = reduction.weights != nullptr;
  float* factors = scratch.columns.data();  // along the tile's columns
  float* shifts = factors + tiles_.cols;
  std::fill_n(factors, masked.ld, 0.0f);
  std::fill_n(shifts, masked.ld, 0.0f);
  for (int64_t c = 0; c < masked.cols; ++c) {
    const int64_t j = masked.col0 + c;
    factors[c] = reduction.by_row ? (weighted ? reduction.weights[j] : 1.0f) : upstream.coefficient[j];
    shifts[c] = log_sum_exp && !reduction.by_row ? upstream.shift[j] : 0.0f;
  }
  for (int64_t r = 0; r < masked.rows; ++r) {
    const int64_t i = masked.row0 + r;
    const Vec factor(reduction.by_row ? upstream.coefficient[i] : (weighted ? reduction.weights[i] : 1.0f));
    const Vec shift(reduction.by_row && log_sum_exp ? upstream.shift[i] : 0.0f);
    for (int64_t c = 0; c < masked.ld; c += kLanes) {
      const Vec score = Vec::loadu(masked.row(r) + c);
      Vec weights;
      if (log_sum_exp) {
        weights = exp(score - shift - Vec::loadu(shifts + c));
      } else {
        weights = Vec::blendv(sigmoid(score), score, score != score);  // a NaN does not survive exp
      }
      if (signs) {
        weights = weights * Vec::loadu(sign + r * masked.ld + c);
      }
      float* to = out + r * masked.ld + c;
      (Vec::loadu(to) + weights * factor * Vec::loadu(factors + c)).store(to);
    }
  }
}

void Weigher::add_pair_weights(const Tile& tile, const Reduction& reduction, const Upstream& upstream,
                               float* out) const {
  const Partner& partner = reduction.positive[0].partner;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t column = partner.column_of(tile.row0 + r), c = column - tile.col0;
    if (c >= 0 && c < tile.cols) {
      out[r * tile.ld + c] += upstream.coefficient[reduction.by_row ? tile.row0 + r : column];
    }
  }
}

}  // namespace pairtile
