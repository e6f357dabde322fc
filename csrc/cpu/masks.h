// The general tile: any rules, weights and biases. One masked copy of the tile for each reduction.
#pragma once

#include "plan.h"
#include "tile.h"

namespace pairtile {

// S of a tile from its cosines, -inf in the padding.
inline void scores_of(const Tile& cosines, const float* scale, const float* offset, const float* col_bias, float* out) {
  for (int64_t r = 0; r < cosines.rows; ++r) {
    const float* from = cosines.row(r);
    float* to = out + r * cosines.ld;
    if (col_bias == nullptr) {
      for (int64_t c = 0; c < cosines.cols; ++c) {
        to[c] = std::fma(scale[r], from[c], offset[r]);
      }
    } else {
      for (int64_t c = 0; c < cosines.cols; ++c) {
        to[c] = std::fma(scale[r], from[c], offset[r]) + col_bias[cosines.col0 + c];
      }
    }
    std::fill(to + cosines.cols, to + cosines.ld, -kInfinity);
  }
}

// Calls found(c) for the pairs of one row of the tile that the rule names; `scores` is that row.
template <typename Found>
inline void pairs_of(const Rule& rule, bool by_row, const Tile& tile, int64_t r, const float* scores,
                     const Found& found) {
  const int64_t i = tile.row0 + r;
  switch (rule.code) {
    case RuleCode::kDiagonal:
    case RuleCode::kTarget: {
      const int64_t c = rule.partner.column_of(i) - tile.col0;
      if (rule.partner.column_of(i) >= 0 && c >= 0 && c < tile.cols) {
        found(c);
      }
      break;
    }
    case RuleCode::kSameId:
    case RuleCode::kDifferentId: {
      const bool same = rule.code == RuleCode::kSameId;
      const int64_t id = rule.row_ids[i];
      const int64_t* ids = rule.col_ids + tile.col0;
      for (int64_t c = 0; c < tile.cols; ++c) {
        if ((ids[c] == id) == same) {
          found(c);
        }
      }
      break;
    }
    case RuleCode::kColumnRange: {
      const int64_t stop = std::min(rule.stop - tile.col0, tile.cols);
      for (int64_t c = std::max<int64_t>(rule.start - tile.col0, 0); c < stop; ++c) {
        found(c);
      }
      break;
    }
    case RuleCode::kAboveDiagonal:
    case RuleCode::kAboveTarget: {
      const int64_t own = rule.partner.column_of(i) - tile.col0;
      for (int64_t c = 0; c < tile.cols; ++c) {
        const float threshold = rule.thresholds[by_row ? i : tile.col0 + c];
        if (scores[c] > threshold && c != own) {
          found(c);
        }
      }
      break;
    }
  }
}

// A reduction's own view of a tile: z S for its pairs (z = -1 for positives, else +1), -inf for what it leaves out.
// `sign` is -z there, only if the reduction has positives.
inline void mask_tile(const Reduction& reduction, const Tile& tile, const float* scores, float* masked, float* sign) {
  const bool signs = reduction.kind == Kind::kSoftplusSum && !reduction.positive.empty();
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float* from = scores + r * tile.ld;
    float* to = masked + r * tile.ld;
    std::copy_n(from, tile.ld, to);
    if (signs) {
      float* z = sign + r * tile.ld;
      std::fill_n(z, tile.ld, 1.0f);
      for (const Rule& rule : reduction.positive) {
        pairs_of(rule, reduction.by_row, tile, r, from, [&](int64_t c) { z[c] = -1.0f; });
      }
      for (int64_t c = 0; c < tile.cols; ++c) {
        to[c] *= z[c];
      }
    }
    for (const Rule& rule : reduction.exclude) {
      pairs_of(rule, reduction.by_row, tile, r, from, [&](int64_t c) { to[c] = -kInfinity; });
    }
    if (reduction.weights != nullptr) {
      const float* weights = reduction.weights + (reduction.by_row ? tile.col0 : 0);
      for (int64_t c = 0; c < tile.cols; ++c) {
        if ((reduction.by_row ? weights[c] : weights[tile.row0 + r]) == 0.0f) {
          to[c] = -kInfinity;
        }
      }
    }
  }
}

}  // namespace pairtile
