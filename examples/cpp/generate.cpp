// Generates token ids with a package of lopro_fx, without Python.
//
//     echo "504 1521 260" | ./generate model.pt2 64
//
// reads the prompt's ids from the standard input and writes the likeliest 64 ids after it, one a line, as they come.

#include <ATen/Functions.h>
#include <c10/core/InferenceMode.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdint>
#include <iostream>
#include <iterator>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using Metadata = std::unordered_map<std::string, std::string>;
using Loader = torch::inductor::AOTIModelPackageLoader;
using Tensors = std::unordered_map<std::string, at::Tensor>;

// Code for another processor would end this one with an illegal instruction.
void require_processor(const Metadata& metadata) {
#if defined(__x86_64__)
  const std::string sets = metadata.at("AOTI_CPU_ISA");
  const auto compiled_with = [&](const char* name) { return sets.find(name) != std::string::npos; };
  if ((compiled_with("AVX512") && !(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"))) ||
      (compiled_with("AVX512_VNNI") && !__builtin_cpu_supports("avx512vnni")) ||
      (compiled_with("AVX2") && !__builtin_cpu_supports("avx2")))
    throw std::runtime_error("the package was compiled for a processor with " + sets + "; package it on this machine");
#else
  if (metadata.at("AOTI_MACHINE") == "x86_64")
    throw std::runtime_error("the package was compiled for x86_64; package it on this machine");
#endif
}

std::string text_of(caffe2::serialize::PyTorchStreamReader& archive, const std::string& name) {
  auto [data, size] = archive.getRecord(name);
  return {static_cast<const char*>(data.get()), size};
}

std::vector<int64_t> integers(std::string list) {
  for (char& c : list)
    if (c == ',') c = ' ';
  std::istringstream stream(list);
  return {std::istream_iterator<int64_t>(stream), {}};
}

// Gives a program its tensors. They are in the archive once, for all its programs: `read` holds those read so far.
void load_weights(caffe2::serialize::PyTorchStreamReader& archive, const std::string& program, Loader& loader,
                  Tensors& read) {
  // "name": ["file", [shape], [stride], offset]
  static const std::regex entry(R"re("([^"]+)": \["([^"]+)", \[([0-9, ]*)\], \[([0-9, ]*)\], ([0-9]+)\])re");
  const std::string config = text_of(archive, "data/aotinductor/" + program + "/weights_config.json");
  Tensors constants;
  for (std::sregex_iterator match(config.begin(), config.end(), entry), end; match != end; ++match) {
    const std::string file = (*match)[2];
    if (!read.count(file)) {
      const std::string bytes = text_of(archive, "data/weights/" + file);
      read[file] = torch::jit::pickle_load({bytes.begin(), bytes.end()}).toTensor();
    }
    constants[(*match)[1]] =
        read[file].as_strided(integers((*match)[3]), integers((*match)[4]), std::stoll((*match)[5]));
  }
  // The program refers to the tensors, it does not copy them.
  loader.load_constants(constants, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
}

// Key and value tensors of all layers: (batch, heads, max_cache_len + 1, head_dim).
std::vector<at::Tensor> allocate_cache(const Metadata& metadata) {
  static const std::unordered_map<std::string, at::ScalarType> types{
      {"float32", at::kFloat}, {"bfloat16", at::kBFloat16}, {"float16", at::kHalf}, {"uint8", at::kByte}};
  std::vector<at::Tensor> cache;
  std::istringstream shapes(metadata.at("cache_heads"));
  int64_t heads, width;
  for (char x; shapes >> heads >> x >> width;)
    cache.push_back(at::zeros({1, heads, std::stoll(metadata.at("max_cache_len")) + 1, width},
                              at::TensorOptions(types.at(metadata.at("cache_dtype")))));
  return cache;
}

void generate(const std::string& path, int64_t count) {
  const c10::InferenceMode no_gradients;
  const Metadata metadata = Loader::load_metadata_from_package(path, "decode");
  if (!metadata.count("cache_heads")) throw std::runtime_error(path + " was not written by lopro_fx.package");
  if (metadata.at("batch_size") != "1" || metadata.at("AOTI_DEVICE_KEY") != "cpu")
    throw std::runtime_error("this example takes packages of batch size 1 for the CPU");
  require_processor(metadata);

  Tensors weights;
  Loader prefill(path, "prefill", /*run_single_threaded=*/true), decode(path, "decode", true);
  {
    caffe2::serialize::PyTorchStreamReader archive(path);
    load_weights(archive, "prefill", prefill, weights);
    load_weights(archive, "decode", decode, weights);
  }

  const std::vector<int64_t> prompt{std::istream_iterator<int64_t>(std::cin), {}};
  const int64_t length = prompt.size(), limit = std::stoll(metadata.at("max_cache_len"));
  if (prompt.empty()) throw std::runtime_error("no token ids on the standard input");
  if (length + count - 1 > limit)
    throw std::runtime_error(std::to_string(length) + " ids of prompt and " + std::to_string(count) +
                             " more don't fit the cache of " + std::to_string(limit));

  const std::vector<at::Tensor> cache = allocate_cache(metadata);
  const at::Tensor slots = at::arange(limit, at::kLong), padding = at::zeros({1}, at::kLong);
  at::Tensor ids = at::tensor(prompt).unsqueeze(0);
  int64_t position = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t end = position + ids.size(1);
    std::vector<at::Tensor> inputs{ids, at::tensor({position}), padding, slots.narrow(0, 0, std::max<int64_t>(end, 2))};
    inputs.insert(inputs.end(), cache.begin(), cache.end());
    const at::Tensor logits = (i == 0 ? prefill : decode).run(inputs).at(0);
    ids = logits.argmax(-1, /*keepdim=*/true);
    position = end;
    std::cout << ids.item<int64_t>() << std::endl;
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: " << argv[0] << " MODEL.pt2 COUNT < ids\n";
    return 2;
  }
  try {
    generate(argv[1], std::stoll(argv[2]));
  } catch (const std::exception& error) {
    // torch appends a stack trace.
    const std::string what = error.what();
    std::cerr << "error: " << what.substr(0, what.find('\n')) << '\n';
    return 1;
  }
}
