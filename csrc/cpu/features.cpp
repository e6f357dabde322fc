// What the CPU build finds on this machine: instruction sets, threads, and torch's tile-sized matrix product.
//
// Two answers can differ, and both are reported: what the compiler was allowed to use (-march=native at build
// time, the macros below) and what torch chose at run time (at::get_cpu_capability).

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <cmath>
#include <exception>
#include <string>
#include <vector>

// An internal interface of ATen: used where the header declares it and build.py found the symbol exported.
#if defined(PAIRTILE_BRGEMM) && __has_include(<ATen/native/CPUBlas.h>)
#include <ATen/native/CPUBlas.h>
#endif

namespace {

std::string instruction_sets() {
  std::string found;
  auto add = [&found](const char* name) { found += found.empty() ? name : std::string(" ") + name; };
#ifdef __AVX2__
  add("AVX2");
#endif
#ifdef __AVX512F__
  add("AVX512F");
#endif
#ifdef __AVX512BF16__
  add("AVX512_BF16");
#endif
#ifdef __AMX_BF16__
  add("AMX_BF16");
#endif
#ifdef __ARM_NEON
  add("NEON");
#endif
#ifdef __ARM_FEATURE_SVE
  add("SVE");
#endif
#ifdef __ARM_FEATURE_BF16
  add("ARM_BF16");
#endif
  return found.empty() ? "none beyond the baseline" : found;
}

// A product of ones whose every entry is the depth: enough to see a refusal or a wrong layout.
template <typename T>
std::string try_brgemm() {
#if defined(CPUBLAS_BRGEMM_F32F32F32) && defined(CPUBLAS_BRGEMM_BF16BF16F32)
  constexpr int64_t n = 32;
  std::vector<T> a(n * n, T(1.0f)), b(n * n, T(1.0f));
  std::vector<float> c(n * n, 0.0f);
  try {
    at::native::cpublas::brgemm(n, n, n, n, n, n, /*add_C=*/false, a.data(), b.data(), c.data());
    at::native::cpublas::brgemm_release();
  } catch (const std::exception&) {
    return "refused by this CPU";
  }
  for (float value : c) {
    if (std::abs(value - static_cast<float>(n)) > 1e-3f) {
      return "gives wrong results on this CPU";
    }
  }
  return "works";
#else
  return "not in this torch";
#endif
}

c10::Dict<std::string, std::string> cpu_features() {
  c10::Dict<std::string, std::string> found;
  found.insert("cpu_capability", at::get_cpu_capability());
  found.insert("threads", std::to_string(at::get_num_threads()));
  found.insert("instruction_sets", instruction_sets());
  found.insert("brgemm_float32", try_brgemm<float>());
  found.insert("brgemm_bfloat16", try_brgemm<at::BFloat16>());
  return found;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pairtile, m) {
  m.def("cpu_features() -> Dict(str, str)", &cpu_features);
}
