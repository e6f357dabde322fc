#include "problem.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "operands.h"

namespace pairtile {
namespace {

constexpr int64_t kTileRows = 256, kTileCols = 256;
constexpr int64_t kLeastRows = 32, kLeastStoredRows = 64;
constexpr int64_t kWorkingBytes = int64_t{14} << 20;
constexpr int64_t kStoredChunks = 2;

at::Tensor as_float(const at::Tensor& tensor) { return tensor.to(at::kFloat).contiguous(); }

template <typename T>
double largest_norm(const at::Tensor& features) {
  const T* data = features.const_data_ptr<T>();
  const int64_t d = features.size(1);
  return at::parallel_reduce(
      0, features.size(0), std::max<int64_t>(1, 65536 / std::max<int64_t>(d, 1)), 0.0,
      [&](int64_t begin, int64_t end, double largest) {
        for (int64_t i = begin; i < end; ++i) {
          float lanes[16] = {};
          const T* row = data + i * d;
          int64_t k = 0;
          for (; k + 16 <= d; k += 16) {
            for (int64_t l = 0; l < 16; ++l) {
              const float value = static_cast<float>(row[k + l]);
              lanes[l] += value * value;
            }
          }
          double square = 0;
          for (; k < d; ++k) {
            square += static_cast<double>(static_cast<float>(row[k])) * static_cast<float>(row[k]);
          }
          for (float lane : lanes) {
            square += lane;
          }
          // Not std::max, which would drop a NaN.
          largest = square > largest || std::isnan(square) ? square : largest;
        }
        return largest;
      },
      [](double a, double b) { return std::isnan(a) || a > b ? a : b; });
}

double largest_norm(const at::Tensor& features) {
  switch (features.scalar_type()) {
    case at::kFloat:
      return std::sqrt(largest_norm<float>(features));
    case at::kHalf:
      return std::sqrt(largest_norm<at::Half>(features));
    default:
      return std::sqrt(largest_norm<at::BFloat16>(features));
  }
}

at::Tensor one_for_each_row(const at::Tensor& scale, int64_t n) {
  TORCH_CHECK(scale.numel() == 1 || scale.numel() == n, "scale has ", scale.numel(), " entries: expected 1 or ", n);
  return as_float(scale).reshape({-1}).expand({n}).contiguous();
}

double largest(const float* values, int64_t count) {
  float found = 0;
  for (int64_t k = 0; k < count; ++k) {
    const float value = std::abs(values[k]);
    found = value > found || std::isnan(value) ? value : found;
  }
  return found;
}

}  // namespace

Features make_features(const at::Tensor& x, const at::Tensor& y, const at::Tensor& scale) {
  TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1) && x.scalar_type() == y.scalar_type(), "x ",
              x.sizes(), " and y ", y.sizes(), ": expected [N, D] and [M, D], of one type");
  return {x.contiguous(), y.contiguous(), one_for_each_row(scale, x.size(0))};
}

Problem make_problem(const at::Tensor& x, const at::Tensor& y, const at::Tensor& scale,
                     const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& row_bias,
                     const std::optional<at::Tensor>& col_bias, int64_t budget) {
  TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1), "x ", x.sizes(), " and y ", y.sizes(),
              ": expected [N, D] and [M, D]");
  TORCH_CHECK(x.scalar_type() == y.scalar_type() &&
                  (x.scalar_type() == at::kFloat || x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16),
              "x is ", x.scalar_type(), ", y ", y.scalar_type(), ": expected one of float32, float16 and bfloat16");
  const int64_t n = x.size(0), m = y.size(0);
  Problem problem{x.contiguous(), y.contiguous(), one_for_each_row(scale, n), {}, {}, n, m, x.size(1), budget, {}};
  problem.offset = at::zeros({n}, problem.scale.options());
  if (bias) {
    problem.offset.add_(as_float(*bias).reshape({}));
  }
  if (row_bias) {
    TORCH_CHECK(row_bias->numel() == n, "row_bias has ", row_bias->numel(), " entries: expected ", n);
    problem.offset.add_(as_float(*row_bias).reshape({n}));
  }
  if (col_bias) {
    TORCH_CHECK(col_bias->numel() == m, "col_bias has ", col_bias->numel(), " entries: expected ", m);
    problem.col_bias = as_float(*col_bias).reshape({m});
  }
  return problem;
}

int64_t Problem::total_depth() const {
  int64_t depth = d;
  for (const Features& teacher : teachers) {
    depth += teacher.d();
  }
  return depth;
}

Tiles::Tiles(const Problem& problem, bool stores_panels) {
  rows = std::clamp<int64_t>(round_up(ceil_div(problem.n, 8), 16), kLeastRows, kTileRows);
  width = std::max<int64_t>(round_up(problem.m, 16), 16);
  if (stores_panels) {
    const int64_t room = (problem.budget - working_bytes(problem)) / (width * static_cast<int64_t>(sizeof(float)));
    int64_t lower = rows;
    while (lower > kLeastStoredRows && kStoredChunks * lower > room) {
      lower /= 2;
    }
    rows = kStoredChunks * lower > room ? rows : round_up(lower, 16);
  }
  cols = std::min(kTileCols, width);
  // Very wide features: a block of them, packed, takes a quarter of the working memory at most.
  while (cols > 16 && cols * problem.total_depth() * static_cast<int64_t>(sizeof(float)) > working_bytes(problem) / 4) {
    cols = round_up(cols / 2, 16);
  }
  chunks = ceil_div(problem.n, rows);
  blocks = ceil_div(problem.m, cols);
}

int64_t working_bytes(const Problem& problem) { return std::min(problem.budget / 4, kWorkingBytes); }

int64_t kept_chunks(const Problem& problem, const Tiles& tiles, int64_t matrices) {
  const int64_t bytes = matrices * tiles.chunk_floats() * static_cast<int64_t>(sizeof(float));
  return bytes == 0 ? 0 : std::min(tiles.chunks, (problem.budget - working_bytes(problem)) / bytes);
}

Bounds bounds_of(const Problem& problem) {
  constexpr double none = std::numeric_limits<double>::infinity();
  if (problem.col_bias) {
    return {none, none};
  }
  float scale = 0, offset = 0;
  for (int64_t i = 0; i < problem.n; ++i) {
    if (!(problem.scales()[i] > 0 && std::isfinite(problem.offsets()[i]))) {
      return {none, none};
    }
    scale = std::max(scale, problem.scales()[i]);
    offset = std::max(offset, std::abs(problem.offsets()[i]));
  }
  const double column = largest_norm(problem.y), bound = scale * largest_norm(problem.x) * column + offset;
  return {std::isfinite(bound) ? bound : none, column};
}

double largest_score(const Problem& problem, int64_t matrix) {
  double bound;
  if (matrix == kScores) {
    bound = largest(problem.scales(), problem.n) * largest_norm(problem.x) * largest_norm(problem.y) +
            largest(problem.offsets(), problem.n) + (problem.col_bias ? largest(problem.col_biases(), problem.m) : 0);
  } else {
    const Features& teacher = problem.teachers[matrix - 1];
    bound = largest(teacher.scale.const_data_ptr<float>(), problem.n) * largest_norm(teacher.x) *
            largest_norm(teacher.y);
  }
  return std::isfinite(bound) ? bound : std::numeric_limits<double>::infinity();
}

}  // namespace pairtile
