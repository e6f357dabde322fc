// The loops over tiles, for features of one type multiplied as operands of another.
//
// Cut into chunks of rows and blocks of columns, S is swept panel by panel: some chunks against some blocks. In a panel
//   1. all threads pack y^T of its blocks, the operand B of the scores;
//   2. tasks own chunks: block by block they multiply a tile, and those of the teachers, reduce them or turn them into
//      weights G while they are in cache, add G y to their rows, and leave G in a buffer of the panel;
//   3. tasks own blocks, and add x^T G to theirs, chunk by chunk. A block of dy stays transposed until the end.
// Few rows of wide float features are not worth packing: then y and x are operands as they lie, and step 3 multiplies
// G^T x, with G transposed instead.
// No two threads ever add to one number, and no sum's order depends on the threads or on the panel.
#pragma once

#include <ATen/Parallel.h>

#include "cosines.h"
#include "gradients.h"
#include "operands.h"
#include "parallel.h"
#include "product.h"
#include "tile_work.h"

namespace pairtile {

template <typename In, typename Operand>
class TypedSweep final : public Sweep {
  static constexpr bool kFloats = std::is_same_v<Operand, float>;
  static constexpr bool kDirect = kFloats && std::is_same_v<In, float>;  // features are operands as they lie
  static constexpr int64_t kPair = kFloats ? 1 : 2;                      // bfloat16 operands B come in pairs of rows
  static constexpr int64_t kOwned = 256;           // features of dy that one task of step 3 adds up
  static constexpr int64_t kLeanRows = 2048;       // up to here features may stay as they lie,
  static constexpr int64_t kFullRows = 256;        // or where chunks had to be lower than this, because S is wide;
  static constexpr int64_t kLeanCols = 64;         // these columns of dy are then one task's
  static constexpr int64_t kPanelRows = 2048;
  static constexpr int64_t kPartialBytes = 2 << 20;
  static constexpr int64_t kSerialFlops = 1 << 20;  // below this, waking threads costs more than it saves

 public:
  TypedSweep(const Problem& problem, const Plan& plan, bool in_one_go)
      : problem_(problem),
        plan_(plan),
        tiles_(problem, in_one_go),
        mode_(problem, plan),
        n_(problem.n),
        m_(problem.m),
        d_(problem.d),
        x_(problem.x.const_data_ptr<In>()),
        y_(problem.y.const_data_ptr<In>()),
        serial_(2 * n_ * m_ * d_ < kSerialFlops),
        lean_(kDirect && (n_ <= kLeanRows ? std::min(n_, m_) < 2 * d_ : in_one_go && tiles_.rows < kFullRows)),
        group_(lean_ && n_ <= kLeanRows ? kDepth / tiles_.rows : 1),
        read_(plan.matrices(problem, /*backward=*/false)),
        read_back_(plan.matrices(problem, /*backward=*/true)) {
    cosines_.emplace_back(problem.x, problem.y, tiles_);
    for (const Features& teacher : problem.teachers) {
      cosines_.emplace_back(teacher.x, teacher.y, tiles_);
    }
    const int64_t workers = serial_ ? 1 : at::get_num_threads();
    const float* scales = problem.scales();
    one_scale_ = std::all_of(scales, scales + n_, [scales](float scale) { return scale == scales[0]; });
    choose_panels(workers);
    for (int64_t worker = 0; worker < workers; ++worker) {
      scratch_.emplace_back(*this);
    }
  }

  bool uniform() const override { return mode_.uniform; }

  std::vector<Statistics> forward(float* kept, int64_t kept_chunks) override {
    Reducer reducer(problem_, plan_, tiles_, mode_);
    // Nothing but partial results of columns bounds the height of a panel here: all chunks, if those stay small.
    const int64_t partial_bytes = kPartials * panel_blocks_ * tiles_.cols * static_cast<int64_t>(sizeof(float));
    const int64_t chunks = std::max(panel_chunks_, kPartialBytes / (partial_bytes * std::max<int64_t>(reducer.slots(), 1)));
    for_each_panel(chunks, kept, kept_chunks, [&](int64_t first, int64_t last, float* store, int64_t stored) {
      forward_panel(first, last, reducer, store, stored);
    });
    return reducer.statistics(0, n_);
  }

