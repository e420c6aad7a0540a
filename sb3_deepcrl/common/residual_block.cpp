// A residual block, forward and backward: four times [Dense, LayerNorm, Swish], then x + scale * F(x). All is float32, but for
// the factors of the matrix products, which may be rounded to bfloat16.
//
// All but the gradients of the weights is done for a few rows at a time, which stay in the cache from the first layer to
// the last. The backward pass starts from the matrix products (with bias), and computes the rest of a layer again.
//
// "Tiled" is a matrix cut into strips of as many columns as there are in a vector, one strip after the other: what the
// inner loop of a product reads is then contiguous.

#include <ATen/cpu/vec/functional.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>

namespace {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t N_LAYERS = 4;
constexpr int64_t LANES = Vec::size();
// A product is computed in tiles of so many rows and vectors, which fit into the registers,
constexpr int TILE_ROWS = 8;
constexpr int TILE_VECTORS = 2;
// in sums of so many words, so that what is added up stays in the cache
constexpr int64_t MAX_WORDS = 512;
// Rows at a time: their activations fit into the second level of the cache
constexpr int64_t MAX_BLOCK_ROWS = 64;

// Parameters of one layer, and their gradients
struct Layer {
  const float *weight, *bias, *gamma, *beta;
};
struct LayerGradients {
  float *weight, *bias, *gamma, *beta;
};

// Factors of a product are stored in words of 32 bits, each with one term of a sum
struct Float32 {
  static constexpr int64_t TERMS_OF_WORD = 1;

  static Vec multiply_add(Vec a, Vec b, Vec sum) {
    return at::vec::fmadd(a, b, sum);
  }
  // Words of n terms that are neighbors in a row
  static const float* pack(const float* row, int64_t, float*) {
    return row;
  }
  // Words of terms that are neighbors in a column
  static Vec words(const float* row, const float*) {
    return Vec::loadu(row);
  }
};

#ifdef __AVX512BF16__
// or with two
struct BFloat16 {
  static constexpr int64_t TERMS_OF_WORD = 2;

  static Vec multiply_add(Vec a, Vec b, Vec sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
  }
  static const float* pack(const float* row, int64_t n, float* packed) {
    for (int64_t j = 0; j < n; j += LANES)
      _mm256_storeu_si256((__m256i*)(packed + j / 2), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(row + j)));
    return packed;
  }
  static Vec words(const float* row, const float* next) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(row)));
    if (!next) return _mm512_castsi512_ps(low);
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(next)));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
};
#endif

// Memory that is kept from one call to the next: new one would have to be mapped page by page
float* workspace(int64_t size) {
  static thread_local std::unique_ptr<float[]> memory;
  static thread_local int64_t capacity = 0;
  if (capacity < size) {
    memory.reset();
    capacity = 0;
    memory.reset(new float[size + LANES]);
    capacity = size;
  }
  const auto address = reinterpret_cast<std::uintptr_t>(memory.get());
  const std::uintptr_t line = LANES * sizeof(float);
  return reinterpret_cast<float*>((address + line - 1) / line * line);
}

// An exception must not reach the caller, which is not C++
template <class Function>
bool enough_memory(Function function) {
  try {
    function();
  } catch (const std::bad_alloc&) {
    return false;
  }
  return true;
}

// No more threads than there are tiles of rows, and only one where waiting for others would take longer than the work
int64_t useful_threads(int64_t n_rows, int64_t n_threads) {
  return n_rows < 32 ? 1 : std::min(n_rows / TILE_ROWS, n_threads);
}

// Enough blocks for all threads, but whole tiles
int64_t rows_of_block(int64_t n_rows, int64_t n_threads) {
  const int64_t share = (n_rows + n_threads - 1) / n_threads;
  const int64_t tiles = std::max<int64_t>(1, std::min(share, MAX_BLOCK_ROWS) / TILE_ROWS);
  return tiles * TILE_ROWS;
}

