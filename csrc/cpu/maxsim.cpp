// A task is a panel of columns of x and a block of sets of y: it owns the scores of their pairs, and what is kept of them.
// It streams the tokens of y, chunk by chunk; the panel stays in the second-level cache, a tile in the first.

#include "maxsim.h"

#include <cmath>

#include "tile.h"
#include "token_panels.h"

namespace pairtile {
namespace {

// Raises the maxima of `vectors` columns by the rows of a tile that count.
template <int vectors>
void raise_values(const float* tile, int64_t width, const Chunk& chunk, float* values) {
  Vec best[vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    best[v] = Vec::loadu(values + v * kLanes);
  }
  for (int r = 0; r < chunk.counted; ++r) {
    const float* row = tile + chunk.row[r] * width;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      best[v] = at::vec::maximum(best[v], Vec::loadu(row + v * kLanes));
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    best[v].store(values + v * kLanes);
  }
}

// The same with positions; the first row of the chunk is `position` in its set.
template <int vectors>
void raise_choices(const float* tile, int64_t width, const Chunk& chunk, int64_t position, float* values,
                   float* positions) {
  Largest best[vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    best[v] = {Vec::loadu(values + v * kLanes), Vec::loadu(positions + v * kLanes)};
  }
  for (int r = 0; r < chunk.counted; ++r) {
    const float* row = tile + chunk.row[r] * width;
    const Vec here(static_cast<float>(position + chunk.row[r]));
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      best[v].raise(Vec::loadu(row + v * kLanes), here);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    best[v].value.store(values + v * kLanes);
    best[v].position.store(positions + v * kLanes);
  }
}

template <typename From, typename To>
class MaxForward {
 public:
  MaxForward(const MaxTask& task, MaxResults& results)
      : x_(task.x),
        y_(task.y),
        pairs_(task.pairs),
        panels_(x_, results.cols.defined(), pairs_.candidates > 0),
        rows_(y_),
        row_scores_(scores_of(results.rows)),
        col_scores_(scores_of(results.cols)),
        row_choices_(choices_of(results.row_choices)),
        col_choices_(choices_of(results.col_choices)),
        scratch_(at::get_num_threads()) {}

  void run(int64_t budget) {
    for (int64_t set = 0; set < pairs_.n;) {
      set = panels_.template pack<From>(set, budget / 2);
      sweep();
    }
  }

 private:
  struct Scores {
    float* data = nullptr;
    int64_t row = 0, column = 0;  // strides
    float& at(int64_t i, int64_t j) const { return data[i * row + j * column]; }
  };

  // The maxima of a panel's columns over a set of y; and, of a chunk's rows, those over a set of x lane by lane.
  struct Scratch {
    Buffer<To> copy;
    Buffer<float> tile, values, positions, lanes, lane_columns;
    std::vector<double> sums;  // over the rows of y, of each segment
  };

  static Scores scores_of(at::Tensor& tensor) {
    return tensor.defined() ? Scores{tensor.mutable_data_ptr<float>(), tensor.stride(0), tensor.stride(1)} : Scores{};
  }
  static int32_t* choices_of(at::Tensor& tensor) {
    return tensor.defined() ? tensor.mutable_data_ptr<int32_t>() : nullptr;
  }

  void sweep() {
    const int64_t columns = pairs_.columns(), panels = panels_.panels().size();
    if (columns == 0 || panels == 0) {
      return;
    }
    // A block of y should stay in cache from panel to panel, and there should be enough tasks for all threads.
    constexpr int64_t kBlockBytes = int64_t{512} << 10;
    const int64_t set_bytes = y_.usual_length() * std::max<int64_t>(rows_.depth(), 1) * sizeof(From);
    const int64_t enough = panels * columns / (8 * at::get_num_threads());
    const int64_t block = std::clamp<int64_t>(std::min(kBlockBytes / set_bytes, enough), 1, columns);
    const int64_t blocks = (columns + block - 1) / block;
    for_each_task(blocks * panels, [&](int64_t task, int64_t worker) {
      const Panel& panel = panels_.panels()[task % panels];
      const Range partners = pairs_.of_x(panels_.segment(panel.first).set);
      const int64_t begin = partners.begin + task / panels * block;
      for (int64_t j = begin; j < std::min(begin + block, partners.end); ++j) {
        score(panel, j, scratch_[worker]);
      }
    });
  }

