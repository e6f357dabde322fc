// Forward and backward together, for a log-sum-exp of rows whose exponentials need no shift.
//
// Some rows of S at a time (a step), of which all exponentials E = exp(S) are stored:
//   1. tasks own columns: block by block they multiply a tile, turn it into E, and add E y to sums of their own;
//   2. of rows, whose sums of E are known now, these are added up in order and scaled: dx;
//   3. tasks own columns again, and add x^T G to dy^T, G being E times what the gradient of its row is.
// Columns are cut into the same few groups whatever the threads are. So a step has few barriers however wide S is, and
// every row of y is packed once for all rows of the step, right where it is multiplied.
#pragma once

#include "gradients.h"
#include "parallel.h"
#include "product.h"
#include "tile_work.h"

namespace pairtile {

// How S is cut, by shape and budget alone.
struct Steps {
  static constexpr int64_t kBlock = 256;     // columns of a tile
  static constexpr int64_t kGroups = 8;      // of columns: each adds up an E y of its own
  static constexpr int64_t kMostRows = 320;  // tiles of more leave the second-level cache
  static constexpr int64_t kLeastRows = 64;  // lower steps read y, and add to dy, too often
  static constexpr int64_t kLeastFlops = int64_t{1} << 28;

  Steps(const Problem& problem, int64_t operand_size) : flops(2 * problem.n * problem.m * problem.d) {
    if (flops == 0) {
      return;
    }
    blocks = ceil_div(problem.m, kBlock);
    groups = std::min(blocks, kGroups);
    width = round_up(problem.m, 16);
    const int64_t features = round_up(problem.d, 2);
    const int64_t row_bytes = 4 * (width + groups * problem.d) + 2 * operand_size * features + 8 * groups;
    rows = std::min(problem.budget / row_bytes, kMostRows) / 16 * 16;
    if (rows > 0) {  // as many steps, of one height
      rows = round_up(ceil_div(problem.n, ceil_div(problem.n, rows)), 16);
    }
  }

  bool worth_it(const Problem& problem) const {
    return flops >= kLeastFlops && rows >= std::min(kLeastRows, problem.n);
  }

  int64_t flops;
  // The blocks of a group are first_block(group) : first_block(group + 1).
  int64_t first_block(int64_t group) const { return blocks * group / groups; }

  int64_t blocks = 0, groups = 0, width = 0, rows = 0;
};

template <typename In, typename Operand>
class OneGo {
  static constexpr bool kFloats = std::is_same_v<Operand, float>;
  static constexpr bool kDirect = kFloats && std::is_same_v<In, float>;  // features are operands as they lie
  static constexpr int64_t kPair = kFloats ? 1 : 2;
  static constexpr int64_t kSlice = 128;  // features of y as they lie, of one product
  // Rows of E fetched ahead: a strip of each is too short for the CPU to foresee the next.
  static constexpr int64_t kAhead = 12;
  static constexpr double kLeastNorm = 1e-8, kLargestNorm = 1e8;

 public:
  // Sums of E y are scaled when they are complete: y must be far from the ends of float's range, as E is.
  static bool serves(const Plan& plan, const Mode& mode, Needed needed) {
    const std::vector<Reduction>& all = plan.reductions;
    return mode.uniform && mode.special && all.size() == 2 && all[0].kind == Kind::kLogSumExp && all[0].by_row &&
           !all[1].dense() && all[1].by_row && !needed.row_sums && !needed.col_sums &&
           mode.bounds.column > kLeastNorm && mode.bounds.column < kLargestNorm;
  }

  OneGo(const Problem& problem, const Plan& plan, const Mode& mode, const Steps& steps)
      : problem_(problem),
        plan_(plan),
        mode_(mode),
        steps_(steps),
        n_(problem.n),
        m_(problem.m),
        d_(problem.d),
        depth_(padded_depth<Operand>(problem.d)),
        x_(problem.x.const_data_ptr<In>()),
        y_(problem.y.const_data_ptr<In>()),
        exponentials_(steps.rows * steps.width),
        weighted_(steps.groups * steps.rows * d_),
        turned_(steps.rows * d_),
        rows_(rows_are_operands() ? 0 : steps.rows * depth_),
        sums_(steps.groups * steps.rows) {
    for (int64_t worker = 0; worker < at::get_num_threads(); ++worker) {
      scratch_.emplace_back(steps);
    }
  }

