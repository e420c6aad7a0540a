// What an update of DeepCRL does on a CPU, besides small change: residual towers forward and backward, InfoNCE, the sample of
// a squashed Gaussian and Adam.
//
// A tower is a stem, residual blocks and heads. The stem is one layer, [Dense, LayerNorm, Swish], a block four of them whose
// outcome is added to the features: x + scale * F(x). Heads are Dense layers that take the last features. All is float32, but
// for the factors of the products in stem and blocks and what is kept of them for the backward pass, which may be rounded to
// bfloat16.
//
// The rows of a minibatch are divided among the threads, and each thread takes its rows through one block after the other,
// some at a time: block weights and those rows stay in its cache meanwhile. Threads meet once a block, in the backward pass
// only, where the gradients of the weights are sums over all rows.
//
// Factors of a product are stored in words of 32 bits, each with one term of the sum in float32 or with two in bfloat16.
// "Strips" are a matrix cut into pieces as wide as a vector, one after the other, so that what the inner loop of a product
// reads is contiguous: strip j holds, for each word of the sum, the words of columns j * LANES to (j + 1) * LANES.

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <climits>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <system_error>
#include <thread>
#include <vector>

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// ---------------------------------------------------------------- vectors

#ifdef __AVX512F__
using Vec = __m512;
constexpr int TILE_ROWS = 8;
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline Vec all(float x) { return _mm512_set1_ps(x); }
inline Vec fmadd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec fnmadd(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec sqrt(Vec x) { return _mm512_sqrt_ps(x); }
inline Vec estimated_reciprocal(Vec x) { return _mm512_rcp14_ps(x); }
#else
using Vec = __m256;
constexpr int TILE_ROWS = 4;
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline Vec all(float x) { return _mm256_set1_ps(x); }
inline Vec fmadd(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec fnmadd(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec sqrt(Vec x) { return _mm256_sqrt_ps(x); }
inline Vec estimated_reciprocal(Vec x) { return _mm256_rcp_ps(x); }
#endif
constexpr int64_t LANES = sizeof(Vec) / sizeof(float);
typedef int32_t Integers __attribute__((vector_size(sizeof(Vec))));

inline float sum(Vec x) {
  float total = 0.0f;
#ifdef __AVX512F__
  total = _mm512_reduce_add_ps(x);
#else
  for (int i = 0; i < LANES; ++i) total += x[i];
#endif
  return total;
}

// 2^x within 2e-7, for x clamped to [-126, 126]
inline Vec exp2(Vec x) {
  x = min(max(x, all(-126.0f)), all(126.0f));
  const Vec shifted = x + all(12582912.0f);  // 3 * 2^22 leaves no digits behind the point
  const Vec fraction = x - (shifted - all(12582912.0f));
  Vec power = all(1.5403530e-4f);
  power = fmadd(power, fraction, all(1.3333558e-3f));
  power = fmadd(power, fraction, all(9.6181291e-3f));
  power = fmadd(power, fraction, all(5.5504109e-2f));
  power = fmadd(power, fraction, all(2.4022651e-1f));
  power = fmadd(power, fraction, all(6.9314718e-1f));
  power = fmadd(power, fraction, all(1.0f));
  return (Vec)((Integers)power + ((Integers)shifted << 23));
}

constexpr float LOG2_E = 1.4426950f;

inline Vec sigmoid(Vec x) {
  const Vec divisor = all(1.0f) + exp2(x * all(-LOG2_E));
  const Vec estimate = estimated_reciprocal(divisor);
  return estimate * fnmadd(divisor, estimate, all(2.0f));
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// What to take of two rows, so that the upper right and the lower left quarter of squares of 2^(i + 1) rows are exchanged
const struct Quarters {
  Integers upper[4], lower[4];
  Quarters() {
    for (int32_t i = 0; i < 4; ++i)
      for (int32_t j = 0; j < LANES; ++j) {
        const int32_t half = 1 << i;
        upper[i][j] = j & half ? j - half + LANES : j;
        lower[i][j] = j & half ? j + LANES : j + half;
      }
  }
} quarters;

// A square of words, mirrored at its diagonal
inline void transpose(const float* from, int64_t from_stride, float* to) {
  Vec rows[LANES];
#pragma GCC unroll 16
  for (int64_t i = 0; i < LANES; ++i) rows[i] = load(from + i * from_stride);
#pragma GCC unroll 4
  for (int64_t step = 0; 1 << step < LANES; ++step)
#pragma GCC unroll 16
    for (int64_t i = 0; i < LANES; ++i)
      if (!(i & 1 << step)) {
        const Vec a = rows[i], b = rows[i + (1 << step)];
        rows[i] = __builtin_shuffle(a, b, quarters.upper[step]);
        rows[i + (1 << step)] = __builtin_shuffle(a, b, quarters.lower[step]);
      }
#pragma GCC unroll 16
  for (int64_t i = 0; i < LANES; ++i) store(to + i * LANES, rows[i]);
}

// ---------------------------------------------------------------- threads

#ifdef __cpp_lib_atomic_wait
inline void sleep_while(const std::atomic<uint32_t>& value, uint32_t old) { value.wait(old, std::memory_order_acquire); }
inline void wake_all(std::atomic<uint32_t>& value) { value.notify_all(); }
#else  // C++17, in which older versions of PyTorch compile
inline void sleep_while(const std::atomic<uint32_t>& value, uint32_t old) {
  while (value.load(std::memory_order_acquire) == old) syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, old, nullptr);
}
inline void wake_all(std::atomic<uint32_t>& value) { syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, INT_MAX); }
#endif

// A team waits for its slowest thread: on cores shared with others it takes longer than fewer threads would. How many are then
// enough, and since when, in cycles.
std::atomic<int64_t> enough_threads{INT64_MAX};
std::atomic<uint64_t> crowded_since{0};

inline int64_t threads_at_hand(int64_t n) {
  constexpr uint64_t A_WHILE = 2'500'000'000;  // a second
  const bool crowded = __rdtsc() - crowded_since.load(std::memory_order_relaxed) < A_WHILE;
  return crowded ? std::min(n, enough_threads.load(std::memory_order_relaxed)) : n;
}

// A thread that waits for its team and is interrupted again and again has neighbors on its core; once or twice, it is the system
inline void interrupted(uint64_t from, uint64_t to, int64_t team_size) {
  constexpr uint64_t SHORTLY = 50'000'000;  // 20 milliseconds
  static thread_local uint64_t last = 0;
  static thread_local int n_times = 0;
  n_times = from - last < SHORTLY ? n_times + 1 : 1;
  last = to;
  if (n_times < 3) return;
  enough_threads.store(std::max<int64_t>(1, team_size / 2), std::memory_order_relaxed);
  crowded_since.store(to, std::memory_order_relaxed);
}

// Waits awake at first, as a wake-up takes as long as a small layer, and then asleep. Interruptions matter where a team waits;
// else its size is 0.
inline void wait_for_change(const std::atomic<uint32_t>& value, uint32_t old, int64_t team_size) {
  // 0.8 milliseconds, longer than PyTorch takes between two calls of an update; 0.2, longer than the system is busy by itself
  constexpr uint64_t PATIENCE = 2'000'000, INTERRUPTION = 500'000;
  const uint64_t start = __rdtsc();
  for (uint64_t before = start, now = start; now - start < PATIENCE; before = now) {
    if (value.load(std::memory_order_acquire) != old) return;
    _mm_pause();
    now = __rdtsc();
    if (team_size && now - before > INTERRUPTION) interrupted(before, now, team_size);
  }
  sleep_while(value, old);
}

class Team {
 public:
  // Calls job(index, team) on so many threads, of which this is one. Where the others are busy for somebody else, or share their
  // cores, fewer do all of it.
  template <class Job>
  static void run(int64_t n_threads, Job job) {
    Team& team = shared();
    std::unique_lock<std::mutex> lock(team.in_use, std::defer_lock);
    n_threads = threads_at_hand(n_threads);
    if (n_threads > 1 && lock.try_lock()) {
      team.run_together(n_threads, [&](int64_t index) { job(index, team); });
    } else {
      Team alone;
      job(0, alone);
    }
  }

  int64_t size() const { return n_threads; }

  // Nobody goes on before everybody is here
  void barrier() {
    if (n_threads == 1) return;
    const uint32_t now = phase.load(std::memory_order_relaxed);
    if (n_arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == n_threads) {
      n_arrived.store(0, std::memory_order_relaxed);
      // Not only released: whether somebody sleeps must not be looked up before
      phase.store(now + 1);
      wake_all(phase);
    } else {
      wait_for_change(phase, now, n_threads);
    }
  }

 private:
  static Team& shared() {
    static std::mutex making;
    static Team* team = nullptr;
    static pid_t owner = 0;
    std::lock_guard<std::mutex> lock(making);
    // A forked process has none of the threads
    if (owner != getpid()) team = new Team, owner = getpid();
    return *team;
  }

  void run_together(int64_t n, std::function<void(int64_t)> job) {
    try {
      for (; n_others < n - 1; ++n_others) std::thread(&Team::help, this, n_others + 1, round.load()).detach();
    } catch (const std::system_error&) {  // then with those that there are
    }
    work = job;
    n_threads = std::min(n, n_others + 1);
    n_working.store(n_others, std::memory_order_relaxed);
    round.fetch_add(1, std::memory_order_release);
    wake_all(round);
    work(0);
    while (const uint32_t still = n_working.load(std::memory_order_acquire)) wait_for_change(n_working, still, n_threads);
  }

  void help(int64_t index, uint32_t seen) {
    for (;;) {
      wait_for_change(round, seen, 0);
      ++seen;
      if (index < n_threads) work(index);
      if (n_working.fetch_sub(1, std::memory_order_acq_rel) == 1) wake_all(n_working);
    }
  }

  std::mutex in_use;
  std::function<void(int64_t)> work;
  int64_t n_threads = 1, n_others = 0;
  std::atomic<uint32_t> round{0}, phase{0}, n_working{0};
  std::atomic<int64_t> n_arrived{0};
};

// The part of `n` things that falls to a thread
struct Share {
  int64_t first, last;
  Share(int64_t n, int64_t index, int64_t n_shares) : first(n * index / n_shares), last(n * (index + 1) / n_shares) {}
  Share(int64_t n, int64_t index, const Team& team) : Share(n, index, team.size()) {}
};

// Memory that is kept from one call to the next: new one would have to be mapped page by page
class Workspace {
 public:
  explicit Workspace(int64_t size) {
    if (capacity < size) {
      memory.reset();
      capacity = 0;
      memory.reset(new float[size + 2 * LANES]);
      capacity = size;
    }
    const auto line = LANES * sizeof(float);
    next = reinterpret_cast<float*>(round_up(reinterpret_cast<int64_t>(memory.get()), line));
  }
  // The sum of what is taken, each rounded up to whole vectors, is at most the size
  float* take(int64_t size) {
    float* taken = next;
    next += round_up(size, LANES);
    return taken;
  }

 private:
  float* next;
  static thread_local std::unique_ptr<float[]> memory;
  static thread_local int64_t capacity;
};
thread_local std::unique_ptr<float[]> Workspace::memory;
thread_local int64_t Workspace::capacity = 0;

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

// ---------------------------------------------------------------- products

// c = start + a b for TILE_ROWS rows and N vectors of columns. The rows of `start` are `start_stride` apart (0: all the
// same), or it is null. b is in strips, and so is a if its rows are the columns of what is in memory.
template <class Type, int N, bool STRIPS>
inline void tile(int64_t n_words, const float* a, int64_t a_stride, const float* b, int64_t b_stride, const float* start,
                 int64_t start_stride, float* c, int64_t c_stride) {
  Vec sums[TILE_ROWS][N];
#pragma GCC unroll 8
  for (int m = 0; m < TILE_ROWS; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sums[m][n] = start ? load(start + m * start_stride + n * LANES) : all(0.0f);
  for (int64_t k = 0; k < n_words; ++k) {
    Vec columns[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) columns[n] = load(b + n * b_stride + k * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < TILE_ROWS; ++m) {
      const Vec factor = all(STRIPS ? a[k * LANES + m] : a[m * a_stride + k]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[m][n] = Type::multiply_add(factor, columns[n], sums[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < TILE_ROWS; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(c + m * c_stride + n * LANES, sums[m][n]);
}

// c = start + a b for some vectors of columns. So many words are added up at a time that they stay in the cache.
template <class Type, int N, bool STRIPS>
void columns_of_product(int64_t n_rows, int64_t n_words, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                        const float* start, int64_t start_stride, float* c, int64_t c_stride) {
  constexpr int64_t MAX_WORDS = 512;
  for (int64_t k = 0; k < n_words; k += MAX_WORDS)
    for (int64_t m = 0; m < n_rows; m += TILE_ROWS) {
      const float* rows = STRIPS ? a + m / LANES * a_stride + k * LANES + m % LANES : a + m * a_stride + k;
      const float* first = k > 0 ? c + m * c_stride : start ? start + m * start_stride : nullptr;
      tile<Type, N, STRIPS>(std::min(MAX_WORDS, n_words - k), rows, a_stride, b + k * LANES, b_stride, first,
                            k > 0 ? c_stride : start_stride, c + m * c_stride, c_stride);
    }
}

// The types of the factors: how many terms there are in a word and how many rows belong together, how words are written,
// and c = start + a b for all columns, with rows of a `a_stride` words apart
struct Float32 {
  static constexpr int64_t TERMS = 1, ROWS = 8;
  static constexpr bool TILES = false;

  static Vec multiply_add(Vec a, Vec b, Vec sum) { return fmadd(a, b, sum); }
  // Neighbors in a row
  static void store_row(float* words, const Vec* x) { store(words, x[0]); }
  static void load_row(const float* words, Vec* x) { x[0] = load(words); }
  // Two rows of one strip, from the first of them on
  static void store_strip(float* words, Vec first, Vec second) {
    store(words, first);
    store(words + LANES, second);
  }

  template <bool STRIPS>
  static void product(int64_t n_rows, int64_t n_columns, int64_t n_words, const float* a, int64_t a_stride, const float* b,
                      int64_t b_stride, const float* start, int64_t start_stride, float* c, int64_t c_stride) {
    vector_product<Float32, STRIPS>(n_rows, n_columns, n_words, a, a_stride, b, b_stride, start, start_stride, c, c_stride);
  }

  template <class Type, bool STRIPS>
  static void vector_product(int64_t n_rows, int64_t n_columns, int64_t n_words, const float* a, int64_t a_stride,
                             const float* b, int64_t b_stride, const float* start, int64_t start_stride, float* c,
                             int64_t c_stride) {
    int64_t j = 0;
    for (; j + 2 * LANES <= n_columns; j += 2 * LANES)
      columns_of_product<Type, 2, STRIPS>(n_rows, n_words, a, a_stride, b + j / LANES * b_stride, b_stride,
                                          start ? start + j : nullptr, start_stride, c + j, c_stride);
    if (j < n_columns)
      columns_of_product<Type, 1, STRIPS>(n_rows, n_words, a, a_stride, b + j / LANES * b_stride, b_stride,
                                          start ? start + j : nullptr, start_stride, c + j, c_stride);
  }
};

#ifdef __AVX512BF16__
struct BFloat16 {
  static constexpr int64_t TERMS = 2, ROWS = 8;
  static constexpr bool TILES = false;

  static Vec multiply_add(Vec a, Vec b, Vec sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
  static __m512i rounded(Vec low, Vec high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
  static void store_row(float* words, const Vec* x) { _mm512_storeu_si512(words, rounded(x[0], x[1])); }
  static void load_row(const float* words, Vec* x) {
    for (int i = 0; i < 2; ++i)
      x[i] = (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)words + i)), 16);
  }
  static void store_strip(float* words, Vec first, Vec second) {
    const __m512i halves = rounded(first, second);
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(halves, 1));
    _mm512_storeu_si512(words, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }

  template <bool STRIPS>
  static void product(int64_t n_rows, int64_t n_columns, int64_t n_words, const float* a, int64_t a_stride, const float* b,
                      int64_t b_stride, const float* start, int64_t start_stride, float* c, int64_t c_stride) {
    Float32::vector_product<BFloat16, STRIPS>(n_rows, n_columns, n_words, a, a_stride, b, b_stride, start, start_stride, c,
                                              c_stride);
  }
};
#endif

#ifdef __AMX_BF16__
// bfloat16 in the registers for whole tiles, 16 rows of 16 words: two of each factor, four sums. In strips of the first
// factor each square of words is mirrored, so that its rows are those of the factor.
struct TiledBFloat16 : BFloat16 {
  static constexpr int64_t ROWS = 32;
  static constexpr bool TILES = true;

  template <bool STRIPS>
  static void product(int64_t n_rows, int64_t n_columns, int64_t n_words, const float* a, int64_t a_stride, const float* b,
                      int64_t b_stride, const float* start, int64_t start_stride, float* c, int64_t c_stride) {
    const int64_t row = STRIPS ? LANES : a_stride, next_rows = STRIPS ? a_stride : 16 * a_stride;
    const int64_t next_words = STRIPS ? LANES * LANES : LANES;
    for (int64_t j = 0; j < n_columns; j += 32)
      for (int64_t m = 0; m < n_rows; m += 32) {
        const float* b0 = b + j / LANES * b_stride;
        const float* a0 = a + m / 16 * next_rows;
        float* to = c + m * c_stride + j;
        if (start) {
          const float* from = start + m * start_stride + j;
          _tile_loadd(0, from, 4 * start_stride);
          _tile_loadd(1, from + 16, 4 * start_stride);
          _tile_loadd(2, from + 16 * start_stride, 4 * start_stride);
          _tile_loadd(3, from + 16 * start_stride + 16, 4 * start_stride);
        } else {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        }
        for (int64_t k = 0; k < n_words / LANES; ++k) {
          _tile_loadd(4, a0 + k * next_words, 4 * row);
          _tile_loadd(6, b0 + k * LANES * LANES, 4 * LANES);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, b0 + b_stride + k * LANES * LANES, 4 * LANES);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, a0 + next_rows + k * next_words, 4 * row);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, to, 4 * c_stride);
        _tile_stored(1, to + 16, 4 * c_stride);
        _tile_stored(2, to + 16 * c_stride, 4 * c_stride);
        _tile_stored(3, to + 16 * c_stride + 16, 4 * c_stride);
      }
  }
};

// The shape of the tiles of this thread, which others may have set: they find it as it was
class TileShapes {
 public:
  TileShapes() {
    Shapes ours;
    for (int i = 0; i < 8; ++i) ours.bytes[i] = 64, ours.rows[i] = 16;
    asm volatile("sttilecfg %0" : "=m"(before));
    // Not by its intrinsic, for which GCC 12 forgets to write all of the struct
    asm volatile("ldtilecfg %0" ::"m"(ours));
  }
  ~TileShapes() {
    if (before.palette)
      asm volatile("ldtilecfg %0" ::"m"(before));
    else
      asm volatile("tilerelease");
  }

 private:
  struct alignas(64) Shapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };
  Shapes before;
};
#endif

template <class Type>
struct Tiles {};
#ifdef __AMX_BF16__
template <>
struct Tiles<TiledBFloat16> : TileShapes {};
#endif

// ---------------------------------------------------------------- layers

template <class Float>
struct Layer {
  Float *weight, *bias, *gamma, *beta;
};
constexpr int64_t N_LAYERS = 4;
template <class Float>
struct Block {
  Layer<Float> layers[N_LAYERS];
  // Null if the block does not add its input, in gradients also if it is not learned
  Float* scale;
};
template <class Float>
struct Head {
  Float *weight, *bias;
};
// What the caller gives as an array of addresses
template <class Float>
struct Parameters {
  Layer<Float> stem;
  // and the others, then the heads
  Block<Float> blocks[1];
};

// Weights (n_out, n_in) of a strip of outputs, as second factor of the forward product; n_in is rounded up with zeros
template <class Type>
void pack_forward(const float* weight, int64_t n_in, int64_t n_words, float* strip) {
  alignas(64) float square[LANES * LANES];
  for (int64_t k = 0; k < n_words; k += LANES) {
    for (int64_t n = 0; n < LANES; ++n) {
      alignas(64) float terms[2 * LANES] = {};
      Vec x[2];
      const int64_t first = k * Type::TERMS;
      const float* from = weight + n * n_in + first;
      if (first + Type::TERMS * LANES > n_in) {
        std::copy_n(from, std::max<int64_t>(n_in - first, 0), terms);
        from = terms;
      }
      for (int64_t i = 0; i < Type::TERMS; ++i) x[i] = load(from + i * LANES);
      Type::store_row(square + n * LANES, x);
    }
    transpose(square, LANES, strip + k * LANES);
  }
}

// Two neighboring rows of weights, as second factor of the product that gives the gradient of the input
template <class Type>
void pack_backward(const float* weight, int64_t n_in, int64_t row, float* strips, int64_t stride) {
  const float *first = weight + row * n_in, *second = first + n_in;
  for (int64_t j = 0; j < n_in; j += LANES) {
    alignas(64) float rest[2][LANES] = {};
    const bool whole = j + LANES <= n_in;
    if (!whole) {
      std::copy(first + j, first + n_in, rest[0]);
      std::copy(second + j, second + n_in, rest[1]);
    }
    Type::store_strip(strips + j / LANES * stride + row / Type::TERMS * LANES, load(whole ? first + j : rest[0]),
                      load(whole ? second + j : rest[1]));
  }
}

// Swish(LayerNorm(z)) of R rows: emit(r, j, h) gets it piece by piece. `kept` and `statistics` are what the backward pass
// needs, or null.
template <class Type, int R, class Emit>
inline void activate(const float* z, const Layer<const float>& layer, int64_t width, float eps, float* kept,
                     float* statistics, Emit emit) {
  constexpr int64_t STEP = Type::TERMS * LANES;
  Vec totals[R], squares[R], means[R], rstds[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) totals[r] = squares[r] = all(0.0f);
  for (int64_t j = 0; j < width; j += STEP)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec x[2];
#pragma GCC unroll 2
      for (int64_t i = 0; i < Type::TERMS; ++i) {
        x[i] = load(z + r * width + j + i * LANES);
        totals[r] += x[i];
      }
      if (kept) Type::store_row(kept + (r * width + j) / Type::TERMS, x);
    }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) means[r] = all(sum(totals[r]) / width);
  for (int64_t j = 0; j < width; j += LANES)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec centered = load(z + r * width + j) - means[r];
      squares[r] = fmadd(centered, centered, squares[r]);
    }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const float rstd = 1.0f / std::sqrt(sum(squares[r]) / width + eps);
    rstds[r] = all(rstd);
    if (statistics) {
      statistics[2 * r] = means[r][0];
      statistics[2 * r + 1] = rstd;
    }
  }
  for (int64_t j = 0; j < width; j += STEP) {
    Vec gamma[2], beta[2];
#pragma GCC unroll 2
    for (int64_t i = 0; i < Type::TERMS; ++i)
      gamma[i] = load(layer.gamma + j + i * LANES), beta[i] = load(layer.beta + j + i * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec h[2];
#pragma GCC unroll 2
      for (int64_t i = 0; i < Type::TERMS; ++i) {
        const Vec normed = (load(z + r * width + j + i * LANES) - means[r]) * rstds[r];
        const Vec y = fmadd(normed, gamma[i], beta[i]);
        h[i] = y * sigmoid(y);
      }
      emit(r, j, h);
    }
  }
}

