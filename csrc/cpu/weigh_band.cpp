// One reduction's share of the backward: d (its results . upstream gradients) / dS of a band, added to the weights.
#include "tile_work.h"

namespace pairtile {
namespace {

// weights += weight(r, at, c) * row_factors[r] * col_factors[c], 0 where the mask says so; one of the factors may be
// absent.
template <typename Weight>
void add_weights(Band& band, const float* mask, const float* row_factors, const float* col_factors,
                 const Weight& weight) {
  float* weights = band.weights();
  if_present(mask, [&](auto masked) {
    if_present(col_factors, [&](auto along) {
      for (int64_t r = 0; r < band.rows; ++r) {
        const Vec row(row_factors == nullptr ? 1.0f : row_factors[r]);
        for (int64_t c = 0; c < band.ld(); c += kLanes) {
          const int64_t at = r * band.ld() + c;
          Vec each = unless<masked.value>(mask, at, weight(r, at, c), 0.0f);
          if constexpr (along.value) {
            each = each * Vec::loadu(col_factors + c);
          }
          at::vec::fmadd(each, row, Vec::loadu(weights + at)).store(weights + at);
        }
      }
    });
  });
}

// The owner's coefficient and the pair's weight, along rows and columns.
template <typename Weight>
void add_weights(Band& band, const float* mask, const Reduction& reduction, const Upstream& upstream,
                 const Weight& weight) {
  const float *of_rows, *of_columns;
  if (reduction.by_row) {
    of_rows = upstream.coefficient.data() + band.row0;
    of_columns = reduction.weights == nullptr ? nullptr : band.along_columns(reduction.weights, 0);
  } else {
    of_rows = reduction.weights == nullptr ? nullptr : reduction.weights + band.row0;
    of_columns = band.along_columns(upstream.coefficient.data(), 0);
  }
  add_weights(band, mask, of_rows, of_columns, weight);
}

// body(of): of(r, c) is the entry of a vector with one for each owner.
template <typename Body>
void with_owners(Band& band, bool by_row, const float* all, int64_t slot, const Body& body) {
  if (by_row) {
    const float* of_rows = all + band.row0;
    body([=](int64_t r, int64_t) { return Vec(of_rows[r]); });
  } else {
    const float* of_columns = band.along_columns(all, slot);
    body([=](int64_t, int64_t c) { return Vec::loadu(of_columns + c); });
  }
}

// d pace(S) / dS.
inline Vec slope_of(const Pace& pace, Vec score) {
  const Vec bent = pace.slope == 0 ? Vec(pace.offset) : at::vec::fmadd(Vec(pace.slope), score, Vec(pace.offset));
  return Vec(pace.gain) * at::vec::maximum(bent, Vec(0.0f));
}

// Of p = coefficient * exponential: p times what the chain rule adds.
template <typename Exponential>
void weigh_softmax(Band& band, const float* mask, const Reduction& reduction, const Upstream& upstream,
                   const Exponential& exponential) {
  const Pace pace = reduction.pace;
  if (reduction.kind == Kind::kLogSumExp) {
    if (pace == Pace()) {
      add_weights(band, mask, reduction, upstream, exponential);
    } else {
      const float* scores = band.scores(kScores);
      add_weights(band, mask, reduction, upstream, [=](int64_t r, int64_t at, int64_t c) {
        return exponential(r, at, c) * slope_of(pace, Vec::loadu(scores + at));
      });
    }
    return;
  }
  if (reduction.under != kScores) {
    add_weights(band, mask, reduction, upstream, exponential);
    return;
  }
  // d (sum_j p_ij A_ij) / dS_ij = p_ij k (A_ij - mean_i), and p_ij more where A is S itself.
  const float* averaged = band.scores(reduction.of);
  const Vec own(reduction.of == kScores ? 1.0f : 0.0f), sharpness(pace.gain);
  with_owners(band, reduction.by_row, upstream.mean.data(), 2, [&](auto mean) {
    with_owners(band, reduction.by_row, upstream.mean_rest.data(), 3, [&](auto rest) {
      add_weights(band, mask, reduction, upstream, [=](int64_t r, int64_t at, int64_t c) {
        const Vec above = Vec::loadu(averaged + at) - mean(r, c) - rest(r, c);
        return exponential(r, at, c) * at::vec::fmadd(sharpness, above, own);
      });
    });
  });
}

void weigh_softplus(Band& band, const float* mask, const Reduction& reduction, const Shared::Use& use,
                    const Upstream& upstream) {
  const float* scores = band.scores(kScores);
  const float* positive = use.positive < 0 ? nullptr : band.mask(use.positive);
  add_weights(band, mask, reduction, upstream, [=](int64_t, int64_t at, int64_t) {
    const Vec score = Vec::loadu(scores + at);
    const Vec sign = positive == nullptr ? Vec(1.0f) : Vec::blendv(Vec(1.0f), Vec(-1.0f), Vec::loadu(positive + at));
    const Vec signed_score = score * sign;
    // A NaN does not survive exp.
    return sign * Vec::blendv(sigmoid(signed_score), signed_score, signed_score != signed_score);
  });
}

}  // namespace

void weigh_band(Band& band, const Mode& mode, const Reduction& reduction, const Shared::Use& use,
                const Upstream& upstream) {
  const float* mask = band.mask(use.excluded);
  if (reduction.kind == Kind::kSoftplusSum) {
    weigh_softplus(band, mask, reduction, use, upstream);
  } else if (reduction.kind == Kind::kHinge) {
    const float* scores = band.scores(kScores);
    with_owners(band, reduction.by_row, reduction.thresholds, 1, [&](auto threshold) {
      add_weights(band, mask, reduction, upstream, [=](int64_t r, int64_t at, int64_t c) {
        return Vec::blendv(Vec(0.0f), Vec(1.0f), Vec::loadu(scores + at) > threshold(r, c));
      });
    });
  } else if (mode.shared.exponents[use.exponent].safe) {
    const float* exponentials = band.exponentials(use.exponent);
    weigh_softmax(band, mask, reduction, upstream,
                  [=](int64_t, int64_t at, int64_t) { return Vec::loadu(exponentials + at); });
  } else {
    const float* values = band.values(use.exponent);
    with_owners(band, reduction.by_row, upstream.shift.data(), 1, [&](auto shift) {
      weigh_softmax(band, mask, reduction, upstream,
                    [=](int64_t r, int64_t at, int64_t c) { return exp(Vec::loadu(values + at) - shift(r, c)); });
    });
  }
}

}  // namespace pairtile
