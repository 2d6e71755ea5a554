// Attention on a CPU, with rotary positions, forward and backward, whose scores never leave the first cache.
//
// Queries stand beside each other in vector registers, Q of them at a time, so that the maximum and the sum of a softmax
// need nothing from a neighbour, and small heads fill the registers as well as large ones. Keys come in chunks: their
// scores, and in the backward pass the gradients of those, are what is kept. All is computed in float32, whatever it is
// read from and written to.
//
// Sums are over what one thread computes, or in a fixed order, so the result does not depend on the number of threads.
//
// Source: FlashAttention-2, https://arxiv.org/abs/2307.08691, algorithms 1 and 2.
//
// Compiled once for each head size and number format, with HEAD_SIZE and IS_BFLOAT16 defined before.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

extern "C" {

#if IS_BFLOAT16
using Number = uint16_t;
#else
using Number = float;
#endif

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
  // (position, pair, 2): cosine and sine of the angle by which a pair of a query's or key's numbers is to be rotated;
  // null rotates none. The queries are the last positions.
  const float* angles;
  int64_t angles_batch;  // from one batch to the next

  const float* angles_of_keys(int64_t batch) const { return angles ? angles + batch * angles_batch : nullptr; }
  const float* angles_of_queries(int64_t batch, int64_t begin) const {
    return angles ? angles_of_keys(batch) + (keys - queries + begin) * HEAD_SIZE : nullptr;
  }
};
}

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
constexpr int TILE = HAS_32_REGISTERS && E % 8 == 0 ? 8 : 4;  // rows of a product in registers, two vectors wide
static_assert(E % 4 == 0);

typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t Int __attribute__((vector_size(4 * W)));
typedef uint32_t UInt __attribute__((vector_size(4 * W)));
typedef float Unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t UnalignedInt __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t UnalignedHalf __attribute__((vector_size(2 * W), aligned(2), may_alias));

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LEAST = -1e30f;   // less than any maximum
constexpr float HIDDEN = -3e38f;  // less than that, scaled too: a query that sees nothing of a chunk adds nothing

inline Vec all(float x) { return x - Vec{}; }
inline Vec load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline Int load(const int32_t* from) { return *reinterpret_cast<const UnalignedInt*>(from); }

inline Vec load(const uint16_t* from) {
  const UnalignedHalf bits = *reinterpret_cast<const UnalignedHalf*>(from);
  return (Vec)(__builtin_convertvector(bits, UInt) << 16);
}

inline void store(float* to, Vec x) { *reinterpret_cast<Unaligned*>(to) = x; }

// To the nearest bfloat16, ties to even; what is not a number would round to infinity.
inline void store(uint16_t* to, Vec x) {
  const UInt bits = (UInt)x, rounded = x == x ? bits + 0x7fff + (bits >> 16 & 1) : (UInt)all(__builtin_nanf(""));
  *reinterpret_cast<UnalignedHalf*>(to) = __builtin_convertvector(rounded >> 16, UnalignedHalf);
}

inline void add(float* to, Vec x) { store(to, load(to) + x); }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// 2^x for x <= 0, with a relative error of 2e-7. A weight of less than 2^-64 beside one of 1 is 0: it changes nothing,
// and its products would be denormal, which costs a hundred times as much.
inline Vec exp2(Vec x) {
  const Vec round = all(12582912.f);  // 1.5 * 2^23: what is added to it is rounded to a whole number in its last bits
  const Vec shifted = x + round;
  const Vec f = x - (shifted - round);
  Vec p = all(1.3264727e-3f);  // of degree 5, with the least largest error from -1/2 to 1/2, 9e-8, and exact at 0
  p = p * f + all(9.6715130e-3f);
  p = p * f + all(5.5507336e-2f);
  p = p * f + all(2.4022242e-1f);
  p = p * f + all(6.9314700e-1f);
  p = p * f + all(1.f);
  return x < all(-64.f) ? Vec{} : (Vec)((Int)p + ((Int)shifted << 23));
}

template <int... i>
using Indices = std::integer_sequence<int, i...>;
template <int n>
using Count = std::make_integer_sequence<int, n>;