// Gradients of a layer for two rows, from that of its outcome h times `factor`. Always: that of z, as words for the product
// with the weights. With gradients of the parameters: dz and h in strips too (h only where the next layer takes it), and
// what the rows add to those of bias, gamma and beta. Returns the product of h and its gradient, for the scale.
template <class Type, bool PARAMETERS>
inline float differentiate(const float* kept, const float* statistics, const Layer<const float>& layer, int64_t width,
                           float factor, const float* dh, float* dz, float* dz_strips, float* h_strips, int64_t stride,
                           float* sums, float* scratch) {
  constexpr int64_t STEP = Type::TERMS * LANES;
  const Vec means[2] = {all(statistics[0]), all(statistics[2])}, rstds[2] = {all(statistics[1]), all(statistics[3])};
  Vec totals[2], totals_normed[2], inner = all(0.0f);
  for (int r = 0; r < 2; ++r) totals[r] = totals_normed[r] = all(0.0f);
  for (int64_t j = 0; j < width; j += STEP) {
    Vec z[2][2];
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) Type::load_row(kept + (r * width + j) / Type::TERMS, z[r]);
#pragma GCC unroll 2
    for (int64_t i = 0; i < Type::TERMS; ++i) {
      const int64_t column = j + i * LANES;
      const Vec gamma = load(layer.gamma + column), beta = load(layer.beta + column);
      Vec dy[2], normed[2], h[2];
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        normed[r] = (z[r][i] - means[r]) * rstds[r];
        const Vec y = fmadd(normed[r], gamma, beta);
        const Vec s = sigmoid(y);
        h[r] = y * s;
        const Vec upper = load(dh + r * width + column);
        dy[r] = all(factor) * upper * fmadd(h[r], all(1.0f) - s, s);
        if (PARAMETERS) inner = fmadd(h[r], upper, inner);
        const Vec scaled = dy[r] * gamma;
        totals[r] += scaled;
        totals_normed[r] = fmadd(scaled, normed[r], totals_normed[r]);
        store(scratch + r * width + column, scaled);
      }
      if (PARAMETERS) {
        store(sums + width + column, fmadd(dy[1], normed[1], fmadd(dy[0], normed[0], load(sums + width + column))));
        store(sums + 2 * width + column, dy[0] + dy[1] + load(sums + 2 * width + column));
        if (h_strips) Type::store_strip(h_strips + column / LANES * stride, h[0], h[1]);
      }
    }
  }
  Vec mean_of_all[2], mean_of_normed[2];
  for (int r = 0; r < 2; ++r) {
    mean_of_all[r] = all(sum(totals[r]) / width);
    // times rstd, so that it can be applied to z - mean
    mean_of_normed[r] = all(sum(totals_normed[r]) / width) * rstds[r];
  }
  for (int64_t j = 0; j < width; j += STEP) {
    Vec z[2][2], gradient[2][2];
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      Type::load_row(kept + (r * width + j) / Type::TERMS, z[r]);
#pragma GCC unroll 2
      for (int64_t i = 0; i < Type::TERMS; ++i)
        gradient[r][i] = rstds[r] * fnmadd(z[r][i] - means[r], mean_of_normed[r],
                                           load(scratch + r * width + j + i * LANES) - mean_of_all[r]);
      Type::store_row(dz + (r * width + j) / Type::TERMS, gradient[r]);
    }
    if (PARAMETERS)