  Gradients forward_backward(Needed needed, const UpstreamOf& upstream_of) {
    std::vector<Upstream> upstream(plan_.reductions.size());
    for (Upstream& each : upstream) {
      each.coefficient.resize(n_);
      each.shift.resize(n_);
    }
    Gradients gradients = start_gradients(problem_, needed);
    const at::Tensor columns = start_columns(problem_, needed, gradients);
    for (int64_t first = 0; first < n_; first += steps_.rows) {
      const int64_t rows = std::min(steps_.rows, n_ - first);
      exponentials(first, rows, needed.x || needed.scale);
      upstream_of(first, first + rows, statistics(rows), upstream);
      if (needed.x || needed.scale) {
        finish_rows(first, rows, upstream, needed, gradients);
      }
      if (needed.y) {
        add_to_columns(first, rows, upstream, columns.mutable_data_ptr<float>());
      }
    }
    if (needed.y) {
      finish_columns(columns.const_data_ptr<float>(), gradients.y.template mutable_data_ptr<In>());
    }
    return gradients;
  }

 private:
  struct Scratch {
    explicit Scratch(const Steps& steps)
        : strip(std::max(kDepth, Steps::kBlock) * kStrip),
          weights(steps.rows * kStrip),
          rounded(kFloats ? 0 : steps.rows * Steps::kBlock),
          lanes(steps.rows * kLanes) {}
    Buffer<Operand> strip;    // of y, packed
    Buffer<float> weights;    // a strip of G
    Buffer<Operand> rounded;  // E, or a strip of G in pairs
    Buffer<float> lanes, copy;
    Removed removed;
  };

  bool rows_are_operands() const { return std::is_same_v<In, Operand> && depth_ == d_; }
  int64_t cols_of(int64_t block) const { return std::min(Steps::kBlock, m_ - block * Steps::kBlock); }

  // E lies block by block, each [rows of a step][its columns, padded].
  Tile tile_at(int64_t first, int64_t begin, int64_t rows, int64_t block) {
    const int64_t cols = cols_of(block), ld = round_up(cols, 16);
    float* data = exponentials_.data() + block * Steps::kBlock * steps_.rows;
    return {data + begin * ld, ld, first + begin, rows, block * Steps::kBlock, cols};
  }

  // ---- 1 --------------------------------------------------------------------------------------------------------

  void exponentials(int64_t first, int64_t rows, bool weighs) {
    if (!rows_are_operands()) {
      for_each_task(ceil_div(rows, 16), [&](int64_t task, int64_t) {
        const int64_t begin = 16 * task;
        copy_rows(x_ + (first + begin) * d_, std::min<int64_t>(16, rows - begin), d_, depth_, d_,
                  rows_.data() + begin * depth_);
      });
    }
    // Where threads are many, rows are shared out too, and each slice packs its own y^T: no sum runs along rows here.
    const int64_t threads = at::get_num_threads();
    const int64_t wanted = std::clamp<int64_t>(ceil_div(threads, steps_.groups), 1, ceil_div(rows, 64));
    const int64_t height = round_up(ceil_div(rows, wanted), 16), slices = ceil_div(rows, height);
    for_each_task(steps_.groups * slices, [&](int64_t task, int64_t worker) {
      const int64_t group = task / slices, begin = task % slices * height, count = std::min(height, rows - begin);
      double* sums = sums_.data() + group * steps_.rows + begin;
      std::fill_n(sums, count, 0.0);
      const int64_t start = steps_.first_block(group);
      for (int64_t block = start; block < steps_.first_block(group + 1); ++block) {
        Tile tile = tile_at(first, begin, count, block);
        multiply(tile, begin, scratch_[worker]);
        exponentiate(tile, sums, scratch_[worker]);
        if (weighs) {
          add_weighted(tile, weighted_.data() + (group * steps_.rows + begin) * d_, block > start, scratch_[worker]);
        }
      }
    });
  }

