// A task owns the gradients of a block of sets. It streams panels of the other side's tokens: the products of a chunk of
// own rows with a group of columns become weights, d(result) / d(similarity), which multiply the same columns' tokens.

#include <cmath>

#include "soft_pooling.h"
#include "tile.h"
#include "token_panels.h"

namespace pairtile {
namespace {

constexpr int64_t kGroup = 256;  // columns whose weights are multiplied at once

// Of one side and one pair: upstream gradients, and pointers to what was kept of its tokens.
struct Known {
  ScoreMatrix<const float> upstream;
  const float* kept = nullptr;
  int64_t rows = 0, blocks = 0;  // of what is kept: [1 or 2, blocks, rows]

  Known(const SoftSide& side, int64_t rows_of_side) : upstream(upstream_of(side.upstream)), rows(rows_of_side) {
    if (side.kept.defined()) {
      kept = side.kept.const_data_ptr<float>();
      blocks = side.kept.size(1);
    }
  }
  float lse(int64_t block, int64_t row) const { return kept[block * rows + row]; }
  float mean(int64_t block, int64_t row) const { return kept[(blocks + block) * rows + row]; }
};

template <typename From, typename To>
class SoftBackward {
 public:
  SoftBackward(const SoftTask& task, bool by_x, const SoftSide& own, const SoftSide& others, at::Tensor& gradient)
      : own_(task.own(by_x)),
        others_(task.others(by_x)),
        side_{task.pairs, by_x},
        softmax_(task.softmax),
        scale_(static_cast<float>(1.0 / task.temperature)),
        by_own_(own, own_.rows()),
        by_others_(others, others_.rows()),
        // The statistics of own rows differ from set to set of the columns, so that each has vectors of its own.
        panels_(others_, static_cast<bool>(by_own_.upstream), task.pairs.candidates > 0),
        rows_(own_),
        gradient_(gradient.mutable_data_ptr<float>()),
        scratch_(at::get_num_threads()) {}

  void run(int64_t budget) {
    constexpr int64_t kOwnedRows = 256;
    const std::vector<Range> blocks = blocks_of(own_, kOwnedRows, 8 * at::get_num_threads());
    for (int64_t set = 0; set < others_.count();) {
      set = panels_.template pack<From>(set, budget / 4);
      pack_straight_groups();
      for_each_task(blocks.size(), [&](int64_t task, int64_t worker) {
        for (const Panel& panel : panels_.panels()) {
          for (int64_t own = blocks[task].begin; own < blocks[task].end; ++own) {
            add_panel(panel, own, scratch_[worker]);
          }
        }
      });
    }
  }

 private:
  struct Scratch {
    Buffer<To> copy;
    Buffer<float> weights, factor, lse, mean;
  };

  // Columns as rows again, [width / 64][columns][64] of each group; those that repeat a token, or hold none, as zeros.
  void pack_straight_groups() {
    const int64_t width = others_.width();
    std::vector<std::pair<const Panel*, int64_t>> groups;
    int64_t columns = 0;
    for (const Panel& panel : panels_.panels()) {
      columns += panel.columns;
      for (int64_t c = 0; c < panel.columns; c += kGroup) {
        groups.emplace_back(&panel, c);
      }
    }
    straight_.reserve(columns * width);
    float* const to = straight_.data();
    straight_data_ = to;
    const From* from = others_.tokens.template const_data_ptr<From>();
    std::vector<Buffer<float>> gathered(at::get_num_threads());
    for_each_task(groups.size(), [&](int64_t task, int64_t worker) {
      const auto [panel, column] = groups[task];
      const int64_t count = std::min(kGroup, panel->columns - column);
      gathered[worker].reserve(kGroup * width);
      float* rows = gathered[worker].data();
      std::fill_n(rows, count * width, 0.0f);
      for (int64_t s = panel->first; s < panel->last; ++s) {
        const Segment& segment = panels_.segment(s);
        const int64_t end = std::min(segment.begin + segment.count, column + count);
        for (int64_t c = std::max(segment.begin, column); c < end; ++c) {
          copy_token(from + panels_.tokens(*panel)[c] * width, width, width, rows + (c - column) * width);
        }
      }
      pack_straight(rows, count, width, width, to + (panel->column + column) * width);
    });
  }

  void add_panel(const Panel& panel, int64_t own, Scratch& scratch) const {
    const Range met = side_.partners(own);
    const int64_t first = panels_.segment(panel.first).set, last = panels_.segment(panel.last - 1).set;
    if (last < met.begin || first >= met.end) {
      return;
    }
    scratch.weights.reserve(kChunkRows * kGroup);
    const int64_t end = own_.start(own) + own_.length(own);
    for (int64_t c = 0; c < panel.columns; c += kGroup) {
      const int64_t columns = std::min(kGroup, panel.columns - c);
      if (by_others_.upstream) {
        copy_statistics(panel, own, c, columns, scratch);
      }
      for (Chunk chunk = next_chunk(own_.kept(), own_.start(own), end); chunk.rows > 0;
           chunk = next_chunk(own_.kept(), chunk.begin + chunk.rows, end)) {
        add_group(panel, own, c, columns, chunk, scratch);
      }
    }
  }

