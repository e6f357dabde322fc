#include "nested.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "gradients.h"
#include "memory.h"
#include "operands.h"
#include "parallel.h"
#include "product.h"
#include "tile.h"

namespace pairtile {
namespace {

constexpr int64_t kRows = 128, kCols = 256, kLeastRows = 32, kPanelRows = 512;
constexpr int64_t kWorkingBytes = int64_t{14} << 20;
constexpr double kShortest = 1e-12;  // F.normalize's eps
constexpr double kRounding = 1e-6;   // of a length that was kept as a float
constexpr float kZero = -100.0f;     // exp of it is an exact 0

at::TensorOptions doubles() { return at::TensorOptions().dtype(at::kDouble); }
double softplus(double v) { return std::max(v, 0.0) + std::log1p(std::exp(-std::abs(v))); }
double sigmoid(double v) { return v >= 0 ? 1 / (1 + std::exp(-v)) : std::exp(v) / (1 + std::exp(v)); }

class Nested {
 public:
  explicit Nested(const NestedProblem& problem)
      : problem_(problem),
        n_(problem.n()),
        m_(problem.m()),
        d_(problem.d()),
        levels_(problem.levels()),
        height_(std::clamp<int64_t>(round_up(ceil_div(n_, 8), 16), kLeastRows, kRows)),
        chunks_(ceil_div(n_, height_)),
        blocks_(ceil_div(m_, kCols)),
        x_(problem.x.const_data_ptr<float>()),
        y_(problem.y.const_data_ptr<float>()),
        row_factors_(factors(problem.x, problem.scale)),
        col_factors_(factors(problem.y, 1.0)) {
    // In a panel some chunks meet some blocks: y and y^T of these, and the weights of all widths, share the working
    // memory. What dy gains from a panel is written once, so its rows should be many.
    const int64_t working = std::min(problem.budget / 4, kWorkingBytes), tile = tile_floats() * levels_ * 4;
    panel_chunks_ = std::clamp<int64_t>(std::min(kPanelRows / height_, working / (2 * tile)), 1, std::max<int64_t>(chunks_, 1));
    panel_blocks_ =
        std::clamp<int64_t>(working / (panel_chunks_ * tile + 2 * kCols * d_ * 4), 1, std::max<int64_t>(blocks_, 1));
    for (int64_t worker = 0; worker < at::get_num_threads(); ++worker) {
      scratch_.emplace_back(*this);
    }
  }

  NestedState forward(bool keep) {
    NestedState state;
    state.rows = at::zeros({levels_, n_}, doubles());
    state.cols = at::zeros({levels_, m_}, doubles());
    const int64_t kept = keep ? kept_chunks() : 0;
    state.kept = empty_in_huge_pages({kept * chunk_floats()}, at::TensorOptions().dtype(at::kFloat));
    float* store = kept > 0 ? state.kept.mutable_data_ptr<float>() : nullptr;
    double *rows = state.rows.mutable_data_ptr<double>(), *cols = state.cols.mutable_data_ptr<double>();
    const int64_t height = std::min<int64_t>(chunks_, 16), width = std::max<int64_t>(1, std::min(blocks_, kWorkingBytes / (kCols * d_ * 4)));
    Buffer<float> partial(height * levels_ * width * kCols);
    for (int64_t first = 0; first < chunks_; first += height) {
      const int64_t last = std::min(first + height, chunks_);
      for (int64_t block = 0; block < blocks_; block += width) {
        const int64_t end = std::min(block + width, blocks_);
        pack_columns(block, end);
        for_each_task(last - first, [&](int64_t task, int64_t worker) {
          for (int64_t b = block; b < end; ++b) {
            float* sums = partial.data() + (task * width + b - block) * levels_ * kCols;
            sum_tiles(first + task, b, block, first + task < kept ? store : nullptr, rows, sums, scratch_[worker]);
          }
        });
        for_each_task(end - block, [&](int64_t task, int64_t) {
          for (int64_t chunk = 0; chunk < last - first; ++chunk) {
            const float* sums = partial.data() + (chunk * width + task) * levels_ * kCols;
            add_columns(block + task, sums, cols);
          }
        });
      }
    }
    state.own = own_scores();
    state.value = value(state);
    return state;
  }

