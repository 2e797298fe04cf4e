#include <cstdlib>
#include <new>

#include "decode_step/cpu.h"

namespace retinar {
namespace {

constexpr std::int64_t line = 64;

std::int64_t up_to(std::int64_t count, std::int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

}  // namespace

Scratch::~Scratch() { release(); }

void Scratch::release() {
  std::free(memory_);
  memory_ = nullptr;
  bytes_ = 0;
  delete[] filters;
  filters = nullptr;
}

void Scratch::prepare(const Model& model, const Step& step, int threads) {
  std::int64_t longest = 0;
  for (std::int64_t row = 0; row < step.rows; ++row) {
    if (step.positions[row] >= longest) longest = step.positions[row] + 1;
  }
  width = up_to(model.dim, panel_columns);
  qkv_width = up_to((model.heads + 2 * model.groups) * model.head_dim, panel_columns);
  heads_width = up_to(model.heads * model.head_dim, panel_columns);
  hidden_width = up_to(model.hidden, panel_columns);
  vocabulary_width = up_to(model.vocabulary, panel_columns);
  score_stride = up_to(longest, 16);
  attention_elements = up_to(model.heads * (score_stride + 2 * model.head_dim) + model.head_dim, line);

  quantised_width = hidden_width > width ? hidden_width : width;
  if (heads_width > quantised_width) quantised_width = heads_width;
  const std::int64_t quantised_rows = model.kind == Kind::int8 ? step.rows : 0;

  std::int64_t bytes = 0;
  const auto take = [&](std::int64_t count, std::int64_t size) {
    const std::int64_t place = bytes;
    bytes += up_to(count * size, line);
    return place;
  };
  const std::int64_t places[] = {
      take(step.rows * width, 4),        take(step.rows * width, 4),
      take(step.rows * qkv_width, 4),    take(step.rows * heads_width, 4),
      take(step.rows * hidden_width, 4), take(step.images * vocabulary_width, 4),
      take(threads * attention_elements, 4), take(threads * step.images, 4),
      take(step.rows, 4),                take(threads * step.images, 8),
      take(quantised_rows * quantised_width, 2),
  };
  if (bytes > bytes_ || threads != threads_) {
    release();
    bytes_ = bytes + bytes / 4;  // positions grow with every step
    bytes_ = up_to(bytes_, line);
    memory_ = std::aligned_alloc(line, static_cast<std::size_t>(bytes_));
    if (memory_ == nullptr) throw std::bad_alloc();
    filters = new FilterMemory[static_cast<std::size_t>(threads)];
    threads_ = threads;
  }
  char* const base = static_cast<char*>(memory_);
  float** const floats[] = {&residual, &normed, &qkv, &heads, &hidden, &mixed, &attention, &best, &row_scales};
  for (int i = 0; i < 9; ++i) *floats[i] = reinterpret_cast<float*>(base + places[i]);
  winner = reinterpret_cast<std::int64_t*>(base + places[9]);
  quantised = base + places[10];
}

}  // namespace retinar
