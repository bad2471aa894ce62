// Multiply a few rows by a matrix of fp32, bf16 or int8: y (n, N) = x (n, K) w (N, K)^T; and attend
// from one query of each row to cached keys.
//
// Such a product takes the time of reading w. A compiler's plain loop waits for memory, and widens
// bf16 slowly; these loops prefetch, and split each 32 bits into two numbers. products.py compiles
// this file and calls it.

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int AHEAD = 1024;           // bytes between a read and its prefetch
constexpr int MOST = 64;              // rows of x, see products.py
constexpr int BLOCK = 256;            // channels of w that are widened at once
constexpr int ROWS = 3, XS = 4;       // rows of w and of x whose sums stay in registers
constexpr int GROUP = 4 * ROWS;       // rows of w that pass a block of x
constexpr ptrdiff_t ALONE = 1 << 16;  // weights up to which one thread is faster

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

static inline vec load(const float *p) { return *(const vec *)p; }
static inline vec even(words pairs) { return (vec)(pairs << 16); }  // bf16: half of an fp32
static inline vec odd(words pairs) { return (vec)(pairs & 0xffff0000); }

static inline float sum(vec v) {
    typedef float four __attribute__((vector_size(16)));
    four parts[LANES / 4], total = {};
    memcpy(parts, &v, sizeof v);
    for (int i = 0; i < LANES / 4; i++) total += parts[i];
    return (total[0] + total[1]) + (total[2] + total[3]);
}

// A row of w times x. K is a multiple of 64, and x in the order of widen().
static float dot(const float *x, const float *w, ptrdiff_t K) {
    vec totals[4] = {};
    for (ptrdiff_t k = 0; k < K; k += 4 * LANES) {
        __builtin_prefetch((const char *)(w + k) + AHEAD);
        __builtin_prefetch((const char *)(w + k) + AHEAD + 64);
        for (int i = 0; i < 4; i++) totals[i] += load(x + k + i * LANES) * load(w + k + i * LANES);
    }
    return sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
}

static float dot(const float *x, const uint16_t *w, ptrdiff_t K) {
    vec totals[4] = {};
    for (ptrdiff_t k = 0; k < K; k += 4 * LANES) {
        __builtin_prefetch((const char *)(w + k) + AHEAD);
        for (int i = 0; i < 4; i += 2) {
            words pairs = *(const words *)(w + k + i * LANES);
            totals[i] += load(x + k + i * LANES) * even(pairs);
            totals[i + 1] += load(x + k + (i + 1) * LANES) * odd(pairs);
        }
    }
    return sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
}

static int32_t dot(const int16_t *x, const int8_t *w, ptrdiff_t K) {
    int32_t total = 0;
    for (ptrdiff_t k = 0; k < K; k += 64) {
        __builtin_prefetch((const char *)(w + k) + AHEAD);
        for (int i = 0; i < 64; i++) total += (int16_t)w[k + i] * x[k + i];
    }
    return total;
}

// Write 2 * LANES channels of a row of w in fp32; of bf16 the even ones come first.
static inline void widen(const float *w, float *wide) { memcpy(wide, w, 8 * LANES); }
static inline void widen(const uint16_t *w, float *wide) {
    words pairs = *(const words *)w;
    *(vec *)wide = even(pairs), *(vec *)(wide + LANES) = odd(pairs);
}
static inline void widen(const int8_t *w, float *wide) {
    for (int i = 0; i < 2 * LANES; i++) wide[i] = w[i];
}

// Add the products of ROWS rows of w, and X rows of x, to totals.
template <int X>
static inline void add_tile(const float *x, ptrdiff_t K, const float *wide, int width, vec *totals) {
    vec t[X][ROWS];
    memcpy(t, totals, sizeof t);
    for (int k = 0; k < width; k += LANES) {
        vec a[ROWS];
        for (int r = 0; r < ROWS; r++) a[r] = load(wide + r * BLOCK + k);
        for (int i = 0; i < X; i++)
            for (int r = 0; r < ROWS; r++) t[i][r] += a[r] * load(x + i * K + k);
    }
    memcpy(totals, t, sizeof t);
}