  void score(const Panel& panel, int64_t j, Scratch& scratch) {
    reserve(panel, scratch);
    std::fill_n(scratch.values.data(), panel.columns, -kInfinity);
    std::fill_n(scratch.positions.data(), panel.columns, -1.0f);
    scratch.sums.assign(panel.last - panel.first, 0.0);
    const int64_t start = y_.start(j), end = start + y_.length(j);
    bool empty = true;
    for (Chunk chunk = next_chunk(y_.kept(), start, end); chunk.rows > 0;
         chunk = next_chunk(y_.kept(), chunk.begin + chunk.rows, end)) {
      empty = false;
      const To* rows = rows_(chunk, scratch.copy);
      int64_t segment = panel.first;
      for (int64_t c = 0; c < panel.columns; c += kStrip) {
        const int64_t width = panels_.strip_width(panel, c);
        multiply(rows, chunk.rows, rows_.depth(), panels_.strip(panel, c), width, scratch.tile.data());
        if (row_scores_.data != nullptr) {
          search_rows(chunk, chunk.begin - start, c, width, scratch);
        }
        if (col_scores_.data != nullptr) {
          segment = search_columns(panel, segment, chunk, c, width, scratch);
        }
      }
    }
    finish(panel, j, empty, scratch);
  }

  void reserve(const Panel& panel, Scratch& scratch) const {
    scratch.tile.reserve(kChunkRows * kStrip);
    scratch.values.reserve(panel.columns);
    scratch.positions.reserve(panel.columns);
    scratch.lanes.reserve(kChunkRows * 16);
    scratch.lane_columns.reserve(kChunkRows * 16);
  }

  // For each column of a strip the maximum over the rows of a tile.
  void search_rows(const Chunk& chunk, int64_t position, int64_t c, int64_t width, Scratch& scratch) const {
    const float* tile = scratch.tile.data();
    float *values = scratch.values.data() + c, *positions = scratch.positions.data() + c;
    auto part = [&](auto count, int64_t k) {
      constexpr int vectors = decltype(count)::value;
      if (row_choices_ != nullptr) {
        raise_choices<vectors>(tile + k, width, chunk, position, values + k, positions + k);
      } else {
        raise_values<vectors>(tile + k, width, chunk, values + k);
      }
    };
    for_each_strip(width, part);
  }

  // For each row of a tile the maximum over the columns of each set of x. Returns the first segment that goes on, or
  // begins, behind the strip.
  int64_t search_columns(const Panel& panel, int64_t s, const Chunk& chunk, int64_t c, int64_t width,
                         Scratch& scratch) const {
    for (; s < panel.last; ++s) {
      const Segment& segment = panels_.segment(s);
      const int64_t begin = std::max(segment.begin, c), end = std::min(segment.end, c + width);
      for (int r = 0; r < chunk.counted && begin < end; ++r) {
        raise_lanes(scratch.tile.data() + chunk.row[r] * width + begin - c, begin, end, begin == segment.begin,
                    scratch.lanes.data() + r * 16, scratch.lane_columns.data() + r * 16);
      }
      if (segment.end > c + width) {
        return s;
      }
      if (segment.count > 0) {
        scratch.sums[s - panel.first] += finish_rows(panel, segment, chunk, scratch);
      }
    }
    return s;
  }