#pragma GCC unroll 2
      for (int64_t i = 0; i < Type::TERMS; ++i) {
        const int64_t column = j + i * LANES;
        Type::store_strip(dz_strips + column / LANES * stride, gradient[0][i], gradient[1][i]);
        store(sums + column, gradient[0][i] + gradient[1][i] + load(sums + column));
      }
  }
  return PARAMETERS ? sum(inner) : 0.0f;
}

// Two rows of words, which a product took as first factor, as strips of its second one
template <class Type>
inline void strips_of_rows(const float* words, int64_t n_words, float* strips, int64_t stride) {
  for (int64_t j = 0; j < n_words; j += LANES) {
    Vec first[2], second[2];
    Type::load_row(words + j, first);
    Type::load_row(words + n_words + j, second);
    for (int64_t i = 0; i < Type::TERMS; ++i)
      Type::store_strip(strips + (j / LANES * Type::TERMS + i) * stride, first[i], second[i]);
  }
}

// ---------------------------------------------------------------- tower

// As the caller describes it
struct Shape {
  int64_t n_inputs, width, n_blocks, n_heads;
  // Outputs of each head; without heads the features are the output
  const int64_t* head_sizes;
  const Parameters<const float>* parameters;
  float eps;
};

// Rows that go through a block together
constexpr int64_t MAX_CHUNK = 64;