// y = scale y + bias, for each of the N columns. Either may be null.
static inline float finish(float y, const float *scale, const float *bias, ptrdiff_t row) {
    return (scale ? y * scale[row] : y) + (bias ? bias[row] : 0);
}

// Several rows of x. Each block of w is read and widened once, for all of them. A block of x stays
// in the first cache while GROUP rows of w pass.
template <typename T>
static void multiply_rows(const float *x, const T *w, float *y, ptrdiff_t n, ptrdiff_t N,
                          ptrdiff_t K, const float *scale, const float *bias) {
    #pragma omp parallel for if (N * K > ALONE)
    for (ptrdiff_t first = 0; first < N; first += GROUP) {
        float wide[ROWS * BLOCK];
        vec totals[MOST * GROUP];
        ptrdiff_t end = first + GROUP < N ? first + GROUP : N;
        memset(totals, 0, n * GROUP * sizeof(vec));
        for (ptrdiff_t start = 0; start < K; start += BLOCK) {
            int width = K - start < BLOCK ? K - start : BLOCK;
            for (ptrdiff_t row = first; row < end; row += ROWS) {
                for (int r = 0; r < ROWS; r++) {
                    const T *p = w + (row + r < N ? row + r : N - 1) * K + start;
                    for (int k = 0; k < width; k += 2 * LANES) {
                        __builtin_prefetch((const char *)(p + k) + ROWS * K * sizeof(T));
                        widen(p + k, wide + r * BLOCK + k);
                    }
                }
                vec *of_rows = totals + (row - first) * n;
                ptrdiff_t i = 0;
                for (; i + XS <= n; i += XS)
                    add_tile<XS>(x + i * K + start, K, wide, width, of_rows + i * ROWS);
                const float *rest = x + i * K + start;
                if (n - i == 3) add_tile<3>(rest, K, wide, width, of_rows + i * ROWS);
                if (n - i == 2) add_tile<2>(rest, K, wide, width, of_rows + i * ROWS);
                if (n - i == 1) add_tile<1>(rest, K, wide, width, of_rows + i * ROWS);
            }
        }
        for (ptrdiff_t row = first; row < end; row++)
            for (ptrdiff_t i = 0; i < n; i++) {
                ptrdiff_t r = (row - first) % ROWS;
                vec total = totals[(row - first - r) * n + i * ROWS + r];
                y[i * N + row] = finish(sum(total), scale, bias, row);
            }
    }
}

template <typename X, typename T>
static void multiply_row(const X *x, const T *w, float *y, ptrdiff_t N, ptrdiff_t K, float step,
                         const float *scale, const float *bias) {
    #pragma omp parallel for if (N * K > ALONE)
    for (ptrdiff_t row = 0; row < N; row++)
        y[row] = finish(step * dot(x, w + row * K, K), scale, bias, row);
}

extern "C" void multiply_float32(const float *x, const float *w, float *y, ptrdiff_t n, ptrdiff_t N,
                                 ptrdiff_t K, const float *scale, const float *bias) {
    if (n == 1) return multiply_row(x, w, y, N, K, 1, scale, bias);
    multiply_rows(x, w, y, n, N, K, scale, bias);
}

// Order numbers as widen() orders those of bf16.
static void order(const float *x, float *ordered, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += 2 * LANES)
        for (int j = 0; j < LANES; j++)
            ordered[i + j] = x[i + 2 * j], ordered[i + LANES + j] = x[i + 2 * j + 1];
}

extern "C" void multiply_bfloat16(const float *x, const uint16_t *w, float *y, ptrdiff_t n,
                                  ptrdiff_t N, ptrdiff_t K, const float *scale, const float *bias) {
    float *ordered = new float[n * K];
    order(x, ordered, n * K);
    if (n == 1)
        multiply_row(ordered, w, y, N, K, 1, scale, bias);
    else
        multiply_rows(ordered, w, y, n, N, K, scale, bias);
    delete[] ordered;
}

