// A task is a panel of columns, the own tokens, and a block of sets of the other side, whose tokens it streams in chunks of
// rows. Sums are taken under the maximum so far, and rescaled when a chunk raises it.

#include "soft_pooling.h"

#include <cmath>

#include "tile.h"
#include "token_panels.h"

namespace pairtile {
namespace {

template <typename From, typename To>
class SoftForward {
 public:
  SoftForward(const SoftTask& task, bool by_x, at::Tensor& scores, at::Tensor& kept)
      : own_(task.own(by_x)),
        others_(task.others(by_x)),
        side_{task.pairs, by_x},
        softmax_(task.softmax),
        temperature_(static_cast<float>(task.temperature)),
        scale_(static_cast<float>(1.0 / task.temperature)),
        panels_(own_, false, task.pairs.candidates > 0),
        rows_(others_),
        scores_(scores_of(scores)),
        kept_(kept.defined() ? kept.mutable_data_ptr<float>() : nullptr),
        kept_blocks_(kept.defined() ? kept.size(1) : 0),
        scratch_(at::get_num_threads()) {}

  void run(int64_t budget) {
    for (int64_t set = 0; set < own_.count();) {
      set = panels_.template pack<From>(set, budget / 2);
      for_each_meeting(panels_, side_, others_, sizeof(From), [&](const Panel& panel, int64_t other, int64_t worker) {
        pool(panel, other, scratch_[worker]);
      });
    }
  }

 private:
  // Of a panel's columns: the largest similarity, and the sums of exp(u - largest u) and of that times the similarity.
  struct Scratch {
    Buffer<To> copy;
    Buffer<float> tile, largest, sum, weighted;
  };

  void pool(const Panel& panel, int64_t other, Scratch& scratch) const {
    scratch.tile.reserve(kChunkRows * kStrip);
    for (auto [buffer, value] :
         {std::pair(&scratch.largest, -kInfinity), {&scratch.sum, 0.0f}, {&scratch.weighted, 0.0f}}) {
      buffer->reserve(panel.columns);
      std::fill_n(buffer->data(), panel.columns, value);
    }
    const int64_t end = others_.start(other) + others_.length(other);
    bool empty = true;
    for (Chunk chunk = next_chunk(others_.kept(), others_.start(other), end); chunk.rows > 0;
         chunk = next_chunk(others_.kept(), chunk.begin + chunk.rows, end)) {
      empty = false;
      const To* rows = rows_({chunk.begin, chunk.rows}, scratch.copy);
      for (int64_t c = 0; c < panel.columns; c += kStrip) {
        const int64_t width = panels_.strip_width(panel, c);
        multiply(rows, chunk.rows, rows_.depth(), panels_.strip(panel, c), width, scratch.tile.data(), width);
        for_each_strip(width, [&](auto count, int64_t k) {
          add_rows<decltype(count)::value>(scratch.tile.data() + k, width, chunk, c + k, scratch);
        });
      }
    }
    finish(panel, other, empty, scratch);
  }

  template <int vectors>
  void add_rows(const float* tile, int64_t width, const Chunk& chunk, int64_t c, Scratch& scratch) const {
    const Vec scale(scale_);
    float *largest = scratch.largest.data() + c, *sums = scratch.sum.data() + c, *weighted = scratch.weighted.data() + c;
    for (int v = 0; v < vectors; ++v) {
      const float* column = tile + v * kLanes;
      const Vec before = Vec::loadu(largest + v * kLanes);
      Vec most = before;
      for (int r = 0; r < chunk.counted; ++r) {
        most = at::vec::maximum(most, Vec::loadu(column + chunk.row[r] * width));
      }
      const Vec kept = ((before - most) * scale).exp();
      Vec sum = Vec::loadu(sums + v * kLanes) * kept, mean = Vec::loadu(weighted + v * kLanes) * kept;
      for (int r = 0; r < chunk.counted; ++r) {
        const Vec s = Vec::loadu(column + chunk.row[r] * width);
        const Vec e = ((s - most) * scale).exp();
        sum = sum + e;
        mean = at::vec::fmadd(e, s, mean);
      }
      most.store(largest + v * kLanes);
      sum.store(sums + v * kLanes);
      mean.store(weighted + v * kLanes);
    }
  }

  void finish(const Panel& panel, int64_t other, bool empty, Scratch& scratch) const {
    const int64_t* tokens = panels_.tokens(panel);
    for (int64_t s = panel.first; s < panel.last; ++s) {
      const Segment& segment = panels_.segment(s);
      double total = empty ? -kInfinity : 0.0;
      const int64_t block = side_.own_block(segment.set, other);
      for (int64_t c = segment.begin; c < segment.begin + segment.count && !empty; ++c) {
        const float lse = scratch.largest.data()[c] + temperature_ * std::log(scratch.sum.data()[c]);
        const float mean = scratch.weighted.data()[c] / scratch.sum.data()[c];
        total += softmax_ ? mean : lse;
        if (kept_ != nullptr) {
          float* to = kept_ + block * own_.rows() + tokens[c];
          to[0] = lse;
          if (softmax_) {
            to[kept_blocks_ * own_.rows()] = mean;
          }
        }
      }
      scores_.at(side_.row(segment.set, other), side_.column(segment.set, other)) = static_cast<float>(total);
    }
  }

  const TokenSets &own_, &others_;
  const Side side_;
  const bool softmax_;
  const float temperature_, scale_;
  TokenPanels<To> panels_;
  const TokenRows<From, To> rows_;
  const ScoreMatrix<float> scores_;
  float* const kept_;
  const int64_t kept_blocks_;
  std::vector<Scratch> scratch_;
};

}  // namespace

void soft_forward(const SoftTask& task, bool by_x, at::Tensor& scores, at::Tensor& kept) {
  with_types(task.x.tokens.scalar_type(), [&](auto from, auto to) {
    SoftForward<decltype(from), decltype(to)>(task, by_x, scores, kept).run(task.budget);
  });
}

}  // namespace pairtile
