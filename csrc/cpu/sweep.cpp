#include "sweep.h"

#include "one_go.h"
#include "typed_sweep.h"

namespace pairtile {
namespace {

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

}  // namespace pairtile
