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

#include "cosines.h"
#include "layout.h"
#include "panel_gradients.h"
#include "tile_work.h"

namespace pairtile {

template <typename In, typename Operand>
class TypedSweep final : public Sweep {
  static constexpr bool kFloats = std::is_same_v<Operand, float>;
  static constexpr bool kDirect = kFloats && std::is_same_v<In, float>;  // features are operands as they lie
  static constexpr int64_t kLeanRows = 2048;       // up to here features may stay as they lie,
  static constexpr int64_t kFullRows = 256;        // or where chunks had to be lower than this, because S is wide;
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
        layout_(layout_of(problem, tiles_, in_one_go)),
        read_(plan.matrices(problem, /*backward=*/false)),
        read_back_(plan.matrices(problem, /*backward=*/true)) {
    cosines_.emplace_back(problem.x, problem.y, tiles_);
    for (const Features& teacher : problem.teachers) {
      cosines_.emplace_back(teacher.x, teacher.y, tiles_);
    }
    choose_panels();
    for (int64_t worker = 0; worker < layout_.workers(); ++worker) {
      scratch_.emplace_back(*this);
    }
  }

  bool uniform() const override { return mode_.uniform; }

  bool shifted(size_t reduction) const override {
    return !mode_.uniform && !mode_.shared.exponents[mode_.shared.uses[reduction].exponent].safe;
  }

  std::vector<Statistics> forward(float* kept, int64_t kept_chunks) override {
    Reducer reducer(problem_, plan_, tiles_, mode_);
    // Nothing but partial results of columns bounds the height of a panel here: all chunks, if those stay small.
    const int64_t slots = std::max<int64_t>(reducer.slots(), 1);
    const int64_t chunk_bytes = slots * chunk_stride(reducer) * static_cast<int64_t>(sizeof(float));
    const int64_t chunks = std::max(layout_.panel_chunks, kPartialBytes / chunk_bytes);
    for_each_panel(chunks, kept, kept_chunks, [&](int64_t first, int64_t last, float* store, int64_t stored) {
      forward_panel(first, last, reducer, store, stored);
    });
    return reducer.statistics(0, n_);
  }

  Gradients backward(const std::vector<Upstream>& upstream, Needed needed, const float* kept, int64_t kept_chunks,
                     std::vector<double>* losses) override {
    const Weigher weigher(problem_, plan_, tiles_, mode_, upstream);
    PanelGradients<In, Operand> gradients(problem_, tiles_, layout_, needed);
    // Removed pairs are put back into stored tiles: they are as const as they look, one thread at a time.
    for_each_panel(layout_.panel_chunks, const_cast<float*>(kept), kept_chunks, [&](int64_t first, int64_t last, float* store, int64_t stored) {
      backward_panel(first, last, weigher, store, stored, losses, gradients);
    });
    return gradients.finish();
  }