// One row of x is rounded to 2^14 steps of its own, or fewer where sums could exceed 32 bits:
// products of integers take half the time.
extern "C" void multiply_int8(const float *x, const int8_t *w, float *y, ptrdiff_t n, ptrdiff_t N,
                              ptrdiff_t K, const float *scale, const float *bias) {
    if (n > 1) return multiply_rows(x, w, y, n, N, K, scale, bias);
    float most = 1e-30f, total = 1e-30f;
    for (ptrdiff_t k = 0; k < K; k++) {
        float size = x[k] < 0 ? -x[k] : x[k];
        most = size > most ? size : most, total += size;
    }
    float steps = (1 << 14) / most, bound = ((1 << 24) - K) / total;
    steps = bound < steps ? bound : steps;
    int16_t *rounded = new int16_t[K];
    for (ptrdiff_t k = 0; k < K; k++) rounded[k] = (int)(x[k] * steps + (x[k] < 0 ? -0.5f : 0.5f));
    float step = total == total ? 1 / steps : total;  // NaN stays NaN
    multiply_row(rounded, w, y, N, K, step, scale, bias);
    delete[] rounded;
}

// y (B, H, D) = softmax(q k^T / sqrt(D)) v, for q (B, H, D) and k, v (B, G, S, D), whose rows and
// heads are row_step and head_step numbers apart. is_seen: S bytes, those of the next row
// mask_step later.
template <typename T>
static void attend(const float *q, const T *k, const T *v, const uint8_t *is_seen, float *y,
                   const ptrdiff_t *sizes) {
    const ptrdiff_t B = sizes[0], H = sizes[1], G = sizes[2], S = sizes[3], D = sizes[4];
    const ptrdiff_t row_step = sizes[5], head_step = sizes[6], mask_step = sizes[7];
    constexpr bool is_bf16 = sizeof(T) == 2;
    #pragma omp parallel for if (2 * B * G * S * D > ALONE)
    for (ptrdiff_t item = 0; item < B * H; item++) {
        ptrdiff_t b = item / H, start = b * row_step + item % H / (H / G) * head_step;
        const uint8_t *seen = is_seen + b * mask_step;
        float *weights = new float[S + 3 * D], *query = weights + S, *wide = query + D;
        float *mixed = wide + D, most = -INFINITY, total = 0;
        if (is_bf16) order(q + item * D, query, D);
        else memcpy(query, q + item * D, 4 * D);
        for (ptrdiff_t s = 0; s < S; s++) {
            weights[s] = -INFINITY;
            if (!seen[s]) continue;
            vec sums[2] = {};
            for (ptrdiff_t d = 0; d < D; d += 2 * LANES) {
                widen(k + start + s * D + d, wide);
                sums[0] += load(query + d) * load(wide);
                sums[1] += load(query + d + LANES) * load(wide + LANES);
            }
            weights[s] = sum(sums[0] + sums[1]) / sqrtf(D);
            most = weights[s] > most ? weights[s] : most;
        }
        for (ptrdiff_t s = 0; s < S; s++) {
            weights[s] = seen[s] ? expf(weights[s] - most) : 0;
            total += weights[s];
        }
        memset(mixed, 0, 4 * D);
        for (ptrdiff_t s = 0; s < S; s++) {
            if (!seen[s]) continue;
            for (ptrdiff_t d = 0; d < D; d += 2 * LANES) {
                widen(v + start + s * D + d, wide);
                *(vec *)(mixed + d) += weights[s] * load(wide);
                *(vec *)(mixed + d + LANES) += weights[s] * load(wide + LANES);
            }
        }
        for (ptrdiff_t d = 0; d < D; d++) {
            ptrdiff_t i = d % (2 * LANES);
            y[item * D + d] = mixed[is_bf16 ? d - i + i / 2 + i % 2 * LANES : d] / total;
        }
        delete[] weights;
    }
}

