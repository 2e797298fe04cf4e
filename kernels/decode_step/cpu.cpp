// The decode step of every instruction set. All threads walk through the whole step together and meet at barriers; each
// does a fixed share of the columns, of the heads, of the rows or of the codes, none of which any sum goes across: bits
// depend neither on the number of threads nor on that of rows.
#include "decode_step/cpu.h"

#include <time.h>

#include "cfg_sample/filter.h"
#include "linear/panels.h"
#include "paged_attention/rows.h"
#include "philox/noise.h"
#include "rms_norm/rows.h"

namespace retinar::RETINAR_ISA {
namespace {

double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Rounds a row to int8 with one scale, which it returns; zeros up to the next multiple of four.
float quantise(const float* x, Quantised* out, std::int64_t count) {
  const float scale = to_int8(x, out, count, quantised_zero);
  for (std::int64_t i = count; i % 4 != 0; ++i) out[i] = quantised_zero;
  return scale;
}

template <typename T>
class Walk {
 public:
  explicit Walk(const DecodeCall& call)
      : model(call.model), step(call.step), scratch(call.scratch), pool(call.pool), width(scratch.width),
        qkv_width(scratch.qkv_width), heads_width(scratch.heads_width), hidden_width(scratch.hidden_width),
        vocabulary_width(scratch.vocabulary_width), residual(scratch.residual), normed(scratch.normed),
        qkv(scratch.qkv), heads(scratch.heads), hidden(scratch.hidden), mixed(scratch.mixed) {}

  void run() {
    pool.run([](void* self, int thread) { static_cast<Walk*>(self)->all(thread); }, this);
  }

 private:
  // What a product reads: X is bfloat16 where the model is and the processor multiplies those, else fp32.
  template <typename X>
  void norm_rows(const void* weight, int thread) {
    const Share rows = share(step.rows, thread, pool.threads());
    for (std::int64_t row = rows.first; row < rows.last; ++row) {
      X* out = reinterpret_cast<X*>(normed) + row * width;
      norm_row<T>(residual + row * width, static_cast<const T*>(weight), out, model.dim, model.eps);
      for (std::int64_t i = model.dim; i < width; ++i) out[i] = X{};
    }
  }

  // Rows as a product of the model's kind reads them, once all threads have written them; ``own``: each has written the
  // rows that it would quantise, and need not wait for that.
  Rows ready(float* rows, std::int64_t stride, std::int64_t inner, bool own, int thread) {
    if (model.kind != Kind::int8) {
      pool.barrier();
      return {rows, stride, nullptr};
    }
    if (!own) pool.barrier();
    const Share part = share(step.rows, thread, pool.threads());
    Quantised* const out = static_cast<Quantised*>(scratch.quantised);
    for (std::int64_t row = part.first; row < part.last; ++row) {
      scratch.row_scales[row] = quantise(rows + row * stride, out + row * scratch.quantised_width, inner);
    }
    pool.barrier();
    return {out, scratch.quantised_width, scratch.row_scales};
  }

  void all(int thread) {
    if (model.kind == Kind::bfloat16) {
      walk<Activation>(thread);
    } else {
      walk<float>(thread);
    }
  }

  template <typename X>
  void walk(int thread) {
    double then = thread == 0 && step.seconds != nullptr ? now() : 0.0;
    const auto done = [&](Phase phase) {
      if (thread != 0 || step.seconds == nullptr) return;
      const double time = now();
      step.seconds[phase] += time - then;
      then = time;
    };
    embed(thread);
    done(embedding);
    for (std::size_t layer = 0; layer < model.layers.size(); ++layer) {
      const Layer& weights = model.layers[layer];
      norm_rows<X>(weights.attention_norm, thread);
      Rows x = ready(normed, width, model.dim, true, thread);
      done(norms);
      into(weights.wqkv, x, qkv, qkv_width, thread);
      done(qkv_product);
      if (step.key_scales != nullptr) {
        attention<X, std::int8_t>(static_cast<std::int64_t>(layer), thread);
      } else {
        attention<X, T>(static_cast<std::int64_t>(layer), thread);
      }
      x = ready(heads, heads_width, model.heads * model.head_dim, false, thread);
      done(attending);
      onto_residual(weights.wo, x, thread);
      done(wo_product);
      norm_rows<X>(weights.ffn_norm, thread);
      x = ready(normed, width, model.dim, true, thread);
      done(norms);
      gated<X>(weights.w13, x, thread);
      x = ready(hidden, hidden_width, model.hidden, false, thread);
      done(w13_product);
      onto_residual(weights.w2, x, thread);
      done(w2_product);
    }
    norm_rows<X>(model.norm, thread);
    const Rows x = ready(normed, width, model.dim, true, thread);
    done(norms);
    logits(x, thread);
    done(output_product);
    sample(thread);
    done(drawing);
  }

