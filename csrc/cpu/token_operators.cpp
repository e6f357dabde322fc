// Token merging as operators: kernels/token_merging/similarity.py and combine.py document what they compute.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "memory.h"
#include "token_matching.h"
#include "token_merging.h"

namespace pairtile {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Of a mask [B, N]; `memory` owns what is returned.
Keep make_keep(const OptionalTensor& given, const TokenBatch& of, Tensor& memory, const char* name) {
  if (!given.has_value()) {
    return {};
  }
  TORCH_CHECK(given->scalar_type() == at::kBool && given->sizes() == at::IntArrayRef({of.batch, of.count}), name,
              ": expected a bool mask [", of.batch, ", ", of.count, "], got ", given->scalar_type(), " ",
              given->sizes());
  memory = given->contiguous();
  return {memory.const_data_ptr<bool>(), of.count};
}

std::tuple<Tensor, Tensor> best_partners(const Tensor& x, const Tensor& y, const OptionalTensor& x_keep,
                                         const OptionalTensor& y_keep, int64_t partners) {
  const TokenBatch of_x = make_token_batch(x, "x"), of_y = make_token_batch(y, "y");
  TORCH_CHECK(of_x.batch == of_y.batch && of_x.width == of_y.width && of_x.type() == of_y.type(),
              "best_partners: expected x and y of one batch, width and dtype, got ", x.scalar_type(), " ", x.sizes(),
              " and ", y.scalar_type(), " ", y.sizes());
  TORCH_CHECK(partners >= 0 && partners <= 2, "best_partners: partners=", partners);
  Tensor x_memory, y_memory;
  const Keep keep_x = make_keep(x_keep, of_x, x_memory, "x_keep"), keep_y = make_keep(y_keep, of_y, y_memory, "y_keep");
  const Tensor best = at::empty({of_x.batch, of_x.count}, x.options().dtype(at::kFloat));
  const Tensor index = at::empty({of_x.batch, of_x.count}, x.options().dtype(at::kLong));
  find_partners(of_x, of_y, false, keep_x, keep_y, static_cast<Partners>(partners), best.mutable_data_ptr<float>(),
                index.mutable_data_ptr<int64_t>());
  return {best, index};
}

Tensor energies(const Tensor& x, double margin, double alpha) {
  const TokenBatch of_x = make_token_batch(x, "x");
  const Tensor found = at::empty({of_x.batch, of_x.count}, x.options().dtype(at::kFloat));
  find_energies(of_x, static_cast<float>(margin), static_cast<float>(alpha), found.mutable_data_ptr<float>());
  return found;
}

std::tuple<Tensor, Tensor, Tensor> bipartite(const Tensor& metric, int64_t r, int64_t protected_count,
                                             bool class_token, bool distill_token) {
  const TokenBatch of_metric = make_token_batch(metric, "metric");
  TORCH_CHECK(r >= 0 && r <= of_metric.count / 2, "bipartite_matching: r=", r, " of ", of_metric.count, " tokens");
  const Bipartite matching{r, protected_count, class_token, distill_token};
  TORCH_CHECK(matching.front() <= of_metric.count - r, "bipartite_matching: ", matching.front(),
              " tokens in front of ", of_metric.count - r);
  const auto options = metric.options().dtype(at::kLong);
  const Tensor kept = at::empty({of_metric.batch, of_metric.count - r}, options);
  const Tensor sources = at::empty({of_metric.batch, r}, options), places = at::empty({of_metric.batch, r}, options);
  match_bipartite(of_metric, matching, kept.mutable_data_ptr<int64_t>(), sources.mutable_data_ptr<int64_t>(),
                  places.mutable_data_ptr<int64_t>());
  return {kept, sources, places};
}

Tensor indices(const Tensor& given, int64_t batch, const char* name) {
  TORCH_CHECK(given.scalar_type() == at::kLong && given.dim() == 2 && given.size(0) == batch, name,
              ": expected int64 indices of ", batch, " samples, got ", given.scalar_type(), " ", given.sizes());
  return given.contiguous();
}

Tensor share(const OptionalTensor& given, int64_t batch, int64_t count, const char* name) {
  if (!given.has_value()) {
    return {};
  }
  TORCH_CHECK(given->sizes() == at::IntArrayRef({batch, count}), name, ": expected a number for each of [", batch, ", ",
              count, "], got ", given->sizes());
  return given->to(at::kFloat).contiguous();
}

const float* data_of(const Tensor& share) { return share.defined() ? share.const_data_ptr<float>() : nullptr; }

Tensor combine(const Tensor& x, const Tensor& kept, const Tensor& sources, const Tensor& places,
               const OptionalTensor& factors, const OptionalTensor& divisors) {
  const TokenBatch of_x = make_token_batch(x, "x");
  const Tensor stay = indices(kept, of_x.batch, "kept"), move = indices(sources, of_x.batch, "sources");
  const Tensor to = indices(places, of_x.batch, "places");
  TORCH_CHECK(move.sizes() == to.sizes(), "combine: expected a place for each source, got ", to.sizes(), " for ",
              move.sizes());
  const Tensor factor = share(factors, of_x.batch, of_x.count, "factors");
  const Tensor divisor = share(divisors, of_x.batch, stay.size(1), "divisors");
  const Moves moves{stay.const_data_ptr<int64_t>(), move.const_data_ptr<int64_t>(), to.const_data_ptr<int64_t>(),
                    stay.size(1), move.size(1)};
  const Tensor out = empty_in_huge_pages({of_x.batch, moves.count, of_x.width}, x.options());
  combine_tokens(of_x, moves, {data_of(factor), data_of(divisor)}, out.mutable_data_ptr());
  return out;
}

Tensor spread(const Tensor& x, const Tensor& place_of, const OptionalTensor& factors, const OptionalTensor& divisors) {
  const TokenBatch of_x = make_token_batch(x, "x");
  const Tensor at_places = indices(place_of, of_x.batch, "place_of");
  const int64_t tokens = at_places.size(1);
  const Tensor factor = share(factors, of_x.batch, tokens, "factors");
  const Tensor divisor = share(divisors, of_x.batch, of_x.count, "divisors");
  const Tensor out = empty_in_huge_pages({of_x.batch, tokens, of_x.width}, x.options());
  spread_tokens(of_x, at_places.const_data_ptr<int64_t>(), tokens, {data_of(factor), data_of(divisor)},
                out.mutable_data_ptr());
  return out;
}

}  // namespace
}  // namespace pairtile

TORCH_LIBRARY_FRAGMENT(pairtile, m) {
  m.def("cpp_best_partners(Tensor x, Tensor y, Tensor? x_keep, Tensor? y_keep, int partners) -> (Tensor, Tensor)");
  m.def("cpp_token_energies(Tensor x, float margin, float alpha) -> Tensor");
  m.def(
      "cpp_bipartite_matching(Tensor metric, int r, int protected_count, bool class_token, bool distill_token) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "cpp_combine_tokens(Tensor x, Tensor kept, Tensor sources, Tensor places, Tensor? factors, Tensor? divisors) -> "
      "Tensor");
  m.def("cpp_spread_tokens(Tensor x, Tensor place_of, Tensor? factors, Tensor? divisors) -> Tensor");
}

TORCH_LIBRARY_IMPL(pairtile, CPU, m) {
  m.impl("cpp_best_partners", &pairtile::best_partners);
  m.impl("cpp_token_energies", &pairtile::energies);
  m.impl("cpp_bipartite_matching", &pairtile::bipartite);
  m.impl("cpp_combine_tokens", &pairtile::combine);
  m.impl("cpp_spread_tokens", &pairtile::spread);
}