// Numbers of two vectors, counted on from the first to the second.
template <int... from>
inline Vec shuffle(Vec a, Vec b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, from...);
#else
  return __builtin_shuffle(a, b, Int{from...});
#endif
}

// The transpose of a tile: exchange its off-diagonal halves, then those of each quarter, down to single numbers.
template <int s, int... lane>
inline void transpose_tile(Vec (&rows)[W], Indices<lane...> lanes) {
  for (int i = 0; i < W; i++) {
    if (i & s) continue;
    const Vec a = rows[i], b = rows[i + s];
    rows[i] = shuffle<(lane & s ? W + lane - s : lane)...>(a, b);
    rows[i + s] = shuffle<(lane & s ? W + lane : lane + s)...>(a, b);
  }
  if constexpr (s > 1) transpose_tile<s / 2>(rows, lanes);
}

// to[j][i] = from[i][j]
template <int height, int width>
inline void transpose(const float* from, float* to) {
  for (int i = 0; i < height; i += W)
    for (int j = 0; j < width; j += W) {
      Vec rows[W];
      for (int r = 0; r < W; r++) rows[r] = load(from + (i + r) * width + j);
      transpose_tile<W / 2>(rows, Count<W>{});
      for (int r = 0; r < W; r++) store(to + (j + r) * height + i, rows[r]);
    }
}

// Memory that begins where a line of the cache does.
struct Buffer {
  explicit Buffer(int64_t count)
      : size(count), data(static_cast<float*>(operator new(count * sizeof(float), std::align_val_t(64)))) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { operator delete(data, std::align_val_t(64)); }
  const int64_t size;
  float* const data;
};

// Some pairs of numbers, each rotated by its angle: forward, or back where `direction` is -1.
template <int... lane>
inline Vec rotate(Vec x, const float* angles, float direction, Indices<lane...>) {
  const Vec angle = load(angles), signs = {(lane & 1 ? direction : -direction)...};
  const Vec cosine = shuffle<(lane & ~1)...>(angle, angle), sine = shuffle<(lane | 1)...>(angle, angle);
  return x * cosine + shuffle<(lane ^ 1)...>(x, x) * (sine * signs);
}

// One position of a head after another, widened, and rotated unless `angles`, those of the first position, are null.
inline void read_rows(const Tensor& from, int64_t batch, int64_t head, int64_t position, int64_t count,
                      const float* angles, float* to) {
  const Number* x = from.data + batch * from.batch + head * from.head + position * from.position;
  for (int64_t i = 0; i < count; i++, x += from.position, to += E)
    for (int e = 0; e < E; e += W)
      store(to + e, angles ? rotate(load(x + e), angles + i * E + e, 1, Count<W>{}) : load(x + e));
}

// The other way, for gradients of what was rotated: they are rotated back.
inline void write_rows(const float* from, int64_t count, float factor, const float* angles, const Tensor& to,
                       int64_t batch, int64_t head, int64_t position) {
  Number* x = to.data + batch * to.batch + head * to.head + position * to.position;
  for (int64_t i = 0; i < count; i++, x += to.position, from += E)
    for (int e = 0; e < E; e += W)
      store(x + e, (angles ? rotate(load(from + e), angles + i * E + e, -1, Count<W>{}) : load(from + e)) * factor);
}

// Queries of a block, or what belongs to them: natural [i][e], and transposed [e][i].
struct Columns {
  alignas(64) float natural[Q * E];
  alignas(64) float transposed[E * Q];

  void read(const Tensor& from, int64_t batch, int64_t head, int64_t position, int count, const float* angles) {
    read_rows(from, batch, head, position, count, angles, natural);
    std::fill(natural + count * E, natural + Q * E, 0.f);
    transpose<Q, E>(natural, transposed);
  }
};

// The number of rows of a product is a parameter pack, for only variables of their own stay in registers. It is summed
// up there from 0 and then added: long sums lose less that way.

template <int... j>
inline void multiply_rows(const float* rows, const float* transposed, float* out, Indices<j...>) {
  Vec a[]{(j, Vec{})...}, b[]{(j, Vec{})...};
  for (int e = 0; e < E; e++) {
    const Vec x = load(transposed + e * Q), y = load(transposed + e * Q + W);
    ((a[j] += all(rows[j * E + e]) * x, b[j] += all(rows[j * E + e]) * y), ...);
  }
  ((store(out + j * Q, a[j]), store(out + j * Q + W, b[j])), ...);
}

