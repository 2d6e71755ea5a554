// Attention on a CPU, forward and backward, whose scores never leave the first cache.
//
// Queries stand beside each other in vector registers, Q of them at a time, so that the maximum and the sum of a softmax
// need nothing from a neighbour, and any head size fills the registers. Keys come in chunks: their scores, and in the
// backward pass the gradients of those, are what is kept. All is computed in float32, whatever it is read from and
// written to. Each product works on a tile that fits into registers.
//
// Every thread has heads of its own, so the result does not depend on their number.
//
// Source: FlashAttention-2, https://arxiv.org/abs/2307.08691, algorithms 1 and 2.
//
// Compiled once for each head size and number format, with HEAD_SIZE and IS_BFLOAT16 defined before.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int WIDEST = 16;
#elif defined(__AVX__)
constexpr int WIDEST = 8;
#else
constexpr int WIDEST = 4;
#endif
constexpr int E = HEAD_SIZE;
constexpr int W = E % WIDEST == 0 ? WIDEST : E % 8 == 0 && WIDEST > 8 ? 8 : 4;  // numbers in a vector
constexpr int Q = 2 * W;                                                       // queries at a time
constexpr int KEYS = 64;                                                       // keys in a chunk
constexpr bool HAS_32_REGISTERS = WIDEST != 8;
constexpr int TILE = HAS_32_REGISTERS && E % 8 == 0 ? 8 : 4;  // rows of a tile that is two vectors wide
static_assert(E % 4 == 0);

#if IS_BFLOAT16
using Number = uint16_t;
#else
using Number = float;
#endif

typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t Int __attribute__((vector_size(4 * W)));
typedef float Unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t UnalignedInt __attribute__((vector_size(4 * W), aligned(4), may_alias));

constexpr float LOG2_E = 1.4426950408889634f;
// Below all scores; twice that is below all maxima too, so that a query which sees nothing of a chunk adds nothing.
constexpr float LEAST = -1e30f;

inline float widen(float x) { return x; }