template <class Type>
struct Tower {
  const Shape& shape;
  const Parameters<const float>* parameters;
  const int64_t n_rows, width;
  // Numbers of words, rows and outputs, rounded up to what the products take
  const int64_t rows, input_words, words, n_outputs;
  // Where the parts of what is kept for the backward pass begin
  const int64_t weight_size, input_size, z_size;
  const bool keep_products;

  Tower(const Shape& shape, int64_t n_rows, bool keep_products)
      : shape(shape),
        parameters(shape.parameters),
        n_rows(n_rows),
        width(shape.width),
        rows(round_up(n_rows, Type::ROWS)),
        input_words(round_up(shape.n_inputs, 32) / Type::TERMS),
        words(width / Type::TERMS),
        n_outputs(round_up(std::accumulate(shape.head_sizes, shape.head_sizes + shape.n_heads, int64_t{0}), LANES)),
        weight_size(width * words),
        input_size(rows * input_words),
        z_size(rows * words),
        keep_products(keep_products) {}

  int64_t n_layers() const { return 1 + N_LAYERS * shape.n_blocks; }
  // Inputs of the stem, of all blocks and of the heads, products (of the stem, then of all layers) and their statistics
  int64_t n_kept_layers() const { return keep_products ? n_layers() : 1; }
  int64_t kept_size() const {
    return input_size + shape.n_blocks * z_size + n_kept_layers() * (z_size + 2 * rows) + (n_outputs ? rows * width : 0);
  }
  float* block_input(float* kept, int64_t b) const { return kept + input_size + b * z_size; }
  float* z_of(float* kept, int64_t layer) const { return kept + input_size + (shape.n_blocks + layer) * z_size; }
  float* statistics_of(float* kept, int64_t layer) const { return z_of(kept, n_kept_layers()) + layer * 2 * rows; }
  float* head_input(float* kept) const { return statistics_of(kept, n_kept_layers()); }
  // The heads come last
  int64_t packed_size() const { return packed_offset(shape.n_blocks, 0) + n_outputs * width; }
  int64_t packed_offset(int64_t b, int64_t l) const {
    return round_up(shape.n_inputs, 32) * words + (b * N_LAYERS + l) * weight_size;
  }

  int64_t useful_threads(int64_t n_threads) const {
    // Waking another one may take as long as so many products. For the few rows of envs that act it does not pay: while the
    // envs were stepped it fell asleep, and theirs may be in its way.
    const int64_t n_products = rows * width * (shape.n_inputs + N_LAYERS * shape.n_blocks * width);
    return std::max<int64_t>(1, std::min({n_threads, rows / MAX_CHUNK, n_products / 20'000'000}));
  }

  // Calls function(head, size, column) with each head and where its outputs begin among those of all
  template <class Float, class Function>
  void for_heads(const Parameters<Float>* of, Function function) const {
    const auto* heads = reinterpret_cast<const Head<Float>*>(of->blocks + shape.n_blocks);
    for (int64_t i = 0, column = 0; i < shape.n_heads; column += shape.head_sizes[i++])
      function(heads[i], shape.head_sizes[i], column);
  }

  // Weights and biases of all heads as one, with zeros up to whole vectors
  void join_heads(float* weight, float* bias) const {
    std::fill_n(weight, n_outputs * width, 0.0f);
    std::fill_n(bias, n_outputs, 0.0f);
    for_heads(parameters, [&](const Head<const float>& head, int64_t size, int64_t column) {
      std::copy_n(head.weight, size * width, weight + column * width);
      std::copy_n(head.bias, size, bias + column);
    });
  }

  void pack_for_forward(const float* heads, float* packed, int64_t index, const Team& team) const {
    const int64_t n_strips = width / LANES;
    const Share share(n_layers() * n_strips + n_outputs / LANES, index, team);
    for (int64_t i = share.first; i < share.last; ++i) {
      const int64_t layer = i / n_strips - 1, strip = i % n_strips, head_strip = i - n_layers() * n_strips;
      if (head_strip >= 0)
        pack_forward<Float32>(heads + head_strip * LANES * width, width, width,
                              packed + packed_offset(shape.n_blocks, 0) + head_strip * LANES * width);
      else if (layer < 0)
        pack_forward<Type>(parameters->stem.weight + strip * LANES * shape.n_inputs, shape.n_inputs, input_words,
                           packed + strip * LANES * input_words);
      else
        pack_forward<Type>(layer_of(layer).weight + strip * LANES * width, width, words,
                           packed + packed_offset(0, layer) + strip * LANES * words);
    }
  }

  void pack_for_backward(const float* heads, float* packed, int64_t index, const Team& team) const {
    const Share share((n_layers() * width + n_outputs) / 2, index, team);
    for (int64_t i = share.first; i < share.last; ++i) {
      const int64_t layer = 2 * i / width - 1, row = 2 * i % width, head_row = 2 * i - n_layers() * width;
      if (head_row >= 0)
        pack_backward<Float32>(heads, width, head_row, packed + packed_offset(shape.n_blocks, 0), n_outputs * LANES);
      else if (layer < 0)
        pack_backward<Type>(parameters->stem.weight, shape.n_inputs, row, packed, words * LANES);
      else
        pack_backward<Type>(layer_of(layer).weight, width, row, packed + packed_offset(0, layer), words * LANES);
    }
  }

  const Layer<const float>& layer_of(int64_t layer) const { return parameters->blocks[layer / N_LAYERS].layers[layer % N_LAYERS]; }