// out[j][i] = sum over e of rows[j][e] * transposed[e][i]
inline void multiply(const float* rows, const float* transposed, int count, float* out) {
  int j = 0;
  for (; j + TILE <= count; j += TILE) multiply_rows(rows + j * E, transposed, out + j * Q, Count<TILE>{});
  for (; j < count; j++) multiply_rows(rows + j * E, transposed, out + j * Q, Count<1>{});
}

template <int... e>
inline void add_rows_over_keys(const float* rows, const float* p, int count, float* transposed, Indices<e...>) {
  Vec a[]{(e, Vec{})...}, b[]{(e, Vec{})...};
  for (int j = 0; j < count; j++) {
    const Vec x = load(p + j * Q), y = load(p + j * Q + W);
    ((a[e] += all(rows[j * E + e]) * x, b[e] += all(rows[j * E + e]) * y), ...);
  }
  ((add(transposed + e * Q, a[e]), add(transposed + e * Q + W, b[e])), ...);
}

// transposed[e][i] += sum over keys j of rows[j][e] * p[j][i]
inline void add_over_keys(const float* rows, const float* p, int count, float* transposed) {
  for (int e = 0; e < E; e += TILE) add_rows_over_keys(rows + e, p, count, transposed + e * Q, Count<TILE>{});
}

template <int... j>
inline void add_rows_over_queries(const float* p, const float* natural, float* out, Indices<j...>) {
  Vec a[]{(j, Vec{})...};
  for (int i = 0; i < Q; i++) {
    const Vec x = load(natural + i * E);
    ((a[j] += all(p[j * Q + i]) * x), ...);
  }
  (add(out + j * E, a[j]), ...);
}

// out[j][e] += sum over queries i of p[j][i] * natural[i][e]
inline void add_over_queries(const float* p, const float* natural, int count, float* out) {
  for (int e = 0; e < E; e += W) {
    int j = 0;
    for (; j + 2 * TILE <= count; j += 2 * TILE)
      add_rows_over_queries(p + j * Q, natural + e, out + j * E + e, Count<2 * TILE>{});
    for (; j < count; j++) add_rows_over_queries(p + j * Q, natural + e, out + j * E + e, Count<1>{});
  }
}

// For each query, of the scores of some keys.
inline Vec largest(const float* scores, int count) {
  Vec found[4] = {all(HIDDEN), all(HIDDEN), all(HIDDEN), all(HIDDEN)};  // four, for each waits for the one before
  int j = 0;
  for (; j + 4 <= count; j += 4)
    for (int r = 0; r < 4; r++) found[r] = larger(load(scores + (j + r) * Q), found[r]);
  for (; j < count; j++) found[0] = larger(load(scores + j * Q), found[0]);
  return larger(larger(found[0], found[1]), larger(found[2], found[3]));
}

// Q queries of a head, the last ones of a sequence fewer: those that are missing see nothing.
struct Block {
  int64_t begin;
  int count;
  int32_t first[Q] = {}, last[Q];
  int64_t low = 0, high;      // keys from `low` to before `high` are seen by any
  int64_t whole = 0, beyond;  // and from `whole` to before `beyond` by all

  Block(const Shape& shape, int64_t batch, int64_t begin)
      : begin(begin), count(std::min<int64_t>(Q, shape.queries - begin)) {
    for (int i = 0; i < Q; i++) last[i] = int32_t(begin + shape.keys - shape.queries) + i;
    high = last[count - 1] + 1;
    beyond = last[0] + 1;
    if (!shape.first && count == Q) return;
    for (int i = 0; shape.first && i < count; i++) {
      first[i] = std::max<int64_t>(shape.first[batch * shape.queries + begin + i], 0);
      last[i] = std::min<int64_t>(shape.last[batch * shape.queries + begin + i], shape.keys - 1);
    }
    for (int i = count; i < Q; i++) last[i] = -1;
    low = shape.keys, high = 0;
    for (int i = 0; i < Q; i++) {
      whole = std::max<int64_t>(whole, first[i]);
      beyond = std::min<int64_t>(beyond, last[i] + 1);
      if (first[i] > last[i]) continue;
      low = std::min<int64_t>(low, first[i]);
      high = std::max<int64_t>(high, last[i] + 1);
    }
  }