inline float widen(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void write(float x, float* to) { *to = x; }

inline void write(float x, uint16_t* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  // to the nearest, ties to even; what is not a number would round to infinity
  *to = x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline Vec load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline Int load(const int32_t* from) { return *reinterpret_cast<const UnalignedInt*>(from); }
inline void store(float* to, Vec x) { *reinterpret_cast<Unaligned*>(to) = x; }
inline void add(float* to, Vec x) { store(to, load(to) + x); }
inline Vec all(float x) { return x - Vec{}; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// 2^x for x <= 0, to two units in the last place. A weight of less than 2^-64 beside one of 1 is 0: it changes nothing,
// and its products would be denormal, which costs a hundred times as much.
inline Vec exp2(Vec x) {
  const Vec round = all(12582912.f);  // 1.5 * 2^23: what is added to it is rounded to a whole number in its last bits
  Vec shifted = x + round;
  Vec f = x - (shifted - round);
  Vec p = all(1.535336188319500e-4f);  // Cephes' exp2f, for -1/2 to 1/2
  p = p * f + all(1.339887440266574e-3f);
  p = p * f + all(9.618437357674640e-3f);
  p = p * f + all(5.550332471162809e-2f);
  p = p * f + all(2.402264791363012e-1f);
  p = p * f + all(6.931472028550421e-1f);
  p = p * f + all(1.f);
  Int scaled = (Int)p + ((Int)shifted << 23);
  return (Vec)((Int)~(x < all(-64.f)) & scaled);
}

template <int... i>
using Indices = std::integer_sequence<int, i...>;
template <int n>
using Count = std::make_integer_sequence<int, n>;

// The number of rows of a tile is a parameter pack, for only variables of their own stay in registers. A tile is summed up
// by itself and then added: long sums lose less that way.

// out[j][i] = sum over e of rows[j][e] * turned[e][i]
template <int... j>
inline void multiply_tile(const float* rows, const float* turned, float* out, Indices<j...>) {
  Vec a[]{(j, Vec{})...}, b[]{(j, Vec{})...};
  for (int e = 0; e < E; e++) {
    Vec x = load(turned + e * Q), y = load(turned + e * Q + W);
    ((a[j] += all(rows[j * E + e]) * x, b[j] += all(rows[j * E + e]) * y), ...);
  }
  ((store(out + j * Q, a[j]), store(out + j * Q + W, b[j])), ...);
}

inline void multiply(const float* rows, const float* turned, int count, float* out) {
  int j = 0;
  for (; j + TILE <= count; j += TILE) multiply_tile(rows + j * E, turned, out + j * Q, Count<TILE>{});
  for (; j < count; j++) multiply_tile(rows + j * E, turned, out + j * Q, Count<1>{});
}

// turned[e][i] += sum over keys j of rows[j][e] * p[j][i]
template <int... e>
inline void add_over_keys_tile(const float* rows, const float* p, int count, float* turned, Indices<e...>) {
  Vec a[]{(e, Vec{})...}, b[]{(e, Vec{})...};
  for (int j = 0; j < count; j++) {
    Vec x = load(p + j * Q), y = load(p + j * Q + W);
    ((a[e] += all(rows[j * E + e]) * x, b[e] += all(rows[j * E + e]) * y), ...);
  }
  ((add(turned + e * Q, a[e]), add(turned + e * Q + W, b[e])), ...);
}

inline void add_over_keys(const float* rows, const float* p, int count, float* turned) {
  for (int e = 0; e < E; e += TILE) add_over_keys_tile(rows + e, p, count, turned + e * Q, Count<TILE>{});
}

// out[j][e] += sum over queries i of p[j][i] * rows[i][e]
template <int... j>
inline void add_over_queries_tile(const float* p, const float* rows, float* out, Indices<j...>) {
  Vec a[]{(j, Vec{})...};
  for (int i = 0; i < Q; i++) {
    Vec x = load(rows + i * E);
    ((a[j] += all(p[j * Q + i]) * x), ...);
  }
  (add(out + j * E, a[j]), ...);
}

inline void add_over_queries(const float* p, const float* rows, int count, float* out) {
  for (int e = 0; e < E; e += W) {
    int j = 0;
    for (; j + 2 * TILE <= count; j += 2 * TILE)
      add_over_queries_tile(p + j * Q, rows + e, out + j * E + e, Count<2 * TILE>{});
    for (; j < count; j++) add_over_queries_tile(p + j * Q, rows + e, out + j * E + e, Count<1>{});
  }
}

}  // namespace

extern "C" {

// Numbers from one batch, head and position to the next; those of a head lie beside each other.
struct Tensor {
  Number* data;
  int64_t batch, head, position;
};

struct Shape {
  int64_t batches, heads, kv_heads, queries, keys;
  float scale;  // of the scores
  int32_t threads;
  const int32_t *first, *last;  // (batch, query): the keys that it sees, both included; or null: causal, up to the end
};
}

namespace {

inline Number* at(const Tensor& x, int64_t batch, int64_t head, int64_t position) {
  return x.data + batch * x.batch + head * x.head + position * x.position;
}

void read(const Number* from, int64_t stride, int64_t count, float factor, float* rows) {
  for (int64_t i = 0; i < count; i++)
    for (int e = 0; e < E; e++) rows[i * E + e] = widen(from[i * stride + e]) * factor;
}

void write_all(const float* rows, int64_t count, float factor, Number* to, int64_t stride) {
  for (int64_t i = 0; i < count; i++)
    for (int e = 0; e < E; e++) write(rows[i * E + e] * factor, to + i * stride + e);
}

void turn(const float* rows, float* turned) {
  for (int e = 0; e < E; e++)
    for (int i = 0; i < Q; i++) turned[e * Q + i] = rows[i * E + e];
}

// Q queries of a head, the last ones of a sequence fewer: those that are missing are 0 and see nothing.
struct Block {
  int64_t begin;
  int count;
  int32_t first[Q], last[Q];
  int64_t low, high;      // keys from `low` to before `high` are seen by any
  int64_t whole, beyond;  // and from `whole` to before `beyond` by all

  Block(const Shape& shape, int64_t batch, int64_t begin)
      : begin(begin), count(std::min<int64_t>(Q, shape.queries - begin)), low(shape.keys), high(0), whole(0), beyond(shape.keys) {
    for (int i = 0; i < Q; i++) {
      int64_t query = begin + i;
      first[i] = i >= count ? 0 : shape.first ? shape.first[batch * shape.queries + query] : 0;
      last[i] = i >= count    ? -1
                : shape.last ? shape.last[batch * shape.queries + query]
                             : query + shape.keys - shape.queries;
      whole = std::max<int64_t>(whole, first[i]);
      beyond = std::min<int64_t>(beyond, last[i] + 1);
      if (first[i] > last[i]) continue;
      low = std::min<int64_t>(low, first[i]);
      high = std::max<int64_t>(high, last[i] + 1);
    }
  }

  // Scores of `count` keys from `key` on that a query does not see become less than any other.
  void hide(float* scores, int64_t key, int keys) const {
    for (int j = 0; j < keys; j++) {
      if (key + j >= whole && key + j < beyond) continue;
      for (int half = 0; half < Q; half += W) {
        const Int at = int32_t(key + j) - Int{};
        const Int seen = (at >= load(first + half)) & (at <= load(last + half));
        float* x = scores + j * Q + half;
        store(x, seen ? load(x) : all(2 * LEAST));
      }
    }
  }
};

}  // namespace

extern "C" {

// out, and for each query the logarithm to the base 2 of its softmax's denominator: sums (batch, head, query).
void attention_forward(const Shape* shape, const Tensor* q, const Tensor* k, const Tensor* v, const Tensor* out, float* sums) {
  const int64_t groups = shape->batches * shape->kv_heads, share = shape->heads / shape->kv_heads;
  // Where there are few heads, several threads take queries of the same one.
  const int64_t blocks = (shape->queries + Q - 1) / Q;
  const int64_t parts = std::min(blocks, std::max<int64_t>(1, 4 * shape->threads / groups));
#pragma omp parallel num_threads(shape->threads)
  {
    std::vector<float> space(2 * shape->keys * E + 3 * Q * E + KEYS * Q);
    float* keys = space.data();
    float* values = keys + shape->keys * E;
    float* queries = values + shape->keys * E;
    float* turned = queries + Q * E;
    float* result = turned + Q * E;
    float* p = result + Q * E;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < groups * parts; task++) {
      const int64_t group = task / parts, batch = group / shape->kv_heads, kv_head = group % shape->kv_heads;
      read(at(*k, batch, kv_head, 0), k->position, shape->keys, 1, keys);
      read(at(*v, batch, kv_head, 0), v->position, shape->keys, 1, values);
      for (int64_t head = kv_head * share; head < (kv_head + 1) * share; head++)
        for (int64_t i = task % parts; i < blocks; i += parts) {
          const Block block(*shape, batch, i * Q);
          std::fill(queries, queries + 3 * Q * E, 0.f);
          read(at(*q, batch, head, block.begin), q->position, block.count, shape->scale * LOG2_E, queries);
          turn(queries, turned);
          Vec top[2] = {all(LEAST), all(LEAST)}, sum[2] = {};
          for (int64_t key = block.low; key < block.high; key += KEYS) {
            const int count = std::min<int64_t>(KEYS, block.high - key);
            multiply(keys + key * E, turned, count, p);
            block.hide(p, key, count);
            for (int half = 0; half < 2; half++) {
              float* x = p + half * W;
              Vec before = top[half];
              for (int j = 0; j < count; j++) top[half] = larger(load(x + j * Q), top[half]);
              const Vec less = exp2(before - top[half]);
              sum[half] *= less;
              for (int e = 0; e < E; e++) store(result + e * Q + half * W, load(result + e * Q + half * W) * less);
              for (int j = 0; j < count; j++) {
                const Vec weight = exp2(load(x + j * Q) - top[half]);
                sum[half] += weight;
                store(x + j * Q, weight);
              }
            }
            add_over_keys(values + key * E, p, count, result);
          }
          Number* to = at(*out, batch, head, block.begin);
          for (int i = 0; i < block.count; i++) {
            const float total = sum[i / W][i % W];
            // What sees nothing attends to nothing, in the backward pass too.
            sums[(batch * shape->heads + head) * shape->queries + block.begin + i] =
                total == 0 ? -LEAST : top[i / W][i % W] + std::log2(total);
            for (int e = 0; e < E; e++) write(total == 0 ? 0 : result[e * Q + i] / total, to + i * out->position + e);
          }
        }
    }
  }
}

// The gradients, of what forward was given and has given.
void attention_backward(const Shape* shape, const Tensor* q, const Tensor* k, const Tensor* v, const Tensor* out,
                        const float* sums, const Tensor* grad, const Tensor* grad_q, const Tensor* grad_k,
                        const Tensor* grad_v) {
  const int64_t groups = shape->batches * shape->kv_heads, share = shape->heads / shape->kv_heads;
#pragma omp parallel num_threads(shape->threads)
  {
    std::vector<float> space(4 * shape->keys * E + 6 * Q * E + 2 * KEYS * Q);
    float* keys = space.data();
    float* values = keys + shape->keys * E;
    float* keys_grad = values + shape->keys * E;
    float* values_grad = keys_grad + shape->keys * E;
    float* queries = values_grad + shape->keys * E;
    float* queries_turned = queries + Q * E;
    float* grads = queries_turned + Q * E;
    float* grads_turned = grads + Q * E;
    float* result = grads_turned + Q * E;
    float* outs = result + Q * E;
    float* p = outs + Q * E;
    float* p_grad = p + KEYS * Q;
#pragma omp for schedule(dynamic)
    for (int64_t group = 0; group < groups; group++) {
      const int64_t batch = group / shape->kv_heads, kv_head = group % shape->kv_heads;
      read(at(*k, batch, kv_head, 0), k->position, shape->keys, 1, keys);
      read(at(*v, batch, kv_head, 0), v->position, shape->keys, 1, values);
      std::fill(keys_grad, keys_grad + 2 * shape->keys * E, 0.f);
      for (int64_t head = kv_head * share; head < (kv_head + 1) * share; head++)
        for (int64_t begin = 0; begin < shape->queries; begin += Q) {
          const Block block(*shape, batch, begin);
          std::fill(queries, queries + 6 * Q * E, 0.f);
          read(at(*q, batch, head, begin), q->position, block.count, shape->scale * LOG2_E, queries);
          read(at(*grad, batch, head, begin), grad->position, block.count, 1, grads);
          read(at(*out, batch, head, begin), out->position, block.count, 1, outs);
          turn(queries, queries_turned);
          turn(grads, grads_turned);
          float sum[Q]{}, mean[Q]{};  // mean: of the weights' gradients, which the softmax takes away
          for (int i = 0; i < block.count; i++) {
            sum[i] = sums[(batch * shape->heads + head) * shape->queries + begin + i];
            for (int e = 0; e < E; e++) mean[i] += grads[i * E + e] * outs[i * E + e];
          }
          for (int64_t key = block.low; key < block.high; key += KEYS) {
            const int count = std::min<int64_t>(KEYS, block.high - key);
            multiply(keys + key * E, queries_turned, count, p);
            block.hide(p, key, count);
            multiply(values + key * E, grads_turned, count, p_grad);
            for (int half = 0; half < Q; half += W)
              for (int j = 0; j < count; j++) {
                const Vec weight = exp2(load(p + j * Q + half) - load(sum + half));
                store(p + j * Q + half, weight);
                store(p_grad + j * Q + half, weight * (load(p_grad + j * Q + half) - load(mean + half)));
              }
            add_over_keys(keys + key * E, p_grad, count, result);
            add_over_queries(p_grad, queries, count, keys_grad + key * E);
            add_over_queries(p, grads, count, values_grad + key * E);
          }
          Number* to = at(*grad_q, batch, head, begin);
          for (int i = 0; i < block.count; i++)
            for (int e = 0; e < E; e++) write(result[e * Q + i] * shape->scale, to + i * grad_q->position + e);
        }
      // the queries that the keys' gradients are made of are scaled for the base 2
      write_all(keys_grad, shape->keys, 1 / LOG2_E, at(*grad_k, batch, kv_head, 0), grad_k->position);
      write_all(values_grad, shape->keys, 1, at(*grad_v, batch, kv_head, 0), grad_v->position);
    }
  }
}
}
