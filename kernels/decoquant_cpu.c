/* DecoQuant on CPU: encode rows, decode rows, and attention over packed rows. Definitions: decoquant.py and
   packed_attention.py of this folder. Every row of codes is read from memory once; nothing the size of the cache is
   ever written. A row is at most 128 bytes and 128 coefficients, a multiple of 16. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define VBMI 1
#endif

#define LANES 16
#define MAX_D 128
#define CHUNK 256          /* tokens a task takes: its scores and the rows stay in the second-level cache */
#define BLOCK 4            /* query rows that share one unpacking */

typedef float vec __attribute__((vector_size(64), aligned(4)));

/* Where each coefficient lies in a row. */
typedef struct {
    int64_t d, row_bytes;
    uint8_t byte[MAX_D], shift[MAX_D], width[MAX_D];
    uint32_t mask[MAX_D];
    float zero[MAX_D];     /* the code that reads as 0 */
#ifdef VBMI
    __m512i index[MAX_D / LANES], shifts[MAX_D / LANES], masks[MAX_D / LANES];
    uint64_t low, high;
#endif
} Plan;

static void make_plan(Plan *p, const uint8_t *widths, int64_t d, int64_t row_bytes, int midrise) {
    int64_t bit = 0;
    p->d = d;
    p->row_bytes = row_bytes;
    for (int64_t i = 0; i < d; i++) {
        int64_t byte = bit / 8;
        if (byte > row_bytes - 2) byte = row_bytes - 2;     /* two bytes are read: never beyond the row */
        p->byte[i] = byte;
        p->shift[i] = bit - 8 * byte;
        p->width[i] = widths[i];
        p->mask[i] = (1u << widths[i]) - 1;
        p->zero[i] = widths[i] == 0 ? 0.f : (float)(1 << (widths[i] - 1)) - (midrise ? 0.5f : 0.f);
        bit += widths[i];
    }
#ifdef VBMI
    for (int64_t v = 0; v < d / LANES; v++) {
        uint8_t index[64] = {0};
        uint32_t shifts[LANES], masks[LANES];
        for (int lane = 0; lane < LANES; lane++) {
            index[4 * lane] = p->byte[v * LANES + lane];
            index[4 * lane + 1] = p->byte[v * LANES + lane] + 1;
            shifts[lane] = p->shift[v * LANES + lane];
            masks[lane] = p->mask[v * LANES + lane];
        }
        p->index[v] = _mm512_loadu_si512(index);
        p->shifts[v] = _mm512_loadu_si512(shifts);
        p->masks[v] = _mm512_loadu_si512(masks);
    }
    p->low = row_bytes >= 64 ? ~0ull : (1ull << row_bytes) - 1;
    p->high = row_bytes >= 128 ? ~0ull : row_bytes <= 64 ? 0 : (1ull << (row_bytes - 64)) - 1;
#endif
}

static inline __attribute__((always_inline)) void unpack(const uint8_t *row, const Plan *p, vec *out, int vectors) {
#ifdef VBMI
    __m512i low = _mm512_maskz_loadu_epi8(p->low, row);
    __m512i high = p->high ? _mm512_maskz_loadu_epi8(p->high, row + 64) : _mm512_setzero_si512();
    for (int v = 0; v < vectors; v++) {
        __m512i w = p->high ? _mm512_permutex2var_epi8(low, p->index[v], high) : _mm512_permutexvar_epi8(p->index[v], low);
        w = _mm512_and_si512(_mm512_srlv_epi32(w, p->shifts[v]), p->masks[v]);
        out[v] = (vec)_mm512_cvtepi32_ps(w);
    }
#else
    for (int v = 0; v < vectors; v++)
        for (int lane = 0; lane < LANES; lane++) {
            int i = v * LANES + lane;
            uint16_t w;
            memcpy(&w, row + p->byte[i], 2);
            out[v][lane] = (float)((w >> p->shift[i]) & p->mask[i]);
        }
#endif
}

static inline float sum(vec x) {
#ifdef VBMI
    return _mm512_reduce_add_ps((__m512)x);
#else
    float s = 0;
    for (int lane = 0; lane < LANES; lane++) s += x[lane];
    return s;
#endif
}

static inline float half(uint16_t h) {
    _Float16 x;
    memcpy(&x, &h, 2);
    return (float)x;
}