  Gradients backward(const std::vector<Upstream>& upstream, Needed needed, const float* kept, int64_t kept_chunks,
                     std::vector<double>* losses) override {
    const Weigher weigher(problem_, plan_, tiles_, mode_, upstream);
    Gradients gradients = start_gradients(problem_, needed);
    dy_ = start_columns(problem_, needed, gradients);
    // Removed pairs are put back into stored tiles: they are as const as they look, one thread at a time.
    for_each_panel(panel_chunks_, const_cast<float*>(kept), kept_chunks, [&](int64_t first, int64_t last, float* store, int64_t stored) {
      backward_panel(first, last, weigher, needed, store, stored, losses, gradients);
    });
    finish_columns(needed, gradients);
    return gradients;
  }

  Gradients forward_backward(Needed needed, const UpstreamOf& upstream_of) override {
    // As many chunks at a time as the budget stores. If that would leave threads idle, tiles are multiplied twice.
    const int64_t fitting = whole_groups(kept_chunks(problem_, tiles_, read_back_.size()));
    const bool stores = fitting >= std::min<int64_t>(scratch_.size(), tiles_.chunks);
    const int64_t step = stores ? std::clamp<int64_t>(fitting, 1, panel_chunks_) : panel_chunks_;
    Buffer<float> cosines(stores ? step * kept_floats() : 0);
    Reducer reducer(problem_, plan_, tiles_, mode_);
    std::vector<Upstream> upstream(plan_.reductions.size());
    for (Upstream& each : upstream) {
      each.coefficient.resize(n_);
      each.shift.resize(n_);
    }
    const Weigher weigher(problem_, plan_, tiles_, mode_, upstream);
    Gradients gradients = start_gradients(problem_, needed);
    dy_ = start_columns(problem_, needed, gradients);
    for (int64_t first = 0; first < tiles_.chunks; first += step) {
      const int64_t last = std::min(first + step, tiles_.chunks), stored = stores ? last - first : 0;
      const int64_t begin = first * tiles_.rows, end = std::min(last * tiles_.rows, n_);
      forward_panel(first, last, reducer, cosines.data(), stored);
      upstream_of(begin, end, reducer.statistics(begin, end), upstream);
      backward_panel(first, last, weigher, needed, cosines.data(), stored, nullptr, gradients);
    }
    finish_columns(needed, gradients);
    return gradients;
  }

 private:
  struct Scratch {
    explicit Scratch(const TypedSweep& sweep)
        : tile(sweep.tiles_.rows * sweep.tiles_.cols),
          weights(kFloats ? 0 : sweep.tiles_.rows * sweep.tiles_.cols),
          work(sweep.tiles_, sweep.mode_) {
      work.matrices.assign(sweep.cosines_.size(), nullptr);
      for (const Cosines<In, Operand>& each : sweep.cosines_) {
        rooms.emplace_back(each.row_room());
        rows.push_back(nullptr);
        taught.emplace_back(taught.empty() ? 0 : sweep.tiles_.rows * sweep.tiles_.cols);
      }
    }
    Buffer<float> tile;
    Buffer<Operand> weights;
    TileScratch work;
    // By matrix: converted rows and where to convert them, and the tiles of teachers.
    std::vector<Buffer<Operand>> rooms;
    std::vector<const Operand*> rows;
    std::vector<Buffer<float>> taught;
  };

  // ---- panels -------------------------------------------------------------------------------------------------