  const Operand* rows_from(int64_t row0, int64_t begin) {
    if constexpr (std::is_same_v<In, Operand>) {
      if (rows_are_operands()) {
        return x_ + row0 * d_;
      }
    }
    return rows_.data() + begin * depth_;
  }

  void multiply(const Tile& tile, int64_t begin, Scratch& scratch) {
    const Operand* rows = rows_from(tile.row0, begin);
    for (int64_t c = 0; c < tile.ld; c += kStrip) {
      const int64_t width = std::min(kStrip, tile.ld - c), real = std::clamp<int64_t>(tile.cols - c, 0, kStrip);
      for (int64_t k = 0; k < depth_; k += kDepth) {
        const int64_t depth = std::min(kDepth, depth_ - k);
        pack_transposed(y_ + (tile.col0 + c) * d_ + k, real, std::min(depth, d_ - k), d_, scratch.strip.data(), width);
        product(tile.rows, width, depth, rows + k, depth_, scratch.strip.data(), width, tile.data + c, tile.ld, k > 0);
      }
    }
  }

  void exponentiate(Tile& tile, double* sums, Scratch& scratch) {
    fill_padding(tile);
    remove_special(mode_, tile, scratch.removed);
    scratch.removed.forget();
    RowSums lanes(scratch.lanes.data(), tile.rows);
    const float* offset = problem_.offsets() + tile.row0;
    weigh_tile<false, false>(tile, problem_.scales() + tile.row0, offset, nullptr, nullptr, tile.data,
                             [&](int64_t r, Vec v) {
                               const Vec value = exp(v);
                               lanes.add(r, value);
                               return value;
                             });
    lanes.add_to(sums);
  }

  // weighted [rows, d] (+)= E y.
  void add_weighted(const Tile& tile, float* weighted, bool add, Scratch& scratch) {
    const In* features = y_ + tile.col0 * d_;
    if constexpr (kDirect) {
      for (int64_t k = 0; k < d_; k += kSlice) {
        product(tile.rows, std::min(kSlice, d_ - k), tile.cols, tile.data, tile.ld, features + k, d_, weighted + k, d_,
                add);
      }
    } else {
      const Operand* weights;
      if constexpr (kFloats) {
        weights = tile.data;
      } else {
        convert_row(tile.data, scratch.rounded.data(), tile.rows * tile.ld);
        weights = scratch.rounded.data();
      }
      for (int64_t k = 0; k < d_; k += kStrip) {
        const int64_t width = std::min(kStrip, d_ - k);
        pack_straight(features + k, tile.cols, width, d_, scratch.strip.data());
        product(tile.rows, width, padded_depth<Operand>(tile.cols), weights, tile.ld, scratch.strip.data(), width,
                weighted + k, d_, add);
      }
    }
  }

  // ---- 2 --------------------------------------------------------------------------------------------------------

  std::vector<Statistics> statistics(int64_t rows) {
    std::vector<Statistics> all(plan_.reductions.size());
    all[0].shift.assign(rows, 0.0);
    all[0].sum.assign(rows, 0.0);
    for (int64_t group = 0; group < steps_.groups; ++group) {
      for (int64_t r = 0; r < rows; ++r) {
        all[0].sum[r] += sums_.data()[group * steps_.rows + r];
      }
    }
    return all;
  }

