// A whole decode step on the CPU: one call, all layers, logits and draws.
#pragma once

#include <cstdint>
#include <vector>

#include "cfg_sample/filter.h"
#include "linear/cpu.h"
#include "native/isa.h"
#include "native/pool.h"

namespace retinar {

struct Layer {
  const void* attention_norm;  // [dim]
  const void* ffn_norm;
  Packed wqkv, wo, w13, w2;
};

// A model's weights; the memory is the caller's. Embeddings and norms are fp32 or bfloat16, which is then what rows are
// rounded to between the ops; matrices are of that type too, or all int8.
struct Model {
  bool bfloat16;
  Kind kind;
  std::int64_t dim, heads, groups, head_dim, hidden, vocabulary, classes, positions;
  float eps;
  const void* class_embedding;  // [classes, dim]
  const void* code_embedding;   // [vocabulary, dim]
  const void* norm;
  const float* rope;  // [positions, head_dim / 2, 2]
  std::vector<Layer> layers;
  Packed output;
};

// The live rows and the images that draw from them, as the op decode_step has them.
struct Step {
  std::int64_t rows, images, columns;
  const std::int64_t* tokens;
  const std::int32_t* positions;
  const std::int32_t* table;  // [rows, columns]
  const std::int32_t* cond_row;
  const std::int32_t* null_row;
  const float* cfg_scale;
  const float* temperature;
  const std::int32_t* top_k;
  const float* top_p;
  const std::int64_t* seed;
  const std::int64_t* index;
  void* keys;  // [layers, pages, slots, groups, head_dim], of the model's type, or int8 with a scale for each head_dim
  void* values;
  float* key_scales;  // [layers, pages, slots, groups], or null
  float* value_scales;
  std::int64_t pages, page_slots;
  float* logits;        // [rows, vocabulary]
  std::int64_t* codes;  // [images]
  double* seconds;      // of each phase, added up by the calling thread, waiting for the others included; or null
};

enum Phase { embedding, norms, qkv_product, attending, wo_product, w13_product, w2_product, output_product, drawing };
constexpr int phases = 9;

// Memory between the ops of a step, kept from one to the next. Rows are padded to whole vectors.
class Scratch {
 public:
  Scratch() = default;
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Room for a step; what was there is lost.
  void prepare(const Model& model, const Step& step, int threads);

  float *residual = nullptr, *normed = nullptr, *qkv = nullptr, *heads = nullptr, *hidden = nullptr, *mixed = nullptr;
  float* row_scales = nullptr;  // of the quantised rows
  void* quantised = nullptr;    // [rows, quantised_width], up to 2 bytes each
  std::int64_t quantised_width = 0;
  std::int64_t width = 0, qkv_width = 0, heads_width = 0, hidden_width = 0, vocabulary_width = 0;
  // For each thread: scores, queries, outputs and one turned key.
  float* attention = nullptr;
  std::int64_t attention_elements = 0, score_stride = 0;
  // For each thread and image: the best of the thread's codes.
  float* best = nullptr;
  std::int64_t* winner = nullptr;
  FilterMemory* filters = nullptr;  // one a thread

 private:
  void release();
  void* memory_ = nullptr;
  std::int64_t bytes_ = 0;
  int threads_ = 0;
};

struct DecodeCall {
  const Model& model;
  const Step& step;
  Scratch& scratch;
  Pool& pool;
};

}  // namespace retinar

RETINAR_DECLARE(void decode_step(const DecodeCall& call))