/* exp for x <= 0, relative error below 3e-7; written so that compilers vectorise a loop of it */
static inline float exp_of(float x) {
    x = x < -87.f ? -87.f : x;
    float n = floorf(x * 1.44269504f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return y * power;
}

/* Packed rows of one of keys and values; strides in elements of the tensor. */
typedef struct {
    const uint8_t *codes;      /* [B, H, N, row_bytes] */
    const void *scales;        /* [B, H or 1, N], uint8 exponents or float16 */
    const uint8_t *widths;     /* [B, d] */
    const uint16_t *synthesis; /* [B, g, g] float16 */
    const uint16_t *mean;      /* [B, H, d] float16 */
    int64_t batch_stride, head_stride, scale_batch_stride, scale_head_stride;
    int64_t row_bytes, group, scale_is_half, midrise;
} Packed;

typedef struct {
    const float *query;        /* [B, H * rep, q, d] */
    float *out;                /* the same */
    const void *recent_keys, *recent_values; /* [B, H, F, d], the last recent_count slots used */
    const int64_t *packed_count, *recent_count; /* [B] */
    const float *scale_table;  /* [256] */
    int64_t batch, heads, rep, q, d, recent_capacity, recent_is_bf16, threads;
    double scaling;
    Packed keys, values;
} Attend;

static inline float scale_at(const Packed *p, const float *table, int64_t b, int64_t h, int64_t t) {
    int64_t at = b * p->scale_batch_stride + h * p->scale_head_stride + t;
    return p->scale_is_half ? half(((const uint16_t *)p->scales)[at]) : table[((const uint8_t *)p->scales)[at]];
}

/* What one task adds up: [rows] maxima, sums, scale-weighted sums, and [rows, d] weighted codes (or values). */
typedef struct { float *max, *total, *weight, *acc; } Part;

static inline __attribute__((always_inline)) void score_block(
    const Attend *a, const Plan *plan, int64_t b, int64_t h, int64_t from, int64_t to, const float *folded,
    const float *zero_dot, const float *mean_dot, float *scores, int rows, int vectors) {
    const uint8_t *codes = a->keys.codes + b * a->keys.batch_stride + h * a->keys.head_stride;
    vec query[BLOCK][MAX_D / LANES], row[MAX_D / LANES];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) memcpy(&query[r][v], folded + r * a->d + v * LANES, sizeof(vec));
    for (int64_t t = from; t < to; t++) {
        unpack(codes + t * a->keys.row_bytes, plan, row, vectors);
        float scale = scale_at(&a->keys, a->scale_table, b, h, t);
        for (int r = 0; r < rows; r++) {
            vec dot = row[0] * query[r][0];
            for (int v = 1; v < vectors; v++) dot += row[v] * query[r][v];
            scores[r * CHUNK + t - from] = scale * (sum(dot) - zero_dot[r]) + mean_dot[r];
        }
    }
}

static inline __attribute__((always_inline)) void gather_block(
    const Attend *a, const Plan *plan, int64_t b, int64_t h, int64_t from, int64_t to, const float *scores, float *weight,
    float *acc, int rows, int vectors) {
    const uint8_t *codes = a->values.codes + b * a->values.batch_stride + h * a->values.head_stride;
    vec sums[BLOCK][MAX_D / LANES], row[MAX_D / LANES];
    float weights[BLOCK] = {0};
    memset(sums, 0, sizeof sums);
    for (int64_t t = from; t < to; t++) {
        unpack(codes + t * a->values.row_bytes, plan, row, vectors);
        float scale = scale_at(&a->values, a->scale_table, b, h, t);
        for (int r = 0; r < rows; r++) {
            float w = scores[r * CHUNK + t - from] * scale;
            weights[r] += w;
            for (int v = 0; v < vectors; v++) sums[r][v] += w * row[v];
        }
    }
    for (int r = 0; r < rows; r++) {
        weight[r] = weights[r];
        for (int v = 0; v < vectors; v++) memcpy(acc + r * a->d + v * LANES, &sums[r][v], sizeof(vec));
    }
}

#define CASES(CALL) \
    if (vectors == 4) { switch (rows) { case 1: CALL(1, 4); break; case 2: CALL(2, 4); break; case 3: CALL(3, 4); break; default: CALL(4, 4); } } \
    else CALL(rows, vectors)