  // The branch of a block for some rows, from the words of its input. z (n_layers, count, width) and statistics are kept,
  // `stride` rows from one layer to the next, or null. `emit` gets the outcome.
  template <class Emit>
  void branch(int64_t b, int64_t count, const float* input, const float* packed, float* z, float* statistics,
              int64_t stride, float* scratch, Emit emit) const {
    float *product = scratch, *h = scratch + MAX_CHUNK * width;
    for (int64_t l = 0; l < N_LAYERS; ++l) {
      const Layer<const float>& layer = parameters->blocks[b].layers[l];
      Type::template product<false>(count, width, words, l == 0 ? input : h, words, packed + packed_offset(b, l),
                                    words * LANES, layer.bias, 0, product, width);
      for (int64_t m = 0; m < count; m += 4)
        activate<Type, 4>(product + m * width, layer, width, shape.eps, z ? z + (l * stride + m) * words : nullptr,
                          statistics ? statistics + 2 * (l * stride + m) : nullptr, [&](int r, int64_t j, const Vec* out) {
                            if (l < N_LAYERS - 1)
                              Type::store_row(h + (m + r) * words + j / Type::TERMS, out);
                            else
                              emit(m + r, j, out);
                          });
    }
  }

  void forward(const float* x, float* const* outs, float* kept, int64_t n_threads) const {
    n_threads = useful_threads(n_threads);
    const int64_t chunk_scratch = MAX_CHUNK * (std::max(2 * width, n_outputs) + words + input_words);
    Workspace workspace(packed_size() + n_outputs * (width + 1) + rows * width + n_threads * chunk_scratch + 8 * LANES);
    float *packed = workspace.take(packed_size()), *heads = workspace.take(n_outputs * width);
    float *head_biases = workspace.take(n_outputs), *scratches = workspace.take(n_threads * chunk_scratch);
    float* features = kept && n_outputs ? head_input(kept) : workspace.take(rows * width);
    join_heads(heads, head_biases);
    Team::run(n_threads, [&](int64_t index, Team& team) {
      pack_for_forward(heads, packed, index, team);
      team.barrier();
      const Share share(rows / Type::ROWS, index, team);
      const int64_t end = share.last * Type::ROWS;
      float *scratch = scratches + index * chunk_scratch, *block_words = scratch + MAX_CHUNK * std::max(2 * width, n_outputs);
      float* stem_words = block_words + MAX_CHUNK * words;
      Tiles<Type> tiles;
      for (int64_t b = -1; b < shape.n_blocks; ++b)
        for (int64_t first = share.first * Type::ROWS; first < end; first += MAX_CHUNK) {
          const int64_t count = std::min(MAX_CHUNK, end - first);
          if (b < 0) {
            float* input = kept ? kept + first * input_words : stem_words;
            copy_inputs(x, first, count, input);
            Type::template product<false>(count, width, input_words, input, input_words, packed, input_words * LANES,
                                          parameters->stem.bias, 0, scratch, width);
            for (int64_t m = 0; m < count; m += 4)
              activate<Type, 4>(scratch + m * width, parameters->stem, width, shape.eps,
                                kept ? z_of(kept, 0) + (first + m) * words : nullptr,
                                kept ? statistics_of(kept, 0) + 2 * (first + m) : nullptr,
                                [&](int r, int64_t j, const Vec* h) {
                                  for (int64_t i = 0; i < Type::TERMS; ++i)
                                    store(features + (first + m + r) * width + j + i * LANES, h[i]);
                                });
            continue;
          }
          float* input = kept ? block_input(kept, b) + first * words : block_words;
          for (int64_t i = 0; i < count * words; i += LANES) {
            Vec x[2];
            for (int64_t t = 0; t < Type::TERMS; ++t) x[t] = load(features + first * width + i * Type::TERMS + t * LANES);
            Type::store_row(input + i, x);
          }
          const float* scale = parameters->blocks[b].scale;
          const bool products = kept && keep_products;
          branch(b, count, input, packed, products ? z_of(kept, 1 + b * N_LAYERS) + first * words : nullptr,
                 products ? statistics_of(kept, 1 + b * N_LAYERS) + 2 * first : nullptr, rows, scratch,
                 [&](int64_t m, int64_t j, const Vec* h) {
                   for (int64_t i = 0; i < Type::TERMS; ++i) {
                     float* feature = features + (first + m) * width + j + i * LANES;
                     store(feature, scale ? fmadd(h[i], all(*scale), load(feature)) : h[i]);
                   }
                 });
        }
      for (int64_t first = share.first * Type::ROWS; first < std::min(end, n_rows); first += MAX_CHUNK) {
        const int64_t count = std::min(MAX_CHUNK, end - first), n = std::min(count, n_rows - first);
        if (!n_outputs) {
          std::copy_n(features + first * width, n * width, outs[0] + first * width);
          continue;
        }
        Float32::product<false>(count, n_outputs, width, features + first * width, width,
                                packed + packed_offset(shape.n_blocks, 0), width * LANES, head_biases, 0, scratch, n_outputs);
        float* const* out = outs;
        for_heads(parameters, [&](const Head<const float>&, int64_t size, int64_t column) {
          for (int64_t m = 0; m < n; ++m)
            std::copy_n(scratch + m * n_outputs + column, size, *out + (first + m) * size);
          ++out;
        });
      }
    });
  }

  // Rows of the input as words, with zeros up to whole vectors and rows
  void copy_inputs(const float* x, int64_t first, int64_t count, float* to) const {
    alignas(64) float terms[32];
    for (int64_t m = 0; m < count; ++m)
      for (int64_t j = 0; j < input_words * Type::TERMS; j += 32) {
        const int64_t n = first + m < n_rows ? std::clamp<int64_t>(shape.n_inputs - j, 0, 32) : 0;
        std::fill(std::copy_n(x + (first + m) * shape.n_inputs + j, n, terms), terms + 32, 0.0f);
        for (int64_t k = 0; k < 32; k += Type::TERMS * LANES) {
          Vec x[2];
          for (int64_t i = 0; i < Type::TERMS; ++i) x[i] = load(terms + k + i * LANES);
          Type::store_row(to + m * input_words + (j + k) / Type::TERMS, x);
        }
      }
  }

