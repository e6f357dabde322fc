#include "band.h"

#include <algorithm>
#include <cmath>

namespace pairtile {
namespace {

// A bound of |pace(S)| where |S| <= score.
double largest_value(const Pace& pace, double score) {
  return std::abs(pace.gain) * (std::abs(pace.slope) * score + std::abs(pace.offset)) * (score + std::abs(pace.center));
}

template <typename Item>
int64_t index_of(std::vector<Item>& items, const Item& wanted) {
  const auto found = std::find(items.begin(), items.end(), wanted);
  if (found == items.end()) {
    items.push_back(wanted);
    return static_cast<int64_t>(items.size()) - 1;
  }
  return found - items.begin();
}

}  // namespace

void score_tile(const Problem& problem, int64_t matrix, const Tile& tile) {
  const bool taught = matrix != kScores;
  const float* scales = taught ? problem.teachers[matrix - 1].scale.const_data_ptr<float>() : problem.scales();
  const float* biases = taught ? nullptr : problem.col_biases();
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float scale = scales[tile.row0 + r], offset = taught ? 0.0f : problem.offsets()[tile.row0 + r];
    float* row = tile.row(r);
    for (int64_t c = 0; c < tile.ld; c += kLanes) {
      at::vec::fmadd(Vec(scale), Vec::loadu(row + c), Vec(offset)).store(row + c);
    }
    for (int64_t c = 0; c < tile.cols && biases != nullptr; ++c) {
      row[c] += biases[tile.col0 + c];
    }
  }
}

bool PairSet::operator==(const PairSet& other) const {
  const bool of_owners = weights != nullptr || std::any_of(rules.begin(), rules.end(), [](const Rule& rule) {
                           return rule.is_above();
                         });
  return rules == other.rules && weights == other.weights && (by_row == other.by_row || !of_owners);
}

Shared::Shared(const Problem& problem, const Plan& plan) {
  std::vector<double> bounds(problem.teachers.size() + 1, -1.0);
  for (const Reduction& each : plan.reductions) {
    Use use;
    if (each.dense()) {
      use.excluded = index_of(sets, {each.exclude, each.by_row, each.weights});
    }
    if (each.kind == Kind::kSoftplusSum && !each.positive.empty()) {
      use.positive = index_of(sets, {each.positive, each.by_row, nullptr});
    }
    if (each.has_exponent()) {
      const int64_t matrix = each.exponent_matrix();
      if (bounds[matrix] < 0) {
        bounds[matrix] = largest_score(problem, matrix);
      }
      const bool safe = largest_value(each.pace, bounds[matrix]) < kSafeScore;  // false for a NaN
      use.exponent = index_of(exponents, {matrix, each.pace, safe});
    }
    uses.push_back(use);
  }
}

const float* Band::values(int64_t exponent) {
  const Exponent& of = shared_.exponents[exponent];
  if (of.is_score()) {
    return scores(of.matrix);
  }
  float* to = part(2 * exponent);
  Made& made = made_[2 * exponent];
  if (made == Made::kNot) {
    made = Made::kFull;
    const float* from = scores(of.matrix);
    const Vec gain(of.pace.gain), slope(of.pace.slope), offset(of.pace.offset), center(of.pace.center);
    const bool bent = of.pace.slope != 0;  // 0 * inf is none of the formula's
    for (int64_t k = 0; k < rows * ld(); k += kLanes) {
      const Vec score = Vec::loadu(from + k);
      const Vec pace = bent ? at::vec::fmadd(slope, score, offset) : offset;
      (gain * at::vec::maximum(pace, Vec(0.0f)) * (score - center)).store(to + k);
    }
  }
  return to;
}

const float* Band::exponentials(int64_t exponent) {
  float* to = part(2 * exponent + 1);
  Made& made = made_[2 * exponent + 1];
  if (made == Made::kNot) {
    made = Made::kFull;
    const float* from = values(exponent);
    for (int64_t k = 0; k < rows * ld(); k += kLanes) {
      exp(Vec::loadu(from + k)).store(to + k);
    }
  }
  return to;
}