  void hide(float* scores, int64_t key, int keys) const {
    for (int j = 0; j < keys; j++) {
      if (key + j >= whole && key + j < beyond) continue;
      for (int half = 0; half < Q; half += W) {
        const Int at = int32_t(key + j) - Int{};
        const Int seen = (at >= load(first + half)) & (at <= load(last + half));
        store(scores + j * Q + half, seen ? load(scores + j * Q + half) : all(HIDDEN));
      }
    }
  }
};

}  // namespace

extern "C" {

// out, and for each query the logarithm to the base 2 of its softmax's denominator: sums (batch, head, query).
void attention_forward(const Shape* shape, const Tensor* q, const Tensor* k, const Tensor* v, const Tensor* out,
                       float* sums) {
  const int64_t groups = shape->batches * shape->kv_heads, share = shape->heads / shape->kv_heads;
  // Where there are few heads, several threads take queries of the same one.
  const int64_t blocks = (shape->queries + Q - 1) / Q;
  const int64_t parts = std::min(blocks, 4 * shape->threads / std::max<int64_t>(1, groups) + 1);
  const float factor = shape->scale * LOG2_E;
#pragma omp parallel num_threads(shape->threads)
  {
    Buffer keys(shape->keys * E), values(shape->keys * E);
    Columns queries;
    alignas(64) float result[E * Q], natural[Q * E], p[KEYS * Q], totals[Q], tops[Q];
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < groups * parts; task++) {
      const int64_t group = task / parts, batch = group / shape->kv_heads, kv_head = group % shape->kv_heads;
      read_rows(*k, batch, kv_head, 0, shape->keys, shape->angles_of_keys(batch), keys.data);
      read_rows(*v, batch, kv_head, 0, shape->keys, nullptr, values.data);
      for (int64_t head = kv_head * share; head < (kv_head + 1) * share; head++)
        for (int64_t i = task % parts; i < blocks; i += parts) {
          const Block block(*shape, batch, i * Q);
          queries.read(*q, batch, head, block.begin, block.count, shape->angles_of_queries(batch, block.begin));
          std::fill(result, result + E * Q, 0.f);
          Vec top[2] = {all(LEAST), all(LEAST)}, total[2] = {};
          for (int64_t key = block.low; key < block.high; key += KEYS) {
            const int count = std::min<int64_t>(KEYS, block.high - key);
            multiply(keys.data + key * E, queries.transposed, count, p);
            block.hide(p, key, count);
            for (int half = 0; half < 2; half++) {
              float* x = p + half * W;
              const Vec before = top[half];
              top[half] = larger(largest(x, count) * factor, before);
              const Vec less = exp2(before - top[half]);
              total[half] *= less;
              for (int e = half * W; e < E * Q; e += Q) store(result + e, load(result + e) * less);
              for (int j = 0; j < count; j++) {
                const Vec weight = exp2(load(x + j * Q) * factor - top[half]);
                total[half] += weight;
                store(x + j * Q, weight);
              }
            }
            add_over_keys(values.data + key * E, p, count, result);
          }
          for (int half = 0; half < 2; half++) {
            store(totals + half * W, total[half]);
            store(tops + half * W, top[half]);
            // What sees nothing attends to nothing, in the backward pass too.
            const Vec inverse = total[half] == Vec{} ? Vec{} : all(1.f) / total[half];
            for (int e = half * W; e < E * Q; e += Q) store(result + e, load(result + e) * inverse);
          }
          for (int i = 0; i < block.count; i++)
            sums[(batch * shape->heads + head) * shape->queries + block.begin + i] =
                totals[i] == 0 ? -LEAST : tops[i] + std::log2(totals[i]);
          transpose<E, Q>(result, natural);
          write_rows(natural, block.count, 1, nullptr, *out, batch, head, block.begin);
        }
    }
  }
}