  NestedGradients backward(const NestedState& state, double upstream) {
    find_coefficients(state, upstream);
    NestedGradients gradients{at::zeros({n_, d_}, problem_.x.options()), empty_in_huge_pages({m_, d_}, problem_.y.options()), 0};
    float *dx = gradients.x.mutable_data_ptr<float>(), *dy = gradients.y.mutable_data_ptr<float>();
    const int64_t kept = state.kept.numel() / std::max<int64_t>(chunk_floats(), 1);
    // Pairs that are taken out of a stored tile are put back: it is as const as it looks, one thread at a time.
    float* store = kept > 0 ? const_cast<float*>(state.kept.const_data_ptr<float>()) : nullptr;
    row_sums_.assign(levels_ * n_, 0.0);
    col_sums_.assign(levels_ * m_, 0.0);
    Buffer<float> partial(panel_chunks_ * levels_ * panel_blocks_ * kCols);
    weights_.reserve(panel_chunks_ * panel_blocks_ * levels_ * tile_floats());
    turned_.reserve(panel_chunks_ * height_ * d_);
    for (int64_t first = 0; first < chunks_; first += panel_chunks_) {
      const int64_t last = std::min(first + panel_chunks_, chunks_);
      for_each_task(last - first, [&](int64_t task, int64_t) {
        pack_turned(x_ + (first + task) * height_ * d_, rows_of(first + task), d_, turned_.data() + task * height_,
                    panel_chunks_ * height_, height_);
      });
      for (int64_t block = 0; block < blocks_; block += panel_blocks_) {
        const int64_t end = std::min(block + panel_blocks_, blocks_);
        if (last > kept) {
          pack_columns(block, end);
        }
        pack_blocks(block, end);
        for_each_task(last - first, [&](int64_t task, int64_t worker) {
          for (int64_t b = block; b < end; ++b) {
            float* sums = partial.data() + (task * panel_blocks_ + b - block) * levels_ * kCols;
            const int64_t chunk = first + task;
            weigh_tiles(chunk, b, block, chunk < kept ? store : nullptr, weights_of(task, b - block), sums, scratch_[worker]);
            add_to_rows(chunk, b, straight_.data() + (b - block) * kCols * d_, weights_of(task, b - block), dx);
          }
        });
        for_each_task(end - block, [&](int64_t task, int64_t) {
          for (int64_t chunk = first; chunk < last; ++chunk) {
            add_columns(block + task, partial.data() + ((chunk - first) * panel_blocks_ + task) * levels_ * kCols,
                        col_sums_.data());
          }
          const int64_t rows = std::min(last * height_, n_) - first * height_;
          add_to_columns(rows, block + task, weights_of(0, task), first > 0, dy);
        });
      }
    }
    finish(dx, dy, gradients);
    return gradients;
  }

 private:
  struct Scratch {
    explicit Scratch(const Nested& nested)
        : tiles(nested.levels_ * nested.tile_floats()), lanes(nested.levels_ * nested.height_ * kLanes),
          columns(2 * nested.levels_ * kCols) {}
    Buffer<float> tiles, lanes, columns;
    Removed removed;
  };

  int64_t tile_floats() const { return height_ * kCols; }
  int64_t chunk_floats() const { return blocks_ * levels_ * tile_floats(); }
  int64_t rows_of(int64_t chunk) const { return std::min(height_, n_ - chunk * height_); }
  int64_t cols_of(int64_t block) const { return std::min(kCols, m_ - block * kCols); }
  int64_t start_of(int64_t level) const { return level == 0 ? 0 : problem_.ends[level - 1]; }
  // Weights of a panel: block by block, level by level, all its rows.
  int64_t level_floats() const { return panel_chunks_ * tile_floats(); }
  float* weights_of(int64_t chunk, int64_t block) {
    return weights_.data() + block * levels_ * level_floats() + chunk * tile_floats();
  }
  int64_t kept_chunks() const {
    const int64_t room = problem_.budget - std::min(problem_.budget / 4, kWorkingBytes);
    return std::min(chunks_, room / std::max<int64_t>(4 * chunk_floats(), 1));
  }

