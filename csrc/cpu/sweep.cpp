#include "sweep.h"

#include "typed_sweep.h"

namespace pairtile {
namespace {

template <typename T>
std::vector<double> typed_pair_scores(const Problem& problem, const Partner& partner) {
  const T* x = problem.x.const_data_ptr<T>();
  const T* y = problem.y.const_data_ptr<T>();
  const int64_t d = problem.d;
  std::vector<double> scores(problem.n, -std::numeric_limits<double>::infinity());
  at::parallel_for(0, problem.n, 32768 / (d + 1) + 1, [&](int64_t begin, int64_t end) {
    std::vector<float> own(d);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t j = partner.column_of(i);
      if (j >= 0 && j < problem.m) {
        convert_row(y + j * d, own.data(), d);
        const double bias = problem.col_bias ? problem.col_biases()[j] : 0.0f;
        scores[i] = problem.scales()[i] * dot(x + i * d, own.data(), d) + problem.offsets()[i] + bias;
      }
    }
  });
  return scores;
}

}  // namespace

std::unique_ptr<Sweep> make_sweep(const Problem& problem, const Plan& plan, bool in_one_go) {
  switch (problem.x.scalar_type()) {
    case at::kFloat:
      return std::make_unique<TypedSweep<float, float>>(problem, plan, in_one_go);
    case at::kHalf:
      return std::make_unique<TypedSweep<at::Half, float>>(problem, plan, in_one_go);
    default:
      if (multiplies_bfloat16()) {
        return std::make_unique<TypedSweep<at::BFloat16, at::BFloat16>>(problem, plan, in_one_go);
      }
      return std::make_unique<TypedSweep<at::BFloat16, float>>(problem, plan, in_one_go);
  }
}

std::vector<double> pair_scores(const Problem& problem, const Partner& partner) {
  switch (problem.x.scalar_type()) {
    case at::kFloat:
      return typed_pair_scores<float>(problem, partner);
    case at::kHalf:
      return typed_pair_scores<at::Half>(problem, partner);
    default:
      return typed_pair_scores<at::BFloat16>(problem, partner);
  }
}

}  // namespace pairtile
