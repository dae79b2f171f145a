// The FAdam update (arXiv 2405.12807) on CPU in one or two passes over memory; the definition is
// fadam_step.fadam_step_reference. Plain C++17 and OpenMP, no torch headers, so that it compiles in seconds.
//
// One tensor is done in two passes, because the root mean squares over the whole tensor scale what is written:
//   observe  f <- b f + (1 - b) g^2, and the sums of g^2, (g d)^2, (x d)^2 and f, where d = 1 / (f^p + eps)
//   apply    m <- beta1 m + (1 - beta1) clip(g d),  x <- x - lr (m + decay clip(x d))
// A tensor that fits the cache is read from memory once. eps depends on the sum of g^2 in most versions of the
// algorithm: where its upper bound is nearly always reached the bound is tried first and checked afterwards.
//
// Sums are taken over blocks of a fixed size and added in order, so the result does not depend on the threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t BLOCK = 4096;               // elements whose sums are kept in vector registers
constexpr int64_t SPLIT = 16 * BLOCK;         // tensors above this are shared among threads, those below are dealt out

enum EpsMode : int64_t { FIXED = 0, MIN_EPS2 = 1, RMS_MIN = 2, RMS_MAX = 3 };

struct BFloat16 { uint16_t bits; };

template <typename S> inline S read(const S* at) { return *at; }
inline float read(const BFloat16* at) {
  const uint32_t bits = static_cast<uint32_t>(at->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <typename S> inline void write(S* at, S value) { *at = value; }
inline void write(BFloat16* at, float value) {  // round to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  at->bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

}  // namespace

extern "C" {

// Mirrored by fadam_step_cpu._Options, in the same order.
struct FAdamOptions {
  double lr, beta1, eps, eps2, clip, p, weight_decay, decay_cap, eps_floor;
  int64_t eps_mode, maximize, threads;
};

// Mirrored by fadam_step_cpu._Tensors, in the same order: one column per member, one row per tensor.
struct FAdamTensors {
  int64_t count;
  const int64_t *param, *grad, *momentum, *fisher;  // addresses
  const int64_t* size;                              // elements here
  const double* total;                              // elements in the whole tensor, of which this may be a shard
  const double* beta2;                              // the corrected decay rate of f at this tensor's step
};

struct FAdamSums { double grad, natural, decay, fisher; };

}  // extern "C"

namespace {

double stabiliser(const FAdamOptions& o, double rms) {
  double eps = o.eps;
  if (rms > 0 && o.eps_mode == MIN_EPS2) eps = std::min(o.eps, o.eps2 * rms);
  if (rms > 0 && o.eps_mode == RMS_MIN) eps = o.eps * std::min(1.0, rms);
  if (o.eps_mode == RMS_MAX) eps = o.eps * std::clamp(rms, 1.0, 1e38);  // 0 * inf is not a number
  return std::max(std::pow(eps, 2 * o.p), o.eps_floor);
}

double shrink(const FAdamOptions& o, double sum, double total) {  // 1 / max(1, RMS / c)
  const double ratio = std::sqrt(sum / total) / o.clip;
  return ratio > 1 ? 1 / ratio : 1;
}

// P: storage of parameter and gradient; S: states and arithmetic; POWER: 2p, or 0 for any other p.
template <typename P, typename S, int POWER> struct Step {
  const FAdamOptions& o;
  P* x;
  const P* g;
  S *m, *f;
  int64_t size;
  double total, beta2;

  static inline S root(S fisher, S p) {
    if constexpr (POWER == 1) return std::sqrt(fisher);
    if constexpr (POWER == 2) return fisher;
    return std::pow(fisher, p);
  }

  using Sum = std::conditional_t<POWER == 1, S, double>;  // with other powers the squares can leave the range of S

  template <bool UPDATE, bool DECAY> FAdamSums observe_block(int64_t from, int64_t to, S eps) const {
    const S b = S(beta2), w = S(1 - beta2), p = S(o.p);
    Sum sg = 0, sa = 0, sw = 0, sf = 0;
    const P* __restrict xs = x;
    const P* __restrict gs = g;
    S* __restrict fs = f;
#pragma omp simd reduction(+ : sg, sa, sw, sf)
    for (int64_t i = from; i < to; ++i) {
      const S gi = read(gs + i);
      S fi = fs[i];
      if constexpr (UPDATE) {
        fi = b * fi + w * (gi * gi);
        fs[i] = fi;
      }
      const S d = S(1) / (root(fi, p) + eps);
      const Sum a = gi * d;
      sg += Sum(gi) * Sum(gi);
      sa += a * a;
      sf += fi;
      if constexpr (DECAY) {
        const Sum y = S(read(xs + i)) * d;
        sw += y * y;
      }
    }
    return {double(sg), double(sa), double(sw), double(sf)};
  }

  void apply_block(int64_t from, int64_t to, S eps, S from_grad, S from_decay) const {
    const S beta1 = S(o.beta1), p = S(o.p), minus_lr = S(-o.lr), cap = S(o.decay_cap * o.weight_decay);
    P* __restrict xs = x;
    const P* __restrict gs = g;
    S* __restrict ms = m;
    const S* __restrict fs = f;
#pragma omp simd
    for (int64_t i = from; i < to; ++i) {
      const S gi = read(gs + i), xi = read(xs + i);
      const S d = S(1) / (root(fs[i], p) + eps);
      const S mi = beta1 * ms[i] + from_grad * (gi * d);
      S y = from_decay * (xi * d);
      y = y > cap ? cap : y;
      y = y < -cap ? -cap : y;
      ms[i] = mi;
      write(xs + i, xi + minus_lr * (mi + y));
    }
  }

  void apply_block_no_decay(int64_t from, int64_t to, S eps, S from_grad) const {
    const S beta1 = S(o.beta1), p = S(o.p), minus_lr = S(-o.lr);
    P* __restrict xs = x;
    const P* __restrict gs = g;
    S* __restrict ms = m;
    const S* __restrict fs = f;
#pragma omp simd
    for (int64_t i = from; i < to; ++i) {
      const S d = S(1) / (root(fs[i], p) + eps);
      const S mi = beta1 * ms[i] + from_grad * (S(read(gs + i)) * d);
      ms[i] = mi;
      write(xs + i, S(read(xs + i)) + minus_lr * mi);
    }
  }

  template <bool UPDATE> FAdamSums observe(S eps, int64_t threads) const {
    const int64_t blocks = (size + BLOCK - 1) / BLOCK;
    std::vector<FAdamSums> parts(blocks);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t from = k * BLOCK, to = std::min(size, (k + 1) * BLOCK);
      parts[k] = o.weight_decay != 0 ? observe_block<UPDATE, true>(from, to, eps)
                                     : observe_block<UPDATE, false>(from, to, eps);
    }
    FAdamSums sums{0, 0, 0, 0};
    for (const FAdamSums& part : parts) {
      sums.grad += part.grad;
      sums.natural += part.natural;
      sums.decay += part.decay;
      sums.fisher += part.fisher;
    }
    return sums;
  }

  double sum_of_squares(int64_t threads) const {  // of the gradient, for the versions whose eps has no likely value
    const int64_t blocks = (size + BLOCK - 1) / BLOCK;
    std::vector<double> parts(blocks);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t k = 0; k < blocks; ++k) {
      const P* __restrict gs = g;
      const int64_t to = std::min(size, (k + 1) * BLOCK);
      S sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = k * BLOCK; i < to; ++i) {
        const S gi = read(gs + i);
        sum += gi * gi;
      }
      parts[k] = double(sum);
    }
    return std::accumulate(parts.begin(), parts.end(), 0.0);
  }

  double eps_of(double sum_grad) const { return stabiliser(o, std::sqrt(sum_grad / total)); }

  void apply(const FAdamSums& sums, int64_t threads) const {
    const S eps = S(eps_of(sums.grad));
    const S from_grad = S((o.maximize ? o.beta1 - 1 : 1 - o.beta1) * shrink(o, sums.natural, total));
    const bool untouched = sums.grad == 0 && sums.fisher == 0;
    const S from_decay = S(untouched ? 0 : o.weight_decay * shrink(o, sums.decay, total));
    const int64_t blocks = (size + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t from = k * BLOCK, to = std::min(size, (k + 1) * BLOCK);
      if (from_decay == 0) apply_block_no_decay(from, to, eps, from_grad);
      else apply_block(from, to, eps, from_grad, from_decay);
    }
  }

  void run(int64_t threads) const {
    const bool likely = o.eps_mode == FIXED || o.eps_mode == MIN_EPS2;
    const double guess = likely ? eps_of(0) : eps_of(sum_of_squares(threads));
    FAdamSums sums = observe<true>(S(guess), threads);
    const double exact = eps_of(sums.grad);
    if (exact != guess && likely) sums = observe<false>(S(exact), threads);
    apply(sums, threads);
  }
};