  // What the others' tokens pool is known by column.
  void copy_statistics(const Panel& panel, int64_t own, int64_t first, int64_t columns, Scratch& scratch) const {
    // Columns that repeat a token, or hold none, weigh exp(-inf).
    for (auto [buffer, value] : {std::pair(&scratch.factor, 0.0f), {&scratch.lse, kInfinity}, {&scratch.mean, 0.0f}}) {
      buffer->reserve(kGroup);
      std::fill_n(buffer->data(), columns, value);
    }
    for (int64_t s = panel.first; s < panel.last; ++s) {
      const Segment& segment = panels_.segment(s);
      const int64_t block = side_.other_block(own, segment.set);
      const float upstream = by_others_.upstream.at(side_.row(own, segment.set), side_.column(own, segment.set));
      const int64_t end = std::min(segment.begin + segment.count, first + columns);
      for (int64_t c = std::max(segment.begin, first); c < end; ++c) {
        const int64_t token = panels_.tokens(panel)[c];
        scratch.factor.data()[c - first] = upstream;
        scratch.lse.data()[c - first] = by_others_.lse(block, token);
        scratch.mean.data()[c - first] = softmax_ ? by_others_.mean(block, token) : 0.0f;
      }
    }
  }

  void add_group(const Panel& panel, int64_t own, int64_t first, int64_t columns, const Chunk& chunk,
                 Scratch& scratch) const {
    const To* rows = rows_({chunk.begin, chunk.rows}, scratch.copy);
    float* weights = scratch.weights.data();
    for (int64_t c = 0; c < columns; c += kStrip) {
      multiply(rows, chunk.rows, rows_.depth(), panels_.strip(panel, first + c),
               panels_.strip_width(panel, first + c), weights + c, columns);
    }
    int next = 0;
    for (int64_t r = 0; r < chunk.rows; ++r) {
      if (next < chunk.counted && chunk.row[next] == r) {
        weigh_row(panel, own, first, columns, chunk.begin + r, weights + r * columns, scratch);
        ++next;
      } else {
        std::fill_n(weights + r * columns, columns, 0.0f);
      }
    }
    const int64_t width = own_.width();
    const float* tokens = straight_data_ + (panel.column + first) * width;
    for (int64_t k = 0; k < width; k += kStrip) {
      const int64_t part = std::min(kStrip, width - k);
      product(chunk.rows, part, columns, weights, columns, tokens + k * columns, part,
              gradient_ + chunk.begin * width + k, width, true);
    }
  }

  // A row's similarities become weights.
  void weigh_row(const Panel& panel, int64_t own, int64_t first, int64_t columns, int64_t row, float* weights,
                 Scratch& scratch) const {
    if (!by_own_.upstream) {
      weigh<false>(weights, 0, columns, 0, 0, 0, scratch);
      return;
    }
    int64_t covered = first;
    for (int64_t s = panel.first; s < panel.last; ++s) {
      const Segment& segment = panels_.segment(s);
      const int64_t begin = std::max(segment.begin, first), end = std::min(segment.end, first + columns);
      if (begin < end) {
        const int64_t block = side_.own_block(own, segment.set);
        const float upstream = by_own_.upstream.at(side_.row(own, segment.set), side_.column(own, segment.set));
        weigh<true>(weights, begin - first, end - first, upstream, by_own_.lse(block, row),
                    softmax_ ? by_own_.mean(block, row) : 0.0f, scratch);
        covered = end;
      }
    }
    std::fill(weights + covered - first, weights + columns, 0.0f);
  }

  template <bool own>
  void weigh(float* weights, int64_t begin, int64_t end, float upstream, float lse, float mean,
             Scratch& scratch) const {
    const Vec scale(scale_), one(1.0f), by_softmax(softmax_ ? scale_ : 0.0f);
    // d(pooled) / ds, times the upstream gradient.
    auto weight = [&](Vec s, Vec factor, Vec known_lse, Vec known_mean) {
      return factor * ((s - known_lse) * scale).exp() * at::vec::fmadd(s - known_mean, by_softmax, one);
    };
    for (int64_t c = begin; c < end; c += kLanes) {
      const Vec s = Vec::loadu(weights + c);
      Vec sum(0.0f);
      if constexpr (own) {
        sum = weight(s, Vec(upstream), Vec(lse), Vec(mean));
      }
      if (by_others_.upstream) {
        sum = sum + weight(s, Vec::loadu(scratch.factor.data() + c), Vec::loadu(scratch.lse.data() + c),
                           Vec::loadu(scratch.mean.data() + c));
      }
      sum.store(weights + c);
    }
  }

  const TokenSets &own_, &others_;
  const Side side_;
  const bool softmax_;
  const float scale_;
  const Known by_own_, by_others_;
  TokenPanels<To> panels_;
  const TokenRows<From, To> rows_;
  Buffer<float> straight_;
  const float* straight_data_ = nullptr;
  float* const gradient_;
  std::vector<Scratch> scratch_;
};

}  // namespace

void soft_backward(const SoftTask& task, bool by_x, const SoftSide& own, const SoftSide& others, at::Tensor& gradient) {
  with_types(task.x.tokens.scalar_type(), [&](auto from, auto to) {
    SoftBackward<decltype(from), decltype(to)>(task, by_x, own, others, gradient).run(task.budget);
  });
}

}  // namespace pairtile