  void choose_panels(int64_t workers) {
    const int64_t size = sizeof(Operand);
    int64_t depth = 0;
    for (int64_t matrix : read_) {
      depth += cosines_[matrix].depth();
    }
    const int64_t chunks = std::max<int64_t>(tiles_.chunks, 1), blocks = std::max<int64_t>(tiles_.blocks, 1);
    panel_chunks_ = std::min(std::max(kPanelRows / tiles_.rows, workers), chunks);
    for (;; panel_chunks_ = (panel_chunks_ + 1) / 2) {
      const int64_t height = panel_chunks_ * tiles_.rows;
      const int64_t fixed = lean_ ? 0 : height * d_ * (size + (kDirect ? 0 : static_cast<int64_t>(sizeof(float))));
      const int64_t each = tiles_.cols * size * (depth + height + (lean_ ? 0 : d_));
      panel_blocks_ = std::clamp<int64_t>((working_bytes(problem_) - fixed) / each, 1, blocks);
      if (fixed + panel_blocks_ * each <= working_bytes(problem_) || panel_chunks_ == 1) {
        panel_chunks_ = std::max(whole_groups(panel_chunks_), std::min(panel_chunks_, group_));
        return;
      }
    }
  }

  // Panels end between groups of chunks, so that how many chunks one holds, which may depend on the threads, does not
  // show in the bits of dy.
  int64_t whole_groups(int64_t chunks) const { return chunks >= tiles_.chunks ? chunks : chunks / group_ * group_; }

  // body(first chunk, last chunk, their stored cosines, how many of them are stored)
  template <typename Body>
  void for_each_panel(int64_t chunks, float* kept, int64_t kept_chunks, const Body& body) {
    for (int64_t first = 0; first < tiles_.chunks; first += chunks) {
      const int64_t last = std::min(first + chunks, tiles_.chunks);
      const int64_t stored = std::clamp<int64_t>(kept_chunks - first, 0, last - first);
      body(first, last, stored == 0 ? nullptr : kept + first * kept_floats(), stored);
    }
  }

  template <typename Body>
  void run(int64_t tasks, const Body& body) {
    if (!serial_) {
      for_each_task(tasks, body);
      return;
    }
    for (int64_t task = 0; task < tasks; ++task) {
      body(task, int64_t{0});
    }
    release_product();
  }

  // ---- operands -----------------------------------------------------------------------------------------------

  int64_t width_of(int64_t block) const { return round_up(tiles_.cols_of(block, m_), 16); }

  void pack_columns(const std::vector<int64_t>& matrices, int64_t first, int64_t last) {
    for (int64_t matrix : matrices) {
      cosines_[matrix].pack_columns(first, last, panel_blocks_, [this](int64_t tasks, const auto& body) { run(tasks, body); });
    }
  }

  // y of the blocks first : last as the operand B of G y, into `straight_`.
  void pack_blocks(int64_t first, int64_t last) {
    straight_.reserve(panel_blocks_ * tiles_.cols * d_);
    run(last - first, [&](int64_t task, int64_t) {
      pack_straight(y_ + (first + task) * tiles_.cols * d_, tiles_.cols_of(first + task, m_), d_, d_,
                    straight_.data() + task * tiles_.cols * d_);
    });
  }

  // x^T of the chunks first : last, the operand A of x^T G, into `turned_`.
  void pack_chunks(int64_t first, int64_t last) {
    turned_.reserve((last - first) * tiles_.rows * d_);
    run(last - first, [&](int64_t task, int64_t) {
      pack_turned(x_ + (first + task) * tiles_.rows * d_, tiles_.rows_of(first + task, n_), d_,
                  turned_.data() + task * tiles_.rows * d_, tiles_.rows, tiles_.rows);
    });
  }

  void prepare_rows(const std::vector<int64_t>& matrices, int64_t chunk, Scratch& scratch) {
    for (int64_t matrix : matrices) {
      scratch.rows[matrix] = cosines_[matrix].rows_of(chunk, scratch.rooms[matrix]);
    }
  }

  // A matrix's tile: cosines for a uniform plan, scores for any other. `block` counts from the first packed one.
  void fill(int64_t matrix, const Tile& tile, int64_t block, Scratch& scratch) {
    cosines_[matrix].multiply(tile, block, scratch.rows[matrix], scratch.rooms[matrix]);
    if (!mode_.uniform) {
      score_tile(problem_, matrix, tile);
    }
  }

