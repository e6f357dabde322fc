#include "plan.h"

#include <algorithm>

#include "problem.h"

namespace pairtile {

bool Reduction::weighs() const {
  switch (kind) {
    case Kind::kLogSumExp:
      return of == kScores;
    case Kind::kSoftmaxMean:
      return of == kScores || under == kScores;
    case Kind::kSoftplusSum:
    case Kind::kHinge:
      return true;
    default:
      return false;
  }
}

bool Reduction::reads(int64_t matrix, bool backward) const {
  if (!dense() || (backward && !weighs())) {
    return false;
  }
  const bool compares = std::any_of(exclude.begin(), exclude.end(), [](const Rule& rule) { return rule.is_above(); });
  if (matrix == kScores && compares) {
    return true;
  }
  if (kind != Kind::kSoftmaxMean) {
    return matrix == of;
  }
  // d (sum_j p_ij S_ij) / dS_ij under a teacher's p is p itself.
  return matrix == under || (matrix == of && !(backward && under != kScores));
}

std::vector<int64_t> Plan::matrices(const Problem& problem, bool backward) const {
  std::vector<int64_t> found;
  for (int64_t matrix = 0; matrix <= static_cast<int64_t>(problem.teachers.size()); ++matrix) {
    if (std::any_of(reductions.begin(), reductions.end(),
                    [&](const Reduction& each) { return each.reads(matrix, backward); })) {
      found.push_back(matrix);
    }
  }
  return found;
}

bool Plan::weighs() const {
  return std::any_of(reductions.begin(), reductions.end(), [](const Reduction& each) { return each.weighs(); });
}

const Reduction* Plan::first_dense() const {
  for (const Reduction& each : reductions) {
    if (each.dense()) {
      return &each;
    }
  }
  return nullptr;
}

std::optional<Partner> Plan::special() const {
  const Reduction* first = first_dense();
  if (first == nullptr) {
    return std::nullopt;
  }
  const std::vector<Rule>& rules = first->kind == Kind::kLogSumExp ? first->exclude : first->positive;
  return rules.empty() ? std::nullopt : std::optional<Partner>(rules[0].partner);
}

bool Plan::uniform() const {
  const Reduction* first = first_dense();
  if (first == nullptr) {
    return false;
  }
  int64_t of_axis[2] = {0, 0};
  for (const Reduction& each : reductions) {
    if (!each.dense()) {
      continue;
    }
    const bool log_sum_exp = each.kind == Kind::kLogSumExp;
    const std::vector<Rule>& named = log_sum_exp ? each.exclude : each.positive;
    const std::vector<Rule>& other = log_sum_exp ? each.positive : each.exclude;
    const std::vector<Rule>& expected = log_sum_exp ? first->exclude : first->positive;
    if (!(log_sum_exp || each.kind == Kind::kSoftplusSum) || each.of != kScores || !(each.pace == Pace())) {
      return false;
    }
    if (each.kind != first->kind || each.weights != nullptr || !other.empty() || named.size() > 1 ||
        ++of_axis[each.by_row] > 1 || named.size() != expected.size()) {
      return false;
    }
    if (!named.empty() && !(named[0].names_partner() && named[0].partner == expected[0].partner)) {
      return false;
    }
  }
  return true;
}

}  // namespace pairtile