// The gradients, of what forward was given and has given.
void attention_backward(const Shape* shape, const Tensor* q, const Tensor* k, const Tensor* v, const Tensor* out,
                        const float* sums, const Tensor* grad, const Tensor* grad_q, const Tensor* grad_k,
                        const Tensor* grad_v) {
  const int64_t share = shape->heads / shape->kv_heads, size = shape->keys * E;
  const float factor = shape->scale * LOG2_E;
  // What each head of a group adds to the gradients of its keys and values, to be summed in a fixed order.
  Buffer shares(share > 1 ? shape->batches * shape->heads * 2 * size : 0);
#pragma omp parallel num_threads(shape->threads)
  {
    Buffer keys(shape->keys * E), values(shape->keys * E);
    Columns queries, grads, outs;
    Buffer own(share > 1 ? 0 : 2 * size);
    alignas(64) float result[E * Q], natural[Q * E], p[KEYS * Q], p_grad[KEYS * Q], sum[Q], mean[Q];
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < shape->batches * shape->heads; task++) {
      const int64_t batch = task / shape->heads, head = task % shape->heads, kv_head = head / share;
      read_rows(*k, batch, kv_head, 0, shape->keys, shape->angles_of_keys(batch), keys.data);
      read_rows(*v, batch, kv_head, 0, shape->keys, nullptr, values.data);
      float* keys_grad = share > 1 ? shares.data + task * 2 * size : own.data;
      float* values_grad = keys_grad + size;
      std::fill(keys_grad, keys_grad + 2 * size, 0.f);
      for (int64_t begin = 0; begin < shape->queries; begin += Q) {
        const Block block(*shape, batch, begin);
        const float* angles = shape->angles_of_queries(batch, begin);
        queries.read(*q, batch, head, begin, block.count, angles);
        grads.read(*grad, batch, head, begin, block.count, nullptr);
        outs.read(*out, batch, head, begin, block.count, nullptr);
        for (int i = 0; i < Q; i++)
          sum[i] = i < block.count ? sums[(batch * shape->heads + head) * shape->queries + begin + i] : -LEAST;
        for (int half = 0; half < Q; half += W) {
          Vec means{};  // of the weights' gradients, which the softmax takes away
          for (int e = half; e < E * Q; e += Q) means += load(grads.transposed + e) * load(outs.transposed + e);
          store(mean + half, means);
        }
        std::fill(result, result + E * Q, 0.f);
        for (int64_t key = block.low; key < block.high; key += KEYS) {
          const int count = std::min<int64_t>(KEYS, block.high - key);
          multiply(keys.data + key * E, queries.transposed, count, p);
          block.hide(p, key, count);
          multiply(values.data + key * E, grads.transposed, count, p_grad);
          for (int half = 0; half < Q; half += W)
            for (int j = half; j < count * Q; j += Q) {
              const Vec weight = exp2(load(p + j) * factor - load(sum + half));
              store(p + j, weight);
              store(p_grad + j, weight * (load(p_grad + j) - load(mean + half)));
            }
          add_over_keys(keys.data + key * E, p_grad, count, result);
          add_over_queries(p_grad, queries.natural, count, keys_grad + key * E);
          add_over_queries(p, grads.natural, count, values_grad + key * E);
        }
        transpose<E, Q>(result, natural);
        write_rows(natural, block.count, shape->scale, angles, *grad_q, batch, head, begin);
      }
      if (share == 1) {
        write_rows(keys_grad, shape->keys, shape->scale, shape->angles_of_keys(batch), *grad_k, batch, kv_head, 0);
        write_rows(values_grad, shape->keys, 1, nullptr, *grad_v, batch, kv_head, 0);
      }
    }
#pragma omp for
    for (int64_t group = 0; group < (share > 1 ? shape->batches * shape->kv_heads : 0); group++) {
      const int64_t batch = group / shape->kv_heads, kv_head = group % shape->kv_heads;
      float* total = shares.data + group * share * 2 * size;
      for (int64_t head = 1; head < share; head++)
        for (int64_t i = 0; i < 2 * size; i++) total[i] += total[head * 2 * size + i];
      write_rows(total, shape->keys, shape->scale, shape->angles_of_keys(batch), *grad_k, batch, kv_head, 0);
      write_rows(total + size, shape->keys, 1, nullptr, *grad_v, batch, kv_head, 0);
    }
  }
}
}