// c = start + a b for one tile. The rows of `start` are `start_stride` apart (0: all the same), or it is null.
// a(m, k) is at a[m * a_stride + k], if it is tiled at a[k * LANES + m].
template <class Type, int M, int N, bool TILED>
inline void tile(int64_t n_words, const float* a, int64_t a_stride, const float* b, int64_t b_stride, const float* start,
                 int64_t start_stride, float* c, int64_t c_stride) {
  Vec sums[M][N];
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sums[m][n] = start ? Vec::loadu(start + m * start_stride + n * LANES) : Vec(0.0f);
  for (int64_t k = 0; k < n_words; ++k) {
    Vec columns[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) columns[n] = Vec::loadu(b + n * b_stride + k * LANES);
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m) {
      const Vec factor(TILED ? a[k * LANES + m] : a[m * a_stride + k]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[m][n] = Type::multiply_add(factor, columns[n], sums[m][n]);
    }
  }
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sums[m][n].store(c + m * c_stride + n * LANES);
}

// The same for the last tile, which may have fewer rows
template <class Type, int M, int N, bool TILED>
inline void part_of_tile(int64_t n_rows, int64_t n_words, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                         const float* start, int64_t start_stride, float* c, int64_t c_stride) {
  if (n_rows >= M)
    tile<Type, M, N, TILED>(n_words, a, a_stride, b, b_stride, start, start_stride, c, c_stride);
  else if constexpr (M > 1)
    part_of_tile<Type, M - 1, N, TILED>(n_rows, n_words, a, a_stride, b, b_stride, start, start_stride, c, c_stride);
}

// c = start + a b for N vectors of columns. b is tiled, with `b_stride` from one strip to the next.
template <class Type, int N, bool TILED>
void strip(int64_t n_rows, int64_t n_words, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
           const float* start, int64_t start_stride, float* c, int64_t c_stride) {
  for (int64_t k = 0; k < n_words || k == 0; k += MAX_WORDS) {
    const int64_t n = std::min(MAX_WORDS, n_words - k);
    for (int64_t m = 0; m < n_rows; m += TILE_ROWS) {
      // If a is tiled, its rows are the columns of what is in memory
      const float* from = TILED ? a + (m / LANES) * a_stride + k * LANES + m % LANES : a + m * a_stride + k;
      const float* first = k == 0 ? (start ? start + m * start_stride : nullptr) : c + m * c_stride;
      part_of_tile<Type, TILE_ROWS, N, TILED>(n_rows - m, n, from, a_stride, b + k * LANES, b_stride, first,
                                              k == 0 ? start_stride : c_stride, c + m * c_stride, c_stride);
    }
  }
}

// c = start + a b for all columns
template <class Type, bool TILED>
void product(int64_t n_rows, int64_t n_columns, int64_t n_words, const float* a, int64_t a_stride, const float* b,
             int64_t b_stride, const float* start, int64_t start_stride, float* c, int64_t c_stride) {
  int64_t j = 0;
  for (; j + TILE_VECTORS * LANES <= n_columns; j += TILE_VECTORS * LANES)
    strip<Type, TILE_VECTORS, TILED>(n_rows, n_words, a, a_stride, b + j / LANES * b_stride, b_stride,
                                     start ? start + j : nullptr, start_stride, c + j, c_stride);
  for (; j < n_columns; j += LANES)
    strip<Type, 1, TILED>(n_rows, n_words, a, a_stride, b + j / LANES * b_stride, b_stride, start ? start + j : nullptr,
                          start_stride, c + j, c_stride);
}

// Rows of a matrix, or of one of its strips only, whose columns become the second factor of a product
template <class Type>
void tile_rows(const float* rows, int64_t n_rows, int64_t row_stride, int64_t n_columns, float* tiled, int64_t stride) {
  for (int64_t m = 0; m < n_rows; m += Type::TERMS_OF_WORD)
    for (int64_t j = 0; j < n_columns; j += LANES) {
      const float* row = rows + m * row_stride + j;
      Type::words(row, m + 1 < n_rows ? row + row_stride : nullptr)
          .store(tiled + j / LANES * stride + m / Type::TERMS_OF_WORD * LANES);
    }
}

// The same for a strip of the transpose
template <class Type>
void tile_transposed(const float* rows, int64_t width, float* tiled) {
  float packed[LANES * LANES];
  for (int64_t k = 0; k < width / Type::TERMS_OF_WORD; k += LANES) {
    const float* from = rows + k * Type::TERMS_OF_WORD;
    int64_t from_stride = width;
    if constexpr (Type::TERMS_OF_WORD > 1) {
      for (int64_t n = 0; n < LANES; ++n) Type::pack(from + n * width, Type::TERMS_OF_WORD * LANES, packed + n * LANES);
      from = packed;
      from_stride = LANES;
    }
    at::vec::transpose_mxn<float, LANES, LANES>(from, from_stride, tiled + k * LANES, LANES);
  }
}