extern "C" void attend_float32(const float *q, const float *k, const float *v, const uint8_t *seen,
                               float *y, const ptrdiff_t *sizes) { attend(q, k, v, seen, y, sizes); }
extern "C" void attend_bfloat16(const float *q, const uint16_t *k, const uint16_t *v,
                                const uint8_t *seen, float *y, const ptrdiff_t *sizes) {
    attend(q, k, v, seen, y, sizes);
}

// A block of model.py on one token of each of B rows, as its Block.forward() ---------------------

struct Linear {
    const void *weight;
    const float *scale, *bias;
    ptrdiff_t N, K, bytes;  // bytes: of a weight
};

struct Norm {
    const float *weight, *bias;
    ptrdiff_t is_rms;
    double eps;
};

struct Block {
    Linear c_attn, attn_proj, c_fc, mlp_proj;
    Norm ln_1, ln_2, q_norm, k_norm;  // eps of q_norm and k_norm is 0: without
    const float *lambdas;
    ptrdiff_t H, G, D, mlp;  // mlp: 0 gelu, 1 gelu_erf, 2 swiglu, 3 relu2
};

struct Step {
    ptrdiff_t B;
    const float *x, *x0, *value_embedding;
    float *y;
    const float *cos, *sin;  // (1 or B, D / 2); null: no rotation
    ptrdiff_t rotation_step;
    const int64_t *slots;  // of the new tokens, (1 or B,)
    ptrdiff_t slot_step;
    void *k, *v;
    ptrdiff_t bytes;  // of a cached number
    const uint8_t *seen;
    const ptrdiff_t *sizes;  // attend()'s
};

static void apply(const Linear &l, const float *x, float *y, ptrdiff_t n) {
    if (l.bytes == 4) multiply_float32(x, (const float *)l.weight, y, n, l.N, l.K, l.scale, l.bias);
    if (l.bytes == 2)
        multiply_bfloat16(x, (const uint16_t *)l.weight, y, n, l.N, l.K, l.scale, l.bias);
    if (l.bytes == 1) multiply_int8(x, (const int8_t *)l.weight, y, n, l.N, l.K, l.scale, l.bias);
}

static void apply(const Norm &norm, const float *x, float *y, ptrdiff_t C) {
    float mean = 0, square = 0;
    if (!norm.is_rms) {
        for (ptrdiff_t c = 0; c < C; c++) mean += x[c];
        mean /= C;
    }
    for (ptrdiff_t c = 0; c < C; c++) square += (x[c] - mean) * (x[c] - mean);
    float factor = 1 / sqrtf(square / C + (float)norm.eps);
    for (ptrdiff_t c = 0; c < C; c++)
        y[c] = (x[c] - mean) * factor * (norm.weight ? norm.weight[c] : 1)
             + (norm.bias ? norm.bias[c] : 0);
}

// Channels d and d + D / 2 are a point that turns, as in model.rotate().
static void rotate(float *x, const float *cos, const float *sin, ptrdiff_t D) {
    for (ptrdiff_t d = 0; d < D / 2; d++) {
        float a = x[d], b = x[d + D / 2];
        x[d] = a * cos[d] - b * sin[d], x[d + D / 2] = a * sin[d] + b * cos[d];
    }
}

