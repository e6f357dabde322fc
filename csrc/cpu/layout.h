// What a sweep and its gradients agree on: how panels are cut, and who runs their tasks.
#pragma once

#include <ATen/Parallel.h>

#include "parallel.h"

namespace pairtile {

struct Layout {
  bool serial;    // one thread: waking others would cost more than it saves
  bool lean;      // features are operands as they lie
  int64_t group;  // chunks that one product of step 3 adds up
  int64_t panel_chunks = 1, panel_blocks = 1;

  int64_t workers() const { return serial ? 1 : at::get_num_threads(); }

  // body(task, worker), as in for_each_task.
  template <typename Body>
  void run(int64_t tasks, const Body& body) const {
    if (!serial) {
      for_each_task(tasks, body);
      return;
    }
    for (int64_t task = 0; task < tasks; ++task) {
      body(task, int64_t{0});
    }
    release_product();
  }
};

}  // namespace pairtile
