// Reads a plan from the numbers and tensors that kernels/contrastive/plan.py describes.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>
#include <map>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "problem.h"

namespace pairtile {
namespace {

constexpr size_t kHeader = 8, kPerRule = 3;
constexpr int64_t kTaught = 1;  // some teacher's matrix

bool fits_int32(const int64_t* ids, int64_t count) {
  return std::all_of(ids, ids + count, [](int64_t id) {
    return id >= std::numeric_limits<int32_t>::min() && id <= std::numeric_limits<int32_t>::max();
  });
}

class Reader {
 public:
  Reader(at::IntArrayRef numbers, at::ArrayRef<double> factors, at::TensorList tensors, Problem& problem, Plan& plan)
      : numbers_(numbers),
        factors_(factors),
        tensors_(tensors),
        n_(problem.n),
        m_(problem.m),
        problem_(problem),
        plan_(plan) {}

  bool done() const { return at_ == numbers_.size(); }

  Reduction reduction() {
    Reduction read;
    read.by_row = next() == 1;
    read.kind = static_cast<Kind>(next());
    TORCH_CHECK(read.kind >= Kind::kLogSumExp && read.kind <= Kind::kChosen, "plan: no reduction has the kind ",
                static_cast<int64_t>(read.kind));
    const int64_t weights = next();
    const int64_t positive = next(), exclude = next();
    if (weights >= 0) {
      read.weights = data<float>(weights, at::kFloat, read.by_row ? m_ : n_);
    }
    read.of = matrix(next());
    read.under = matrix(next());
    read_extra(next(), read);
    for (int64_t k = 0; k < positive; ++k) {
      read.positive.push_back(rule(read.by_row));
    }
    for (int64_t k = 0; k < exclude; ++k) {
      read.exclude.push_back(rule(read.by_row));
    }
    TORCH_CHECK(read.dense() || (read.positive.size() == 1 && read.positive[0].names_partner()),
                "plan: a pair score needs one diagonal or target");
    return read;
  }

 private:
  int64_t next() {
    TORCH_CHECK(at_ < numbers_.size(), "plan: ends in the middle of a reduction");
    return numbers_[at_++];
  }

  void read_extra(int64_t extra, Reduction& read) {
    if (read.has_exponent() && extra >= 0) {
      TORCH_CHECK(extra + 4 <= static_cast<int64_t>(factors_.size()), "plan: no four factors at ", extra);
      const double* four = factors_.data() + extra;
      read.pace = {static_cast<float>(four[0]), static_cast<float>(four[1]), static_cast<float>(four[2]),
                   static_cast<float>(four[3])};
    } else if (read.kind == Kind::kHinge || read.kind == Kind::kCount) {
      read.thresholds = data<float>(extra, at::kFloat, read.by_row ? n_ : m_);
    } else if (read.kind == Kind::kChosen) {
      TORCH_CHECK(extra > 0, "plan: k is ", extra, ", expected at least 1");
      read.k = extra;
    }
  }

  // The number of the matrix whose three tensors begin at `index`; S if that is negative.
  int64_t matrix(int64_t index) {
    if (index < 0) {
      return kScores;
    }
    const auto [known, is_new] = teachers_.emplace(index, static_cast<int64_t>(problem_.teachers.size()) + 1);
    if (is_new) {
      TORCH_CHECK(index + 3 <= static_cast<int64_t>(tensors_.size()), "plan: no teacher's three tensors at ", index);
      problem_.teachers.push_back(make_features(tensors_[index], tensors_[index + 1], tensors_[index + 2]));
      const Features& made = problem_.teachers.back();
      TORCH_CHECK(made.x.size(0) == n_ && made.y.size(0) == m_ && made.x.scalar_type() == problem_.x.scalar_type(),
                  "plan: the teacher's features ", made.x.sizes(), " and ", made.y.sizes(), " of ",
                  made.x.scalar_type(), " do not fit ", n_, " rows and ", m_, " columns of ", problem_.x.scalar_type());
    }
    return known->second;
  }

