// Attention on a CPU, with rotary positions, forward and backward, whose scores never leave the first cache.
//
// Queries stand beside each other in vector registers, Q of them at a time, so that the maximum and the sum of a softmax
// need nothing from a neighbour, and small heads fill the registers as well as large ones. Keys come in chunks: their
// scores, and in the backward pass the gradients of those, are what is kept. All is computed in float32, whatever it is
// read from and written to; but where a CPU multiplies bfloat16 in tiles (AMX), the products of that format are taken
// there, of factors rounded to it (weights, their gradients, and what was rotated), and summed up in float32.
//
// Sums are over what one thread computes, or in a fixed order, so the result does not depend on the number of threads.
//
// Source: FlashAttention-2, https://arxiv.org/abs/2307.08691, algorithms 1 and 2.
//
// Compiled once for each head size and number format, with HEAD_SIZE and IS_BFLOAT16 defined before, and HAS_TILES:
// whether this process may use them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#if IS_BFLOAT16 && HAS_TILES && HEAD_SIZE % 16 == 0 && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define IN_TILES 1
#include <immintrin.h>
#endif

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
constexpr int HEIGHT = HAS_32_REGISTERS && E % 8 == 0 ? 8 : 4;  // rows of a product in registers, two vectors wide
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
  return x < all(-64.f) ? Vec{} : (Vec)((UInt)p + ((UInt)shifted << 23));
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

#if IN_TILES

// A tile has 16 rows of 64 bytes: of 16 numbers in float32, or of 32 in bfloat16. What is multiplied from the right has
// two rows of a matrix in each of its own: their numbers in pairs.
constexpr int PADDED = (E + 31) / 32 * 32;  // the numbers of a head that is summed over
constexpr int SPARE = 16;                   // rows behind the last: whole tiles are read and written, up to 15 too many

// For as long as it lives, this thread has whole tiles.
struct Tiles {
  Tiles() {
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; tile++) config[16 + 2 * tile] = 64, config[48 + tile] = 16;
    asm volatile("" : : "r"(config) : "memory");  // GCC 12 takes the configuration to be 8 bytes long
    _tile_loadconfig(config);
  }
  Tiles(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }
};

// As `store`, by one instruction, which makes 0 of what is denormal.
inline void store_rounded(uint16_t* to, Vec x) {
  *reinterpret_cast<__m256i*>(to) = (__m256i)_mm512_cvtneps_pbh((__m512)x);
}

// Two rows, one behind the other.
inline __m512i round_both(Vec first, Vec second) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

// The same as one of pairs.
template <int... i>
inline __m512i interleave(__m512i rows, Indices<i...>) {
  typedef int16_t Halves __attribute__((vector_size(64)));
  return _mm512_permutexvar_epi16((__m512i)Halves{(i / 2 + i % 2 * 16)...}, rows);
}

