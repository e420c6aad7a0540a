// A residual block, forward and backward: four times [Dense, LayerNorm, Swish], then x + scale * F(x), in float32.
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

namespace {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t N_LAYERS = 4;
constexpr int64_t LANES = Vec::size();
// A product is computed in tiles of so many rows and vectors, which fit into the registers,
constexpr int TILE_ROWS = 8;
constexpr int TILE_VECTORS = 2;
// in sums of so many terms, so that what is added up stays in the cache
constexpr int64_t TERMS = 512;
// Rows at a time: their activations fit into the second level of the cache
constexpr int64_t MAX_BLOCK_ROWS = 64;

// Parameters of one layer, and their gradients
struct Layer {
  const float *weight, *bias, *gamma, *beta;
};
struct LayerGradients {
  float *weight, *bias, *gamma, *beta;
};

// Memory that is kept from one call to the next: new one would have to be mapped page by page
float* workspace(int64_t size) {
  static thread_local std::unique_ptr<float[]> memory;
  static thread_local int64_t capacity = 0;
  if (capacity < size) {
    memory.reset();
    memory.reset(new float[size + LANES]);
    capacity = size;
  }
  const auto address = reinterpret_cast<std::uintptr_t>(memory.get());
  const std::uintptr_t line = LANES * sizeof(float);
  return reinterpret_cast<float*>((address + line - 1) / line * line);
}

// No more threads than there are tiles of rows
int64_t useful_threads(int64_t n_rows, int64_t n_threads) {
  return std::clamp<int64_t>(n_rows / TILE_ROWS, 1, n_threads);
}

// Enough blocks for all threads, but whole tiles
int64_t rows_of_block(int64_t n_rows, int64_t n_threads) {
  const int64_t share = (n_rows + n_threads - 1) / n_threads;
  const int64_t tiles = std::max<int64_t>(1, std::min(share, MAX_BLOCK_ROWS) / TILE_ROWS);
  return tiles * TILE_ROWS;
}

// c = start + a b for one tile. The rows of `start` are `start_stride` apart (0: all the same), or it is null.
// a(m, k) is at a[m * a_stride + k], if it is tiled at a[k * LANES + m].
template <int M, int N, bool TILED>
inline void tile(int64_t n_terms, const float* a, int64_t a_stride, const float* b, int64_t b_stride, const float* start,
                 int64_t start_stride, float* c, int64_t c_stride) {
  Vec sums[M][N];
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      sums[m][n] = start ? Vec::loadu(start + m * start_stride + n * LANES) : Vec(0.0f);
  for (int64_t k = 0; k < n_terms; ++k) {
    Vec columns[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) columns[n] = Vec::loadu(b + n * b_stride + k * LANES);
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m) {
      const Vec factor(TILED ? a[k * LANES + m] : a[m * a_stride + k]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[m][n] = at::vec::fmadd(factor, columns[n], sums[m][n]);
    }
  }
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sums[m][n].store(c + m * c_stride + n * LANES);
}

// The same for the last tile, which may have fewer rows
template <int M, int N, bool TILED>
inline void part_of_tile(int64_t n_rows, int64_t n_terms, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                         const float* start, int64_t start_stride, float* c, int64_t c_stride) {
  if (n_rows >= M)
    tile<M, N, TILED>(n_terms, a, a_stride, b, b_stride, start, start_stride, c, c_stride);
  else if constexpr (M > 1)
    part_of_tile<M - 1, N, TILED>(n_rows, n_terms, a, a_stride, b, b_stride, start, start_stride, c, c_stride);
}

// c = start + a b for N vectors of columns. b is tiled, with `b_stride` from one strip to the next.
template <int N, bool TILED>
void strip(int64_t n_rows, int64_t n_terms, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
           const float* start, int64_t start_stride, float* c, int64_t c_stride) {
  for (int64_t k = 0; k < n_terms || k == 0; k += TERMS) {
    const int64_t n = std::min(TERMS, n_terms - k);
    for (int64_t m = 0; m < n_rows; m += TILE_ROWS) {
      // If a is tiled, its rows are the columns of what is in memory
      const float* from = TILED ? a + (m / LANES) * a_stride + k * LANES + m % LANES : a + m * a_stride + k;
      const float* first = k == 0 ? (start ? start + m * start_stride : nullptr) : c + m * c_stride;
      part_of_tile<TILE_ROWS, N, TILED>(n_rows - m, n, from, a_stride, b + k * LANES, b_stride, first,
                                        k == 0 ? start_stride : c_stride, c + m * c_stride, c_stride);
    }
  }
}

// c = start + a b for all columns
template <bool TILED>
void product(int64_t n_rows, int64_t n_columns, int64_t n_terms, const float* a, int64_t a_stride, const float* b,
             int64_t b_stride, const float* start, int64_t start_stride, float* c, int64_t c_stride) {
  int64_t j = 0;
  for (; j + TILE_VECTORS * LANES <= n_columns; j += TILE_VECTORS * LANES)
    strip<TILE_VECTORS, TILED>(n_rows, n_terms, a, a_stride, b + j / LANES * b_stride, b_stride, start ? start + j : nullptr,
                               start_stride, c + j, c_stride);
  for (; j < n_columns; j += LANES)
    strip<1, TILED>(n_rows, n_terms, a, a_stride, b + j / LANES * b_stride, b_stride, start ? start + j : nullptr,
                    start_stride, c + j, c_stride);
}

// One strip of a square matrix, or of its transpose
void tile_strip(const float* matrix, int64_t width, bool transpose, int64_t strip_index, float* tiled) {
  float* to = tiled + strip_index * width * LANES;
  if (transpose)
    for (int64_t k = 0; k < width; k += LANES)
      at::vec::transpose_mxn<float, LANES, LANES>(matrix + strip_index * LANES * width + k, width, to + k * LANES, LANES);
  else
    for (int64_t k = 0; k < width; ++k) Vec::loadu(matrix + k * width + strip_index * LANES).store(to + k * LANES);
}

inline float sum(Vec x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, x);
}

