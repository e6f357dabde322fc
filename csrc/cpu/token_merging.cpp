// Both maps read every token once and write every token once; most of them are copied as they are.

#include "token_merging.h"

#include <c10/util/Exception.h>

#include <vector>

#include "operands.h"
#include "parallel.h"
#include "token_output.h"
#include "token_vec.h"

namespace pairtile {
namespace {

constexpr int64_t kTaskBytes = int64_t{256} << 10;

template <typename T>
Vec load_some(const T* from, int64_t count) {
  if (count == kLanes) {
    return load_floats(from);
  }
  alignas(64) float lanes[kLanes] = {};
  convert_row(from, lanes, count);
  return Vec::loadu(lanes);
}

// A token as it is where its share is all of it, so that what is not merged keeps its bits.
template <typename T>
void scale_token(const T* from, float factor, float divisor, int64_t width, const TokenOutput<T>& out, int64_t row) {
  if (factor == divisor) {
    out.copy(row, from);
    return;
  }
  for (int64_t c = 0; c < width; c += kLanes) {
    const int64_t count = std::min(kLanes, width - c);
    out.put(row, c, load_some(from + c, count) * Vec(factor) / Vec(divisor), count);
  }
}

void check_index(int64_t index, int64_t size, const char* name) {
  TORCH_CHECK_INDEX(index >= 0 && index < size, name, ": ", index, " is not one of ", size);
}

// Items by their key: of each key of a range those that have it, in their order.
class Lists {
 public:
  void find(const int64_t* keys, int64_t items, int64_t begin, int64_t end) {
    begin_ = begin;
    first_.assign(end - begin, -1);
    next_.resize(items);
    for (int64_t item = items - 1; item >= 0; --item) {
      if (keys[item] >= begin && keys[item] < end) {
        int64_t& first = first_[keys[item] - begin];
        next_[item] = first;
        first = item;
      }
    }
  }
  int64_t first(int64_t key) const { return first_[key - begin_]; }  // -1: none
  int64_t next(int64_t item) const { return next_[item]; }

 private:
  int64_t begin_ = 0;
  std::vector<int64_t> first_, next_;
};

// Places of kept tokens, and the sources that are merged into places.
struct Lookup {
  Lists places, sources;
};

// A task owns the places of some successive kept tokens: these are read as they lie, since fetching rows ahead pays for
// reads and not for writes, and ToMe's new order takes first the even tokens and then the odd ones.
template <typename T>
class Combine {
 public:
  Combine(const TokenBatch& x, const Moves& moves, Shares shares, void* out)
      : x_(x), moves_(moves), shares_(shares), out_(out, x.batch * moves.count, x.width) {}

  void run() const {
    const int64_t step = std::max<int64_t>(1, kTaskBytes / std::max<int64_t>(1, x_.width * sizeof(T)));
    const int64_t parts = ceil_div(x_.count, step);
    std::vector<Lookup> lookups(at::get_num_threads());
    for_each_task(x_.batch * parts, [&](int64_t task, int64_t worker) {
      const int64_t b = task / parts, begin = task % parts * step, end = std::min(begin + step, x_.count);
      Lookup& of = lookups[worker];
      of.places.find(moves_.kept + b * moves_.count, moves_.count, begin, end);
      of.sources.find(moves_.places + b * moves_.merged, moves_.merged, 0, moves_.count);
      for (int64_t token = begin; token < end; ++token) {
        for (int64_t place = of.places.first(token); place >= 0; place = of.places.next(place)) {
          fill(b, token, place, of.sources);
        }
      }
      out_.finish();
    });
  }

 private:
  void fill(int64_t b, int64_t token, int64_t place, const Lists& merged) const {
    const T* x = x_.sample<T>(b);
    const int64_t* sources = moves_.sources + b * moves_.merged;
    const int64_t row = b * moves_.count + place;
    const float divisor = shares_.divisors == nullptr ? 1.0f : shares_.divisors[row];
    auto factor = [&](int64_t of) { return shares_.factors == nullptr ? 1.0f : shares_.factors[b * x_.count + of]; };
    if (merged.first(place) < 0) {
      scale_token(x + token * x_.stride, factor(token), divisor, x_.width, out_, row);
      return;
    }
    for (int64_t c = 0; c < x_.width; c += kLanes) {
      const int64_t count = std::min(kLanes, x_.width - c);
      Vec sum = load_some(x + token * x_.stride + c, count) * Vec(factor(token));
      for (int64_t r = merged.first(place); r >= 0; r = merged.next(r)) {
        sum = at::vec::fmadd(load_some(x + sources[r] * x_.stride + c, count), Vec(factor(sources[r])), sum);
      }
      out_.put(row, c, sum / Vec(divisor), count);
    }
  }

  const TokenBatch& x_;
  const Moves moves_;
  const Shares shares_;
  const TokenOutput<T> out_;
};

template <typename T>
void spread(const TokenBatch& x, const int64_t* place_of, int64_t tokens, Shares shares, void* data) {
  const TokenOutput<T> out(data, x.batch * tokens, x.width);
  const int64_t step = std::max<int64_t>(1, kTaskBytes / std::max<int64_t>(1, x.width * sizeof(T)));
  const int64_t parts = ceil_div(tokens, step);
  for_each_task(x.batch * parts, [&](int64_t task, int64_t) {
    const int64_t b = task / parts, begin = task % parts * step, end = std::min(begin + step, tokens);
    for (int64_t token = b * tokens + begin; token < b * tokens + end; ++token) {
      const int64_t place = place_of[token];
      const float factor = shares.factors == nullptr ? 1.0f : shares.factors[token];
      const float divisor = shares.divisors == nullptr ? 1.0f : shares.divisors[b * x.count + place];
      scale_token(x.sample<T>(b) + place * x.stride, factor, divisor, x.width, out, token);
    }
    out.finish();
  });
}

}  // namespace

void combine_tokens(const TokenBatch& x, const Moves& moves, Shares shares, void* out) {
  for (int64_t k = 0; k < x.batch * moves.count; ++k) {
    check_index(moves.kept[k], x.count, "kept");
  }
  for (int64_t k = 0; k < x.batch * moves.merged; ++k) {
    check_index(moves.sources[k], x.count, "sources");
    check_index(moves.places[k], moves.count, "places");
  }
  with_token_type(x.type(), [&](auto number) {
    using T = decltype(number);
    Combine<T>(x, moves, shares, out).run();
  });
}

void spread_tokens(const TokenBatch& x, const int64_t* place_of, int64_t tokens, Shares shares, void* out) {
  for (int64_t k = 0; k < x.batch * tokens; ++k) {
    check_index(place_of[k], x.count, "place_of");
  }
  with_token_type(x.type(), [&](auto number) {
    spread<decltype(number)>(x, place_of, tokens, shares, out);
  });
}

}  // namespace pairtile