  // Without gradients of the parameters (`gradients` is null) threads meet only once
  template <bool PARAMETERS>
  void backward(const float* const* douts, float* kept, float* dx, const Parameters<float>* gradients,
                int64_t n_threads) const {
    // Sums over rows are sums of so many partial ones, however many threads there are: they are always rounded the same way
    const int64_t n_parts = useful_threads(n_threads);
    const int64_t padded_inputs = input_words * Type::TERMS, row_words = rows / Type::TERMS;
    // From one strip to the next; not a multiple of the size of a page, on which caches put all strips in few places
    const int64_t stride = row_words * LANES + LANES, head_stride = rows * LANES + LANES;
    const int64_t operand = round_up(std::max({width, padded_inputs, n_outputs}), LANES) / LANES * stride;
    const int64_t n_sums = round_up((N_LAYERS * 3 + 1) * width, 64);
    const int64_t recomputed = keep_products ? 0 : N_LAYERS * MAX_CHUNK * (words + 2);
    const int64_t chunk_scratch = MAX_CHUNK * (3 * width + 2 * words + std::max(padded_inputs, n_outputs)) + recomputed;
    const int64_t n_packed = (keep_products ? 1 : 2) * packed_size();
    Workspace workspace(n_packed + n_outputs * (width + 1) + rows * width + n_parts * chunk_scratch + 16 * LANES +
                        (PARAMETERS ? 4 * N_LAYERS * operand + 2 * n_parts * n_sums + width * (padded_inputs + n_outputs) : 0));
    float *packed = workspace.take(packed_size()), *packed_forward = workspace.take(n_packed - packed_size());
    float *heads = workspace.take(n_outputs * width), *dbiases = workspace.take(n_outputs);
    float *d = workspace.take(rows * width), *scratches = workspace.take(n_parts * chunk_scratch);
    float *operands = nullptr, *all_sums = nullptr, *dstem = nullptr, *dheads = nullptr;
    if (PARAMETERS) {
      operands = workspace.take(4 * N_LAYERS * operand);
      all_sums = workspace.take(2 * n_parts * n_sums);
      dstem = workspace.take(width * padded_inputs);
      dheads = workspace.take(width * n_outputs);
    }
    join_heads(heads, dbiases);
    Team::run(n_parts, [&](int64_t index, Team& team) {
      pack_for_backward(heads, packed, index, team);
      if (!keep_products) pack_for_forward(heads, packed_forward, index, team);
      const Share parts(n_parts, index, team);
      const auto first_row = [&](int64_t part) { return Share(rows / Type::ROWS, part, n_parts).first * Type::ROWS; };
      const int64_t begin = first_row(parts.first), end = first_row(parts.last);
      team.barrier();
      float *dh = scratches + index * chunk_scratch, *dz = dh + MAX_CHUNK * width, *two_rows = dz + MAX_CHUNK * words;
      float* again = two_rows + 2 * MAX_CHUNK * width;
      float *z_again = again + MAX_CHUNK * (words + padded_inputs), *statistics_again = z_again + N_LAYERS * MAX_CHUNK * words;
      // The heads, with operands of their own; those of the last block may be written while others still read them
      float *dout_strips = operands + (shape.n_blocks & 1) * 2 * N_LAYERS * operand;
      float *feature_strips = dout_strips + N_LAYERS * operand;
      for (int64_t first = begin; first < end; first += MAX_CHUNK) {
        const int64_t count = std::min(MAX_CHUNK, end - first), n = std::clamp<int64_t>(n_rows - first, 0, count);
        float* dout = n_outputs ? again : d + first * width;
        const int64_t n_columns = n_outputs ? n_outputs : width;
        std::fill_n(dout, count * n_columns, 0.0f);
        if (!n_outputs) {
          std::copy_n(douts[0] + first * width, n * width, dout);
          continue;
        }
        const float* const* of_head = douts;
        for_heads(parameters, [&](const Head<const float>&, int64_t size, int64_t column) {
          for (int64_t m = 0; m < n; ++m) std::copy_n(*of_head + (first + m) * size, size, dout + m * n_outputs + column);
          ++of_head;
        });
        Float32::product<false>(count, width, n_outputs, dout, n_outputs, packed + packed_offset(shape.n_blocks, 0),
                                n_outputs * LANES, nullptr, 0, d + first * width, width);
        if (PARAMETERS)
          for (int64_t m = 0; m < count; m += 2) {
            strips_of_rows<Float32>(dout + m * n_outputs, n_outputs, dout_strips + (first + m) * LANES, head_stride);
            strips_of_rows<Float32>(head_input(kept) + (first + m) * width, width, feature_strips + (first + m) * LANES,
                                    head_stride);
          }
      }
      if (PARAMETERS && n_outputs) {
        team.barrier();
        const Share columns((width + LANES) / (2 * LANES), index, team);
        for (int64_t j = columns.first * 2 * LANES; j < std::min(columns.last * 2 * LANES, width); j += 2 * LANES)
          Float32::product<true>(n_outputs, std::min(2 * LANES, width - j), rows, dout_strips, head_stride,
                                 feature_strips + j / LANES * head_stride, head_stride, nullptr, 0, dheads + j, width);
        if (index == 0)
          for (int64_t j = 0; j < n_outputs; j += LANES) {
            Vec total = all(0.0f);
            for (int64_t m = 0; m < rows; ++m) total += load(dout_strips + j / LANES * head_stride + m * LANES);
            store(dbiases + j, total);
          }
      }
      Tiles<Type> tiles;
      for (int64_t b = shape.n_blocks - 1; b >= -1; --b) {
        // Others may still read what belongs to the last block
        float* dz_strips = operands + (b & 1) * 2 * N_LAYERS * operand;
        float* h_strips = dz_strips + N_LAYERS * operand;
        float* sums_of_parts = all_sums + (b & 1) * n_parts * n_sums;
        const int64_t n = b < 0 ? 1 : N_LAYERS;
        const float* scale = b < 0 ? nullptr : parameters->blocks[b].scale;
        for (int64_t part = parts.first; part < parts.last; ++part) {
          float *my_sums = sums_of_parts + part * n_sums, inner = 0.0f;
          if (PARAMETERS) std::fill_n(my_sums, n_sums, 0.0f);
          for (int64_t first = first_row(part), end = first_row(part + 1); first < end; first += MAX_CHUNK) {
            const int64_t count = std::min(MAX_CHUNK, end - first), position = first / Type::TERMS * LANES;
            const float* input = b < 0 ? kept + first * input_words : block_input(kept, b) + first * words;
            float *z = z_again, *statistics = statistics_again;
            int64_t rows_of_layer = MAX_CHUNK;
            if (keep_products || b < 0) {
              z = z_of(kept, b < 0 ? 0 : 1 + b * N_LAYERS) + first * words;
              statistics = statistics_of(kept, b < 0 ? 0 : 1 + b * N_LAYERS) + 2 * first;
              rows_of_layer = rows;
            } else {
              branch(b, count, input, packed_forward, z, statistics, MAX_CHUNK, two_rows, [](int64_t, int64_t, const Vec*) {});
            }
            if (PARAMETERS)
              for (int64_t m = 0; m < count; m += 2)
                strips_of_rows<Type>(input + m * (b < 0 ? input_words : words), b < 0 ? input_words : words,
                                     h_strips + position + m / Type::TERMS * LANES, stride);
            for (int64_t l = n - 1; l >= 0; --l) {
              const Layer<const float>& layer = b < 0 ? parameters->stem : parameters->blocks[b].layers[l];
              const bool last = l == n - 1;
              for (int64_t m = 0; m < count; m += 2) {
                const int64_t at = position + m / Type::TERMS * LANES, row = l * rows_of_layer + m;
                const float product_with_h = differentiate<Type, PARAMETERS>(
                    z + row * words, statistics + 2 * row, layer, width, last && scale ? *scale : 1.0f,
                    last ? d + (first + m) * width : dh + m * width, dz + m * words, dz_strips + l * operand + at,
                    last ? nullptr : h_strips + (l + 1) * operand + at, stride, my_sums + l * 3 * width, two_rows);
                if (last) inner += product_with_h;
              }
              if (PARAMETERS && Type::TILES)
                for (int64_t k = 0; k < count / Type::TERMS; k += LANES)
                  for (int64_t strip = 0; strip < width / LANES; ++strip) {
                    float* square = dz_strips + l * operand + strip * stride + position + k * LANES;
                    transpose(square, LANES, square);
                  }
              // The gradient of the input
              if (l > 0)
                Type::template product<false>(count, width, words, dz, words, packed + packed_offset(b, l), words * LANES,
                                              nullptr, 0, dh, width);
              else if (b >= 0)
                Type::template product<false>(count, width, words, dz, words, packed + packed_offset(b, l), words * LANES,
                                              scale ? d + first * width : nullptr, width, d + first * width, width);
              else if (dx) {
                Type::template product<false>(count, padded_inputs, words, dz, words, packed, words * LANES, nullptr, 0, again,
                                              padded_inputs);
                for (int64_t m = 0; m < std::min(count, n_rows - first); ++m)
                  std::copy_n(again + m * padded_inputs, shape.n_inputs, dx + (first + m) * shape.n_inputs);
              }
            }
          }
          if (PARAMETERS) my_sums[N_LAYERS * 3 * width] = inner;
        }
        if (!PARAMETERS) continue;
        team.barrier();
        const Layer<float>* layers = b < 0 ? &gradients->stem : gradients->blocks[b].layers;
        const int64_t n_columns = b < 0 ? padded_inputs : width, n_steps = round_up(n_columns, 2 * LANES) / (2 * LANES);
        const Share products(n * n_steps, index, team);
        for (int64_t i = products.first; i < products.last; ++i) {
          const int64_t l = i / n_steps, j = i % n_steps * 2 * LANES;
          float* to = b < 0 ? dstem : layers[l].weight;
          Type::template product<true>(width, std::min(2 * LANES, n_columns - j), row_words, dz_strips + l * operand, stride,
                                       h_strips + l * operand + j / LANES * stride, stride, nullptr, 0, to + j, n_columns);
        }
        const auto total = [&](int64_t i) {
          float all_parts = 0.0f;
          for (int64_t part = 0; part < n_parts; ++part) all_parts += sums_of_parts[part * n_sums + i];
          return all_parts;
        };
        const Share columns(n * 3 * width, index, team);
        for (int64_t i = columns.first; i < columns.last; ++i) {
          const Layer<float>& layer = layers[i / (3 * width)];
          float* const to[] = {layer.bias, layer.gamma, layer.beta};
          to[i / width % 3][i % width] = total(i);
        }
        if (b >= 0 && index == 0 && gradients->blocks[b].scale) *gradients->blocks[b].scale = total(N_LAYERS * 3 * width);
      }
      if (PARAMETERS) {
        team.barrier();
        const Share share(width, index, team);
        for (int64_t n = share.first; n < share.last; ++n)
          std::copy_n(dstem + n * padded_inputs, shape.n_inputs, gradients->stem.weight + n * shape.n_inputs);
        if (index == team.size() - 1)
          for_heads(gradients, [&](const Head<float>& head, int64_t size, int64_t column) {
            std::copy_n(dheads + column * width, size * width, head.weight);
            std::copy_n(dbiases + column, size, head.bias);
          });
      }
    });
  }
};