  // [levels, rows]: what <x_i, y_j> of each width is multiplied with for the sake of x_i.
  std::vector<float> factors(const at::Tensor& features, double scale) const {
    const int64_t rows = features.size(0);
    const float* data = features.const_data_ptr<float>();
    std::vector<float> found(levels_ * rows, static_cast<float>(scale));
    if (problem_.normalize) {
      at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          double square = 0;
          for (int64_t level = 0; level < levels_; ++level) {
            const float* from = data + i * d_ + start_of(level);
            square += dot(from, from, problem_.ends[level] - start_of(level));
            found[level * rows + i] = static_cast<float>(scale / std::max(std::sqrt(square), kShortest));
          }
        }
      });
    }
    return found;
  }

  at::Tensor own_scores() const {
    at::Tensor own = at::zeros({levels_, n_}, doubles());
    double* scores = own.mutable_data_ptr<double>();
    at::parallel_for(0, n_, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t j = i + problem_.offset;
        double product = 0;
        for (int64_t level = 0; level < levels_ && j >= 0 && j < m_; ++level) {
          const int64_t k = start_of(level);
          product += dot(x_ + i * d_ + k, y_ + j * d_ + k, problem_.ends[level] - k);
          scores[level * n_ + i] =
              product * row_factors_[level * n_ + i] * static_cast<double>(col_factors_[level * m_ + j]);
        }
      }
    });
    return own;
  }

  void pack_columns(int64_t first, int64_t last) {
    columns_.reserve((last - first) * kCols * d_);
    constexpr int64_t strips = kCols / kStrip;
    for_each_task((last - first) * strips, [&](int64_t task, int64_t) {
      const int64_t start = (first + task / strips) * kCols + task % strips * kStrip;
      const int64_t rows = std::clamp<int64_t>(m_ - start, 0, kStrip);
      if (rows > 0) {
        pack_transposed(y_ + start * d_, rows, d_, d_, columns_.data() + task * kStrip * d_, kStrip);
      }
    });
  }

  // y of the blocks first : last, strip by strip of 64 features.
  void pack_blocks(int64_t first, int64_t last) {
    straight_.reserve(panel_blocks_ * kCols * d_);
    for_each_task(last - first, [&](int64_t task, int64_t) {
      pack_straight(y_ + (first + task) * kCols * d_, cols_of(first + task), d_, d_, straight_.data() + task * kCols * d_);
    });
  }

  Tile tile_at(int64_t chunk, int64_t block, float* data) const {
    return {data, kCols, chunk * height_, rows_of(chunk), block * kCols, cols_of(block)};
  }

  // Adds the features of one level to the products of the level before.
  void multiply(const Tile& tile, int64_t level, const float* columns) const {
    const int64_t k = start_of(level), width = round_up(tile.cols, kStrip);
    for (int64_t first = k; first < problem_.ends[level]; first += kDepth) {
      const int64_t depth = std::min(kDepth, problem_.ends[level] - first);
      for (int64_t c = 0; c < width; c += kStrip) {
        product(tile.rows, kStrip, depth, x_ + tile.row0 * d_ + first, d_, columns + c * d_ + first * kStrip, kStrip,
                tile.data + c, tile.ld, first > 0);
      }
    }
  }

  // The products of one level in a tile of its own; `levels` are the tiles of all, one behind the other.
  Tile product_of(int64_t chunk, int64_t block, int64_t panel, int64_t level, float* levels) {
    const Tile tile = tile_at(chunk, block, levels + level * tile_floats());
    if (level > 0) {
      std::copy_n(tile.data - tile_floats(), tile.rows * tile.ld, tile.data);
    }
    multiply(tile, level, columns_.data() + (block - panel) * kCols * d_);
    return tile;
  }

  void remove_own(Tile& tile, Removed& removed) const {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t c = tile.row0 + r + problem_.offset - tile.col0;
      if (c >= 0 && c < tile.cols) {
        removed.remove(tile, r, c);
      }
    }
  }

  // Vectors that hold columns of the tile; what lies behind its columns in the last one is -inf.
  int64_t filled(const Tile& tile) const {
    const int64_t width = round_up(tile.cols, kLanes);
    for (int64_t r = 0; r < tile.rows; ++r) {
      std::fill(tile.row(r) + tile.cols, tile.row(r) + width, -kInfinity);
    }
    return width;
  }

  // A copy of one factor for each column of the tile, padded with a harmless one.
  void copy_columns(const float* from, const Tile& tile, float padding, float* to) const {
    std::copy_n(from + tile.col0, tile.cols, to);
    std::fill(to + tile.cols, to + kCols, padding);
  }

  // ---- forward ----------------------------------------------------------------------------------------------------

  void sum_tiles(int64_t chunk, int64_t block, int64_t panel, float* store, double* rows, float* cols, Scratch& scratch) {
    float* stored = store == nullptr ? nullptr : store + chunk * chunk_floats() + block * levels_ * tile_floats();
    for (int64_t level = 0; level < levels_; ++level) {
      Tile tile = tile_at(chunk, block, scratch.tiles.data());
      if (stored == nullptr) {
        multiply(tile, level, columns_.data() + (block - panel) * kCols * d_);
      } else {
        tile = product_of(chunk, block, panel, level, stored);
      }
      sum_exponentials(tile, level, rows, cols + level * kCols, scratch);
    }
  }

  void sum_exponentials(Tile tile, int64_t level, double* rows, float* cols, Scratch& scratch) {
    remove_own(tile, scratch.removed);
    const int64_t width = filled(tile);
    const float* factor = row_factors_.data() + level * n_ + tile.row0;
    float* columns = scratch.columns.data();
    copy_columns(col_factors_.data() + level * m_, tile, 1.0f, columns);
    RowSums sums(scratch.lanes.data(), tile.rows);
    for_each_strip(width, [&](auto count, int64_t c) {
      constexpr int vectors = decltype(count)::value;
      Vec column[vectors], sum[vectors];
      for (int v = 0; v < vectors; ++v) {
        column[v] = Vec::loadu(columns + c + v * kLanes);
        sum[v] = Vec(0.0f);
      }
      for (int64_t r = 0; r < tile.rows; ++r) {
        const Vec row(factor[r]);
        Vec value[vectors];
        for (int v = 0; v < vectors; ++v) {
          value[v] = exp(Vec::loadu(tile.row(r) + c + v * kLanes) * (row * column[v]));
          sum[v] = sum[v] + value[v];
        }
        sums.add(r, sum_of(value));
      }
      for (int v = 0; v < vectors; ++v) {
        sum[v].store(cols + c + v * kLanes);
      }
    });
    sums.add_to(rows + level * n_ + tile.row0);
    scratch.removed.restore();
  }

  void add_columns(int64_t block, const float* sums, double* cols) const {
    for (int64_t level = 0; level < levels_; ++level) {
      for (int64_t c = 0; c < cols_of(block); ++c) {
        cols[level * m_ + block * kCols + c] += sums[level * kCols + c];
      }
    }
  }

  // body(level, row, column) for every pair.
  template <typename Body>
  void for_each_pair(const Body& body) const {
    for (int64_t level = 0; level < levels_; ++level) {
      for (int64_t i = std::max<int64_t>(0, -problem_.offset); i < std::min(n_, m_ - problem_.offset); ++i) {
        body(level, i, i + problem_.offset);
      }
    }
  }

  double value(const NestedState& state) const {
    const double *rows = state.rows.const_data_ptr<double>(), *cols = state.cols.const_data_ptr<double>();
    const double* own = state.own.const_data_ptr<double>();
    double total = 0;
    for_each_pair([&](int64_t level, int64_t i, int64_t j) {
      const double score = own[level * n_ + i];
      const double by_row = softplus(std::log(rows[level * n_ + i]) - score);
      const double by_col = softplus(std::log(cols[level * m_ + j]) - score);
      total += problem_.weights[level] * (problem_.row_weight * by_row + problem_.col_weight * by_col);
    });
    return total;
  }

  // ---- backward ---------------------------------------------------------------------------------------------------

  void find_coefficients(const NestedState& state, double upstream) {
    const double *rows = state.rows.const_data_ptr<double>(), *cols = state.cols.const_data_ptr<double>();
    const double* own = state.own.const_data_ptr<double>();
    row_coefficients_.assign(levels_ * n_, 0.0f);
    col_coefficients_.assign(levels_ * m_, 0.0f);
    own_coefficients_.assign(levels_ * n_, 0.0);
    own_ = own;
    for_each_pair([&](int64_t level, int64_t i, int64_t j) {
      const int64_t row = level * n_ + i, col = level * m_ + j;
      const double weight = upstream * problem_.weights[level];
      const double p = weight * problem_.row_weight * sigmoid(std::log(rows[row]) - own[row]);
      const double q = weight * problem_.col_weight * sigmoid(std::log(cols[col]) - own[row]);
      row_coefficients_[row] = rows[row] == 0 ? 0.0f : static_cast<float>(p / rows[row]);
      col_coefficients_[col] = cols[col] == 0 ? 0.0f : static_cast<float>(q / cols[col]);
      own_coefficients_[row] = -(p + q);
    });
  }

  // For each level the sum, over it and all wider ones, of d loss / d (product of that level); and the sums of G S.
  void weigh_tiles(int64_t chunk, int64_t block, int64_t panel, float* store, float* out, float* cols, Scratch& scratch) {
    float* products = store == nullptr ? scratch.tiles.data() : store + chunk * chunk_floats() + block * levels_ * tile_floats();
    int64_t width = 0;
    for (int64_t level = 0; level < levels_; ++level) {
      if (store == nullptr) {
        product_of(chunk, block, panel, level, products);
      }
    }
    Tile tile = tile_at(chunk, block, products);
    for (int64_t level = 0; level < levels_; ++level) {
      Tile each = tile_at(chunk, block, products + level * tile_floats());
      remove_own(each, scratch.removed);
      width = filled(each);
    }
    float *factors = scratch.columns.data(), *coefficients = factors + levels_ * kCols;
    for (int64_t level = 0; level < levels_; ++level) {
      copy_columns(col_factors_.data() + level * m_, tile, 1.0f, factors + level * kCols);
      copy_columns(col_coefficients_.data() + level * m_, tile, 0.0f, coefficients + level * kCols);
    }
    std::fill_n(cols, levels_ * kCols, 0.0f);
    std::fill_n(scratch.lanes.data(), levels_ * tile.rows * kLanes, 0.0f);
    for_each_strip(width, [&](auto count, int64_t c) {
      weigh_strip<decltype(count)::value>(tile, c, factors, coefficients, out, cols, scratch.lanes.data());
    });
    for (int64_t level = 0; level < levels_; ++level) {
      double* sums = row_sums_.data() + level * n_ + tile.row0;
      for (int64_t r = 0; r < tile.rows; ++r) {
        sums[r] += sum_lanes(Vec::loadu(scratch.lanes.data() + (level * tile.rows + r) * kLanes));
      }
    }
    scratch.removed.restore();
    weigh_own(tile, out, cols);
  }

  template <int vectors>
  void weigh_strip(const Tile& tile, int64_t first, const float* factors, const float* coefficients, float* out,
                   float* cols, float* lanes) const {
    for (int64_t r = 0; r < tile.rows; ++r) {
      Vec total[vectors];
      for (int v = 0; v < vectors; ++v) {
        total[v] = Vec(0.0f);
      }
      for (int64_t level = levels_ - 1; level >= 0; --level) {
        const int64_t row = level * n_ + tile.row0 + r;
        const Vec row_factor(row_factors_[row]), row_coefficient(row_coefficients_[row]);
        const float* from = tile.row(r) + level * tile_floats() + first;
        float* to = out + level * level_floats() + r * tile.ld + first;
        Vec terms[vectors];
        for (int v = 0; v < vectors; ++v) {
          const int64_t at = level * kCols + first + v * kLanes;
          const Vec factor = row_factor * Vec::loadu(factors + at);
          const Vec score = at::vec::maximum(Vec::loadu(from + v * kLanes) * factor, Vec(kZero));
          const Vec weight = exp(score) * (row_coefficient + Vec::loadu(coefficients + at));
          terms[v] = weight * score;
          (Vec::loadu(cols + at) + terms[v]).store(cols + at);
          total[v] = at::vec::fmadd(weight, factor, total[v]);
          total[v].store(to + v * kLanes);
        }
        float* row_lanes = lanes + (level * tile.rows + r) * kLanes;
        (Vec::loadu(row_lanes) + sum_of(terms)).store(row_lanes);
      }
    }
  }

  void weigh_own(const Tile& tile, float* out, float* cols) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t i = tile.row0 + r, j = i + problem_.offset, c = j - tile.col0;
      if (c < 0 || c >= tile.cols) {
        continue;
      }
      double total = 0;
      for (int64_t level = levels_ - 1; level >= 0; --level) {
        const double weight = own_coefficients_[level * n_ + i], term = weight * own_[level * n_ + i];
        row_sums_[level * n_ + i] += term;
        cols[level * kCols + c] += static_cast<float>(term);
        total += weight * row_factors_[level * n_ + i] * static_cast<double>(col_factors_[level * m_ + j]);
        out[level * level_floats() + r * tile.ld + c] = static_cast<float>(total);
      }
    }
  }

  // dx += G y, with y in strips of 64 features: a width may end, and other weights begin, within one.
  void add_to_rows(int64_t chunk, int64_t block, const float* strips, const float* weights, float* dx) const {
    const int64_t cols = cols_of(block);
    for (int64_t level = 0; level < levels_; ++level) {
      for (int64_t k = start_of(level); k < problem_.ends[level];) {
        const int64_t strip = k / kStrip * kStrip, width = std::min(kStrip, d_ - strip);
        const int64_t end = std::min(problem_.ends[level], strip + kStrip);
        product(rows_of(chunk), end - k, cols, weights + level * level_floats(), kCols, strips + strip * cols + k - strip,
                width, dx + chunk * height_ * d_ + k, d_, block > 0);
        k = end;
      }
    }
  }

  // dy^T += x^T G, of all rows of a panel. dy^T [d, cols] of a block lies where its rows of dy will be.
  void add_to_columns(int64_t rows, int64_t block, const float* weights, bool add, float* dy) {
    const int64_t cols = cols_of(block), ld = panel_chunks_ * height_;
    for (int64_t level = 0; level < levels_; ++level) {
      const int64_t k = start_of(level), depth = problem_.ends[level] - k;
      for (int64_t c = 0; c < cols; c += kStrip) {
        product(depth, std::min(kStrip, cols - c), rows, turned_.data() + k * ld, ld, weights + level * level_floats() + c,
                kCols, dy + block * kCols * d_ + k * cols + c, cols, add);
      }
    }
  }

  // Turns dy, takes off what a prefix's length takes, and adds up d scale.
  void finish(float* dx, float* dy, NestedGradients& gradients) {
    for_each_task(blocks_, [&](int64_t block, int64_t) {
      Buffer<float> copy;
      const int64_t start = block * kCols * d_;
      finish_block(dy + start, cols_of(block), d_, /*transposed=*/true, 1.0f, copy, dy + start);
    });
    if (problem_.normalize) {
      take_off_lengths(x_, n_, row_factors_, problem_.scale, row_sums_, dx);
      take_off_lengths(y_, m_, col_factors_, 1.0, col_sums_, dy);
    }
    for (double sum : row_sums_) {
      gradients.scale += sum / problem_.scale;
    }
  }

  // S has the factor 1 / |x_i| of each prefix: its part of dx_i is -(sum_j G_ij S_ij) x_i / |x_i|^2.
  void take_off_lengths(const float* features, int64_t rows, const std::vector<float>& factors, double scale,
                        const std::vector<double>& sums, float* gradient) const {
    at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double total = 0;
        for (int64_t level = levels_ - 1; level >= 0; --level) {
          const double inverse = factors[level * rows + i] / scale;
          total += inverse * kShortest < 1 - kRounding ? sums[level * rows + i] * inverse * inverse : 0.0;
          for (int64_t k = start_of(level); k < problem_.ends[level]; ++k) {
            gradient[i * d_ + k] -= static_cast<float>(total) * features[i * d_ + k];
          }
        }
      }
    });
  }

  const NestedProblem& problem_;
  const int64_t n_, m_, d_, levels_, height_, chunks_, blocks_;
  const float *x_, *y_;
  const std::vector<float> row_factors_, col_factors_;
  int64_t panel_chunks_, panel_blocks_;
  Buffer<float> columns_, straight_, weights_, turned_;
  std::vector<float> row_coefficients_, col_coefficients_;
  std::vector<double> own_coefficients_, row_sums_, col_sums_;
  const double* own_ = nullptr;
  std::vector<Scratch> scratch_;
};

}  // namespace

NestedState nested_forward(const NestedProblem& problem, bool keep) { return Nested(problem).forward(keep); }

NestedGradients nested_backward(const NestedProblem& problem, const NestedState& state, double upstream) {
  return Nested(problem).backward(state, upstream);
}

}  // namespace pairtile
