#include "sweep.h"

#include "one_go.h"
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

template <typename T>
struct Type {
  using type = T;
};

// body(type of the features, type they are multiplied in)
template <typename Body>
auto with_types(const Problem& problem, const Body& body) {
  switch (problem.x.scalar_type()) {
    case at::kFloat:
      return body(Type<float>(), Type<float>());
    case at::kHalf:
      return body(Type<at::Half>(), Type<float>());
    default:
      return multiplies_bfloat16() ? body(Type<at::BFloat16>(), Type<at::BFloat16>())
                                   : body(Type<at::BFloat16>(), Type<float>());
  }
}

}  // namespace

std::unique_ptr<Sweep> make_sweep(const Problem& problem, const Plan& plan, bool in_one_go) {
  return with_types(problem, [&](auto in, auto operand) -> std::unique_ptr<Sweep> {
    using Typed = TypedSweep<typename decltype(in)::type, typename decltype(operand)::type>;
    return std::make_unique<Typed>(problem, plan, in_one_go);
  });
}

Gradients forward_backward(const Problem& problem, const Plan& plan, Needed needed, const UpstreamOf& upstream_of) {
  return with_types(problem, [&](auto in, auto operand) {
    using Operand = typename decltype(operand)::type;
    using Go = OneGo<typename decltype(in)::type, Operand>;
    const Steps steps(problem, sizeof(Operand));
    if (steps.worth_it(problem)) {
      const Mode mode(problem, plan);
      if (Go::serves(plan, mode, needed)) {
        return Go(problem, plan, mode, steps).forward_backward(needed, upstream_of);
      }
    }
    return make_sweep(problem, plan, /*in_one_go=*/true)->forward_backward(needed, upstream_of);
  });
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