  Tile tile_at(int64_t chunk, int64_t block, float* data) const {
    return {data, width_of(block), chunk * tiles_.rows, tiles_.rows_of(chunk, n_), block * tiles_.cols,
            tiles_.cols_of(block, m_)};
  }

  // Stored tiles lie chunk by chunk, in a chunk matrix by matrix, then block by block; `chunk` counts from the first
  // stored one. Null if the backward does not read the matrix.
  float* stored_tile(float* store, int64_t chunk, int64_t matrix, int64_t block) const {
    const auto found = std::find(read_back_.begin(), read_back_.end(), matrix);
    return found == read_back_.end() ? nullptr
                                     : store + chunk * kept_floats() + (found - read_back_.begin()) * tiles_.chunk_floats() +
                                           block * tiles_.cols * tiles_.rows;
  }

  int64_t kept_floats() const { return static_cast<int64_t>(read_back_.size()) * tiles_.chunk_floats(); }

  // ---- forward ------------------------------------------------------------------------------------------------

  void forward_panel(int64_t first, int64_t last, Reducer& reducer, float* store, int64_t stored) {
    const int64_t chunk_stride = kPartials * panel_blocks_ * tiles_.cols, slot_stride = (last - first) * chunk_stride;
    // A slot of its own also where no column is reduced: the address of a partial result is then never used.
    partial_.reserve(std::max<int64_t>(reducer.slots(), 1) * slot_stride);
    for (int64_t block = 0; block < tiles_.blocks; block += panel_blocks_) {
      const int64_t end = std::min(block + panel_blocks_, tiles_.blocks);
      pack_columns(read_, block, end);
      run(last - first, [&](int64_t task, int64_t worker) {
        Scratch& scratch = scratch_[worker];
        prepare_rows(read_, first + task, scratch);
        for (int64_t b = block; b < end; ++b) {
          for (int64_t matrix : read_) {
            float* to = task < stored ? stored_tile(store, task, matrix, b) : nullptr;
            to = to != nullptr ? to : (matrix == kScores ? scratch.tile : scratch.taught[matrix]).data();
            scratch.work.matrices[matrix] = to;
            fill(matrix, tile_at(first + task, b, to), b - block, scratch);
          }
          Tile tile = tile_at(first + task, b, scratch.work.matrices[kScores]);
          reducer.reduce(tile, partial_.data() + task * chunk_stride + kPartials * (b - block) * tiles_.cols,
                         slot_stride, scratch.work);
        }
      });
      merge(last - first, block, end, reducer, chunk_stride, slot_stride);
    }
  }

  // Partial results of columns, chunk by chunk in their order.
  void merge(int64_t chunks, int64_t block, int64_t end, Reducer& reducer, int64_t chunk_stride, int64_t slot_stride) {
    for (Running& each : reducer.running()) {
      if (each.slot < 0) {
        continue;
      }
      run(end - block, [&](int64_t task, int64_t) {
        float* partial = partial_.data() + each.slot * slot_stride + kPartials * task * tiles_.cols;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          reducer.merge(each, partial + chunk * chunk_stride, (block + task) * tiles_.cols,
                        tiles_.cols_of(block + task, m_));
        }
      });
    }
  }

  // ---- backward -----------------------------------------------------------------------------------------------