  // Adds up the groups' E y. dx_i = scale_i (G y)_i, and d scale_i = <x_i, (G y)_i>.
  void finish_rows(int64_t first, int64_t rows, const std::vector<Upstream>& upstream, Needed needed,
                   Gradients& gradients) {
    const Partner& partner = *mode_.special;
    In* dx = needed.x ? gradients.x.template mutable_data_ptr<In>() : nullptr;
    for_each_task(ceil_div(rows, 16), [&](int64_t task, int64_t) {
      for (int64_t r = 16 * task; r < std::min(16 * task + 16, rows); ++r) {
        const int64_t i = first + r, j = partner.column_of(i);
        float* sum = weighted_.data() + r * d_;
        for (int64_t group = 1; group < steps_.groups; ++group) {
          const float* part = sum + group * steps_.rows * d_;
          for (int64_t k = 0; k < d_; ++k) {
            sum[k] += part[k];
          }
        }
        const float others = upstream[0].coefficient[i], scale = problem_.scales()[i];
        for (int64_t k = 0; k < d_; ++k) {
          sum[k] *= others;
        }
        if (j >= 0 && j < m_) {
          const float own = upstream[1].coefficient[i];
          for (int64_t k = 0; k < d_; ++k) {
            sum[k] += own * static_cast<float>(y_[j * d_ + k]);
          }
        }
        if (needed.scale) {
          gradients.scale[i] = dot(x_ + i * d_, sum, d_);
        }
        for (int64_t k = 0; dx != nullptr && k < d_; ++k) {
          dx[i * d_ + k] = static_cast<In>(scale * sum[k]);
        }
      }
    });
  }

  // ---- 3 --------------------------------------------------------------------------------------------------------

  // dy^T (+)= x^T G. dy^T [d, cols] of a block lies where its rows of dy will be.
  void add_to_columns(int64_t first, int64_t rows, const std::vector<Upstream>& upstream, float* dy) {
    const int64_t ld = round_up(rows, 16), depth = padded_depth<Operand>(rows);
    for_each_task(ceil_div(ld, 16), [&](int64_t task, int64_t) {
      const int64_t begin = 16 * task;
      pack_turned(x_ + (first + begin) * d_, std::min<int64_t>(16, rows - begin), d_, turned_.data() + begin, ld, 16);
    });
    for_each_task(steps_.blocks, [&](int64_t block, int64_t worker) {
      Scratch& scratch = scratch_[worker];
      const Tile tile = tile_at(first, 0, rows, block);
      for (int64_t c = 0; c < tile.cols; c += kStrip) {
        const int64_t width = std::min(kStrip, tile.ld - c);
        const Operand* weights = strip_of_weights(tile, c, width, upstream, scratch);
        product(d_, std::min(kStrip, tile.cols - c), depth, turned_.data(), ld, weights, width,
                dy + tile.col0 * d_ + c, tile.cols, first > 0);
      }
    });
  }

  // scale_i G_ij of `width` columns behind c, as an operand B.
  const Operand* strip_of_weights(const Tile& tile, int64_t c, int64_t width, const std::vector<Upstream>& upstream,
                                  Scratch& scratch) {
    const Partner& partner = *mode_.special;
    float* weights = scratch.weights.data();
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t i = tile.row0 + r, own = partner.column_of(i) - tile.col0 - c;
      const float scale = problem_.scales()[i];
      const Vec factor(scale * upstream[0].coefficient[i]);
      for (int64_t k = 0; k < width && r + kAhead < tile.rows; k += 16) {
        __builtin_prefetch(tile.row(r + kAhead) + c + k);
      }
      for (int64_t k = 0; k < width; k += kLanes) {
        (Vec::loadu(tile.row(r) + c + k) * factor).store(weights + r * width + k);
      }
      if (own >= 0 && own < width) {
        weights[r * width + own] = scale * upstream[1].coefficient[i];
      }
    }
    if constexpr (kFloats) {
      return weights;
    } else {
      pair_weights(weights, tile.rows, width, scratch.rounded.data());
      return scratch.rounded.data();
    }
  }

  void finish_columns(const float* sums, In* dy) {
    for_each_task(steps_.blocks, [&](int64_t block, int64_t worker) {
      const int64_t start = block * Steps::kBlock * d_;
      finish_block(sums + start, cols_of(block), d_, /*transposed=*/true, 1.0f, scratch_[worker].copy, dy + start);
    });
  }

  const Problem& problem_;
  const Plan& plan_;
  const Mode& mode_;
  const Steps& steps_;
  const int64_t n_, m_, d_, depth_;
  const In *x_, *y_;
  // Of a step.
  Buffer<float> exponentials_, weighted_;
  Buffer<Operand> turned_, rows_;
  Buffer<double> sums_;
  std::vector<Scratch> scratch_;
};

}  // namespace pairtile