inline float sum(Vec x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, x);
}

inline Vec sigmoid(Vec x) {
  return Vec(1.0f) / (Vec(1.0f) + x.neg().exp_u20());
}

inline void add_to(float* total, Vec x) {
  (Vec::loadu(total) + x).store(total);
}

// Swish(LayerNorm(z)) of a row
inline void activate(const float* z, const Layer& layer, int64_t width, float eps, float* h, float& mean, float& rstd) {
  Vec total(0.0f);
  for (int64_t j = 0; j < width; j += LANES) total = total + Vec::loadu(z + j);
  mean = sum(total) / width;
  Vec squares(0.0f);
  for (int64_t j = 0; j < width; j += LANES) {
    const Vec centered = Vec::loadu(z + j) - Vec(mean);
    squares = at::vec::fmadd(centered, centered, squares);
  }
  rstd = 1.0f / std::sqrt(sum(squares) / width + eps);
  for (int64_t j = 0; j < width; j += LANES) {
    const Vec normed = (Vec::loadu(z + j) - Vec(mean)) * Vec(rstd);
    const Vec y = at::vec::fmadd(normed, Vec::loadu(layer.gamma + j), Vec::loadu(layer.beta + j));
    (y * sigmoid(y)).store(h + j);
  }
}

// The gradient of z from that of h times `factor`, for a row. With gradients of the parameters: also h, and what the row adds
// to the gradients of bias, gamma and beta in `sums`. Returns the product of h and its gradient, for the scale.
template <bool PARAMETERS>
inline float differentiate(const float* z, const Layer& layer, int64_t width, float mean, float rstd, float factor,
                           const float* dh, float* dz, float* h, float* sums) {
  Vec total(0.0f), total_normed(0.0f), inner(0.0f);
  for (int64_t j = 0; j < width; j += LANES) {
    const Vec normed = (Vec::loadu(z + j) - Vec(mean)) * Vec(rstd);
    const Vec gamma = Vec::loadu(layer.gamma + j);
    const Vec y = at::vec::fmadd(normed, gamma, Vec::loadu(layer.beta + j));
    const Vec s = sigmoid(y);
    const Vec swish = y * s;
    const Vec upper = Vec::loadu(dh + j);
    const Vec dy = Vec(factor) * upper * at::vec::fmadd(swish, Vec(1.0f) - s, s);
    if (PARAMETERS) {
      swish.store(h + j);
      inner = at::vec::fmadd(swish, upper, inner);
      add_to(sums + width + j, dy * normed);
      add_to(sums + 2 * width + j, dy);
    }
    const Vec scaled = dy * gamma;
    total = total + scaled;
    total_normed = at::vec::fmadd(scaled, normed, total_normed);
    scaled.store(dz + j);
  }
  const Vec mean_of_all(sum(total) / width), mean_of_normed(sum(total_normed) / width);
  for (int64_t j = 0; j < width; j += LANES) {
    const Vec normed = (Vec::loadu(z + j) - Vec(mean)) * Vec(rstd);
    const Vec gradient = Vec(rstd) * (Vec::loadu(dz + j) - mean_of_all - normed * mean_of_normed);
    gradient.store(dz + j);
    if (PARAMETERS) add_to(sums + j, gradient);
  }
  return PARAMETERS ? sum(inner) : 0.0f;
}

