// Classify an image with an exported file: the onnxruntime C++ API and the standard library alone.
//
//   sqakd-deploy export model.onnx --input uint8
//   classify model.onnx image.ppm
//
// The image is a binary PPM (P6) or PGM (P5) of the size that the file wants; its pixels go in as
// they are, which is why the file has to be one for raw pixels (NCHW or NHWC).

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

struct Picture {
  int64_t width = 0, height = 0, channels = 0;
  std::vector<uint8_t> pixels;  // rows of pixels, channels last
};

// A number of a PPM header; a comment runs from # to the end of its line.
int64_t header_number(std::istream& in) {
  while ((in >> std::ws) && in.peek() == '#') {
    std::string comment;
    std::getline(in, comment);
  }
  int64_t number = 0;
  in >> number;
  return number;
}

Picture read_picture(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error("cannot open " + path);
  std::string magic;
  in >> magic;
  if (magic != "P5" && magic != "P6")
    throw std::runtime_error(path + ": wanted a binary PPM (P6) or PGM (P5)");
  Picture picture;
  picture.channels = magic == "P6" ? 3 : 1;
  picture.width = header_number(in);
  picture.height = header_number(in);
  if (header_number(in) != 255 || picture.width < 1 || picture.height < 1 ||
      picture.width > 65535 || picture.height > 65535)
    throw std::runtime_error(path + ": wanted a size up to 65535 and 8 bits a channel");
  in.get();  // the one white space before the pixels
  picture.pixels.resize(static_cast<size_t>(picture.width * picture.height * picture.channels));
  in.read(reinterpret_cast<char*>(picture.pixels.data()),
          static_cast<std::streamsize>(picture.pixels.size()));
  if (!in) throw std::runtime_error(path + ": the file ends before its last pixel");
  return picture;
}

// Channels last to channels first.
std::vector<uint8_t> planes(const Picture& picture) {
  std::vector<uint8_t> out(picture.pixels.size());
  const size_t area = out.size() / static_cast<size_t>(picture.channels);
  for (size_t pixel = 0; pixel < area; ++pixel)
    for (size_t c = 0; c < static_cast<size_t>(picture.channels); ++c)
      out[c * area + pixel] = picture.pixels[pixel * static_cast<size_t>(picture.channels) + c];
  return out;
}

// A metadata entry, or an empty string.
std::string metadata(const Ort::Session& session, const char* key) {
  Ort::AllocatorWithDefaultOptions allocator;
  auto value = session.GetModelMetadata().LookupCustomMetadataMapAllocated(key, allocator);
  return value ? value.get() : "";
}

// The strings of a JSON list as exports write it: other characters than ASCII come as \uXXXX, which
// are left as they are.
std::vector<std::string> names_of(const std::string& json) {
  std::vector<std::string> names;
  for (size_t i = 0; i < json.size(); ++i) {
    if (json[i] != '"') continue;
    std::string name;
    for (++i; i < json.size() && json[i] != '"'; ++i) {
      if (json[i] == '\\' && i + 1 < json.size() && (json[i + 1] == '"' || json[i + 1] == '\\')) ++i;
      name += json[i];
    }
    names.push_back(name);
  }
  return names;
}

// Whether the CPU is known to sum products of 8 bits exactly; other compilers do not tell.
bool has_vnni() {
#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

void classify(const std::string& model, const std::string& image) {
  Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "classify");
  const std::basic_string<ORTCHAR_T> file(model.begin(), model.end());
  Ort::SessionOptions options;
  // Else sums of 8-bit layers saturate. Where the CPU has AVX512-VNNI it costs time.
  if (!has_vnni()) options.AddConfigEntry("session.x64quantprecision", "1");
  Ort::Session session(env, file.c_str(), options);
  const auto type_info = session.GetInputTypeInfo(0);
  const auto info = type_info.GetTensorTypeAndShapeInfo();
  if (info.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8)
    throw std::runtime_error(model + " takes floats; export it with --input uint8");

  const Picture picture = read_picture(image);
  const bool last = metadata(session, "sqakd.input").find("\"NHWC\"") != std::string::npos;
  std::vector<int64_t> shape = info.GetShape();
  std::vector<int64_t> got = {shape.at(0), picture.channels, picture.height, picture.width};
  if (last) got = {shape.at(0), picture.height, picture.width, picture.channels};
  if (shape != got)
    throw std::runtime_error(image + " has another size or number of channels than " + model +
                             " takes");
  std::vector<uint8_t> one = last ? picture.pixels : planes(picture), batch;
  if (shape[0] < 1) shape[0] = 1;  // the batch is open
  for (int64_t i = 0; i < shape[0]; ++i) batch.insert(batch.end(), one.begin(), one.end());

  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  auto input = Ort::Value::CreateTensor<uint8_t>(memory, batch.data(), batch.size(), shape.data(),
                                                 shape.size());
  Ort::AllocatorWithDefaultOptions allocator;
  const auto input_name = session.GetInputNameAllocated(0, allocator);
  const auto output_name = session.GetOutputNameAllocated(0, allocator);
  const char* inputs[] = {input_name.get()};
  const char* outputs[] = {output_name.get()};
  auto results = session.Run(Ort::RunOptions{nullptr}, inputs, &input, 1, outputs, 1);

  const float* logits = results[0].GetTensorData<float>();
  const size_t classes =
      static_cast<size_t>(results[0].GetTensorTypeAndShapeInfo().GetShape().at(1));
  std::vector<size_t> order(classes);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return logits[a] > logits[b]; });
  double sum = 0;
  for (size_t k : order) sum += std::exp(double(logits[k]) - double(logits[order[0]]));
  const auto names = names_of(metadata(session, "sqakd.classes"));
  std::printf("%s\n", image.c_str());
  for (size_t i = 0; i < std::min<size_t>(5, classes); ++i) {
    const size_t k = order[i];
    const double share = std::exp(double(logits[k]) - double(logits[order[0]])) / sum;
    std::printf("  %6.2f %%  %s\n", 100 * share,
                k < names.size() ? names[k].c_str() : std::to_string(k).c_str());
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: classify MODEL.onnx IMAGE.ppm\n");
    return 2;
  }
  try {
    classify(argv[1], argv[2]);
  } catch (const std::exception& error) {  // Ort::Exception is one
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
