// The gradient of a sum of maxima touches the chosen tokens alone.
//
// A task owns the gradients of a block of sets. Of the other side it takes a block at a time: the choices that concern
// these two blocks are sorted by the owned token, and each token's gradient gathers its rows of the other side from cache.

#include <algorithm>
#include <vector>

#include "maxsim.h"
#include "parallel.h"
#include "token_vec.h"

namespace pairtile {
namespace {

// A row of the other side's block, and the upstream gradient of its pair.
struct Entry {
  int32_t row;
  float weight;
};

template <int vectors, typename T>
void gather_part(float* to, const T* rows, int64_t width, const Entry* begin, const Entry* end) {
  Vec sum[vectors];
#pragma GCC unroll 16
  for (int v = 0; v < vectors; ++v) {
    sum[v] = Vec::loadu(to + v * kLanes);
  }
  for (const Entry* entry = begin; entry < end; ++entry) {
    const T* row = rows + entry->row * width;
    const Vec weight(entry->weight);
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      sum[v] = at::vec::fmadd(weight, load_floats(row + v * kLanes), sum[v]);
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < vectors; ++v) {
    sum[v].store(to + v * kLanes);
  }
}

// to += the weighted sum of some rows.
template <typename T>
void gather(float* to, const T* rows, int64_t width, const Entry* begin, const Entry* end) {
#if defined(CPU_CAPABILITY_AVX512)
  constexpr int kMost = 16;
#else
  constexpr int kMost = 8;
#endif
  int64_t k = 0;
  for (; k + kMost * kLanes <= width; k += kMost * kLanes) {
    gather_part<kMost>(to + k, rows + k, width, begin, end);
  }
  for (; k + 4 * kLanes <= width; k += 4 * kLanes) {
    gather_part<4>(to + k, rows + k, width, begin, end);
  }
  for (; k + kLanes <= width; k += kLanes) {
    gather_part<1>(to + k, rows + k, width, begin, end);
  }
  for (const Entry* entry = begin; entry < end && k < width; ++entry) {
    for (int64_t rest = k; rest < width; ++rest) {
      to[rest] += entry->weight * static_cast<float>(rows[entry->row * width + rest]);
    }
  }
}

const int32_t* choices_of(const at::Tensor& choices) {
  return choices.defined() ? choices.const_data_ptr<int32_t>() : nullptr;
}

// One side's gradient, to which tokens of the other side, the giver, contribute.
template <typename T>
class GatherGradient {
 public:
  GatherGradient(const MaxTask& task, const MaxGradients& given, bool by_x, at::Tensor& gradient)
      : side_{task.pairs, by_x},
        owner_(by_x ? task.x : task.y),
        giver_(by_x ? task.y : task.x),
        own_(upstream_of(by_x ? given.rows : given.cols)),
        others_(upstream_of(by_x ? given.cols : given.rows)),
        own_choices_(choices_of(by_x ? given.row_choices : given.col_choices)),
        other_choices_(choices_of(by_x ? given.col_choices : given.row_choices)),
        tokens_(giver_.tokens.const_data_ptr<T>()),
        gradient_(gradient.mutable_data_ptr<float>()),
        scratch_(at::get_num_threads()) {}

  void run() {
    // Together they should stay in the second-level cache; each owned block reads all of the other side once.
    constexpr int64_t kOwnedBytes = int64_t{512} << 10, kGivenBytes = int64_t{256} << 10;
    const int64_t width = std::max<int64_t>(1, owner_.width());
    const std::vector<Range> owners =
        blocks_of(owner_, kOwnedBytes / (width * sizeof(float)), 8 * at::get_num_threads());
    givers_ = blocks_of(giver_, kGivenBytes / (width * sizeof(T)), 1);
    for_each_task(owners.size(), [&](int64_t task, int64_t worker) { add_block(owners[task], scratch_[worker]); });
  }

 private:
  struct Scratch {
    std::vector<int64_t> first;  // the first token of each owned set among those of the block
    std::vector<int64_t> bound;  // of each owned token among the entries
    std::vector<Entry> entries;
  };

  void add_block(Range owned, Scratch& scratch) const {
    scratch.first.assign(1, 0);
    for (int64_t set = owned.begin; set < owned.end; ++set) {
      scratch.first.push_back(scratch.first.back() + owner_.length(set));
    }
    const Range all{side_.partners(owned.begin).begin, side_.partners(owned.end - 1).end};
    for (const Range& givers : givers_) {
      const Range met{std::max(givers.begin, all.begin), std::min(givers.end, all.end)};
      if (met.size() > 0) {
        add_pairs(owned, met, scratch);
      }
    }
  }