  void embed(int thread) {
    const Share rows = share(step.rows, thread, pool.threads());
    for (std::int64_t row = rows.first; row < rows.last; ++row) {
      const bool first = step.positions[row] == 0;
      const T* source = static_cast<const T*>(first ? model.class_embedding : model.code_embedding) +
                        step.tokens[row] * model.dim;
      for (std::int64_t i = 0; i < model.dim; ++i) residual[row * width + i] = to_float(source[i]);
      for (std::int64_t i = model.dim; i < width; ++i) residual[row * width + i] = 0.0f;
    }
    pool.barrier();
  }

  // Sums into fp32 rows, rounded to the model's type.
  void into(const Packed& matrix, Rows x, float* out, std::int64_t stride, int thread) {
    const Share units = share(matrix.units(), thread, pool.threads());
    multiply(matrix, x, step.rows, units.first, units.last, [=](std::int64_t row, std::int64_t unit, const Vec* sums) {
      for (int v = 0; v < unit_vectors; ++v) {
        store(out + row * stride + unit * unit_columns + v * Vec::width, round_to<T>(sums[v]));
      }
    });
    pool.barrier();
  }

  void onto_residual(const Packed& matrix, Rows x, int thread) {
    float* const out = residual;
    const std::int64_t stride = width;
    const Share units = share(matrix.units(), thread, pool.threads());
    multiply(matrix, x, step.rows, units.first, units.last, [=](std::int64_t row, std::int64_t unit, const Vec* sums) {
      for (int v = 0; v < unit_vectors; ++v) {
        float* place = out + row * stride + unit * unit_columns + v * Vec::width;
        store(place, load(place) + sums[v]);
      }
    });
    pool.barrier();
  }

  template <typename X>
  void gated(const Packed& matrix, Rows x, int thread) {
    X* const out = reinterpret_cast<X*>(hidden);
    const std::int64_t stride = hidden_width;
    const Share pairs = share(matrix.units() / 2, thread, pool.threads());
    multiply(matrix, x, step.rows, 2 * pairs.first, 2 * pairs.last,
             [=](std::int64_t row, std::int64_t unit, const Vec* sums) {
               if (unit % 2 != 0) return;  // up: it lies behind its gate
               for (int v = 0; v < unit_vectors; ++v) {
                 const Vec gate = round_to<T>(sums[v]), up = round_to<T>(sums[v + unit_vectors]);
                 const Vec silu = gate / (broadcast(1.0f) + exp(broadcast(0.0f) - gate));
                 store(out + row * stride + unit / 2 * unit_columns + v * Vec::width, round_to<T>(silu * up));
               }
             });
  }

  template <typename X, typename C>
  void attention(std::int64_t layer, int thread) {
    const std::int64_t dim = model.head_dim, groups = model.groups, ratio = model.heads / groups;
    const std::int64_t layer_elements = step.pages * step.page_slots * groups * dim;
    Cache<C> cache{static_cast<C*>(step.keys) + layer * layer_elements,
                   static_cast<C*>(step.values) + layer * layer_elements,
                   nullptr,
                   nullptr,
                   step.page_slots,
                   groups,
                   dim};
    if (sizeof(C) == 1) {
      cache.key_scales = step.key_scales + layer * layer_elements / dim;
      cache.value_scales = step.value_scales + layer * layer_elements / dim;
    }
    const Share work = share(step.rows * groups, thread, pool.threads());
    const std::int64_t stride = scratch.score_stride;
    float* const scores = scratch.attention + thread * scratch.attention_elements;
    float* const queries = scores + model.heads * stride;
    float* const out = queries + model.heads * dim;
    float* const turned = out + model.heads * dim;
    for (std::int64_t at = work.first; at < work.last;) {
      const std::int64_t row = at / groups, first = at % groups;
      const std::int64_t last = work.last - at < groups - first ? first + work.last - at : groups;
      const std::int64_t position = step.positions[row];
      const float* angles = model.rope + position * dim;
      const float* projected = qkv + row * qkv_width;
      const std::int32_t* pages = step.table + row * step.columns;
      const std::int64_t slot = cache.place(pages, position);
      for (std::int64_t head = 0; head < (last - first) * ratio; ++head) {
        rotate(projected + (first * ratio + head) * dim, angles, queries + head * dim, dim);
        for (std::int64_t i = 0; i < dim; ++i) queries[head * dim + i] = to_float(from_float<T>(queries[head * dim + i]));
      }
      for (std::int64_t group = first; group < last; ++group) {
        rotate(projected + (model.heads + group) * dim, angles, turned, dim);
        write(turned, cache.keys, cache.key_scales, slot + group * dim, dim);
        write(projected + (model.heads + groups + group) * dim, cache.values, cache.value_scales, slot + group * dim, dim);
      }
      attend(cache, pages, position + 1, first, last, ratio, queries, 1.0f / __builtin_sqrtf(static_cast<float>(dim)),
             scores, stride, out);
      X* target = reinterpret_cast<X*>(heads) + row * heads_width;
      for (std::int64_t i = 0; i < (last - first) * ratio * dim; ++i) {
        target[first * ratio * dim + i] = from_float<X>(to_float(from_float<T>(out[i])));
      }
      if (last == groups) {
        for (std::int64_t i = model.heads * dim; i < heads_width; ++i) target[i] = X{};
      }
      at += last - first;
    }
  }

