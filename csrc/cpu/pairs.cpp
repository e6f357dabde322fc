// S at the own pairs of rows and columns alone: scores in float64, and gradients without a tile.
#include <ATen/Parallel.h>

#include <limits>

#include "gradients.h"
#include "sweep.h"

namespace pairtile {
namespace {

template <typename T>
struct Type {
  using type = T;
};

template <typename Body>
auto with_features(const Problem& problem, const Body& body) {
  switch (problem.x.scalar_type()) {
    case at::kFloat:
      return body(Type<float>());
    case at::kHalf:
      return body(Type<at::Half>());
    default:
      return body(Type<at::BFloat16>());
  }
}

int64_t grain(const Problem& problem) { return 32768 / (problem.d + 1) + 1; }

// The pairs of one reduction that lie in S, once by row and once by column: a column may belong to several rows.
struct Pairs {
  Pairs(const Problem& problem, const Partner& partner) : column(problem.n, -1), start(problem.m + 1, 0) {
    for (int64_t i = 0; i < problem.n; ++i) {
      const int64_t j = partner.column_of(i);
      if (j >= 0 && j < problem.m) {
        column[i] = j;
        ++start[j + 1];
      }
    }
    for (int64_t j = 0; j < problem.m; ++j) {
      start[j + 1] += start[j];
    }
    rows.resize(start[problem.m]);
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t i = 0; i < problem.n; ++i) {
      if (column[i] >= 0) {
        rows[next[column[i]]++] = i;
      }
    }
  }
  std::vector<int64_t> column;       // of each row, or -1
  std::vector<int64_t> start, rows;  // of column j: rows[start[j]] : rows[start[j + 1]]
};

struct Weighted {
  Pairs pairs;
  bool by_row;
  const float* coefficients;
  float of(int64_t row, int64_t column) const { return coefficients[by_row ? row : column]; }
};

template <typename T>
void add_scaled(const T* from, float factor, int64_t d, float* to) {
  for (int64_t k = 0; k < d; ++k) {
    to[k] += factor * static_cast<float>(from[k]);
  }
}

template <typename T>
void gradients_of_rows(const Problem& problem, const std::vector<Weighted>& all, Needed needed, Gradients& gradients) {
  const int64_t d = problem.d;
  const T *x = problem.x.const_data_ptr<T>(), *y = problem.y.const_data_ptr<T>();
  T* dx = needed.x ? gradients.x.mutable_data_ptr<T>() : nullptr;
  at::parallel_for(0, problem.n, grain(problem), [&](int64_t begin, int64_t end) {
    std::vector<float> weighted(d);
    for (int64_t i = begin; i < end; ++i) {
      std::fill(weighted.begin(), weighted.end(), 0.0f);
      for (const Weighted& each : all) {
        const int64_t j = each.pairs.column[i];
        if (j >= 0) {
          add_scaled(y + j * d, each.of(i, j), d, weighted.data());
          if (needed.row_sums) {
            gradients.row[i] += each.of(i, j);
          }
        }
      }
      if (needed.scale) {
        gradients.scale[i] = dot(x + i * d, weighted.data(), d);
      }
      for (int64_t k = 0; dx != nullptr && k < d; ++k) {
        dx[i * d + k] = static_cast<T>(problem.scales()[i] * weighted[k]);
      }
    }
  });
}

template <typename T>
void gradients_of_columns(const Problem& problem, const std::vector<Weighted>& all, Needed needed,
                          Gradients& gradients) {
  const int64_t d = problem.d;
  const T* x = problem.x.const_data_ptr<T>();
  T* dy = needed.y ? gradients.y.mutable_data_ptr<T>() : nullptr;
  at::parallel_for(0, problem.m, grain(problem), [&](int64_t begin, int64_t end) {
    std::vector<float> sum(d);
    for (int64_t j = begin; j < end; ++j) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (const Weighted& each : all) {
        for (int64_t k = each.pairs.start[j]; k < each.pairs.start[j + 1]; ++k) {
          const int64_t i = each.pairs.rows[k];
          add_scaled(x + i * d, problem.scales()[i] * each.of(i, j), d, sum.data());
          if (needed.col_sums) {
            gradients.col[j] += each.of(i, j);
          }
        }
      }
      for (int64_t k = 0; dy != nullptr && k < d; ++k) {
        dy[j * d + k] = static_cast<T>(sum[k]);
      }
    }
  });
}

}  // namespace

std::vector<double> pair_scores(const Problem& problem, const Partner& partner) {
  return with_features(problem, [&](auto type) {
    using T = typename decltype(type)::type;
    const T *x = problem.x.const_data_ptr<T>(), *y = problem.y.const_data_ptr<T>();
    const int64_t d = problem.d;
    std::vector<double> scores(problem.n, -std::numeric_limits<double>::infinity());
    at::parallel_for(0, problem.n, grain(problem), [&](int64_t begin, int64_t end) {
      std::vector<float> own(d);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t j = partner.column_of(i);
        if (j >= 0 && j < problem.m) {
          convert_row(y + j * d, own.data(), d);
          const double bias = problem.col_bias ? problem.col_biases()[j] : 0.0f;
          scores[i] = problem.scales()[i] * dot(x + i * d, own.data(), d) + problem.offsets()[i] + bias;
        }
      }
    });
    return scores;
  });
}

Gradients pair_gradients(const Problem& problem, const Plan& plan, const std::vector<Upstream>& upstream,
                         Needed needed) {
  Gradients gradients = start_gradients(problem, needed);
  std::vector<Weighted> all;
  for (size_t k = 0; k < plan.reductions.size(); ++k) {
    const Reduction& each = plan.reductions[k];
    if (!each.dense()) {
      all.push_back({Pairs(problem, each.positive[0].partner), each.by_row, upstream[k].coefficient.data()});
    }
  }
  with_features(problem, [&](auto type) {
    using T = typename decltype(type)::type;
    gradients_of_rows<T>(problem, all, needed, gradients);
    gradients_of_columns<T>(problem, all, needed, gradients);
  });
  return gradients;
}

}  // namespace pairtile
