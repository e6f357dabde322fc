#include "plan.h"

#include <ATen/core/Tensor.h>

namespace pairtile {
namespace {

class Reader {
 public:
  Reader(at::IntArrayRef numbers, at::TensorList tensors, int64_t n, int64_t m, Plan& plan)
      : numbers_(numbers), tensors_(tensors), n_(n), m_(m), plan_(plan) {}

  bool done() const { return at_ == numbers_.size(); }

  Reduction reduction() {
    Reduction read;
    read.by_row = next() == 1;
    read.kind = static_cast<Kind>(next());
    TORCH_CHECK(read.kind >= Kind::kLogSumExp && read.kind <= Kind::kPairScore, "plan: no reduction has the kind ",
                static_cast<int64_t>(read.kind));
    const int64_t weights = next();
    const int64_t positive = next(), exclude = next();
    if (weights >= 0) {
      read.weights = data<float>(weights, at::kFloat, read.by_row ? m_ : n_);
    }
    const int64_t of = next(), under = next();
    next();
    TORCH_CHECK(of < 0 && under < 0, "plan: the cpp backend has no teachers");
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
        read.row_ids = data<int64_t>(a, at::kLong, n_);
        read.col_ids = data<int64_t>(b, at::kLong, m_);
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
  at::TensorList tensors_;
  int64_t n_, m_;
  Plan& plan_;
  size_t at_ = 0;
};

}  // namespace

Plan decode_plan(at::IntArrayRef numbers, at::ArrayRef<double>, at::TensorList tensors, int64_t n, int64_t m) {
  Plan plan;
  Reader reader(numbers, tensors, n, m, plan);
  while (!reader.done()) {
    plan.reductions.push_back(reader.reduction());
  }
  return plan;
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