/* scores become exp(score - max) */
static void soften(float *scores, int64_t n, float *max, float *total) {
    float m = -INFINITY, lanes[LANES] = {0};
    for (int64_t t = 0; t < n; t++) m = scores[t] > m ? scores[t] : m;
    if (m == -INFINITY) { *max = m; *total = 0; memset(scores, 0, n * sizeof(float)); return; }
    for (int64_t t = 0; t < n; t++) scores[t] = exp_of(scores[t] - m);
    int64_t t = 0;
    for (; t + LANES <= n; t += LANES) for (int lane = 0; lane < LANES; lane++) lanes[lane] += scores[t + lane];
    for (; t < n; t++) lanes[0] += scores[t];
    float s = 0;
    for (int lane = 0; lane < LANES; lane++) s += lanes[lane];
    *max = m;
    *total = s;
}

static void packed_task(const Attend *a, const Plan *kp, const Plan *vp, int64_t b, int64_t h, int64_t from, int64_t to,
                        const float *folded, const float *zero_dot, const float *mean_dot, Part part) {
    float scores[BLOCK * CHUNK];
    int vectors = a->d / LANES;
    int64_t all = a->rep * a->q;
    for (int64_t first = 0; first < all; first += BLOCK) {
        int rows = all - first < BLOCK ? all - first : BLOCK;
        const float *f = folded + first * a->d, *z = zero_dot + first, *m = mean_dot + first;
#define SCORE(R, V) score_block(a, kp, b, h, from, to, f, z, m, scores, R, V)
        CASES(SCORE);
        for (int r = 0; r < rows; r++) soften(scores + r * CHUNK, to - from, part.max + first + r, part.total + first + r);
        float *w = part.weight + first, *acc = part.acc + first * a->d;
#define GATHER(R, V) gather_block(a, vp, b, h, from, to, scores, w, acc, R, V)
        CASES(GATHER);
    }
}

static inline float recent_at(const void *data, int64_t at, int is_bf16) {
    if (!is_bf16) return ((const float *)data)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)data)[at] << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* The tokens kept as they are. Query j of a row sees all but the q - 1 - j newest. */
static void recent_task(const Attend *a, int64_t b, int64_t h, const float *query, Part part) {
    int64_t n = a->recent_count[b], d = a->d, base = ((b * a->heads + h + 1) * a->recent_capacity - n) * d;
    float *scores = malloc((n + LANES) * sizeof(float)), row[MAX_D];
    for (int64_t r = 0; r < a->rep * a->q; r++) {
        int64_t visible = n - a->q + r % a->q + 1;
        float *acc = part.acc + r * d;
        memset(acc, 0, d * sizeof(float));
        if (visible <= 0) { part.max[r] = -INFINITY; part.total[r] = 0; continue; }
        for (int64_t t = 0; t < visible; t++) {
            float lanes[LANES] = {0}, s = 0;
            for (int64_t i = 0; i < d; i++) row[i] = recent_at(a->recent_keys, base + t * d + i, a->recent_is_bf16);
            for (int64_t i = 0; i < d; i += LANES)
                for (int lane = 0; lane < LANES; lane++) lanes[lane] += row[i + lane] * query[r * d + i + lane];
            for (int lane = 0; lane < LANES; lane++) s += lanes[lane];
            scores[t] = s;
        }
        soften(scores, visible, part.max + r, part.total + r);
        for (int64_t t = 0; t < visible; t++)
            for (int64_t i = 0; i < d; i++)
                acc[i] += scores[t] * recent_at(a->recent_values, base + t * d + i, a->recent_is_bf16);
    }
    free(scores);
}

/* Fold scaling, synthesis and mean of the keys into the query rows of one head. */
static void fold(const Attend *a, const Plan *plan, int64_t b, int64_t h, const float *query, float *scaled, float *folded,
                 float *zero_dot, float *mean_dot) {
    int64_t d = a->d, g = a->keys.group;
    const uint16_t *synthesis = a->keys.synthesis + b * g * g, *mean = a->keys.mean + (b * a->heads + h) * d;
    int64_t rows = a->rep * a->q;
    float line[MAX_D];
    for (int64_t r = 0; r < rows; r++) {
        zero_dot[r] = mean_dot[r] = 0;
        for (int64_t i = 0; i < d; i++) {
            scaled[r * d + i] = query[r * d + i] * (float)a->scaling;
            mean_dot[r] += scaled[r * d + i] * half(mean[i]);
        }
    }
    for (int64_t i = 0; i < d; i++) {
        for (int64_t j = 0; j < g; j++) line[j] = half(synthesis[(i % g) * g + j]);
        for (int64_t r = 0; r < rows; r++) {
            const float *part = scaled + r * d + i / g * g;
            float lanes[LANES] = {0}, dot = 0;
            for (int64_t j = 0; j < g; j += LANES)
                for (int lane = 0; lane < LANES; lane++) lanes[lane] += line[j + lane] * part[j + lane];
            for (int lane = 0; lane < LANES; lane++) dot += lanes[lane];
            folded[r * d + i] = dot;
            zero_dot[r] += dot * plan->zero[i];
        }
    }
}