template <class Type>
void forward(const float* x, const Layer* layers, const float* scale, float eps, float* out, float* products,
             float* statistics, int64_t n_rows, int64_t width, int64_t n_threads) {
  const int64_t block_rows = rows_of_block(n_rows, n_threads), n_blocks = (n_rows + block_rows - 1) / block_rows;
  const int64_t n_words = width / Type::TERMS_OF_WORD, n_strips = width / LANES, block_size = block_rows * width;
  float* tiled = workspace(N_LAYERS * width * n_words + n_threads * 3 * block_size);
  float* memory = tiled + N_LAYERS * width * n_words;
#pragma omp parallel num_threads(n_threads)
  {
    float* h = memory + omp_get_thread_num() * 3 * block_size;
    float* packed = h + block_size;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < N_LAYERS * n_strips; ++i)
      tile_transposed<Type>(layers[i / n_strips].weight + i % n_strips * LANES * width, width, tiled + i * n_words * LANES);
#pragma omp for schedule(dynamic) nowait
    for (int64_t block = 0; block < n_blocks; ++block) {
      const int64_t first = block * block_rows, count = std::min(block_rows, n_rows - first);
      for (int64_t l = 0; l < N_LAYERS; ++l) {
        float* z = products ? products + (l * n_rows + first) * width : packed + block_size;
        const float* input = Type::pack(l == 0 ? x + first * width : h, count * width, packed);
        product<Type, false>(count, width, n_words, input, n_words, tiled + l * width * n_words, n_words * LANES,
                             layers[l].bias, 0, z, width);
        for (int64_t m = 0; m < count; ++m) {
          float mean, rstd;
          activate(z + m * width, layers[l], width, eps, h + m * width, mean, rstd);
          if (statistics) {
            statistics[2 * (l * n_rows + first + m)] = mean;
            statistics[2 * (l * n_rows + first + m) + 1] = rstd;
          }
        }
      }
      for (int64_t i = 0; i < count * width; i += LANES) {
        const Vec branch = Vec::loadu(h + i);
        (scale ? at::vec::fmadd(branch, Vec(*scale), Vec::loadu(x + first * width + i)) : branch).store(out + first * width + i);
      }
    }
  }
}

template <class Type, bool PARAMETERS>
void backward(const float* x, const float* dout, const float* products, const float* statistics, const Layer* layers,
              const float* scale, float* dx, const LayerGradients* gradients, float* dscale, int64_t n_rows, int64_t width,
              int64_t n_threads) {
  const int64_t block_rows = rows_of_block(n_rows, n_threads), n_blocks = (n_rows + block_rows - 1) / block_rows;
  const int64_t n_words = width / Type::TERMS_OF_WORD, n_strips = width / LANES, block_size = block_rows * width;
  const int64_t n_row_words = (n_rows + Type::TERMS_OF_WORD - 1) / Type::TERMS_OF_WORD, stride = n_row_words * LANES;
  const int64_t n_sums = (N_LAYERS * 3 + 1) * width;
  float* tiled = workspace(N_LAYERS * width * n_words + n_threads * 4 * block_size +
                           (PARAMETERS ? 2 * N_LAYERS * n_row_words * width + n_blocks * n_sums : 0));
  float* memory = tiled + N_LAYERS * width * n_words;
  float* inputs_tiled = memory + n_threads * 4 * block_size;
  float* dz_tiled = inputs_tiled + N_LAYERS * n_row_words * width;
  float* all_sums = dz_tiled + N_LAYERS * n_row_words * width;
#pragma omp parallel num_threads(n_threads)
  {
    float* dh = memory + omp_get_thread_num() * 4 * block_size;
    float *dz = dh + block_size, *h = dz + block_size, *packed = h + block_size;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < N_LAYERS * n_strips; ++i)
      tile_rows<Type>(layers[i / n_strips].weight + i % n_strips * LANES, width, width, LANES, tiled + i * n_words * LANES, 0);
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < n_blocks; ++block) {
      const int64_t first = block * block_rows, count = std::min(block_rows, n_rows - first);
      float* sums = all_sums + block * n_sums;
      float inner = 0.0f;
      // Where the rows of this block are in the tiled inputs and gradients of layer l
      const auto part = [&](float* all, int64_t l) {
        return all + l * n_row_words * width + first / Type::TERMS_OF_WORD * LANES;
      };
      if (PARAMETERS) {
        std::fill(sums, sums + n_sums, 0.0f);
        tile_rows<Type>(x + first * width, count, width, width, part(inputs_tiled, 0), stride);
      }
      for (int64_t l = N_LAYERS - 1; l >= 0; --l) {
        const bool last = l == N_LAYERS - 1;
        for (int64_t m = 0; m < count; ++m) {
          const int64_t row = l * n_rows + first + m;
          const float product_with_h = differentiate<PARAMETERS>(
              products + row * width, layers[l], width, statistics[2 * row], statistics[2 * row + 1],
              last && scale ? *scale : 1.0f, last ? dout + (first + m) * width : dh + m * width, dz + m * width, h + m * width,
              sums + l * 3 * width);
          if (last) inner += product_with_h;
        }
        if (PARAMETERS) {
          if (!last) tile_rows<Type>(h, count, width, width, part(inputs_tiled, l + 1), stride);
          tile_rows<Type>(dz, count, width, width, part(dz_tiled, l), stride);
        }
        product<Type, false>(count, width, n_words, Type::pack(dz, count * width, packed), n_words,
                             tiled + l * width * n_words, n_words * LANES, l == 0 && scale ? dout + first * width : nullptr,
                             width, l == 0 ? dx + first * width : dh, width);
      }
      if (PARAMETERS) sums[N_LAYERS * 3 * width] = inner;
    }
    if (PARAMETERS) {
      const int64_t n_steps = (n_strips + TILE_VECTORS - 1) / TILE_VECTORS;
#pragma omp for schedule(dynamic) nowait
      for (int64_t i = 0; i < N_LAYERS * n_steps; ++i) {
        const int64_t l = i / n_steps, j = i % n_steps * TILE_VECTORS, n = std::min<int64_t>(TILE_VECTORS, n_strips - j);
        product<Type, true>(width, n * LANES, n_row_words, dz_tiled + l * n_row_words * width, stride,
                            inputs_tiled + l * n_row_words * width + j * stride, stride, nullptr, 0,
                            gradients[l].weight + j * LANES, width);
      }
#pragma omp for schedule(dynamic) nowait
      for (int64_t i = 0; i < N_LAYERS * 3; ++i) {
        const LayerGradients& layer = gradients[i / 3];
        float* to = i % 3 == 0 ? layer.bias : i % 3 == 1 ? layer.gamma : layer.beta;
        std::fill(to, to + width, 0.0f);
        for (int64_t block = 0; block < n_blocks; ++block)
          for (int64_t j = 0; j < width; j += LANES) add_to(to + j, Vec::loadu(all_sums + block * n_sums + i * width + j));
      }
    }
  }
  if (PARAMETERS && dscale) {
    *dscale = 0.0f;
    for (int64_t block = 0; block < n_blocks; ++block) *dscale += all_sums[block * n_sums + N_LAYERS * 3 * width];
  }
}

}  // namespace