// ---------------------------------------------------------------- InfoNCE

// Logits are negative distances, those of the positives on the diagonal. With the loss of a row
// logsumexp - positive + coef * logsumexp^2, the gradients are dx_i = -sum_j w_ij (x_i - y_j), dy_j = sum_i w_ij (x_i - y_j)
// where w is the gradient of the logits over the distances. Both are linear in rows and columns of w but for the
// positives, which may come so near to each other that only their own difference is exact.
void contrast(const float* x_all, const float* y_all, int64_t n, int64_t dim, float coef, float* dx, float* dy,
              float* metrics, int64_t n_threads) {
  constexpr int64_t CHUNK = 4 * TILE_ROWS;
  constexpr float FAR = 1e18f;
  enum { LOSS, CORRECT, POSITIVE, TOTAL, LOGSUMEXP, N_METRICS };
  // Waking another thread takes as long as so much of it, and longer where the cores are busy
  n_threads = std::max<int64_t>(1, std::min(n_threads, n * n * dim / 8'000'000));
  const int64_t rows = round_up(n, CHUNK), width = round_up(dim, LANES);
  // From one row or strip to the next: not a multiple of the size of a page, for which caches have few places
  const int64_t pitch = rows + LANES, stride = pitch * LANES;
  Workspace workspace(4 * rows * width + rows / LANES * stride + 4 * rows + width + n_threads * CHUNK * (pitch + std::max(pitch, width)) +
                      16 * LANES);
  float *x = workspace.take(rows * width), *y = workspace.take(rows * width), *center = workspace.take(width);
  float *y_transposed = workspace.take(rows * width), *xy_strips = workspace.take(rows * width);
  float *w_strips = workspace.take(rows / LANES * stride), *y_squares = workspace.take(rows), *valid = workspace.take(rows);
  float *positive_w = workspace.take(rows), *row_w = workspace.take(rows);
  const int64_t scratch_size = CHUNK * (pitch + std::max(pitch, width));
  float* scratches = workspace.take(n_threads * scratch_size);
  // Of each chunk, so that they are always rounded the same way
  std::vector<std::array<double, N_METRICS>> partial(rows / CHUNK);
  // Distances do not depend on the origin, but their digits do
  std::fill_n(center, width, 0.0f);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < dim; ++k) center[k] += y_all[i * dim + k];
  for (int64_t k = 0; k < dim; ++k) center[k] /= n;

  Team::run(n_threads, [&](int64_t index, Team& team) {
    const Share share(rows / CHUNK, index, team);
    const int64_t begin = share.first * CHUNK, end = share.last * CHUNK;
    for (int64_t i = begin; i < end; ++i) {
      float square = 0.0f;
      for (int64_t k = 0; k < width; ++k) {
        const bool inside = i < n && k < dim;
        x[i * width + k] = inside ? x_all[i * dim + k] - center[k] : 0.0f;
        const float value = y[i * width + k] = inside ? y_all[i * dim + k] - center[k] : 0.0f;
        square += value * value;
      }
      y_squares[i] = i < n ? square : FAR * FAR;
      valid[i] = i < n ? 1.0f : 0.0f;
    }
    for (int64_t i = begin; i < end; i += LANES)
      for (int64_t k = 0; k < width; k += LANES) transpose(y + i * width + k, width, y_transposed + i * width + k * LANES);
    for (int64_t i = begin; i < end; ++i)
      for (int64_t k = 0; k < width; k += LANES) store(xy_strips + k * rows + i * LANES, load(y + i * width + k));
    team.barrier();

    float *distances = scratches + index * scratch_size, *exponentials = distances + CHUNK * pitch;
    for (int64_t first = begin; first < end; first += CHUNK) {
      std::array<double, N_METRICS>& sums = partial[first / CHUNK];
      Float32::product<false>(CHUNK, rows, width, x + first * width, width, y_transposed, width * LANES, nullptr, 0, distances,
                              pitch);
      for (int64_t i = first; i < first + CHUNK; ++i) {
        float *row = distances + (i - first) * pitch, square = 0.0f, positive = 0.0f;
        if (i >= n) {
          std::fill_n(row, rows, 0.0f);
          for (int64_t j = 0; j < rows; j += LANES) store(w_strips + j / LANES * stride + i * LANES, all(0.0f));
          row_w[i] = positive_w[i] = 0.0f;
          continue;
        }
        for (int64_t k = 0; k < width; ++k) {
          const float value = x[i * width + k], difference = value - y[i * width + k];
          square += value * value;
          positive += difference * difference;
        }
        Vec least = all(FAR);
        for (int64_t j = 0; j < rows; j += LANES) {
          const Vec squared = fmadd(all(-2.0f), load(row + j), all(square) + load(y_squares + j));
          store(row + j, sqrt(max(squared, all(0.0f))));
        }
        // The nearest of the others, and whether the own one, rounded as they are, is nearer: equal goals are not
        const float rounded = row[i];
        row[i] = FAR;
        for (int64_t j = 0; j < rows; j += LANES) least = min(least, load(row + j));
        float nearest = least[0];
        for (int64_t k = 1; k < LANES; ++k) nearest = std::min(nearest, least[k]);
        row[i] = positive = std::sqrt(positive);
        sums[CORRECT] += rounded < nearest;
        nearest = std::min(nearest, positive);
        Vec total = all(0.0f), exponential = all(0.0f);
        for (int64_t j = 0; j < rows; j += LANES) {
          total = fmadd(load(row + j), load(valid + j), total);
          const Vec e = exp2((all(nearest) - load(row + j)) * all(LOG2_E));
          exponential += e;
          store(exponentials + j, e);
        }
        const float sum_of_all = sum(exponential), logsumexp = std::log(sum_of_all) - nearest;
        sums[LOSS] += logsumexp + positive + coef * logsumexp * logsumexp;
        sums[POSITIVE] -= positive;
        sums[TOTAL] -= sum(total);
        sums[LOGSUMEXP] += logsumexp;
        if (!dx) continue;
        const float factor = (1.0f + 2.0f * coef * logsumexp) / (n * sum_of_all);
        positive_w[i] = positive > 0.0f ? (factor * exponentials[i] - 1.0f / n) / positive : 0.0f;
        exponentials[i] = 0.0f;
        Vec weights = all(0.0f);
        for (int64_t j = 0; j < rows; j += LANES) {
          const Vec distance = load(row + j);
          // Zero where two rows are equal
          const Vec w = distance > all(0.0f) ? all(factor) * load(exponentials + j) / distance : all(0.0f);
          store(row + j, w);
          store(w_strips + j / LANES * stride + i * LANES, w);
          weights += w;
        }
        row_w[i] = sum(weights);
      }
      if (!dx) continue;
      Float32::product<false>(CHUNK, width, rows, distances, pitch, xy_strips, rows * LANES, nullptr, 0, exponentials, width);
      for (int64_t i = first; i < std::min(first + CHUNK, n); ++i)
        for (int64_t k = 0; k < dim; ++k) {
          const float from_x = x[i * width + k], difference = from_x - y[i * width + k];
          dx[i * dim + k] = exponentials[(i - first) * width + k] - row_w[i] * from_x - positive_w[i] * difference;
        }
    }
    team.barrier();
    if (index == 0) {
      std::array<double, N_METRICS> sums = {};
      for (const auto& of_chunk : partial)
        for (int k = 0; k < N_METRICS; ++k) sums[k] += of_chunk[k];
      sums[TOTAL] = (sums[TOTAL] - sums[POSITIVE]) / (n - 1);
      for (int k = 0; k < N_METRICS; ++k) metrics[k] = sums[k] / n;
    }
    if (!dx) return;
    for (int64_t i = begin; i < end; ++i)
      for (int64_t k = 0; k < width; k += LANES) store(xy_strips + k * rows + i * LANES, load(x + i * width + k));
    team.barrier();
    Float32::product<true>(end - begin, width, rows, w_strips + begin / LANES * stride, stride, xy_strips, rows * LANES,
                           nullptr, 0, y_transposed + begin * width, width);
    for (int64_t j = begin; j < std::min(end, n); j += LANES) {
      Vec column = all(0.0f);
      for (int64_t i = 0; i < rows; ++i) column += load(w_strips + j / LANES * stride + i * LANES);
      for (int64_t i = j; i < std::min(j + LANES, n); ++i)
        for (int64_t k = 0; k < dim; ++k) {
          const float from_y = y[i * width + k], difference = x[i * width + k] - from_y;
          dy[i * dim + k] = y_transposed[i * width + k] - column[i - j] * from_y + positive_w[i] * difference;
        }
    }
  });
}