template <typename P, typename S, typename Visit>
void each(const FAdamTensors& t, const FAdamOptions& o, const Visit& visit) {
  const auto visit_one = [&](int64_t k, int64_t threads) {
    const auto go = [&](auto power) {
      visit(k, Step<P, S, decltype(power)::value>{
                   o, reinterpret_cast<P*>(t.param[k]), reinterpret_cast<const P*>(t.grad[k]),
                   reinterpret_cast<S*>(t.momentum[k]), reinterpret_cast<S*>(t.fisher[k]), t.size[k], t.total[k],
                   t.beta2[k]}, threads);
    };
    if (o.p == 0.5) go(std::integral_constant<int, 1>{});
    else if (o.p == 1.0) go(std::integral_constant<int, 2>{});
    else go(std::integral_constant<int, 0>{});
  };
  for (int64_t k = 0; k < t.count; ++k)
    if (t.size[k] > SPLIT) visit_one(k, o.threads);
#pragma omp parallel for num_threads(o.threads) if (o.threads > 1) schedule(dynamic)
  for (int64_t k = 0; k < t.count; ++k)
    if (t.size[k] <= SPLIT) visit_one(k, 1);
}

template <typename P, typename S> void step(const FAdamTensors& t, const FAdamOptions& o) {
  each<P, S>(t, o, [](int64_t, const auto& one, int64_t threads) { one.run(threads); });
}