  // A row's entries of the columns begin : end, lane by lane.
  static void raise_lanes(const float* row, int64_t begin, int64_t end, bool first, float* values, float* columns) {
    for (int64_t lane = 0; lane < 16; lane += kLanes) {
      const Vec at = Vec::arange(static_cast<float>(lane), 1.0f);
      Largest best = first ? Largest{Vec(-kInfinity), Vec(-1.0f)}
                           : Largest{Vec::loadu(values + lane), Vec::loadu(columns + lane)};
      for (int64_t c = begin; c < end; c += 16) {
        best.raise(Vec::loadu(row + c - begin + lane), at + Vec(static_cast<float>(c)));
      }
      best.value.store(values + lane);
      best.position.store(columns + lane);
    }
  }

  // The maxima of a chunk's rows over a set of x from those of the 16 lanes. Returns their sum.
  double finish_rows(const Panel& panel, const Segment& segment, const Chunk& chunk, Scratch& scratch) const {
    const int64_t offset = pairs_.col_block(segment.set) * y_.rows() + chunk.begin, set_start = x_.start(segment.set);
    float turned[16 * 16], turned_columns[16 * 16], values[16], columns[16];
    double sum = 0;
    for (int r = 0; r < chunk.counted; r += 16) {
      const int count = std::min(16, chunk.counted - r);
      at::vec::transpose_mxn<float, 16, 16>(scratch.lanes.data() + r * 16, 16, turned, 16);
      at::vec::transpose_mxn<float, 16, 16>(scratch.lane_columns.data() + r * 16, 16, turned_columns, 16);
      for (int64_t lane = 0; lane < 16; lane += kLanes) {
        Largest best{Vec::loadu(turned + lane), Vec::loadu(turned_columns + lane)};
        for (int64_t k = 16; k < 16 * 16; k += 16) {
          best.merge(Vec::loadu(turned + k + lane), Vec::loadu(turned_columns + k + lane));
        }
        best.value.store(values + lane);
        best.position.store(columns + lane);
      }
      for (int k = 0; k < count; ++k) {
        sum += values[k];
        if (col_choices_ != nullptr && columns[k] >= 0) {
          const int64_t token = panels_.tokens(panel)[static_cast<int64_t>(columns[k])];
          col_choices_[offset + chunk.row[r + k]] = static_cast<int32_t>(token - set_start);
        }
      }
    }
    return sum;
  }

  void finish(const Panel& panel, int64_t j, bool empty, Scratch& scratch) const {
    const float *values = scratch.values.data(), *positions = scratch.positions.data();
    const int64_t* tokens = panels_.tokens(panel);
    for (int64_t s = panel.first; s < panel.last; ++s) {
      const Segment& segment = panels_.segment(s);
      const int64_t i = segment.set, column = pairs_.column(i, j), last = segment.begin + segment.count;
      if (row_scores_.data != nullptr) {
        double sum = empty ? -kInfinity : 0.0;
        for (int64_t c = segment.begin; c < last && !empty; ++c) {
          sum += values[c];
        }
        row_scores_.at(i, column) = static_cast<float>(sum);
      }
      if (col_scores_.data != nullptr) {
        col_scores_.at(i, column) = segment.count == 0 ? -kInfinity : static_cast<float>(scratch.sums[s - panel.first]);
      }
      if (row_choices_ != nullptr && !empty) {
        int32_t* choices = row_choices_ + pairs_.row_block(i, j) * x_.rows();
        for (int64_t c = segment.begin; c < last; ++c) {
          choices[tokens[c]] = static_cast<int32_t>(positions[c]);
        }
      }
    }
  }

  const TokenSets &x_, &y_;
  const Pairs pairs_;
  TokenPanels<To> panels_;
  const TokenRows<From, To> rows_;
  const Scores row_scores_, col_scores_;
  int32_t *const row_choices_, *const col_choices_;
  std::vector<Scratch> scratch_;
};

}  // namespace

void max_forward(const MaxTask& task, MaxResults& results) {
  with_types(task.x.tokens.scalar_type(), [&](auto from, auto to) {
    MaxForward<decltype(from), decltype(to)>(task, results).run(task.budget);
  });
}

}  // namespace pairtile