// ---------------------------------------------------------------- squashed Gaussian

// log(1 + x) within 1e-7, for x between 0 and 1
inline Vec log1p(Vec x) {
  const Vec s = x / (all(2.0f) + x), square = s * s;
  Vec series = all(1.0f / 13.0f);
#pragma GCC unroll 6
  for (int n = 11; n > 0; n -= 2) series = fmadd(series, square, all(1.0f / n));
  return all(2.0f) * s * series;
}

// Actions are tanh(u) of u = mean + exp(log_std) * noise
void squash(const float* mean, const float* log_std, const float* noise, int64_t n, int64_t dim, float* actions,
            float* log_prob) {
  const float* inputs[] = {mean, log_std, noise};
  float buffer[3][LANES] = {};
  std::fill_n(log_prob, n, -0.5f * std::log(2.0f * float(M_PI)) * dim);
  for (int64_t i = 0; i < n * dim; i += LANES) {
    const int64_t count = std::min(LANES, n * dim - i);
    for (int k = 0; k < 3; ++k) std::copy_n(inputs[k] + i, count, buffer[k]);
    const Vec log = load(buffer[1]), z = load(buffer[2]);
    const Vec u = fmadd(exp2(log * all(LOG2_E)), z, load(buffer[0])), size = max(u, -u), e = exp2(size * all(-2.0f * LOG2_E));
    const Vec action = (all(1.0f) - e) / (all(1.0f) + e);
    // log(1 - tanh(u)^2), in the form that does not saturate
    const Vec correction = all(2.0f) * (all(0.6931472f) - size - log1p(e));
    // Zero and NaN are themselves
    store(buffer[0], u > all(0.0f) ? action : u < all(0.0f) ? -action : u);
    store(buffer[1], fnmadd(all(0.5f) * z, z, -log) - correction);
    std::copy_n(buffer[0], count, actions + i);
    for (int64_t k = 0; k < count; ++k) log_prob[(i + k) / dim] += buffer[1][k];
  }
}

// ---------------------------------------------------------------- Adam

// Gives the norm of the gradients, which it reads anyway
double step_of_adam(float* values, const float* gradients, float* exp_avg, float* exp_avg_sq, int64_t n, double step_size,
                    double beta1, double beta2, double correction, double eps, double l2, double decay, int64_t n_threads) {
  // Less than that is done before another thread is awake. Parts are rounded the same way, however many threads there are.
  const int64_t n_parts = std::max<int64_t>(1, std::min(n_threads, n / 100'000));
  std::vector<double> squares(n_parts);
  Team::run(n_parts, [&](int64_t index, Team& team) {
    const Share parts(n_parts, index, team);
    for (int64_t part = parts.first; part < parts.last; ++part) {
      const Share share(n / LANES, part, n_parts);
      Vec total = all(0);
      for (int64_t i = share.first * LANES; i < share.last * LANES; i += LANES) {
        const Vec value = load(values + i), raw = load(gradients + i), gradient = fmadd(all(l2), value, raw);
        total = fmadd(raw, raw, total);
        if (i % (256 * LANES) == 0) {
          // Sums of many numbers lose digits
          squares[part] += sum(total);
          total = all(0);
        }
        const Vec mean = fmadd(all(1.0 - beta1), gradient - load(exp_avg + i), load(exp_avg + i));
        const Vec square = fmadd(all(1.0 - beta2) * gradient, gradient, all(beta2) * load(exp_avg_sq + i));
        store(exp_avg + i, mean);
        store(exp_avg_sq + i, square);
        const Vec step = all(step_size) * mean / fmadd(sqrt(square), all(correction), all(eps));
        store(values + i, fnmadd(all(decay), value, value) - step);
      }
      squares[part] += sum(total);
    }
  });
  return std::sqrt(std::accumulate(squares.begin(), squares.end(), 0.0));
}

#ifdef __AMX_BF16__
// Linux gives the tiles to those who ask for them
const bool has_tiles = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#endif

// Calls function(tower) with a tower whose factors are of that type
template <class Function>
auto with_tower(const Shape& shape, int64_t n_rows, bool bfloat16, bool keep_products, Function function) {
#ifdef __AMX_BF16__
  if (bfloat16 && has_tiles) return function(Tower<TiledBFloat16>(shape, n_rows, keep_products));
#endif
#ifdef __AVX512BF16__
  if (bfloat16) return function(Tower<BFloat16>(shape, n_rows, keep_products));
#endif
  return function(Tower<Float32>(shape, n_rows, keep_products));
}

}  // namespace

// The width of a tower must be a multiple of it; 0 if there are no products of this type
extern "C" int64_t width_multiple(bool bfloat16) {
#ifdef __AVX512BF16__
  if (bfloat16) return 32;
#endif
  return bfloat16 ? 0 : LANES;
}

// How many floats are kept for the backward pass. keep_products: whether products are kept, or computed again there.
extern "C" int64_t tower_kept_size(const Shape* shape, int64_t n_rows, bool bfloat16, bool keep_products) {
  return with_tower(*shape, n_rows, bfloat16, keep_products, [](const auto& tower) { return tower.kept_size(); });
}

// x: (n_rows, n_inputs), outs: (n_rows, n_outputs) of each head, or of all features. kept is what the backward pass needs, or
// null. Returns whether there was enough memory, before which nothing is done.
extern "C" bool tower_forward(const Shape* shape, int64_t n_rows, bool bfloat16, bool keep_products, int64_t n_threads,
                              const float* x, float* const* outs, float* kept) {
  return enough_memory([&] {
    with_tower(*shape, n_rows, bfloat16, keep_products, [&](const auto& tower) { tower.forward(x, outs, kept, n_threads); });
  });
}

// Gradients of the outputs, the input (or null) and the parameters (or null), which are written and not added to
extern "C" bool tower_backward(const Shape* shape, int64_t n_rows, bool bfloat16, bool keep_products, int64_t n_threads,
                               const float* const* douts, float* kept, float* dx, const void* gradients) {
  return enough_memory([&] {
    with_tower(*shape, n_rows, bfloat16, keep_products, [&](const auto& tower) {
      const auto* typed = static_cast<const Parameters<float>*>(gradients);
      if (typed)
        tower.template backward<true>(douts, kept, dx, typed, n_threads);
      else
        tower.template backward<false>(douts, kept, dx, nullptr, n_threads);
    });
  });
}

// InfoNCE of negative distances, forward, with the log-sum-exp penalty: x, y, dx, dy: (n, dim), the gradients may be null;
// metrics: loss, fraction of rows whose positive is the largest logit, means of positives, negatives and log-sum-exps
extern "C" bool info_nce(const float* x, const float* y, int64_t n, int64_t dim, float coef, float* dx, float* dy,
                         float* metrics, int64_t n_threads) {
  return enough_memory([&] { contrast(x, y, n, dim, coef, dx, dy, metrics, n_threads); });
}

// A sample of a Gaussian squashed by tanh: all of them (n, dim), but log_prob (n,)
extern "C" void squashed_gaussian(const float* mean, const float* log_std, const float* noise, int64_t n, int64_t dim,
                                  float* actions, float* log_prob) {
  squash(mean, log_std, noise, n, dim, actions, log_prob);
}

// A step of Adam (https://arxiv.org/abs/1412.6980, algorithm 1) for n numbers, a multiple of the lanes of a vector: step_size
// is the learning rate over 1 - beta1^t, correction is 1 / sqrt(1 - beta2^t). Weights decay by the gradient (l2) or by themselves.
extern "C" double adam(float* values, const float* gradients, float* exp_avg, float* exp_avg_sq, int64_t n, double step_size,
                       double beta1, double beta2, double correction, double eps, double l2, double decay, int64_t n_threads) {
  return step_of_adam(values, gradients, exp_avg, exp_avg_sq, n, step_size, beta1, beta2, correction, eps, l2, decay, n_threads);
}
