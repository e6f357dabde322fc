// Tasks for all of torch's threads, taken one by one: a thread that the machine slows down takes fewer.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "product.h"

namespace pairtile {

// Calls body(task, worker) for each task in [0, tasks); worker < at::get_num_threads() names a private scratch.
// Which thread takes a task is left open, so a task must own what it writes, and add in an order of its own.
template <typename Body>
void for_each_task(int64_t tasks, const Body& body) {
  const int64_t workers = std::min<int64_t>(tasks, at::get_num_threads());
  if (workers <= 1) {
    for (int64_t task = 0; task < tasks; ++task) {
      body(task, int64_t{0});
    }
    if (tasks > 0) {
      release_product();
    }
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task = next++; task < tasks; task = next++) {
        body(task, worker);
      }
    }
    release_product();
  });
}

}  // namespace pairtile