  Gradients forward_backward(Needed needed, const UpstreamOf& upstream_of) override {
    // As many chunks at a time as the budget stores. If that would leave threads idle, tiles are multiplied twice.
    const int64_t fitting = whole_groups(kept_chunks(problem_, tiles_, read_back_.size()));
    const bool stores = fitting >= std::min<int64_t>(scratch_.size(), tiles_.chunks);
    const int64_t step = stores ? std::clamp<int64_t>(fitting, 1, layout_.panel_chunks) : layout_.panel_chunks;
    Buffer<float> cosines(stores ? step * kept_floats() : 0);
    Reducer reducer(problem_, plan_, tiles_, mode_);
    std::vector<Upstream> upstream(plan_.reductions.size());
    for (Upstream& each : upstream) {
      each.coefficient.resize(n_);
      each.shift.resize(n_);
    }
    const Weigher weigher(problem_, plan_, tiles_, mode_, upstream);
    PanelGradients<In, Operand> gradients(problem_, tiles_, layout_, needed);
    for (int64_t first = 0; first < tiles_.chunks; first += step) {
      const int64_t last = std::min(first + step, tiles_.chunks), stored = stores ? last - first : 0;
      const int64_t begin = first * tiles_.rows, end = std::min(last * tiles_.rows, n_);
      forward_panel(first, last, reducer, cosines.data(), stored);
      upstream_of(begin, end, reducer.statistics(begin, end), upstream);
      backward_panel(first, last, weigher, cosines.data(), stored, nullptr, gradients);
    }
    return gradients.finish();
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

  static Layout layout_of(const Problem& problem, const Tiles& tiles, bool in_one_go) {
    const bool few = problem.n <= kLeanRows;
    const bool lean =
        kDirect && (few ? std::min(problem.n, problem.m) < 2 * problem.d : in_one_go && tiles.rows < kFullRows);
    return {2 * problem.n * problem.m * problem.d < kSerialFlops, lean, lean && few ? kDepth / tiles.rows : 1};
  }

  void choose_panels() {
    const bool lean = layout_.lean;
    int64_t &panel_chunks = layout_.panel_chunks, &panel_blocks = layout_.panel_blocks;
    const int64_t size = sizeof(Operand);
    int64_t depth = 0;
    for (int64_t matrix : read_) {
      depth += cosines_[matrix].depth();
    }
    const int64_t chunks = std::max<int64_t>(tiles_.chunks, 1), blocks = std::max<int64_t>(tiles_.blocks, 1);
    panel_chunks = std::min(std::max(kPanelRows / tiles_.rows, layout_.workers()), chunks);
    for (;; panel_chunks = (panel_chunks + 1) / 2) {
      const int64_t height = panel_chunks * tiles_.rows;
      const int64_t apart = kDirect ? 0 : static_cast<int64_t>(sizeof(float));
      const int64_t fixed = lean ? 0 : height * problem_.d * (size + apart);
      const int64_t each = tiles_.cols * size * (depth + height + (lean ? 0 : problem_.d));
      panel_blocks = std::clamp<int64_t>((working_bytes(problem_) - fixed) / each, 1, blocks);
      if (fixed + panel_blocks * each <= working_bytes(problem_) || panel_chunks == 1) {
        panel_chunks = std::max(whole_groups(panel_chunks), std::min(panel_chunks, layout_.group));
        return;
      }
    }
  }

  // Panels end between groups of chunks, so that how many chunks one holds, which may depend on the threads, does not
  // show in the bits of dy.
  int64_t whole_groups(int64_t chunks) const {
    return chunks >= tiles_.chunks ? chunks : chunks / layout_.group * layout_.group;
  }

  // body(first chunk, last chunk, their stored cosines, how many of them are stored)
  template <typename Body>
  void for_each_panel(int64_t chunks, float* kept, int64_t kept_chunks, const Body& body) {
    for (int64_t first = 0; first < tiles_.chunks; first += chunks) {
      const int64_t last = std::min(first + chunks, tiles_.chunks);
      const int64_t stored = std::clamp<int64_t>(kept_chunks - first, 0, last - first);
      body(first, last, stored == 0 ? nullptr : kept + first * kept_floats(), stored);
    }
  }

  // ---- operands -----------------------------------------------------------------------------------------------

  int64_t width_of(int64_t block) const { return round_up(tiles_.cols_of(block, m_), 16); }

  void pack_columns(const std::vector<int64_t>& matrices, int64_t first, int64_t last) {
    for (int64_t matrix : matrices) {
      cosines_[matrix].pack_columns(first, last, layout_.panel_blocks, layout_);
    }
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
    const int64_t place = found - read_back_.begin();
    return found == read_back_.end() ? nullptr
                                     : store + chunk * kept_floats() + place * tiles_.chunk_floats() +
                                           block * tiles_.cols * tiles_.rows;
  }

  int64_t kept_floats() const { return static_cast<int64_t>(read_back_.size()) * tiles_.chunk_floats(); }

  // ---- forward ------------------------------------------------------------------------------------------------

  // Partial results of one slot and chunk.
  int64_t chunk_stride(const Reducer& reducer) const {
    return reducer.partials() * layout_.panel_blocks * tiles_.cols;
  }

  void forward_panel(int64_t first, int64_t last, Reducer& reducer, float* store, int64_t stored) {
    const int64_t stride = chunk_stride(reducer), slot_stride = (last - first) * stride;
    // A slot of its own also where no column is reduced: the address of a partial result is then never used.
    partial_.reserve(std::max<int64_t>(reducer.slots(), 1) * slot_stride);
    for (int64_t block = 0; block < tiles_.blocks; block += layout_.panel_blocks) {
      const int64_t end = std::min(block + layout_.panel_blocks, tiles_.blocks);
      pack_columns(read_, block, end);
      layout_.run(last - first, [&](int64_t task, int64_t worker) {
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
          reducer.reduce(tile, partial_.data() + task * stride + reducer.partials() * (b - block) * tiles_.cols,
                         slot_stride, scratch.work);
        }
      });
      merge(last - first, block, end, reducer, stride, slot_stride);
    }
  }

  // Partial results of columns, chunk by chunk in their order.
  void merge(int64_t chunks, int64_t block, int64_t end, Reducer& reducer, int64_t stride, int64_t slot_stride) {
    for (Running& each : reducer.running()) {
      if (each.slot < 0) {
        continue;
      }
      layout_.run(end - block, [&](int64_t task, int64_t) {
        float* partial = partial_.data() + each.slot * slot_stride + reducer.partials() * task * tiles_.cols;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          reducer.merge(each, partial + chunk * stride, (block + task) * tiles_.cols,
                        tiles_.cols_of(block + task, m_));
        }
      });
    }
  }

  // ---- backward -----------------------------------------------------------------------------------------------

  void backward_panel(int64_t first, int64_t last, const Weigher& weigher, float* store, int64_t stored,
                      std::vector<double>* losses, PanelGradients<In, Operand>& gradients) {
    gradients.start_panel(first, last);
    for (int64_t block = 0; block < tiles_.blocks; block += layout_.panel_blocks) {
      const int64_t end = std::min(block + layout_.panel_blocks, tiles_.blocks);
      if (stored < last - first) {
        pack_columns(read_back_, block, end);
      }
      gradients.start_blocks(block, end);
      layout_.run(last - first, [&](int64_t task, int64_t worker) {
        Scratch& scratch = scratch_[worker];
        if (task >= stored) {
          prepare_rows(read_back_, first + task, scratch);
        }
        for (int64_t b = block; b < end; ++b) {
          float* out = gradients.place_of(first + task, b);
          out = out == nullptr ? scratch.tile.data() : out;
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
          gradients.add(tile, first + task, b, scratch.weights);
        }
      });
      gradients.finish_blocks();
    }
    gradients.finish_panel();
  }

  const Problem& problem_;
  const Plan& plan_;
  const Tiles tiles_;
  const Mode mode_;
  const int64_t n_, m_;
  Layout layout_;
  const std::vector<int64_t> read_, read_back_;  // the matrices that forward and backward look at
  std::vector<Cosines<In, Operand>> cosines_;    // by matrix
  std::vector<Scratch> scratch_;
  Buffer<float> partial_;  // column statistics of each chunk of a panel
};

}  // namespace pairtile
