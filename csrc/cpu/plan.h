// What is asked of the similarity matrix: kernels/contrastive/plan.py writes it as numbers and tensors, this reads it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace pairtile {

enum class Kind : int64_t { kLogSumExp = 0, kSoftplusSum = 1, kPairScore = 2 };

// The one column that belongs to a row: row + offset, or an entry of `targets` (negative: none).
struct Partner {
  int64_t offset = 0;
  const int64_t* targets = nullptr;
  bool operator==(const Partner& other) const { return offset == other.offset && targets == other.targets; }
  int64_t column_of(int64_t row) const { return targets == nullptr ? row + offset : targets[row]; }
};

enum class RuleCode : int64_t {
  kDiagonal = 0,
  kSameId = 1,
  kDifferentId = 2,
  kColumnRange = 3,
  kAboveDiagonal = 4,
  kTarget = 5,
  kAboveTarget = 6,
};

struct Rule {
  RuleCode code;
  Partner partner;                  // kDiagonal, kTarget, kAbove*
  const int64_t* row_ids = nullptr;  // kSameId, kDifferentId
  const int64_t* col_ids = nullptr;
  int64_t start = 0, stop = 0;          // kColumnRange
  const float* thresholds = nullptr;    // kAbove*: one for each owner
  bool names_partner() const { return code == RuleCode::kDiagonal || code == RuleCode::kTarget; }
};

struct Reduction {
  bool by_row;  // reduces a row (over j), or a column (over i)
  Kind kind;
  const float* weights = nullptr;  // along the reduced axis
  std::vector<Rule> positive, exclude;
  bool dense() const { return kind != Kind::kPairScore; }
};

struct Plan {
  std::vector<Reduction> reductions;
  std::vector<at::Tensor> keep_alive;

  // All dense reductions are of one kind, at most one for each axis, without weights, and every rule is one and the
  // same partner: the case of nearly every loss, in which a tile needs one exponential for each pair.
  bool uniform() const;
  // The partner that a uniform plan leaves out (log-sum-exp) or counts as positive (softplus).
  std::optional<Partner> special() const;
  const Reduction* first_dense() const;
};

// Checks lengths and dtypes; n and m are the numbers of rows and columns.
Plan decode_plan(at::IntArrayRef numbers, at::ArrayRef<double> factors, at::TensorList tensors, int64_t n, int64_t m);

}  // namespace pairtile