/* Add the parts of one head up and turn weighted codes into values. */
static void combine(const Attend *a, const Plan *plan, int64_t b, int64_t h, int64_t parts, const Part *part, float *out) {
    int64_t d = a->d, g = a->values.group;
    const uint16_t *synthesis = a->values.synthesis + b * g * g, *mean = a->values.mean + (b * a->heads + h) * d;
    int64_t rows = a->rep * a->q;
    float line[MAX_D], *weighted = malloc(rows * (d + 2) * sizeof(float)), *packed = weighted + rows * d, *totals = packed + rows;
    for (int64_t r = 0; r < rows; r++) {
        float max = -INFINITY, weight = 0, *codes = weighted + r * d, *y = out + r * d;
        memset(y, 0, d * sizeof(float));
        memset(codes, 0, d * sizeof(float));
        packed[r] = 0;
        totals[r] = 0;
        for (int64_t p = 0; p < parts; p++) max = part[p].max[r] > max ? part[p].max[r] : max;
        for (int64_t p = 0; p < parts; p++) {           /* part 0: the tokens kept as they are */
            if (part[p].max[r] == -INFINITY) continue;
            float factor = expf(part[p].max[r] - max), *into = p == 0 ? y : codes;
            totals[r] += factor * part[p].total[r];
            if (p > 0) { packed[r] += factor * part[p].total[r]; weight += factor * part[p].weight[r]; }
            for (int64_t i = 0; i < d; i++) into[i] += factor * part[p].acc[r * d + i];
        }
        for (int64_t i = 0; i < d; i++) codes[i] -= weight * plan->zero[i];
    }
    for (int64_t i = 0; i < d; i++) {
        for (int64_t j = 0; j < g; j++) line[j] = half(synthesis[(i % g) * g + j]);
        for (int64_t r = 0; r < rows; r++) {
            float c = weighted[r * d + i], *into = out + r * d + i / g * g;
            for (int64_t j = 0; j < g; j++) into[j] += c * line[j];
        }
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < d; i++)
            out[r * d + i] = totals[r] > 0 ? (out[r * d + i] + packed[r] * half(mean[i])) / totals[r] : 0.f;
    free(weighted);
}

void hf_ext_attend(const Attend *a) {
    int64_t pairs = a->batch * a->heads, rows = a->rep * a->q, d = a->d, longest = 0;
    for (int64_t b = 0; b < a->batch; b++) longest = a->packed_count[b] > longest ? a->packed_count[b] : longest;
    int64_t parts = 1 + (longest + CHUNK - 1) / CHUNK, tasks = pairs * parts;
    Plan *plans = aligned_alloc(64, (2 * a->batch * sizeof(Plan) + 63) / 64 * 64);
    Part *part = malloc(tasks * sizeof(Part));
    float *numbers = malloc(sizeof(float) * (tasks * rows * (3 + d) + pairs * rows * (2 * d + 2)));
    float *scaled = numbers + tasks * rows * (3 + d), *folded = scaled + pairs * rows * d;
    float *zero_dot = folded + pairs * rows * d, *mean_dot = zero_dot + pairs * rows;
    for (int64_t b = 0; b < a->batch; b++) {
        make_plan(plans + 2 * b, a->keys.widths + b * d, d, a->keys.row_bytes, a->keys.midrise);
        make_plan(plans + 2 * b + 1, a->values.widths + b * d, d, a->values.row_bytes, a->values.midrise);
    }
    for (int64_t i = 0; i < tasks; i++) {
        float *at = numbers + i * rows * (3 + d);
        part[i] = (Part){at, at + rows, at + 2 * rows, at + 3 * rows};
    }
#pragma omp parallel num_threads(a->threads)
    {
#pragma omp for schedule(static)
        for (int64_t p = 0; p < pairs; p++)
            fold(a, plans + 2 * (p / a->heads), p / a->heads, p % a->heads, a->query + p * rows * d, scaled + p * rows * d,
                 folded + p * rows * d, zero_dot + p * rows, mean_dot + p * rows);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < tasks; i++) {
            int64_t p = i / parts, b = p / a->heads, h = p % a->heads, from = (i % parts - 1) * CHUNK, to = from + CHUNK;
            if (to > a->packed_count[b]) to = a->packed_count[b];
            if (i % parts == 0)
                recent_task(a, b, h, scaled + p * rows * d, part[i]);
            else if (from < to)
                packed_task(a, plans + 2 * b, plans + 2 * b + 1, b, h, from, to, folded + p * rows * d,
                            zero_dot + p * rows, mean_dot + p * rows, part[i]);
            else
                for (int64_t r = 0; r < rows; r++) part[i].max[r] = -INFINITY;
        }
#pragma omp for schedule(static)
        for (int64_t p = 0; p < pairs; p++)
            combine(a, plans + 2 * (p / a->heads) + 1, p / a->heads, p % a->heads, parts, part + p * parts,
                    a->out + p * rows * d);
    }
    free(plans);
    free(part);
    free(numbers);
}

