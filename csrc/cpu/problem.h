// One similarity matrix, and those of its teachers: operands, how they are cut into tiles, and how much memory that may
// take.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "plan.h"
#include "vec.h"

namespace pairtile {

// A similarity without biases, scale_i <x_i, y_j>: a teacher's.
struct Features {
  at::Tensor x, y;    // [n, d], [m, d], contiguous, of one type
  at::Tensor scale;   // [n], float
  int64_t d() const { return x.size(1); }
};

Features make_features(const at::Tensor& x, const at::Tensor& y, const at::Tensor& scale);

// S_ij = scale_i <x_i, y_j> + offset_i + col_bias_j, contiguous; x and y of one type, the rest float.
struct Problem {
  at::Tensor x, y;
  at::Tensor scale;                     // [n]
  at::Tensor offset;                    // [n]: bias + row_bias
  std::optional<at::Tensor> col_bias;   // [m]
  int64_t n, m, d;
  int64_t budget;                       // bytes
  std::vector<Features> teachers;       // features of S's type

  // Features of one column in all matrices.
  int64_t total_depth() const;
  const float* scales() const { return scale.const_data_ptr<float>(); }
  const float* offsets() const { return offset.const_data_ptr<float>(); }
  const float* col_biases() const { return col_bias ? col_bias->const_data_ptr<float>() : nullptr; }
};

Problem make_problem(const at::Tensor& x, const at::Tensor& y, const at::Tensor& scale,
                     const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& row_bias,
                     const std::optional<at::Tensor>& col_bias, int64_t budget);

// Rows are cut into chunks, columns into blocks; a tile is a chunk against a block. Sizes depend on shapes and budget
// alone, never on threads: the order of all sums, and with it the bits of every result, hangs on them.
struct Tiles {
  // `stores_panels`: all cosines of some chunks at a time will be stored, so chunks are lower if S is wide.
  explicit Tiles(const Problem& problem, bool stores_panels = false);

  int64_t rows, cols;       // of a tile; cols is a multiple of 16
  int64_t chunks, blocks;
  int64_t width;            // all columns, padded to 16: what a row of stored tiles takes

  int64_t rows_of(int64_t chunk, int64_t n) const { return std::min(rows, n - chunk * rows); }
  int64_t cols_of(int64_t block, int64_t m) const { return std::min(cols, m - block * cols); }
  int64_t chunk_floats() const { return rows * width; }
};

// Bytes beside the stored tiles, for panels of packed operands and weights. Each thread's own tile, half a MiB or so,
// comes on top.
int64_t working_bytes(const Problem& problem);

// Chunks (the first ones) whose tiles, of `matrices` each, fit what the budget leaves, kept from the forward to the
// backward. kernels/contrastive/cpp_backend.py repeats this formula for shapes without data.
int64_t kept_chunks(const Problem& problem, const Tiles& tiles, int64_t matrices = 1);

struct Bounds {
  double score;   // of |S|; infinite where a scale is not positive, a column bias is given, or a number is not finite
  double column;  // the largest norm in y, if that of the scores is finite
};
Bounds bounds_of(const Problem& problem);

// A bound of the absolute values of a matrix, whatever the signs of its scales; infinite where there is none.
double largest_score(const Problem& problem, int64_t matrix);

// Up to this bound exp(S) is safe without a shift, in sums and in weights exp(S) * (gradient / sum). The factor
// of an owner whose m scores are all 50 is a normal float, with all its digits, while gradient / m is above 6e-17. (At
// 80 that was 7e-4, and the mean over a batch lost its digits.)
constexpr double kSafeScore = 50.0;

}  // namespace pairtile