  void add_pairs(Range owned, Range met, Scratch& scratch) const {
    sort_choices(owned, met, scratch);
    const T* rows = tokens_ + giver_.start(met.begin) * giver_.width();
    const int64_t width = owner_.width();
    const Entry* begin = scratch.entries.data();
    for (int64_t set = owned.begin; set < owned.end; ++set) {
      const int64_t first = scratch.first[set - owned.begin];
      for (int64_t k = 0; k < owner_.length(set); ++k) {
        const Entry* end = scratch.entries.data() + scratch.bound[first + k];
        if (begin < end) {
          gather(gradient_ + (owner_.start(set) + k) * width, rows, width, begin, end);
        }
        begin = end;
      }
    }
  }

  // Counting sort by the owned token: afterwards bound[t] is where the entries of token t end.
  void sort_choices(Range owned, Range met, Scratch& scratch) const {
    const int64_t tokens = scratch.first.back();
    scratch.bound.assign(tokens + 1, 0);
    for_each_choice(owned, met, scratch, [&](int64_t token, int64_t, float) { ++scratch.bound[token + 1]; });
    for (int64_t t = 0; t < tokens; ++t) {
      scratch.bound[t + 1] += scratch.bound[t];
    }
    scratch.entries.resize(scratch.bound[tokens]);
    for_each_choice(owned, met, scratch, [&](int64_t token, int64_t row, float weight) {
      scratch.entries[scratch.bound[token]++] = {static_cast<int32_t>(row), weight};
    });
  }

  // body(owned token in the block, row of the other side from that of its first set on, upstream gradient).
  template <typename Body>
  void for_each_choice(Range owned, Range met, const Scratch& scratch, const Body& body) const {
    const int64_t base = giver_.start(met.begin);
    for (int64_t set = owned.begin; set < owned.end; ++set) {
      const int64_t token = scratch.first[set - owned.begin];
      const Range range = side_.partners(set);
      for (int64_t other = std::max(met.begin, range.begin); other < std::min(met.end, range.end); ++other) {
        const int64_t row = side_.row(set, other), column = side_.column(set, other);
        const float own = own_ ? own_.at(row, column) : 0.0f, others = others_ ? others_.at(row, column) : 0.0f;
        const int64_t first = giver_.start(other);
        if (own != 0) {
          const int32_t* chosen = own_choices_ + side_.own_block(set, other) * owner_.rows() + owner_.start(set);
          for (int64_t k = 0; k < owner_.length(set); ++k) {
            if (chosen[k] >= 0 && chosen[k] < giver_.length(other)) {
              body(token + k, first + chosen[k] - base, own);
            }
          }
        }
        if (others != 0) {
          const int32_t* chosen = other_choices_ + side_.other_block(set, other) * giver_.rows() + first;
          for (int64_t k = 0; k < giver_.length(other); ++k) {
            if (chosen[k] >= 0 && chosen[k] < owner_.length(set)) {
              body(token + chosen[k], first + k - base, others);
            }
          }
        }
      }
    }
  }

  const Side side_;
  const TokenSets &owner_, &giver_;
  const ScoreMatrix<const float> own_, others_;
  const int32_t *const own_choices_, *const other_choices_;
  const T* const tokens_;
  float* const gradient_;
  std::vector<Range> givers_;
  std::vector<Scratch> scratch_;
};

template <typename T>
void add_gradients(const MaxTask& task, const MaxGradients& gradients) {
  at::Tensor x = gradients.x, y = gradients.y;
  if (x.defined()) {
    GatherGradient<T>(task, gradients, true, x).run();
  }
  if (y.defined()) {
    GatherGradient<T>(task, gradients, false, y).run();
  }
}

}  // namespace

void max_backward(const MaxTask& task, const MaxGradients& gradients) {
  switch (task.x.tokens.scalar_type()) {
    case at::kFloat:
      return add_gradients<float>(task, gradients);
    case at::kHalf:
      return add_gradients<at::Half>(task, gradients);
    default:
      return add_gradients<at::BFloat16>(task, gradients);
  }
}

}  // namespace pairtile
