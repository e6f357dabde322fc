// What is asked of the similarity matrix: kernels/contrastive/plan.py writes it as numbers and tensors, this reads it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace pairtile {

struct Problem;

enum class Kind : int64_t {
  kLogSumExp = 0,
  kSoftplusSum = 1,
  kPairScore = 2,
  kSoftmaxMean = 3,
  kHinge = 4,
  kCount = 5,
  kChosen = 6,
};

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
  Partner partner;                    // kDiagonal, kTarget, kAbove*
  const int32_t* row_ids = nullptr;   // kSameId, kDifferentId: numbered anew where int32 does not hold them
  const int32_t* col_ids = nullptr;
  int64_t start = 0, stop = 0;        // kColumnRange
  const float* thresholds = nullptr;  // kAbove*: one for each owner
  bool names_partner() const { return code == RuleCode::kDiagonal || code == RuleCode::kTarget; }
  bool is_above() const { return code == RuleCode::kAboveDiagonal || code == RuleCode::kAboveTarget; }
  bool operator==(const Rule& other) const {
    return code == other.code && partner == other.partner && row_ids == other.row_ids && col_ids == other.col_ids &&
           start == other.start && stop == other.stop && thresholds == other.thresholds;
  }
};

// The exponent of a softmax as a function of a score: gain * relu(slope * S + offset) * (S - center). A sharpness k is
// (k, 0, 1, 0).
struct Pace {
  float gain = 1, slope = 0, offset = 1, center = 0;
  bool operator==(const Pace& other) const {
    return gain == other.gain && slope == other.slope && offset == other.offset && center == other.center;
  }
};

// Matrices by number: 0 is S, k the similarity of teacher k - 1.
constexpr int64_t kScores = 0;

struct Reduction {
  bool by_row;  // reduces a row (over j), or a column (over i)
  Kind kind;
  const float* weights = nullptr;  // along the reduced axis
  std::vector<Rule> positive, exclude;
  int64_t of = kScores;                // what is summed up, averaged or chosen from
  int64_t under = kScores;             // kSoftmaxMean: the matrix of the softmax
  Pace pace;                           // kLogSumExp, kSoftmaxMean: of the exponents
  const float* thresholds = nullptr;   // kHinge, kCount: one for each owner
  int64_t k = 0;                       // kChosen

  bool dense() const { return kind != Kind::kPairScore; }
  bool has_exponent() const { return kind == Kind::kLogSumExp || kind == Kind::kSoftmaxMean; }
  int64_t exponent_matrix() const { return kind == Kind::kSoftmaxMean ? under : of; }
  // Whether a gradient goes through the tiles. That of chosen scores is sparse, and not made here.
  bool weighs() const;
  // Whether the forward, or the backward, reads a matrix.
  bool reads(int64_t matrix, bool backward) const;
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
  // The matrices that the forward, or the backward, reads, in ascending order.
  std::vector<int64_t> matrices(const Problem& problem, bool backward) const;
  // Whether a gradient goes through more than the pairs' own scores.
  bool weighs() const;
};

// Checks lengths and dtypes, and adds the teachers to the problem.
Plan decode_plan(at::IntArrayRef numbers, at::ArrayRef<double> factors, at::TensorList tensors, Problem& problem);

// For each result, in their order, whether it has a gradient.
std::vector<bool> differentiable_results(at::IntArrayRef numbers);

}  // namespace pairtile
