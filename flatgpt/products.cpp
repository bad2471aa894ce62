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