// c = a b, or c += a b: of high x wide tiles. The distances between rows are in bytes.
template <int high, int wide>
inline void multiply_tiles(const uint16_t* a, int64_t row_a, const uint16_t* b, int64_t row_b, float* c, int64_t row_c,
                           int depth, bool is_sum) {
  float* below = c + 16 * row_c / sizeof *c;
  if (is_sum) {
    _tile_loadd(0, c, row_c);
    if constexpr (wide > 1) _tile_loadd(1, c + 16, row_c);
    if constexpr (high > 1) _tile_loadd(2, below, row_c);
    if constexpr (high > 1 && wide > 1) _tile_loadd(3, below + 16, row_c);
  } else {
    _tile_zero(0);
    if constexpr (wide > 1) _tile_zero(1);
    if constexpr (high > 1) _tile_zero(2);
    if constexpr (high > 1 && wide > 1) _tile_zero(3);
  }
  for (int k = 0; k < depth; k++, a += 32, b += 16 * row_b / sizeof *b) {
    _tile_loadd(4, a, row_a);
    _tile_loadd(6, b, row_b);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (wide > 1) {
      _tile_loadd(7, b + 32, row_b);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (high > 1) {
      _tile_loadd(5, a + 16 * row_a / sizeof *a, row_a);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (wide > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, row_c);
  if constexpr (wide > 1) _tile_stored(1, c + 16, row_c);
  if constexpr (high > 1) _tile_stored(2, below, row_c);
  if constexpr (high > 1 && wide > 1) _tile_stored(3, below + 16, row_c);
}

// The same for `rows` rows, in whole tiles, and `wide` tiles beside each other.
template <int wide>
inline void multiply_matrix(const uint16_t* a, int64_t row_a, const uint16_t* b, int64_t row_b, float* c, int64_t row_c,
                            int rows, int depth, bool is_sum) {
  asm volatile("" ::: "memory");  // what loads a tile does not tell the compiler that it reads memory
  if constexpr (wide > 2) {
    multiply_matrix<2>(a, row_a, b, row_b, c, row_c, rows, depth, is_sum);
    multiply_matrix<wide - 2>(a, row_a, b + 64, row_b, c + 32, row_c, rows, depth, is_sum);
  } else {
    for (; rows > 16; rows -= 32, a += 32 * row_a / sizeof *a, c += 32 * row_c / sizeof *c)
      multiply_tiles<2, wide>(a, row_a, b, row_b, c, row_c, depth, is_sum);
    if (rows > 0) multiply_tiles<1, wide>(a, row_a, b, row_b, c, row_c, depth, is_sum);
  }
  asm volatile("" ::: "memory");
}

// Queries of a block, or what belongs to them: natural [i][e], and in pairs of a query's numbers [e/2][i][2], or of
// queries [i/2][e][2].
struct Columns {
  alignas(64) float natural[Q * E];
  alignas(64) uint16_t by_number[PADDED * Q];
  alignas(64) uint16_t by_query[Q * E];

  void read(const Tensor& from, int64_t batch, int64_t head, int64_t position, int count, const float* angles) {
    alignas(64) uint16_t rounded[Q * PADDED] = {};
    read_rows(from, batch, head, position, count, angles, natural);
    std::fill(natural + count * E, natural + Q * E, 0.f);
    for (int i = 0; i < Q; i++)
      for (int e = 0; e < E; e += W) store_rounded(rounded + i * PADDED + e, load(natural + i * E + e));
    transpose<Q, PADDED / 2>(reinterpret_cast<float*>(rounded), reinterpret_cast<float*>(by_number));
  }

  void pair() {
    for (int i = 0; i < Q; i += 2)
      for (int e = 0; e < E; e += W) {
        const __m512i both = round_both(load(natural + i * E + e), load(natural + (i + 1) * E + e));
        _mm512_store_si512(by_query + i * E + 2 * e, interleave(both, Count<32>{}));
      }
  }
};

// Keys or values of a head: natural [j][e], and turned [e][j].
struct Rows {
  // A chunk begins anywhere and is read in whole 32s where it is turned: up to 31 numbers too many, which are 0.
  explicit Rows(int64_t count)
      : count(count), row((count + 63) / 32 * 32), natural((count + SPARE) * PADDED / 2), turned(E * row / 2) {
    std::fill(natural.data, natural.data + natural.size, 0.f);
    std::fill(turned.data, turned.data + turned.size, 0.f);
  }
  const int64_t count, row;
  Buffer natural, turned;

  uint16_t* at(int64_t j) const { return reinterpret_cast<uint16_t*>(natural.data) + j * PADDED; }
  uint16_t* turned_at(int64_t j) const { return reinterpret_cast<uint16_t*>(turned.data) + j; }

  void read(const Tensor& from, int64_t batch, int64_t head, const float* angles) {
    alignas(64) float wide[E];
    for (int64_t j = 0; j < count; j++) {
      read_rows(from, batch, head, j, 1, angles ? angles + j * E : nullptr, wide);
      for (int e = 0; e < E; e += W) store_rounded(at(j) + e, load(wide + e));
    }
  }

  void turn() {
    for (int64_t j = 0; j < count; j += W)
      for (int e = 0; e < E; e += W) {
        Vec rows[W] = {};
        for (int r = 0; r < std::min<int64_t>(W, count - j); r++) rows[r] = load(at(j + r) + e);
        transpose_tile<W / 2>(rows, Count<W>{});
        for (int r = 0; r < W; r++) store_rounded(turned_at(j) + (e + r) * row, rows[r]);
      }
  }
};

// A number for each query and some keys: [j][i], rounded too, and in pairs of keys [j/2][i][2].
struct Scores {
  alignas(64) float numbers[KEYS * Q];
  alignas(64) uint16_t rounded[KEYS * Q];
  alignas(64) uint16_t by_key[KEYS * Q];

  template <bool to_rows, bool to_pairs>
  void round(int count) {
    const int whole = (count + 31) / 32 * 32;
    std::fill(numbers + count * Q, numbers + whole * Q, 0.f);
    for (int j = 0; j < whole; j += 2)
      for (int i = 0; i < Q; i += W) {
        const __m512i both = round_both(load(numbers + j * Q + i), load(numbers + (j + 1) * Q + i));
        if constexpr (to_rows) {
          _mm256_store_si256((__m256i*)(rounded + j * Q + i), _mm512_castsi512_si256(both));
          _mm256_store_si256((__m256i*)(rounded + (j + 1) * Q + i), _mm512_extracti64x4_epi64(both, 1));
        }
        if constexpr (to_pairs) _mm512_store_si512(by_key + j * Q + 2 * i, interleave(both, Count<32>{}));
      }
  }
};

inline void multiply(const Rows& rows, int64_t key, const Columns& columns, int count, Scores& out) {
  multiply_matrix<2>(rows.at(key), 2 * PADDED, columns.by_number, 4 * Q, out.numbers, 4 * Q, count, PADDED / 32, false);
}

inline void add_over_keys(const Rows& rows, int64_t key, const Scores& p, int count, float* transposed) {
  multiply_matrix<2>(rows.turned_at(key), 2 * rows.row, p.by_key, 4 * Q, transposed, 4 * Q, E, (count + 31) / 32, true);
}

inline void add_over_queries(const Scores& p, const Columns& columns, int count, float* out) {
  multiply_matrix<E / 16>(p.rounded, 2 * Q, columns.by_query, 4 * E, out, 4 * E, count, 1, true);
}

#else

// Queries of a block, or what belongs to them: natural [i][e], and transposed [e][i].
struct Columns {
  alignas(64) float natural[Q * E];
  alignas(64) float transposed[E * Q];

  void read(const Tensor& from, int64_t batch, int64_t head, int64_t position, int count, const float* angles) {
    read_rows(from, batch, head, position, count, angles, natural);
    std::fill(natural + count * E, natural + Q * E, 0.f);
    transpose<Q, E>(natural, transposed);
  }

  void pair() {}
};

// Keys or values of a head: [j][e].
struct Rows : Buffer {
  explicit Rows(int64_t count) : Buffer(count * E), count(count) {}
  const int64_t count;

  void read(const Tensor& from, int64_t batch, int64_t head, const float* angles) {
    read_rows(from, batch, head, 0, count, angles, data);
  }

  void turn() {}
};

// A number for each query and some keys: [j][i].
struct Scores {
  alignas(64) float numbers[KEYS * Q];

  template <bool to_rows, bool to_pairs>
  void round(int count) {}
};

struct Tiles {};
constexpr int SPARE = 0;

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
inline void multiply(const Rows& rows, int64_t key, const Columns& columns, int count, Scores& out) {
  const float* row = rows.data + key * E;
  int j = 0;
  for (; j + HEIGHT <= count; j += HEIGHT)
    multiply_rows(row + j * E, columns.transposed, out.numbers + j * Q, Count<HEIGHT>{});
  for (; j < count; j++) multiply_rows(row + j * E, columns.transposed, out.numbers + j * Q, Count<1>{});
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
inline void add_over_keys(const Rows& rows, int64_t key, const Scores& p, int count, float* transposed) {
  const float* row = rows.data + key * E;
  for (int e = 0; e < E; e += HEIGHT)
    add_rows_over_keys(row + e, p.numbers, count, transposed + e * Q, Count<HEIGHT>{});
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
inline void add_over_queries(const Scores& p, const Columns& columns, int count, float* out) {
  for (int e = 0; e < E; e += W) {
    int j = 0;
    for (; j + 2 * HEIGHT <= count; j += 2 * HEIGHT)
      add_rows_over_queries(p.numbers + j * Q, columns.natural + e, out + j * E + e, Count<2 * HEIGHT>{});
    for (; j < count; j++) add_rows_over_queries(p.numbers + j * Q, columns.natural + e, out + j * E + e, Count<1>{});
  }
}

#endif

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
    const Tiles tiles;
    Rows keys(shape->keys), values(shape->keys);
    Columns queries;
    Scores p;
    alignas(64) float result[E * Q], natural[Q * E], totals[Q], tops[Q];
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < groups * parts; task++) {
      const int64_t group = task / parts, batch = group / shape->kv_heads, kv_head = group % shape->kv_heads;
      keys.read(*k, batch, kv_head, shape->angles_of_keys(batch));
      values.read(*v, batch, kv_head, nullptr);
      values.turn();
      for (int64_t head = kv_head * share; head < (kv_head + 1) * share; head++)
        for (int64_t i = task % parts; i < blocks; i += parts) {
          const Block block(*shape, batch, i * Q);
          queries.read(*q, batch, head, block.begin, block.count, shape->angles_of_queries(batch, block.begin));
          std::fill(result, result + E * Q, 0.f);
          Vec top[2] = {all(LEAST), all(LEAST)}, total[2] = {};
          for (int64_t key = block.low; key < block.high; key += KEYS) {
            const int count = std::min<int64_t>(KEYS, block.high - key);
            multiply(keys, key, queries, count, p);
            block.hide(p.numbers, key, count);
            for (int half = 0; half < 2; half++) {
              float* x = p.numbers + half * W;
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
            p.round<false, true>(count);
            add_over_keys(values, key, p, count, result);
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
  const int64_t share = shape->heads / shape->kv_heads, size = (shape->keys + SPARE) * E;
  const float factor = shape->scale * LOG2_E;
  // What each head of a group adds to the gradients of its keys and values, to be summed in a fixed order.
  Buffer shares(share > 1 ? shape->batches * shape->heads * 2 * size : 0);
#pragma omp parallel num_threads(shape->threads)
  {
    const Tiles tiles;
    Rows keys(shape->keys), values(shape->keys);
    Columns queries, grads;
    Scores p, p_grad;
    Buffer own(share > 1 ? 0 : 2 * size);
    alignas(64) float result[E * Q], natural[Q * E], sum[Q], mean[Q];
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < shape->batches * shape->heads; task++) {
      const int64_t batch = task / shape->heads, head = task % shape->heads, kv_head = head / share;
      keys.read(*k, batch, kv_head, shape->angles_of_keys(batch));
      keys.turn();
      values.read(*v, batch, kv_head, nullptr);
      float* keys_grad = share > 1 ? shares.data + task * 2 * size : own.data;
      float* values_grad = keys_grad + size;
      std::fill(keys_grad, keys_grad + 2 * size, 0.f);
      for (int64_t begin = 0; begin < shape->queries; begin += Q) {
        const Block block(*shape, batch, begin);
        const float* angles = shape->angles_of_queries(batch, begin);
        queries.read(*q, batch, head, begin, block.count, angles);
        queries.pair();
        grads.read(*grad, batch, head, begin, block.count, nullptr);
        grads.pair();
        read_rows(*out, batch, head, begin, block.count, nullptr, natural);
        for (int i = 0; i < block.count * E; i += W) store(natural + i, load(natural + i) * load(grads.natural + i));
        std::fill(natural + block.count * E, natural + Q * E, 0.f);
        transpose<Q, E>(natural, result);
        for (int i = 0; i < Q; i++)
          sum[i] = i < block.count ? sums[(batch * shape->heads + head) * shape->queries + begin + i] : -LEAST;
        for (int half = 0; half < Q; half += W) {
          Vec means{};  // of the weights' gradients, which the softmax takes away
          for (int e = half; e < E * Q; e += Q) means += load(result + e);
          store(mean + half, means);
        }
        std::fill(result, result + E * Q, 0.f);
        for (int64_t key = block.low; key < block.high; key += KEYS) {
          const int count = std::min<int64_t>(KEYS, block.high - key);
          multiply(keys, key, queries, count, p);
          block.hide(p.numbers, key, count);
          multiply(values, key, grads, count, p_grad);
          for (int half = 0; half < Q; half += W)
            for (int j = half; j < count * Q; j += Q) {
              const Vec weight = exp2(load(p.numbers + j) * factor - load(sum + half));
              store(p.numbers + j, weight);
              store(p_grad.numbers + j, weight * (load(p_grad.numbers + j) - load(mean + half)));
            }
          p.round<true, false>(count);
          p_grad.round<true, true>(count);
          add_over_keys(keys, key, p_grad, count, result);
          add_over_queries(p_grad, queries, count, keys_grad + key * E);
          add_over_queries(p, grads, count, values_grad + key * E);
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