  void backward_panel(int64_t first, int64_t last, const Weigher& weigher, Needed needed, float* store, int64_t stored,
                      std::vector<double>* losses, Gradients& gradients) {
    const int64_t chunks = last - first, panel_cols = panel_blocks_ * tiles_.cols;
    const bool weighs_y = needed.x || needed.scale;
    weights_.reserve(panel_cols * chunks * tiles_.rows);
    column_sums_.reserve(needed.col_sums ? chunks * panel_cols : 0);
    float* weighted = weighted_rows(first, last, needed, gradients);
    if (needed.y && !lean_) {
      pack_chunks(first, last);
    }
    for (int64_t block = 0; block < tiles_.blocks; block += panel_blocks_) {
      const int64_t end = std::min(block + panel_blocks_, tiles_.blocks);
      if (stored < chunks) {
        pack_columns(read_back_, block, end);
      }
      if (weighs_y && !lean_) {
        pack_blocks(block, end);
      }
      run(chunks, [&](int64_t task, int64_t worker) {
        Scratch& scratch = scratch_[worker];
        if (task >= stored) {
          prepare_rows(read_back_, first + task, scratch);
        }
        for (int64_t b = block; b < end; ++b) {
          float* out = kFloats && !lean_ ? reinterpret_cast<float*>(shared_tile(b - block, task, chunks)) : scratch.tile.data();
          for (int64_t matrix : read_back_) {
            float*& scores = scratch.work.matrices[matrix];
            if (task < stored) {
              scores = stored_tile(store, task, matrix, b);
            } else {
              scores = matrix == kScores ? out : scratch.taught[matrix].data();
              fill(matrix, tile_at(first + task, b, scores), b - block, scratch);
            }
          }
          Tile tile = tile_at(first + task, b, scratch.work.matrices[kScores]);
          weigher.weigh(tile, out, losses, scratch.work);
          tile.data = out;
          add_sums(tile, needed, gradients, column_sums_.data() + task * panel_cols + (b - block) * tiles_.cols);
          if (weighs_y) {
            float* to = weighted + task * tiles_.rows * d_;
            if (lean_) {
              add_weighted_lean(tile, to, b > 0);
            } else {
              add_weighted(tile, straight_.data() + (b - block) * tiles_.cols * d_, to, b > 0, scratch);
            }
          }
          if (needed.y) {
            scale_rows(tile);
            share_weights(tile, b - block, task, chunks);
          }
        }
      });
      if (needed.y && lean_) {
        add_to_columns_lean(first, last, block, end);
      } else if (needed.y) {
        add_to_columns(first, last, block, end);
      }
      merge_column_sums(chunks, block, end, gradients);
    }
    finish_rows(first, last, needed, weighted, gradients);
  }

  Operand* shared_tile(int64_t block, int64_t chunk, int64_t chunks) {
    return weights_.data() + (block * chunks + chunk) * tiles_.cols * tiles_.rows;
  }

  // dy needs scale_i G_ij; where all scales are one, it is multiplied at the end instead.
  void scale_rows(const Tile& weights) {
    for (int64_t r = 0; r < weights.rows && !one_scale_; ++r) {
      const Vec scale(problem_.scales()[weights.row0 + r]);
      for (int64_t c = 0; c < weights.ld; c += kLanes) {
        (Vec::loadu(weights.row(r) + c) * scale).store(weights.row(r) + c);
      }
    }
  }

  // Leaves the weights of a tile for step 3. Float ones were written there already, unless they are to be transposed:
  // a block is then [cols][rows of the panel].
  void share_weights(const Tile& tile, int64_t block, int64_t chunk, int64_t chunks) {
    if constexpr (kFloats) {
      if (lean_) {
        const int64_t height = chunks * tiles_.rows;
        transpose(tile.data, tile.ld, tile.rows, tile.cols, shared_tile(block, 0, chunks) + chunk * tiles_.rows, height);
      }
    } else {
      pair_weights(tile.data, tile.rows, tile.ld, shared_tile(block, chunk, chunks));
    }
  }

  // Where G y of the panel's rows is added up: in dx itself, or apart where that is of another type or not wanted.
  float* weighted_rows(int64_t first, int64_t last, Needed needed, Gradients& gradients) {
    if (!needed.x && !needed.scale) {
      return nullptr;
    }
    if (needed.x && std::is_same_v<In, float>) {
      return reinterpret_cast<float*>(gradients.x.mutable_data_ptr()) + first * tiles_.rows * d_;
    }
    apart_.reserve((last - first) * tiles_.rows * d_);
    return apart_.data();
  }