/* Rows of coefficients, in steps, to codes: for each row the scale of `tries` that leaves least squared error. */
void hf_ext_encode(const float *coefficients, int64_t n, int64_t d, const uint8_t *widths, const float *weight, float energy,
                   const float *scale_table, const int64_t *tries, int64_t count, int64_t unit_scale, int64_t row_bytes,
                   uint8_t *codes, uint8_t *scales, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < n; row++) {
        const float *x = coefficients + row * d;
        float middle[MAX_D], top[MAX_D], lanes[LANES] = {0}, size = 0, best = INFINITY;
        uint8_t *out = codes + row * row_bytes;
        int64_t chosen = 0;
        for (int64_t i = 0; i < d; i++) {
            middle[i] = widths[i] == 0 ? 0.f : (float)(1 << (widths[i] - 1));
            top[i] = widths[i] == 0 ? 0.f : (float)((1 << widths[i]) - 1);
        }
        for (int64_t i = 0; i < d; i += LANES)
            for (int lane = 0; lane < LANES; lane++) lanes[lane] += weight[i + lane] * x[i + lane] * x[i + lane];
        for (int lane = 0; lane < LANES; lane++) size += lanes[lane];
        float log_scale = 8.f * log2f(fmaxf(size, 1e-30f) / energy);   /* 16 steps an octave of the root */
        for (int64_t k = 0; k < count; k++) {
            int64_t s = (int64_t)rintf(log_scale) + unit_scale + tries[k];
            s = s < 0 ? 0 : s > 255 ? 255 : s;
            float scale = scale_table[s], inverse = 1.f / scale, error = 0, parts[LANES] = {0};
            for (int64_t i = 0; i < d; i += LANES)
                for (int lane = 0; lane < LANES; lane++) {
                    int64_t j = i + lane;
                    float c = floorf(x[j] * inverse) + middle[j];
                    c = c < 0.f ? 0.f : c > top[j] ? top[j] : c;
                    float half_step = top[j] > 0.f ? 0.5f : 0.f;
                    float e = x[j] - scale * (c - middle[j] + half_step);
                    parts[lane] += weight[j] * e * e;
                }
            for (int lane = 0; lane < LANES; lane++) error += parts[lane];
            if (error < best) { best = error; chosen = s; }
        }
        float inverse = 1.f / scale_table[chosen];
        uint64_t word = 0;
        int64_t held = 0, at = 0;
        for (int64_t i = 0; i < d; i++) {
            float c = floorf(x[i] * inverse) + middle[i];
            c = c < 0.f ? 0.f : c > top[i] ? top[i] : c;
            word |= (uint64_t)c << held;
            held += widths[i];
            for (; held >= 8; held -= 8, word >>= 8) out[at++] = word & 255;
        }
        if (held > 0) out[at++] = word & 255;
        for (; at < row_bytes; at++) out[at] = 0;
        scales[row] = chosen;
    }
}

/* Rows of codes to scaled codes (code - zero) * scale, [n, d]: what the synthesis matrix is applied to. */
void hf_ext_decode(const uint8_t *codes, const float *scales, int64_t n, int64_t d, const uint8_t *widths, int64_t row_bytes,
                   int64_t midrise, float *out, int64_t threads) {
    Plan *plan = aligned_alloc(64, (sizeof(Plan) + 63) / 64 * 64);
    make_plan(plan, widths, d, row_bytes, midrise);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < n; row++) {
        vec x[MAX_D / LANES];
        unpack(codes + row * row_bytes, plan, x, d / LANES);
        for (int64_t v = 0; v < d / LANES; v++)
            for (int lane = 0; lane < LANES; lane++)
                out[row * d + v * LANES + lane] = (x[v][lane] - plan->zero[v * LANES + lane]) * scales[row];
    }
    free(plan);
}
