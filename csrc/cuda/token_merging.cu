// Merging: a warp owns a slab of the channels of one row of the result, and writes each of them once.

#include "launch.h"

namespace pairtile {
namespace {

constexpr int kWarps = 4;

template <class State>
struct CudaWarp {
  State state;

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % kLanes; }
  template <class F>
  __device__ void each(F&& f) {
    f(lane(), state);
  }
  template <class F>
  __device__ uint32_t ballot(F&& f) {
    return __ballot_sync(0xffffffffu, f(lane()));
  }
};

template <class T, class Slab>
__device__ void run(const CombineProblem<T>& problem, int row, int first_channel) {
  CudaWarp<LaneSums<Slab>> warp;
  combine_place<Slab>(warp, problem, row, first_channel);
}

template <class T, class Slab>
__device__ void run(const SpreadProblem<T>& problem, int row, int first_channel) {
  CudaWarp<int> warp;
  spread_token<Slab>(warp, problem, row, first_channel);
}

template <class Slab, class Problem>
__global__ void __launch_bounds__(kWarps* kLanes) move_tokens_kernel(const Problem problem, int rows) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kLanes;
  if (row < rows) {
    run<typename Problem::Element, Slab>(problem, static_cast<int>(row), blockIdx.y * Slab::kChannels);
  }
}

template <class Problem>
cudaError_t launch(const Problem& problem, cudaStream_t stream) {
  if (problem.rows() == 0) {
    return cudaSuccess;
  }
  with_slab(problem, [&](auto slab) {
    using Slab = decltype(slab);
    // Rows without channels still have totals.
    const dim3 grid(ceil_div(problem.rows(), kWarps), ceil_div(problem.width > 0 ? problem.width : 1, Slab::kChannels));
    move_tokens_kernel<Slab><<<grid, kWarps * kLanes, 0, stream>>>(problem, static_cast<int>(problem.rows()));
  });
  return cudaGetLastError();
}

template <class T>
Tokens<T> typed(const Tokens<void>& x) {
  return {static_cast<const T*>(x.data), x.sample_stride, x.token_stride, x.count};
}

template <class T>
CombineProblem<T> typed(const CombineProblem<void>& p) {
  return {typed<T>(p.x), p.kept,  p.sources, p.places,   p.batch,  p.count,
          p.merged,      p.width, p.factors, p.sizes, p.divisors, p.totals, static_cast<T*>(p.out)};
}

template <class T>
SpreadProblem<T> typed(const SpreadProblem<void>& p) {
  return {typed<T>(p.x), p.place_of, p.batch, p.count, p.width, p.factors, p.divisors, static_cast<T*>(p.out)};
}

template <class Problem>
cudaError_t launch_typed(const Problem& problem, TokenType type, cudaStream_t stream) {
  switch (type) {
    case TokenType::kFloat:
      return launch(typed<float>(problem), stream);
    case TokenType::kHalf:
      return launch(typed<__half>(problem), stream);
    case TokenType::kBFloat16:
      return launch(typed<__nv_bfloat16>(problem), stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_combine_tokens(const CombineProblem<void>& problem, TokenType type, cudaStream_t stream) {
  return launch_typed(problem, type, stream);
}

cudaError_t launch_spread_tokens(const SpreadProblem<void>& problem, TokenType type, cudaStream_t stream) {
  return launch_typed(problem, type, stream);
}

}  // namespace pairtile