  Rule rule(bool by_row) {
    Rule read;
    read.code = static_cast<RuleCode>(next());
    const int64_t a = next(), b = next();
    switch (read.code) {
      case RuleCode::kDiagonal:
        read.partner.offset = a;
        break;
      case RuleCode::kSameId:
      case RuleCode::kDifferentId:
        std::tie(read.row_ids, read.col_ids) = ids(a, b);
        break;
      case RuleCode::kColumnRange:
        read.start = a;
        read.stop = b;
        break;
      case RuleCode::kAboveDiagonal:
        read.partner.offset = a;
        read.thresholds = data<float>(b, at::kFloat, by_row ? n_ : m_);
        break;
      case RuleCode::kAboveTarget:
        read.partner.targets = data<int64_t>(a, at::kLong, n_);
        read.thresholds = data<float>(b, at::kFloat, by_row ? n_ : m_);
        break;
      case RuleCode::kTarget:
        read.partner.targets = data<int64_t>(a, at::kLong, n_);
        break;
      default:
        TORCH_CHECK(false, "plan: no rule has the code ", static_cast<int64_t>(read.code));
    }
    return read;
  }

  // Ids in 32 bits, of which a vector compares twice as many as of 64: equal where the given ones are.
  std::pair<const int32_t*, const int32_t*> ids(int64_t rows, int64_t cols) {
    const auto [known, is_new] = ids_.emplace(std::pair(rows, cols), std::pair<const int32_t*, const int32_t*>());
    if (!is_new) {
      return known->second;
    }
    const int64_t* of_rows = data<int64_t>(rows, at::kLong, n_);
    const int64_t* of_cols = data<int64_t>(cols, at::kLong, m_);
    at::Tensor both = at::empty({n_ + m_}, at::TensorOptions().dtype(at::kInt));
    int32_t* to = both.mutable_data_ptr<int32_t>();
    if (fits_int32(of_rows, n_) && fits_int32(of_cols, m_)) {
      std::copy_n(of_rows, n_, to);
      std::copy_n(of_cols, m_, to + n_);
    } else {
      std::unordered_map<int64_t, int32_t> numbers;
      auto number = [&](int64_t id) { return numbers.emplace(id, static_cast<int32_t>(numbers.size())).first->second; };
      std::transform(of_rows, of_rows + n_, to, number);
      std::transform(of_cols, of_cols + m_, to + n_, number);
    }
    plan_.keep_alive.push_back(std::move(both));
    return known->second = {to, to + n_};
  }

  template <typename T>
  const T* data(int64_t index, at::ScalarType type, int64_t length) {
    TORCH_CHECK(index >= 0 && index < static_cast<int64_t>(tensors_.size()), "plan: no tensor ", index);
    at::Tensor tensor = tensors_[index].to(type).contiguous();
    TORCH_CHECK(tensor.numel() == length, "plan: tensor ", index, " has ", tensor.numel(), " entries, expected ",
                length);
    const T* pointer = tensor.const_data_ptr<T>();
    plan_.keep_alive.push_back(std::move(tensor));
    return pointer;
  }

  at::IntArrayRef numbers_;
  at::ArrayRef<double> factors_;
  at::TensorList tensors_;
  int64_t n_, m_;
  Problem& problem_;
  Plan& plan_;
  size_t at_ = 0;
  std::map<int64_t, int64_t> teachers_;
  std::map<std::pair<int64_t, int64_t>, std::pair<const int32_t*, const int32_t*>> ids_;
};

}  // namespace

Plan decode_plan(at::IntArrayRef numbers, at::ArrayRef<double> factors, at::TensorList tensors, Problem& problem) {
  Plan plan;
  Reader reader(numbers, factors, tensors, problem, plan);
  while (!reader.done()) {
    plan.reductions.push_back(reader.reduction());
  }
  return plan;
}

std::vector<bool> differentiable_results(at::IntArrayRef numbers) {
  std::vector<bool> found;
  for (size_t at = 0; at + kHeader <= numbers.size();) {
    Reduction read;
    read.kind = static_cast<Kind>(numbers[at + 1]);
    read.of = numbers[at + 5] < 0 ? kScores : kTaught;
    read.under = numbers[at + 6] < 0 ? kScores : kTaught;
    found.resize(found.size() + (read.kind == Kind::kChosen ? 2 : 1), read.weighs() || !read.dense());
    at += kHeader + kPerRule * (numbers[at + 3] + numbers[at + 4]);
  }
  return found;
}

}  // namespace pairtile