// The width of a block must be a multiple of it, in bfloat16 of twice as much
extern "C" int64_t n_lanes() {
  return LANES;
}

// Whether the processor multiplies bfloat16
extern "C" bool has_bfloat16() {
#ifdef __AVX512BF16__
  return true;
#else
  return false;
#endif
}

// x, out: (n_rows, width). products (4, n_rows, width) and statistics (4, n_rows, 2) are what the backward pass needs, or
// null. scale is null for a block that does not add x. bfloat16: whether to round the factors of the products.
// Returns whether there was enough memory, before which nothing is done.
extern "C" bool residual_block_forward(const float* x, const Layer* layers, const float* scale, float eps, float* out,
                                       float* products, float* statistics, int64_t n_rows, int64_t width,
                                       int64_t n_threads, bool bfloat16) {
  n_threads = useful_threads(n_rows, n_threads);
  auto run = forward<Float32>;
#ifdef __AVX512BF16__
  if (bfloat16) run = forward<BFloat16>;
#endif
  return enough_memory([&] { run(x, layers, scale, eps, out, products, statistics, n_rows, width, n_threads); });
}

// dout, dx: gradients of the output and the input. The gradients of the parameters are left out if `gradients` is null,
// that of the scale also if `dscale` is. Returns whether there was enough memory.
extern "C" bool residual_block_backward(const float* x, const float* dout, const float* products, const float* statistics,
                                        const Layer* layers, const float* scale, float* dx,
                                        const LayerGradients* gradients, float* dscale, int64_t n_rows, int64_t width,
                                        int64_t n_threads, bool bfloat16) {
  n_threads = useful_threads(n_rows, n_threads);
  auto run = gradients ? backward<Float32, true> : backward<Float32, false>;
#ifdef __AVX512BF16__
  if (bfloat16) run = gradients ? backward<BFloat16, true> : backward<BFloat16, false>;
#endif
  return enough_memory(
      [&] { run(x, dout, products, statistics, layers, scale, dx, gradients, dscale, n_rows, width, n_threads); });
}
