// The rate of the tile product alone: what the benchmarks call the floor.

#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <chrono>

#include "operands.h"
#include "parallel.h"
#include "product.h"

namespace pairtile {
namespace {

// A thread's GFLOP/s over `seconds` on tiles that stay in its cache.
template <typename T>
double thread_rate(int64_t m, int64_t n, int64_t k, double seconds) {
  using Clock = std::chrono::steady_clock;
  const at::TensorOptions options = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value);
  const int64_t depth = padded_depth<T>(k);
  const at::Tensor a = at::full({m, depth}, 0.01, options), b = at::full({depth, n}, 0.01, options);
  at::Tensor c = at::full({m, n}, 0.0, at::TensorOptions().dtype(at::kFloat));
  auto multiply = [&] {
    product(m, n, depth, a.const_data_ptr<T>(), depth, b.const_data_ptr<T>(), n, c.mutable_data_ptr<float>(), n, false);
  };
  multiply();
  int64_t products = 0;
  const Clock::time_point start = Clock::now();
  double elapsed = 0;
  while (elapsed < seconds) {
    for (int repeat = 0; repeat < 4; ++repeat, ++products) {
      multiply();
    }
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  }
  return 2e-9 * m * n * k * products / elapsed;
}

// GFLOP/s of all threads together, each on tiles [m, k] x [k, n] of its own.
double brgemm_rate(at::ScalarType dtype, int64_t m, int64_t n, int64_t k, double seconds) {
  TORCH_CHECK(dtype == at::kFloat || (dtype == at::kBFloat16 && multiplies_bfloat16()), "brgemm_rate: no tile product of ",
              dtype, " on this machine; float32 always has one");
  TORCH_CHECK(m > 0 && n > 0 && k > 0 && seconds > 0, "brgemm_rate: sizes and seconds must be positive");
  std::vector<double> rates(at::get_num_threads(), 0.0);
  at::parallel_for(0, static_cast<int64_t>(rates.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      rates[t] = dtype == at::kFloat ? thread_rate<float>(m, n, k, seconds) : thread_rate<at::BFloat16>(m, n, k, seconds);
    }
    release_product();
  });
  double total = 0;
  for (double rate : rates) {
    total += rate;
  }
  return total;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pairtile, m) {
  m.def("brgemm_rate(ScalarType dtype, int m, int n, int k, float seconds) -> float", &brgemm_rate);
}

}  // namespace pairtile