inline Vec sigmoid(Vec x) {
  return Vec(1.0f) / (Vec(1.0f) + x.neg().exp_u20());
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

inline void add_to(float* total, Vec x) {
  (Vec::loadu(total) + x).store(total);
}

// The gradient of z from that of h times `factor`. With gradients of the parameters: h goes to `h_tiled` if that is not null,
// the gradient of z to `dz_tiled`, both with `stride` between two strips, and what the row adds to the gradients of gamma,
// beta and bias to `sums`. Returns the product of h and its gradient, for the scale.
template <bool PARAMETERS>
inline float differentiate(const float* z, const Layer& layer, int64_t width, float mean, float rstd, float factor,
                           const float* dh, float* dz, float* h_tiled, float* dz_tiled, int64_t stride, float* sums) {
  Vec total(0.0f), total_normed(0.0f), inner(0.0f);
  for (int64_t j = 0; j < width; j += LANES) {
    const Vec normed = (Vec::loadu(z + j) - Vec(mean)) * Vec(rstd);
    const Vec gamma = Vec::loadu(layer.gamma + j);
    const Vec y = at::vec::fmadd(normed, gamma, Vec::loadu(layer.beta + j));
    const Vec s = sigmoid(y);
    const Vec h = y * s;
    const Vec upper = Vec::loadu(dh + j);
    const Vec dy = Vec(factor) * upper * at::vec::fmadd(h, Vec(1.0f) - s, s);
    if (PARAMETERS) {
      if (h_tiled) h.store(h_tiled + j / LANES * stride);
      inner = at::vec::fmadd(h, upper, inner);
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
    if (PARAMETERS) {
      gradient.store(dz_tiled + j / LANES * stride);
      add_to(sums + j, gradient);
    }
  }
  return PARAMETERS ? sum(inner) : 0.0f;
}

template <bool PARAMETERS>
void differentiate_block(const float* x, const float* dout, const float* products, const float* statistics,
                         const Layer* layers, const float* scale, float* dx, const LayerGradients* gradients, float* dscale,
                         int64_t n_rows, int64_t width, int64_t n_threads) {
  const int64_t block_rows = rows_of_block(n_rows, n_threads), n_blocks = (n_rows + block_rows - 1) / block_rows;
  const int64_t matrix = width * width, activations = n_rows * width, n_strips = width / LANES, stride = n_rows * LANES;
  const int64_t n_sums = (N_LAYERS * 3 + 1) * width;
  float* tiled = workspace(N_LAYERS * matrix + n_threads * 2 * block_rows * width +
                           (PARAMETERS ? 2 * N_LAYERS * activations + n_blocks * n_sums : 0));
  float* rows = tiled + N_LAYERS * matrix;
  float* inputs_tiled = rows + n_threads * 2 * block_rows * width;
  float* dz_tiled = inputs_tiled + N_LAYERS * activations;
  float* all_sums = dz_tiled + N_LAYERS * activations;
#pragma omp parallel num_threads(n_threads)
  {
    float* dh = rows + omp_get_thread_num() * 2 * block_rows * width;
    float* dz = dh + block_rows * width;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < N_LAYERS * n_strips; ++i)
      tile_strip(layers[i / n_strips].weight, width, false, i % n_strips, tiled + i / n_strips * matrix);
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < n_blocks; ++block) {
      const int64_t first = block * block_rows, count = std::min(block_rows, n_rows - first);
      float* sums = all_sums + block * n_sums;
      float inner = 0.0f;
      if (PARAMETERS) {
        std::fill(sums, sums + n_sums, 0.0f);
        for (int64_t row = first; row < first + count; ++row)
          for (int64_t j = 0; j < width; j += LANES)
            Vec::loadu(x + row * width + j).store(inputs_tiled + j / LANES * stride + row * LANES);
      }
      for (int64_t l = N_LAYERS - 1; l >= 0; --l) {
        const bool last = l == N_LAYERS - 1;
        for (int64_t m = 0; m < count; ++m) {
          const int64_t row = first + m;
          const float product_with_h = differentiate<PARAMETERS>(
              products + l * activations + row * width, layers[l], width, statistics[2 * (l * n_rows + row)],
              statistics[2 * (l * n_rows + row) + 1], last && scale ? *scale : 1.0f,
              last ? dout + row * width : dh + m * width, dz + m * width,
              last ? nullptr : inputs_tiled + (l + 1) * activations + row * LANES,
              dz_tiled + l * activations + row * LANES, stride, sums + l * 3 * width);
          if (last) inner += product_with_h;
        }
        const float* start = l == 0 && scale ? dout + first * width : nullptr;
        product<false>(count, width, width, dz, width, tiled + l * matrix, width * LANES, start, width,
                       l == 0 ? dx + first * width : dh, width);
      }
      if (PARAMETERS) sums[N_LAYERS * 3 * width] = inner;
    }
    if (PARAMETERS) {
      const int64_t step = TILE_VECTORS;
      const int64_t n_steps = (n_strips + step - 1) / step;
#pragma omp for schedule(dynamic) nowait
      for (int64_t i = 0; i < N_LAYERS * n_steps; ++i) {
        const int64_t l = i / n_steps, j = i % n_steps * step, n = std::min(step, n_strips - j);
        product<true>(width, n * LANES, n_rows, dz_tiled + l * activations, stride,
                      inputs_tiled + l * activations + j * stride, stride, nullptr, 0, gradients[l].weight + j * LANES, width);
      }
#pragma omp for schedule(dynamic)
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

// The width of a block must be a multiple of it
extern "C" int64_t n_lanes() {
  return LANES;
}

// x, out: (n_rows, width). products (4, n_rows, width) and statistics (4, n_rows, 2) are what the backward pass needs, or
// null. scale is null for a block that does not add x.
extern "C" void residual_block_forward(const float* x, const Layer* layers, const float* scale, float eps, float* out,
                                       float* products, float* statistics, int64_t n_rows, int64_t width,
                                       int64_t n_threads) {
  n_threads = useful_threads(n_rows, n_threads);
  const int64_t block_rows = rows_of_block(n_rows, n_threads), n_blocks = (n_rows + block_rows - 1) / block_rows;
  const int64_t matrix = width * width, n_strips = width / LANES;
  float* tiled = workspace(N_LAYERS * matrix + n_threads * 2 * block_rows * width);
  float* rows = tiled + N_LAYERS * matrix;
#pragma omp parallel num_threads(n_threads)
  {
    float* h = rows + omp_get_thread_num() * 2 * block_rows * width;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < N_LAYERS * n_strips; ++i)
      tile_strip(layers[i / n_strips].weight, width, true, i % n_strips, tiled + i / n_strips * matrix);
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < n_blocks; ++block) {
      const int64_t first = block * block_rows, count = std::min(block_rows, n_rows - first);
      for (int64_t l = 0; l < N_LAYERS; ++l) {
        float* z = products ? products + (l * n_rows + first) * width : h + block_rows * width;
        product<false>(count, width, width, l == 0 ? x + first * width : h, width, tiled + l * matrix, width * LANES,
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
      for (int64_t m = 0; m < count; ++m)
        for (int64_t j = 0; j < width; j += LANES) {
          const Vec branch = Vec::loadu(h + m * width + j);
          const int64_t place = (first + m) * width + j;
          (scale ? at::vec::fmadd(branch, Vec(*scale), Vec::loadu(x + place)) : branch).store(out + place);
        }
    }
  }
}

// dout, dx: gradients of the output and the input. The gradients of the parameters are left out if `gradients` is null,
// that of the scale also if `dscale` is.
extern "C" void residual_block_backward(const float* x, const float* dout, const float* products, const float* statistics,
                                        const Layer* layers, const float* scale, float* dx,
                                        const LayerGradients* gradients, float* dscale, int64_t n_rows, int64_t width,
                                        int64_t n_threads) {
  n_threads = useful_threads(n_rows, n_threads);
  if (gradients)
    differentiate_block<true>(x, dout, products, statistics, layers, scale, dx, gradients, dscale, n_rows, width, n_threads);
  else
    differentiate_block<false>(x, dout, products, statistics, layers, scale, dx, gradients, dscale, n_rows, width, n_threads);
}