  void add_sums(const Tile& weights, Needed needed, Gradients& gradients, float* column_sums) {
    if (needed.row_sums) {
      for (int64_t r = 0; r < weights.rows; ++r) {
        Vec lanes(0.0f);
        for (int64_t c = 0; c < weights.ld; c += kLanes) {
          lanes = lanes + Vec::loadu(weights.row(r) + c);
        }
        gradients.row[weights.row0 + r] += sum_lanes(lanes);
      }
    }
    if (needed.col_sums) {
      for (int64_t c = 0; c < weights.ld; c += kLanes) {
        Vec sum(0.0f);
        for (int64_t r = 0; r < weights.rows; ++r) {
          sum = sum + Vec::loadu(weights.row(r) + c);
        }
        sum.store(column_sums + c);
      }
    }
  }

  void merge_column_sums(int64_t chunks, int64_t block, int64_t end, Gradients& gradients) {
    if (gradients.col.empty()) {
      return;
    }
    const int64_t begin = block * tiles_.cols, count = std::min(end * tiles_.cols, m_) - begin;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float* sums = column_sums_.data() + chunk * panel_blocks_ * tiles_.cols;
      for (int64_t c = 0; c < count; ++c) {
        gradients.col[begin + c] += sums[c];
      }
    }
  }

  // weighted [rows, d] (+)= G y.
  void add_weighted(const Tile& tile, const Operand* features, float* weighted, bool add, Scratch& scratch) {
    const Operand* weights;
    if constexpr (kFloats) {
      weights = tile.data;
    } else {
      convert_row(tile.data, scratch.weights.data(), tile.rows * tile.ld);
      weights = scratch.weights.data();
    }
    const int64_t depth = padded_depth<Operand>(tile.cols);
    for (int64_t k = 0; k < d_; k += kStrip) {
      const int64_t width = std::min(kStrip, d_ - k);
      product(tile.rows, width, depth, weights, tile.ld, features + k * depth, width, weighted + k, d_, add);
    }
  }

  void add_weighted_lean(const Tile& tile, float* weighted, bool add) {
    if constexpr (kDirect) {
      for (int64_t k = 0; k < d_; k += kDepth) {
        product(tile.rows, std::min(kDepth, d_ - k), tile.cols, tile.data, tile.ld, y_ + tile.col0 * d_ + k, d_,
                weighted + k, d_, add);
      }
    }
  }

  // dy of the blocks (+)= G^T x of the chunks; a task owns some columns and some features.
  void add_to_columns_lean(int64_t first, int64_t last, int64_t block, int64_t end) {
    if constexpr (kDirect) {
      const int64_t height = (last - first) * tiles_.rows, rows = std::min(height, n_ - first * tiles_.rows);
      const int64_t parts = ceil_div(tiles_.cols, kLeanCols), slices = ceil_div(d_, kDepth);
      const int64_t group_rows = group_ * tiles_.rows;
      float* dy = dy_.template mutable_data_ptr<float>();
      run((end - block) * parts * slices, [&](int64_t task, int64_t) {
        const int64_t b = task / (parts * slices), start = task / slices % parts * kLeanCols, k = task % slices * kDepth;
        const int64_t cols = std::min(kLeanCols, tiles_.cols_of(block + b, m_) - start);
        for (int64_t r = 0; r < rows && cols > 0; r += group_rows) {
          product(cols, std::min(kDepth, d_ - k), std::min(group_rows, rows - r),
                  shared_tile(b, 0, last - first) + start * height + r, height, x_ + (first * tiles_.rows + r) * d_ + k, d_,
                  dy + ((block + b) * tiles_.cols + start) * d_ + k, d_, first > 0 || r > 0);
        }
      });
    }
  }

  // dy^T of the blocks (+)= x^T G of the chunks, in order; a task owns a block and some features. dy^T [d, cols] lies
  // where the block's rows of dy will be.
  void add_to_columns(int64_t first, int64_t last, int64_t block, int64_t end) {
    const int64_t slices = ceil_div(d_, kOwned);
    float* dy = dy_.template mutable_data_ptr<float>();
    run((end - block) * slices, [&](int64_t task, int64_t) {
      const int64_t b = task / slices, k = task % slices * kOwned, features = std::min(kOwned, d_ - k);
      const int64_t cols = tiles_.cols_of(block + b, m_), width = width_of(block + b);
      for (int64_t chunk = 0; chunk < last - first; ++chunk) {
        const int64_t depth = padded_depth<Operand>(tiles_.rows_of(first + chunk, n_));
        const Operand* features_of_chunk = turned_.data() + (chunk * d_ + k) * tiles_.rows;
        const Operand* weights = shared_tile(b, chunk, last - first);
        float* to = dy + (block + b) * tiles_.cols * d_ + k * cols;
        for (int64_t c = 0; c < cols; c += kStrip) {
          product(features, std::min(kStrip, cols - c), depth, features_of_chunk, tiles_.rows, weights + c * kPair, width,
                  to + c, cols, first + chunk > 0);
        }
      }
    });
  }

  // Turns each block of dy^T into rows of dy, times the one scale.
  void finish_columns(Needed needed, Gradients& gradients) {
    if (!needed.y || n_ == 0) {
      return;
    }
    const float* sums = dy_.template const_data_ptr<float>();
    In* dy = gradients.y.template mutable_data_ptr<In>();
    std::vector<Buffer<float>> copies(scratch_.size());
    run(tiles_.blocks, [&](int64_t block, int64_t worker) {
      const int64_t start = block * tiles_.cols * d_;
      finish_block(sums + start, tiles_.cols_of(block, m_), d_, !lean_, one_scale_ ? problem_.scales()[0] : 1.0f,
                   copies[worker], dy + start);
    });
    dy_ = at::Tensor();
  }

  // dx_i = scale_i (G y)_i, and d scale_i = <x_i, (G y)_i>.
  void finish_rows(int64_t first, int64_t last, Needed needed, const float* weighted, Gradients& gradients) {
    if (weighted == nullptr || tiles_.blocks == 0) {
      return;
    }
    In* dx = needed.x ? gradients.x.template mutable_data_ptr<In>() : nullptr;
    run(last - first, [&](int64_t task, int64_t) {
      const int64_t begin = (first + task) * tiles_.rows, end = std::min(begin + tiles_.rows, n_);
      for (int64_t i = begin; i < end; ++i) {
        const float* row = weighted + (i - first * tiles_.rows) * d_;
        const float scale = problem_.scales()[i];
        if (needed.scale) {
          gradients.scale[i] = dot(x_ + i * d_, row, d_);
        }
        for (int64_t k = 0; dx != nullptr && k < d_; ++k) {
          dx[i * d_ + k] = static_cast<In>(scale * row[k]);
        }
      }
    });
  }

  const Problem& problem_;
  const Plan& plan_;
  const Tiles tiles_;
  const Mode mode_;
  const int64_t n_, m_, d_;
  const In *x_, *y_;
  const bool serial_, lean_;
  const int64_t group_;  // chunks that one product of step 3 adds up
  const std::vector<int64_t> read_, read_back_;  // the matrices that forward and backward look at
  bool one_scale_;                               // all rows have the same
  std::vector<Cosines<In, Operand>> cosines_;    // by matrix
  int64_t panel_chunks_ = 1, panel_blocks_ = 1;
  std::vector<Scratch> scratch_;
  // Shared by the threads, a panel at a time.
  Buffer<Operand> straight_;    // y of the panel's blocks
  Buffer<Operand> turned_;      // x^T of the panel's chunks
  Buffer<Operand> weights_;     // G, tile by tile
  Buffer<float> partial_;       // column statistics of each chunk
  Buffer<float> column_sums_;   // of the weights, of each chunk
  Buffer<float> apart_;         // G y
  at::Tensor dy_;               // float, whatever the features are
};

}  // namespace pairtile