static void store(const float *x, void *cache, ptrdiff_t start, ptrdiff_t D, ptrdiff_t bytes) {
    if (bytes == 4) {
        memcpy((float *)cache + start, x, 4 * D);
        return;
    }
    for (ptrdiff_t d = 0; d < D; d++) {  // to the nearest bf16, of two to the even one
        uint32_t bits;
        memcpy(&bits, x + d, 4);
        ((uint16_t *)cache)[start + d] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
}

static void activate(const float *x, float *y, ptrdiff_t n, ptrdiff_t mlp) {
    const float c = 2 * sqrtf(2 / 3.14159265358979f);
    if (mlp == 0)
        for (ptrdiff_t i = 0; i < n; i++)
            y[i] = x[i] / (1 + expf(-c * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
    if (mlp == 1)
        for (ptrdiff_t i = 0; i < n; i++) y[i] = 0.5f * x[i] * (1 + erff(x[i] * sqrtf(0.5f)));
    if (mlp == 2)
        for (ptrdiff_t i = 0; i < n; i++) y[i] = x[i] / (1 + expf(-x[i])) * x[n + i];
    if (mlp == 3)
        for (ptrdiff_t i = 0; i < n; i++) y[i] = x[i] > 0 ? x[i] * x[i] : 0 * x[i];
}

static void mix(const Block &block, const Step &s, const float *normed, float *mixed) {
    const ptrdiff_t H = block.H, G = block.G, D = block.D, width = (H + 2 * G) * D;
    float *qkv = new float[s.B * width], *q = new float[s.B * H * D];
    apply(block.c_attn, normed, qkv, s.B);
    for (ptrdiff_t b = 0; b < s.B; b++) {
        float *row = qkv + b * width;
        for (ptrdiff_t head = 0; head < H + G; head++) {
            const Norm &norm = head < H ? block.q_norm : block.k_norm;
            if (norm.eps) apply(norm, row + head * D, row + head * D, D);
            ptrdiff_t start = b * s.rotation_step;
            if (s.cos) rotate(row + head * D, s.cos + start, s.sin + start, D);
        }
        float *k = row + H * D, *v = k + G * D;
        for (ptrdiff_t i = 0; s.value_embedding && i < G * D; i++)
            v[i] += s.value_embedding[b * G * D + i];
        for (ptrdiff_t g = 0; g < G; g++) {
            ptrdiff_t place = b * s.sizes[5] + g * s.sizes[6] + s.slots[b * s.slot_step] * D;
            store(k + g * D, s.k, place, D, s.bytes);
            store(v + g * D, s.v, place, D, s.bytes);
        }
        memcpy(q + b * H * D, row, 4 * H * D);
    }
    float *heads = qkv;  // (B, H, D) fits
    if (s.bytes == 4) attend(q, (const float *)s.k, (const float *)s.v, s.seen, heads, s.sizes);
    else attend(q, (const uint16_t *)s.k, (const uint16_t *)s.v, s.seen, heads, s.sizes);
    apply(block.attn_proj, heads, mixed, s.B);
    delete[] qkv;
    delete[] q;
}

extern "C" void run_block(const Block *of, const Step *step) {
    const Block &block = *of;
    const Step &s = *step;
    const ptrdiff_t C = block.c_attn.K, n = s.B * C, wide = block.c_fc.N, inner = block.mlp_proj.K;
    float *normed = new float[n], *added = new float[n];
    float *hidden = new float[s.B * wide], *active = new float[s.B * inner];
    for (ptrdiff_t i = 0; i < n; i++)
        s.y[i] = block.lambdas ? block.lambdas[0] * s.x[i] + block.lambdas[1] * s.x0[i] : s.x[i];
    for (ptrdiff_t b = 0; b < s.B; b++) apply(block.ln_1, s.y + b * C, normed + b * C, C);
    mix(block, s, normed, added);
    for (ptrdiff_t i = 0; i < n; i++) s.y[i] += added[i];
    for (ptrdiff_t b = 0; b < s.B; b++) apply(block.ln_2, s.y + b * C, normed + b * C, C);
    apply(block.c_fc, normed, hidden, s.B);
    for (ptrdiff_t b = 0; b < s.B; b++)
        activate(hidden + b * wide, active + b * inner, inner, block.mlp);
    apply(block.mlp_proj, active, added, s.B);
    for (ptrdiff_t i = 0; i < n; i++) s.y[i] += added[i];
    delete[] normed;
    delete[] added;
    delete[] hidden;
    delete[] active;
}