  void logits(Rows x, int thread) {
    const std::int64_t vocabulary = model.vocabulary;
    float* const out = step.logits;
    const Share units = share(model.output.units(), thread, pool.threads());
    multiply(model.output, x, step.rows, units.first, units.last,
             [=](std::int64_t row, std::int64_t unit, const Vec* sums) {
               for (int v = 0; v < unit_vectors; ++v) {
                 const std::int64_t code = unit * unit_columns + v * Vec::width;
                 const std::int64_t left = vocabulary - code;
                 const Vec rounded = round_to<T>(sums[v]);
                 if (left >= Vec::width) {
                   store(out + row * vocabulary + code, rounded);
                 } else if (left > 0) {
                   store_first(out + row * vocabulary + code, rounded, left);
                 }
               }
             });
    pool.barrier();
  }

  void sample(int thread) {
    const std::int64_t vocabulary = model.vocabulary;
    const int threads = pool.threads();
    const Share codes = share(vocabulary, thread, threads);
    bool filtered = false;
    for (std::int64_t image = 0; image < step.images; ++image) {
      const float* cond = step.logits + step.cond_row[image] * vocabulary;
      const bool guided = step.null_row[image] >= 0;
      const float* null = guided ? step.logits + step.null_row[image] * vocabulary : cond;
      const float scale = step.cfg_scale[image];
      const float temperature = step.temperature[image] > 1e-5f ? step.temperature[image] : 1e-5f;
      float* out = mixed + image * vocabulary_width;
      for (std::int64_t code = codes.first; code < codes.last; ++code) {
        const float logit = guided ? null[code] + (cond[code] - null[code]) * scale : cond[code];
        out[code] = logit / temperature;
      }
      filtered |= step.top_k[image] > 0 || step.top_p[image] < 1.0f;
    }
    if (filtered) {
      pool.barrier();
      const Share images = share(step.images, thread, threads);
      for (std::int64_t image = images.first; image < images.last; ++image) {
        filter(mixed + image * vocabulary_width, vocabulary, step.top_k[image], step.top_p[image],
               scratch.filters[thread]);
      }
    }
    pool.barrier();
    const Share blocks = share((vocabulary + noise_block - 1) / noise_block, thread, threads);
    for (std::int64_t image = 0; image < step.images; ++image) {
      const float* row = mixed + image * vocabulary_width;
      const auto position = static_cast<std::uint32_t>(step.positions[step.cond_row[image]]);
      float best = -__builtin_inff();
      std::int64_t winner = vocabulary;
      for (std::int64_t block = blocks.first; block < blocks.last; ++block) {
        float noise[noise_block];
        gumbel_noise(static_cast<std::uint32_t>(block * noise_quads), position,
                     static_cast<std::uint32_t>(step.index[image]), 0, static_cast<std::uint64_t>(step.seed[image]),
                     noise);
        const std::int64_t start = block * noise_block;
        const std::int64_t count = vocabulary - start < noise_block ? vocabulary - start : noise_block;
        for (std::int64_t i = 0; i < count; ++i) {
          const float value = row[start + i] + noise[i];
          if (value > best) {  // strictly: of equal ones the lowest code stays
            best = value;
            winner = start + i;
          }
        }
      }
      const std::int64_t place = thread * step.images + image;
      scratch.best[place] = best;
      scratch.winner[place] = winner;
    }
    pool.barrier();
    const Share images = share(step.images, thread, threads);
    for (std::int64_t image = images.first; image < images.last; ++image) {
      float best = -__builtin_inff();
      std::int64_t winner = 0;
      for (int other = 0; other < threads; ++other) {
        const std::int64_t place = other * step.images + image;
        if (scratch.winner[place] < vocabulary && scratch.best[place] > best) {
          best = scratch.best[place];
          winner = scratch.winner[place];
        }
      }
      step.codes[image] = winner;
    }
  }

  const Model& model;
  const Step& step;
  Scratch& scratch;
  Pool& pool;
  const std::int64_t width, qkv_width, heads_width, hidden_width, vocabulary_width;
  float *const residual, *const normed, *const qkv, *const heads, *const hidden, *const mixed;
};

}  // namespace

void decode_step(const DecodeCall& call) {
  if (call.model.bfloat16) {
    Walk<BFloat16>(call).run();
  } else {
    Walk<float>(call).run();
  }
}

}  // namespace retinar::RETINAR_ISA
