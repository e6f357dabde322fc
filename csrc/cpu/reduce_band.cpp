// One reduction's share of the forward: a band of scores into its sums.
#include "softmax_shift.h"
#include "tile_work.h"

namespace pairtile {
namespace {

// term(r, at) is a vector of the terms of row r, at `at` in the band.
template <typename Term>
void add_to_rows(const Band& band, const float* mask, const float* weights, double* sums, const Term& term) {
  const float* along = weights == nullptr ? nullptr : band.along_columns(weights, 0);
  if_present(mask, [&](auto masked) {
    for (int64_t r = 0; r < band.rows; ++r) {
      Vec lanes(0.0f);
      for (int64_t c = 0; c < band.ld(); c += kLanes) {
        const int64_t at = r * band.ld() + c;
        Vec each = unless<masked.value>(mask, at, term(r, at, c), 0.0f);
        if (along != nullptr) {
          each = each * Vec::loadu(along + c);
        }
        lanes = lanes + each;
      }
      sums[r] += sum_lanes(lanes);
    }
  });
}

template <typename Term>
void add_to_columns(const Band& band, const float* mask, const float* weights, float* sums, const Term& term) {
  if_present(mask, [&](auto masked) {
    for_each_strip(band.ld(), [&](auto count, int64_t c) {
      constexpr int vectors = decltype(count)::value;
      Vec sum[vectors];
      for (int v = 0; v < vectors; ++v) {
        sum[v] = Vec::loadu(sums + c + v * kLanes);
      }
      for (int64_t r = 0; r < band.rows; ++r) {
        const Vec weight(weights == nullptr ? 1.0f : weights[r]);
        for (int v = 0; v < vectors; ++v) {
          const int64_t along = c + v * kLanes, at = r * band.ld() + along;
          sum[v] = at::vec::fmadd(unless<masked.value>(mask, at, term(r, at, along), 0.0f), weight, sum[v]);
        }
      }
      for (int v = 0; v < vectors; ++v) {
        sum[v].store(sums + c + v * kLanes);
      }
    });
  });
}

// Raises the maxima of the band's rows, and leaves their shifts.
void raise_rows(const Band& band, const float* mask, const float* values, Running& running, float* shifts) {
  if_present(mask, [&](auto masked) {
    for (int64_t r = 0; r < band.rows; ++r) {
      const int64_t i = band.row0 + r;
      Vec largest(running.maximum[i]);
      for (int64_t c = 0; c < band.ld(); c += kLanes) {
        const int64_t at = r * band.ld() + c;
        largest = at::vec::maximum(largest, unless<masked.value>(mask, at, Vec::loadu(values + at), -kInfinity));
      }
      const float raised = max_lanes(largest);
      const double factor = rescale(running.maximum[i], raised);
      running.sum[i] *= factor;
      if (!running.weighted.empty()) {
        running.weighted[i] *= factor;
      }
      running.maximum[i] = raised;
      shifts[r] = finite(raised);
    }
  });
}

// The same for columns, whose partial results are of the tile alone.
void raise_columns(const Band& band, const float* mask, const float* values, bool averages, Partial partial,
                   float* shifts) {
  if_present(mask, [&](auto masked) {
    for (int64_t c = 0; c < band.ld(); c += kLanes) {
      const Vec before = Vec::loadu(partial.maxima + c);
      Vec largest = before;
      for (int64_t r = 0; r < band.rows; ++r) {
        const int64_t at = r * band.ld() + c;
        largest = at::vec::maximum(largest, unless<masked.value>(mask, at, Vec::loadu(values + at), -kInfinity));
      }
      const Vec shift = finite(largest), factor = exp(before - shift);
      largest.store(partial.maxima + c);
      shift.store(shifts + c);
      if (!averages) {
        (Vec::loadu(partial.sums + c) * factor).store(partial.sums + c);
        continue;
      }
      float factors[kLanes];
      factor.store(factors);
      for (int64_t l = 0; l < kLanes; ++l) {
        partial.exact_sums[c + l] *= factors[l];
        partial.weighted[c + l] *= factors[l];
      }
    }
  });
}

template <typename Term>
void add_terms(const Band& band, const float* mask, Running& running, Partial partial, const Term& term) {
  const Reduction& reduction = *running.reduction;
  if (reduction.by_row) {
    add_to_rows(band, mask, reduction.weights, running.sum.data() + band.row0, term);
  } else {
    const float* weights = reduction.weights == nullptr ? nullptr : reduction.weights + band.row0;
    add_to_columns(band, mask, weights, partial.sums, term);
  }
}

// body(term): term(r, at, c) is a vector of exp(value - shift of the owner).
template <typename Body>
void with_exponentials(Band& band, const Mode& mode, const float* mask, Running& running, Partial partial,
                       const Body& body) {
  if (running.safe(mode)) {
    const float* exponentials = band.exponentials(running.use.exponent);
    body([=](int64_t, int64_t at, int64_t) { return Vec::loadu(exponentials + at); });
    return;
  }
  const float* values = band.values(running.use.exponent);
  float* shifts = band.shifts();
  if (running.reduction->by_row) {
    raise_rows(band, mask, values, running, shifts);
    body([=](int64_t r, int64_t at, int64_t) { return exp(Vec::loadu(values + at) - Vec(shifts[r])); });
  } else {
    raise_columns(band, mask, values, running.reduction->kind == Kind::kSoftmaxMean, partial, shifts);
    body([=](int64_t, int64_t at, int64_t c) { return exp(Vec::loadu(values + at) - Vec::loadu(shifts + c)); });
  }
}

// p = weight * exp(value - shift), 0 where the mask says so, and what is averaged, 0 there too.
template <typename Term>
void weigh_terms(Band& band, const float* mask, const Reduction& reduction, const Term& term, float* p,
                 float* averaged) {
  const float* from = band.scores(reduction.of);
  const bool weighted = reduction.weights != nullptr;
  const float* along = weighted && reduction.by_row ? band.along_columns(reduction.weights, 0) : nullptr;
  if_present(mask, [&](auto masked) {
    for (int64_t r = 0; r < band.rows; ++r) {
      const Vec weight(weighted && !reduction.by_row ? reduction.weights[band.row0 + r] : 1.0f);
      for (int64_t c = 0; c < band.ld(); c += kLanes) {
        const int64_t at = r * band.ld() + c;
        const Vec each = unless<masked.value>(mask, at, term(r, at, c), 0.0f);
        (each * (along == nullptr ? weight : Vec::loadu(along + c))).store(p + at);
        unless<masked.value>(mask, at, Vec::loadu(from + at), 0.0f).store(averaged + at);
      }
    }
  });
}

// Sums of p and p A in float64: the gradient p (A - mean) of a peaked softmax is a difference of numbers that agree.
void average_rows(const Band& band, const float* p, const float* averaged, double* sums, double* totals) {
  constexpr int64_t kSums = 16;  // ld is a multiple of it
  for (int64_t r = 0; r < band.rows; ++r) {
    double sum[kSums] = {}, total[kSums] = {};
    for (int64_t c = 0; c < band.ld(); c += kSums) {
      const float *weights = p + r * band.ld() + c, *values = averaged + r * band.ld() + c;
      for (int64_t l = 0; l < kSums; ++l) {
        sum[l] += weights[l];
        total[l] += static_cast<double>(weights[l]) * values[l];
      }
    }
    for (int64_t l = 0; l < kSums; ++l) {
      sums[r] += sum[l];
      totals[r] += total[l];
    }
  }
}

void average_columns(const Band& band, const float* p, const float* averaged, double* sums, double* totals) {
  for (int64_t r = 0; r < band.rows; ++r) {
    const float *weights = p + r * band.ld(), *values = averaged + r * band.ld();
    for (int64_t c = 0; c < band.ld(); ++c) {
      sums[c] += weights[c];
      totals[c] += static_cast<double>(weights[c]) * values[c];
    }
  }
}

void reduce_softmax(Band& band, const Mode& mode, const float* mask, Running& running, Partial partial) {
  with_exponentials(band, mode, mask, running, partial, [&](auto term) {
    if (running.reduction->kind == Kind::kLogSumExp) {
      add_terms(band, mask, running, partial, term);
      return;
    }
    float *p = band.spare(0), *averaged = band.spare(1);
    weigh_terms(band, mask, *running.reduction, term, p, averaged);
    if (running.reduction->by_row) {
      average_rows(band, p, averaged, running.sum.data() + band.row0, running.weighted.data() + band.row0);
    } else {
      average_columns(band, p, averaged, partial.exact_sums, partial.weighted);
    }
  });
}

// term(S, threshold) against the thresholds of the owners.
template <typename Term>
void reduce_hinge(const Band& band, const float* mask, Running& running, Partial partial, const Term& term) {
  const Reduction& reduction = *running.reduction;
  const float* scores = band.scores(kScores);
  if (reduction.by_row) {
    const float* thresholds = reduction.thresholds + band.row0;
    add_terms(band, mask, running, partial, [=](int64_t r, int64_t at, int64_t) {
      return term(Vec::loadu(scores + at), Vec(thresholds[r]));
    });
  } else {
    const float* thresholds = band.along_columns(reduction.thresholds, 1);
    add_terms(band, mask, running, partial, [=](int64_t, int64_t at, int64_t c) {
      return term(Vec::loadu(scores + at), Vec::loadu(thresholds + c));
    });
  }
}

void reduce_softplus(Band& band, const float* mask, Running& running, Partial partial) {
  const float* scores = band.scores(kScores);
  const float* positive = running.use.positive < 0 ? nullptr : band.mask(running.use.positive);
  add_terms(band, mask, running, partial, [=](int64_t, int64_t at, int64_t) {
    const Vec score = Vec::loadu(scores + at);
    return softplus(positive == nullptr ? score : Vec::blendv(score, score.neg(), Vec::loadu(positive + at)));
  });
}

}  // namespace

void reduce_band(Band& band, const Mode& mode, Running& running, Partial partial) {
  if (running.chooser != nullptr) {
    running.chooser->choose(band, running.use.excluded);
    return;
  }
  const float* mask = band.mask(running.use.excluded);
  switch (running.reduction->kind) {
    case Kind::kSoftplusSum:
      return reduce_softplus(band, mask, running, partial);
    case Kind::kHinge:
      return reduce_hinge(band, mask, running, partial,
                          [](Vec score, Vec threshold) { return at::vec::maximum(score - threshold, Vec(0.0f)); });
    case Kind::kCount:
      return reduce_hinge(band, mask, running, partial, [](Vec score, Vec threshold) {
        return Vec::blendv(Vec(0.0f), Vec(1.0f), score > threshold);
      });
    default:
      return reduce_softmax(band, mode, mask, running, partial);
  }
}

}  // namespace pairtile
