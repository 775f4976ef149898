// The choice of a path at run time.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "site.h"

namespace lopro {
namespace {

struct Path {
  const char* name;
  void (*run)(const Site&);
  bool (*available)();
};

const Path paths[] = {
#if defined(__x86_64__)
    {"avx512", run_avx512,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vnni");
     }},
    {"avx2", run_avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"portable", run_portable, [] { return true; }},
};

const Path* find(const char* name) {
  for (const Path& path : paths)
    if ((!name || !std::strcmp(name, path.name)) && path.available()) return &path;
  return nullptr;
}

const Path* first() {
  const char* wanted = std::getenv("LOPRO_FX_CPU_ISA");
  if (wanted && *wanted) {
    if (const Path* path = find(wanted)) return path;
    std::fprintf(stderr, "lopro_fx: LOPRO_FX_CPU_ISA=%s is not a path of this processor; it is ignored\n", wanted);
  }
  return find(nullptr);
}

const Path*& current() {
  static const Path* path = first();
  return path;
}

}  // namespace

const char* path() { return current()->name; }

bool set_path(const char* name) {
  const Path* path = find(name);
  if (path) current() = path;
  return path != nullptr;
}

void run(const Site& site) { current()->run(site); }

}  // namespace lopro