const float* Band::mask(int64_t index) {
  const PairSet& set = shared_.sets[index];
  const size_t place = 2 * shared_.exponents.size() + index;
  float* to = part(place);
  Made& made = made_[place];
  if (made == Made::kNot) {
    const std::vector<Rule>& rules = set.rules;
    const bool any = cols() < ld() || set.weights != nullptr ||
                     std::any_of(rules.begin(), rules.end(), [this](const Rule& rule) { return touches(rule); });
    made = any ? Made::kFull : Made::kEmpty;
    if (any) {
      int32_t* lanes = reinterpret_cast<int32_t*>(to);
      std::fill_n(lanes, rows * ld(), 0);
      for (int64_t r = 0; r < rows; ++r) {
        std::fill(lanes + r * ld() + cols(), lanes + (r + 1) * ld(), -1);
      }
      for (const Rule& rule : set.rules) {
        add_rule(rule, set.by_row, lanes);
      }
      add_weightless(set, lanes);
    }
  }
  return made == Made::kEmpty ? nullptr : to;
}

// Whether a rule may name a pair of the band.
bool Band::touches(const Rule& rule) const {
  if (rule.names_partner()) {
    for (int64_t i = row0; i < row0 + rows; ++i) {
      const int64_t c = rule.partner.column_of(i) - col0();
      if (c >= 0 && c < cols()) {
        return true;
      }
    }
    return false;
  }
  return rule.code != RuleCode::kColumnRange || (rule.start < col0() + cols() && rule.stop > col0());
}

void Band::add_rule(const Rule& rule, bool by_row, int32_t* mask) const {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = row0 + r, own = rule.partner.column_of(i) - col0();
    int32_t* to = mask + r * ld();
    switch (rule.code) {
      case RuleCode::kDiagonal:
      case RuleCode::kTarget:
        if (own >= 0 && own < cols()) {
          to[own] = -1;
        }
        break;
      case RuleCode::kSameId:
      case RuleCode::kDifferentId: {
        const int32_t id = rule.row_ids[i], other = rule.code == RuleCode::kSameId ? 0 : -1;
        const int32_t* ids = rule.col_ids + col0();
        for (int64_t c = 0; c < cols(); ++c) {
          to[c] |= (ids[c] == id ? -1 : 0) ^ other;
        }
        break;
      }
      case RuleCode::kColumnRange:
        for (int64_t c = std::max<int64_t>(rule.start - col0(), 0); c < std::min(rule.stop - col0(), cols()); ++c) {
          to[c] = -1;
        }
        break;
      case RuleCode::kAboveDiagonal:
      case RuleCode::kAboveTarget: {
        const float* compared = scores(kScores) + r * ld();
        const int32_t before = own >= 0 && own < cols() ? to[own] : 0;
        if (by_row) {
          const float threshold = rule.thresholds[i];
          for (int64_t c = 0; c < cols(); ++c) {
            to[c] |= compared[c] > threshold ? -1 : 0;
          }
        } else {
          const float* thresholds = rule.thresholds + col0();
          for (int64_t c = 0; c < cols(); ++c) {
            to[c] |= compared[c] > thresholds[c] ? -1 : 0;
          }
        }
        if (own >= 0 && own < cols()) {
          to[own] = before;
        }
        break;
      }
    }
  }
}

void Band::add_weightless(const PairSet& set, int32_t* mask) const {
  if (set.weights == nullptr) {
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    int32_t* to = mask + r * ld();
    if (set.by_row) {
      const float* weights = set.weights + col0();
      for (int64_t c = 0; c < cols(); ++c) {
        to[c] |= weights[c] == 0.0f ? -1 : 0;
      }
    } else if (set.weights[row0 + r] == 0.0f) {
      std::fill_n(to, cols(), -1);
    }
  }
}

const float* Band::along_columns(const float* all, int64_t slot) const {
  if (cols() == ld()) {
    return all + col0();
  }
  float* copy = columns_ + slot * ld();
  std::copy_n(all + col0(), cols(), copy);
  std::fill(copy + cols(), copy + ld(), 0.0f);
  return copy;
}

}  // namespace pairtile