template <typename P, typename S> void measure(const FAdamTensors& t, const FAdamOptions& o, FAdamSums* sums) {
  each<P, S>(t, o, [&](int64_t k, const auto& one, int64_t threads) { sums[k].grad = one.sum_of_squares(threads); });
}

template <typename P, typename S>
void observe(const FAdamTensors& t, const FAdamOptions& o, bool update, FAdamSums* sums) {
  each<P, S>(t, o, [&](int64_t k, const auto& one, int64_t threads) {
    const S eps = static_cast<S>(one.eps_of(sums[k].grad));  // from the sum over the whole tensor
    sums[k] = update ? one.template observe<true>(eps, threads) : one.template observe<false>(eps, threads);
  });
}

template <typename P, typename S> void apply(const FAdamTensors& t, const FAdamOptions& o, const FAdamSums* sums) {
  each<P, S>(t, o, [&](int64_t k, const auto& one, int64_t threads) { one.apply(sums[k], threads); });
}

}  // namespace

// step does everything for whole tensors. measure, observe (f only if update) and apply are its parts for shards of
// tensors: the caller adds up the sums over the shards after measure (grad) and after observe (all four).
#define FADAM_EXPORT(name, P, S)                                                                                   \
  extern "C" void fadam_step_##name(const FAdamTensors* t, const FAdamOptions* o) { step<P, S>(*t, *o); }          \
  extern "C" void fadam_measure_##name(const FAdamTensors* t, const FAdamOptions* o, FAdamSums* s) {               \
    measure<P, S>(*t, *o, s);                                                                                      \
  }                                                                                                                \
  extern "C" void fadam_observe_##name(const FAdamTensors* t, const FAdamOptions* o, int64_t update, FAdamSums* s) { \
    observe<P, S>(*t, *o, update != 0, s);                                                                         \
  }                                                                                                                \
  extern "C" void fadam_apply_##name(const FAdamTensors* t, const FAdamOptions* o, const FAdamSums* s) {           \
    apply<P, S>(*t, *o, s);                                                                                        \
  }

FADAM_EXPORT(float32, float, float)
FADAM_EXPORT(bfloat16, BFloat16, float)
FADAM_EXPORT(float64, double, double)
