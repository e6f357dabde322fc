#include "tile_work.h"

namespace pairtile {

void Weigher::weigh(Tile& tile, float* out, std::vector<double>* losses, TileScratch& scratch) const {
  if (mode_.uniform) {
    weigh_uniform(tile, out, losses, scratch);
  } else {
    weigh_bands(tile, out, scratch);
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
  fill_padding(tile);
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

void Weigher::weigh_bands(const Tile& tile, float* out, TileScratch& scratch) const {
  Band band(mode_.shared, tile, scratch.matrices, scratch.band.data(), scratch.columns.data());
  for (int64_t first = 0; first < tile.rows; first += kBandRows) {
    band.move_to(first);
    // Apart from `out`, which may hold the scores of this band.
    const int64_t count = band.rows * tile.ld;
    std::fill_n(band.weights(), count, 0.0f);
    for (size_t k = 0; k < plan_.reductions.size(); ++k) {
      if (plan_.reductions[k].weighs()) {
        weigh_band(band, mode_, plan_.reductions[k], mode_.shared.uses[k], upstream_[k]);
      }
    }
    std::copy_n(band.weights(), count, out + first * tile.ld);
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
