/* Blocks of EVA ViT (Fang et al., 2022) in bfloat16 for x86 CPUs with AMX, on Linux; eva_block.py calls it.
 *
 * AMX makes matrix products so fast that everything between them counts as much. So a pass through all blocks is one
 * call, and what one product writes is laid out as the next one reads it: in tiles of 16 rows by 32 numbers (1 KiB),
 * the size of a register of AMX. The states, to which each block adds, stay in float32 and in the usual order. A thread
 * takes an image of its own where there are enough of them: its 257 tokens stay in a core's second cache while the
 * weights stream past. With fewer images than threads, several threads share one and meet after each step.
 *
 * Layouts: activations are tiles [16 rows][32 features], a row of tiles after the other; rows behind the last token
 * hold anything and are never looked at. Weights are [32 outputs][32 inputs][2 tiles of 16 outputs], and in each of the
 * tiles [pair of inputs][output][2], as the instruction wants its right factor; `pack` of eva_block.py makes them.
 * All widths are multiples of 32; features of each head are filled up to one with zeros.
 */
#define _GNU_SOURCE
#include <immintrin.h>
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef uint16_t bf16;

enum { TILE = 512, ROWS = 16, COLUMNS = 32 }; /* numbers in a tile of bfloat16; its shape */
enum { STEPS = 8 };  /* tiles of inputs after which sums are set aside, so that all that is read fits the first cache */
enum { CHUNK = 48 }; /* tiles of an MLP's hidden features that are computed and used before the next ones: second cache */

#define FENCE() __asm__ volatile("" ::: "memory") /* the compiler's tile instructions do not say what memory they read */

struct layer {
    const bf16 *weight; /* packed */
    const bf16 *bias;   /* (outputs), or null */
};

struct block {
    int64_t width, heads, head_width, hidden;
    float epsilon;
    const bf16 *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
    struct layer qkv, proj, fc1, fc2;
};

/* A thread and those that work on the same image. */
struct team {
    _Alignas(64) atomic_int arrived;
    atomic_int round;
    int members;
};

struct worker {
    struct team *team;
    int member;
};

/* Waits until all members of the team are here. */
static void meet(const struct worker *worker) {
    struct team *team = worker->team;
    FENCE();
    if (team->members == 1) return;
    const int round = atomic_load(&team->round);
    if (atomic_fetch_add(&team->arrived, 1) + 1 == team->members) {
        atomic_store(&team->arrived, 0);
        atomic_store(&team->round, round + 1);
        return;
    }
    for (int turns = 0; atomic_load(&team->round) == round; turns++) {
        if (turns < 4096)
            _mm_pause();
        else
            sched_yield(); /* another process has the core of one that is waited for */
    }
}

/* This worker's part of `count` things: from the first to before the last. */
static inline int64_t first_of(const struct worker *worker, int64_t count) {
    return count * worker->member / worker->team->members;
}

static inline int64_t end_of(const struct worker *worker, int64_t count) {
    return count * (worker->member + 1) / worker->team->members;
}

static inline int64_t tiles_of(int64_t numbers, int64_t size) { return (numbers + size - 1) / size; }

/* ---- Numbers ---------------------------------------------------------------------------------------------------- */

static inline __m512 from_bf16(const bf16 *numbers) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)numbers)), 16));
}

static inline void store_bf16(bf16 *target, __m512 low, __m512 high) {
    _mm512_storeu_si512(target, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

/* e^x for x <= 0 to about 2 units in the last place: 2^n times a Taylor polynomial of the rest. */
static inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x); /* in this order NaN stays NaN */
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 rest = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    rest = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), rest);
    __m512 sum = _mm512_set1_ps(1.0f / 720);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f / 120));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f / 24));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f / 6));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.5f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, n);
}

/* x/2 (1 + erf(x / sqrt 2)), with erf of Abramowitz and Stegun, 7.1.26, whose error is below 1.5e-7. */
static inline __m512 gelu(__m512 x) {
    const __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678f));
    const __m512 t = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), _mm512_set1_ps(1.0f)));
    __m512 sum = _mm512_set1_ps(1.061405429f);
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(-1.453152027f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(1.421413741f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(-0.284496736f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(0.254829592f));
    /* erfc(z) */
    const __m512 outside = _mm512_mul_ps(_mm512_mul_ps(sum, t), exponential(_mm512_fnmadd_ps(z, z, _mm512_setzero_ps())));
    const __m512 half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
    const __m512 tail = _mm512_mul_ps(half, outside); /* what a negative x is left with, and a positive one loses */
    return _mm512_mask_sub_ps(tail, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ), x, tail);
}

/* ---- Matrix products -------------------------------------------------------------------------------------------- */

enum finish { STORE, STORE_GELU, ADD };

struct product {
    const bf16 *left;   /* tiles [row tile][left_stride] */
    int64_t left_stride, row_tiles;
    const bf16 *right;  /* tiles [pair of outputs][right_stride][2] */
    int64_t right_stride, steps, pairs;
    const bf16 *bias;   /* or null */
    enum finish finish;
    bf16 *tiles;        /* STORE: [row tile][pairs] */
    float *states;      /* ADD: (rows, width) */
    int64_t rows, width;
    float *sums;        /* scratch: [row tile][2][16][16] */
};

static void finish_tile(const struct product *p, int64_t row_tile, int64_t pair) {
    const float *sums = p->sums + row_tile * TILE;
    const __m512 bias0 = p->bias ? from_bf16(p->bias + pair * COLUMNS) : _mm512_setzero_ps();
    const __m512 bias1 = p->bias ? from_bf16(p->bias + pair * COLUMNS + 16) : _mm512_setzero_ps();
    int64_t rows = ROWS;
    if (p->finish == ADD) {
        if (rows > p->rows - row_tile * ROWS) rows = p->rows - row_tile * ROWS;
        float *states = p->states + row_tile * ROWS * p->width + pair * COLUMNS;
        for (int64_t row = 0; row < rows; row++, states += p->width) {
            const __m512 low = _mm512_add_ps(_mm512_loadu_ps(states), bias0);
            const __m512 high = _mm512_add_ps(_mm512_loadu_ps(states + 16), bias1);
            _mm512_storeu_ps(states, _mm512_add_ps(low, _mm512_loadu_ps(sums + row * 16)));
            _mm512_storeu_ps(states + 16, _mm512_add_ps(high, _mm512_loadu_ps(sums + TILE / 2 + row * 16)));
        }
        return;
    }
    bf16 *tile = p->tiles + (row_tile * p->pairs + pair) * TILE;
    for (int64_t row = 0; row < rows; row++) {
        __m512 low = _mm512_add_ps(_mm512_loadu_ps(sums + row * 16), bias0);
        __m512 high = _mm512_add_ps(_mm512_loadu_ps(sums + TILE / 2 + row * 16), bias1);
        if (p->finish == STORE_GELU) low = gelu(low), high = gelu(high);
        store_bf16(tile + row * COLUMNS, low, high);
    }
}

/* Two tiles of rows by two of columns at a time, so that each that is loaded takes part in two products. Their sums are
 * the registers 0 (upper left), 1 (upper right), 2 and 3. */
static inline void zero_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

static inline void load_sums(const float *upper, const float *lower) {
    _tile_loadd(0, upper, 64);
    _tile_loadd(1, upper + TILE / 2, 64);
    _tile_loadd(2, lower, 64);
    _tile_loadd(3, lower + TILE / 2, 64);
}

static inline void store_sums(float *upper, float *lower) {
    _tile_stored(0, upper, 64);
    _tile_stored(1, upper + TILE / 2, 64);
    _tile_stored(2, lower, 64);
    _tile_stored(3, lower + TILE / 2, 64);
    FENCE();
}

static inline void add_product(const bf16 *upper, const bf16 *lower, const bf16 *left, const bf16 *right) {
    _tile_loadd(4, upper, 64);
    _tile_loadd(6, left, 64);
    _tile_loadd(7, right, 64);
    _tile_loadd(5, lower, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

static void multiply(const struct worker *worker, const struct product *p) {
    const int64_t end_pair = end_of(worker, p->pairs);
    for (int64_t pair = first_of(worker, p->pairs); pair < end_pair; pair++)
        for (int64_t begin = 0; begin < p->steps; begin += STEPS) {
            const int64_t count = p->steps - begin < STEPS ? p->steps - begin : STEPS;
            const int last = begin + count == p->steps;
            const bf16 *right = p->right + (pair * p->right_stride + begin) * 2 * TILE;
            /* Weights come from far: the next ones are asked for while these are multiplied. */
            const bf16 *next = last ? p->right + (pair + 1) * p->right_stride * 2 * TILE : right + count * 2 * TILE;
            const bf16 *const end = next + (last && pair + 1 == end_pair ? 0 : STEPS * 2 * TILE);
            for (int64_t row_tile = 0; row_tile < p->row_tiles; row_tile += 2) {
                const int64_t lone = row_tile + 1 == p->row_tiles;
                const bf16 *left = p->left + (row_tile * p->left_stride + begin) * TILE;
                float *sums = p->sums + row_tile * TILE;
                if (lone) {
                    _tile_zero(0);
                    _tile_zero(1);
                    if (begin) {
                        _tile_loadd(0, sums, 64);
                        _tile_loadd(1, sums + TILE / 2, 64);
                    }
                    for (int64_t step = 0; step < count; step++) {
                        _tile_loadd(4, left + step * TILE, 64);
                        _tile_loadd(6, right + step * 2 * TILE, 64);
                        _tile_loadd(7, right + (step * 2 + 1) * TILE, 64);
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_dpbf16ps(1, 4, 7);
                    }
                    _tile_stored(0, sums, 64);
                    _tile_stored(1, sums + TILE / 2, 64);
                    FENCE();
                } else {
                    const bf16 *below = left + p->left_stride * TILE;
                    if (begin)
                        load_sums(sums, sums + TILE);
                    else
                        zero_sums();
                    for (int64_t step = 0; step < count; step++) {
                        for (int line = 0; line < 4 && next < end; line++, next += COLUMNS)
                            _mm_prefetch((const char *)next, _MM_HINT_T1);
                        add_product(left + step * TILE, below + step * TILE, right + step * 2 * TILE,
                                    right + (step * 2 + 1) * TILE);
                    }
                    store_sums(sums, sums + TILE);
                }
                if (last)
                    for (int64_t tile = row_tile; tile <= row_tile + 1 - lone; tile++) finish_tile(p, tile, pair);
                FENCE();
            }
        }
}

/* ---- Between the products --------------------------------------------------------------------------------------- */

static void layer_norm(const struct worker *worker, const float *states, int64_t rows, int64_t width,
                       const bf16 *weight, const bf16 *bias, float epsilon, bf16 *tiles) {
    const int64_t end = end_of(worker, rows);
    for (int64_t row = first_of(worker, rows); row < end; row++) {
        const float *state = states + row * width;
        __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < width; i += 16) sum = _mm512_add_ps(sum, _mm512_loadu_ps(state + i));
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / (float)width);
        for (int64_t i = 0; i < width; i += 16) {
            const __m512 off = _mm512_sub_ps(_mm512_loadu_ps(state + i), mean);
            squares = _mm512_fmadd_ps(off, off, squares);
        }
        const __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)width + epsilon));
        bf16 *target = tiles + (row / ROWS * (width / COLUMNS)) * TILE + row % ROWS * COLUMNS;
        for (int64_t i = 0; i < width; i += COLUMNS, target += TILE) {
            const __m512 low = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(state + i), mean), scale);
            const __m512 high = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(state + i + 16), mean), scale);
            store_bf16(target, _mm512_fmadd_ps(low, from_bf16(weight + i), from_bf16(bias + i)),
                       _mm512_fmadd_ps(high, from_bf16(weight + i + 16), from_bf16(bias + i + 16)));
        }
    }
}

/* A tile of 16 rows by 16 pairs to 16 pairs by 16 rows. */
static void transpose_pairs(const bf16 *tile, bf16 *target) {
    const __m512i column = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(16));
    for (int pair = 0; pair < 16; pair++)
        _mm512_storeu_si512(target + pair * COLUMNS, _mm512_i32gather_epi32(column, (const int *)tile + pair, 4));
}

/* `count` rows of 32 numbers each, to two tiles of pairs of rows by 16 numbers; rows behind `count` become zeros. */
static void pair_rows(const bf16 *upper, const bf16 *lower, int64_t count, bf16 *left, bf16 *right) {
    for (int64_t row = 0; row < 2 * ROWS; row += 2) {
        const bf16 *source = row < ROWS ? upper + row * COLUMNS : lower + (row - ROWS) * COLUMNS;
        for (int half = 0; half < 2; half++) {
            const __m256i nothing = _mm256_setzero_si256();
            const __m256i first = row < count ? _mm256_loadu_si256((const __m256i *)(source + half * 16)) : nothing;
            const __m256i second = row + 1 < count ? _mm256_loadu_si256((const __m256i *)(source + COLUMNS + half * 16)) : nothing;
            const __m512i both = _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
            _mm512_storeu_si512((half ? right : left) + row / 2 * COLUMNS, both);
        }
    }
}

/* Scores (row, [key tile][16 rows][16]) of `tokens` keys to probabilities not yet divided by their sum. */
static float soften(const float *scores, int64_t tokens, float scale, bf16 *target) {
    const int64_t tiles = tiles_of(tokens, ROWS), step = TILE / 2;
    const __mmask16 mask = (__mmask16)(tokens % ROWS ? (1 << tokens % ROWS) - 1 : 0xFFFF);
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    __m512 top = _mm512_mask_loadu_ps(lowest, mask, scores + (tiles - 1) * step);
    for (int64_t tile = 0; tile + 1 < tiles; tile++) top = _mm512_max_ps(top, _mm512_loadu_ps(scores + tile * step));
    const __m512 factor = _mm512_set1_ps(scale), offset = _mm512_set1_ps(-scale * _mm512_reduce_max_ps(top));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t tile = 0; tile < tiles; tile += 2) {
        __m512 both[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int i = 0; i < 2 && tile + i < tiles; i++) {
            const __m512 exponent = _mm512_fmadd_ps(_mm512_loadu_ps(scores + (tile + i) * step), factor, offset);
            both[i] = _mm512_maskz_mov_ps(tile + i + 1 == tiles ? mask : (__mmask16)0xFFFF, exponential(exponent));
            sum = _mm512_add_ps(sum, both[i]);
        }
        store_bf16(target + tile / 2 * TILE, both[0], both[1]);
    }
    return _mm512_reduce_add_ps(sum);
}

struct sizes {
    int64_t rows, steps;          /* tiles of tokens, as rows (16) and as inputs of a product (32) */
    int64_t depth, inner;         /* tiles of a head's features, of those of all heads */
    int64_t width, hidden, chunk; /* tiles of features: of a token, of the MLP, of as many as are computed at a time */
    int64_t narrow, wide;         /* tiles of activations of an image: between products, and the widest */
    int64_t keys, values, weights, scratch; /* tiles of what each worker needs for itself: for a head, and all */
};

static struct sizes sizes_of(const struct block *b, int64_t tokens) {
    struct sizes s = {.rows = tiles_of(tokens, ROWS), .steps = tiles_of(tokens, COLUMNS)};
    s.depth = tiles_of(b->head_width, COLUMNS), s.inner = b->heads * s.depth;
    s.width = b->width / COLUMNS, s.hidden = b->hidden / COLUMNS, s.chunk = s.hidden < CHUNK ? s.hidden : CHUNK;
    s.narrow = s.rows * (s.inner > s.width ? s.inner : s.width);
    s.wide = s.rows * (3 * s.inner > s.chunk ? 3 * s.inner : s.chunk);
    s.keys = (s.rows + 1) * s.depth, s.values = 2 * s.depth * s.steps, s.weights = 2 * s.steps;
    const int64_t sums = 2 * (s.rows + 1); /* float32 of a product, or scores of two tiles of queries */
    s.scratch = s.keys + s.values + s.weights + sums;
    return s;
}

/* Scores and then weighted values of one head, two tiles of queries at a time.
 * `qkv` is [row tile][3][head][depth], `result` [row tile][head][depth], both in tiles. */
static void attend(const struct worker *worker, const struct block *b, const struct sizes *s, int64_t tokens,
                   const bf16 *qkv, bf16 *result, bf16 *scratch) {
    const int64_t stride = 3 * s->inner, depth = s->depth;
    const float scale = 1.0f / sqrtf((float)b->head_width);
    bf16 *keys = scratch;                       /* [key tile][depth] */
    bf16 *values = keys + s->keys * TILE;       /* [depth][step][2] */
    bf16 *weights = values + s->values * TILE;  /* [2 row tiles][step] */
    float *scores = (float *)(weights + s->weights * TILE); /* [2 row tiles][key tile][16][16] */
    const int64_t score_stride = (s->rows + 1) * TILE / 2;
    for (int64_t head = first_of(worker, b->heads); head < end_of(worker, b->heads); head++) {
        const bf16 *query = qkv + head * depth * TILE;
        const bf16 *key = query + s->inner * TILE, *value = key + s->inner * TILE;
        for (int64_t tile = 0; tile < s->rows; tile++)
            for (int64_t part = 0; part < depth; part++)
                transpose_pairs(key + (tile * stride + part) * TILE, keys + (tile * depth + part) * TILE);
        for (int64_t part = 0; part < depth; part++)
            for (int64_t step = 0; step < s->steps; step++) {
                const bf16 *upper = value + (2 * step * stride + part) * TILE;
                bf16 *pairs = values + (part * s->steps + step) * 2 * TILE;
                pair_rows(upper, upper + stride * TILE, tokens - step * COLUMNS, pairs, pairs + TILE);
            }
        FENCE();
        for (int64_t row_tile = 0; row_tile < s->rows; row_tile += 2) {
            const int64_t rows = row_tile + 1 < s->rows ? 2 : 1; /* a lone tile is computed twice */
            const bf16 *left = query + row_tile * stride * TILE, *below = left + (rows - 1) * stride * TILE;
            for (int64_t tile = 0; tile < s->rows; tile += 2) { /* behind a lone tile of keys another is read, unused */
                zero_sums();
                for (int64_t part = 0; part < depth; part++)
                    add_product(left + part * TILE, below + part * TILE, keys + (tile * depth + part) * TILE,
                                keys + ((tile + 1) * depth + part) * TILE);
                store_sums(scores + tile * TILE / 2, scores + score_stride + tile * TILE / 2);
            }
            float parts[2 * ROWS];
            for (int64_t row = 0; row < rows * ROWS; row++)
                parts[row] = 1.0f / soften(scores + row / ROWS * score_stride + row % ROWS * 16, tokens, scale,
                                           weights + row / ROWS * s->steps * TILE + row % ROWS * COLUMNS);
            FENCE();
            for (int64_t part = 0; part < depth; part++) {
                zero_sums();
                for (int64_t step = 0; step < s->steps; step++) {
                    const bf16 *pairs = values + (part * s->steps + step) * 2 * TILE;
                    add_product(weights + step * TILE, weights + ((rows - 1) * s->steps + step) * TILE, pairs,
                                pairs + TILE);
                }
                store_sums(scores, scores + TILE);
                for (int64_t row = 0; row < rows * ROWS; row++) {
                    const float *sums = scores + row / ROWS * TILE + row % ROWS * 16;
                    const __m512 factor = _mm512_set1_ps(parts[row]);
                    bf16 *target = result + ((row_tile + row / ROWS) * s->inner + head * depth + part) * TILE;
                    store_bf16(target + row % ROWS * COLUMNS, _mm512_mul_ps(_mm512_loadu_ps(sums), factor),
                               _mm512_mul_ps(_mm512_loadu_ps(sums + TILE / 2), factor));
                }
                FENCE();
            }
        }
    }
}

/* One image, states of (tokens, width), through one block, in place. */
static void forward_block(const struct worker *worker, const struct block *b, float *states, int64_t tokens,
                          bf16 *workspace) {
    const struct sizes s = sizes_of(b, tokens);
    bf16 *narrow = workspace, *wide = narrow + s.narrow * TILE;
    bf16 *scratch = wide + (s.wide + worker->member * s.scratch) * TILE;
    const struct product product = {.row_tiles = s.rows, .states = states, .rows = tokens, .width = b->width,
                                    .sums = (float *)scratch};

    layer_norm(worker, states, tokens, b->width, b->norm1_weight, b->norm1_bias, b->epsilon, narrow);
    meet(worker);
    struct product qkv = product;
    qkv.left = narrow, qkv.left_stride = qkv.right_stride = qkv.steps = s.width;
    qkv.right = b->qkv.weight, qkv.bias = b->qkv.bias, qkv.pairs = 3 * s.inner;
    qkv.finish = STORE, qkv.tiles = wide;
    multiply(worker, &qkv);
    meet(worker);
    attend(worker, b, &s, tokens, wide, narrow, scratch);
    meet(worker);
    struct product proj = product;
    proj.left = narrow, proj.left_stride = proj.right_stride = proj.steps = s.inner;
    proj.right = b->proj.weight, proj.bias = b->proj.bias, proj.pairs = s.width;
    proj.finish = ADD;
    multiply(worker, &proj);
    meet(worker);
    layer_norm(worker, states, tokens, b->width, b->norm2_weight, b->norm2_bias, b->epsilon, narrow);
    for (int64_t begin = 0; begin < s.hidden; begin += s.chunk) {
        const int64_t count = s.hidden - begin < s.chunk ? s.hidden - begin : s.chunk;
        meet(worker);
        struct product fc1 = product;
        fc1.left = narrow, fc1.left_stride = fc1.right_stride = fc1.steps = s.width;
        fc1.right = b->fc1.weight + begin * s.width * 2 * TILE, fc1.bias = b->fc1.bias + begin * COLUMNS;
        fc1.pairs = count, fc1.finish = STORE_GELU, fc1.tiles = wide;
        multiply(worker, &fc1);
        meet(worker);
        struct product fc2 = product;
        fc2.left = wide, fc2.left_stride = fc2.steps = count;
        fc2.right = b->fc2.weight + begin * 2 * TILE, fc2.right_stride = s.hidden;
        fc2.bias = begin ? NULL : b->fc2.bias, fc2.pairs = s.width, fc2.finish = ADD;
        multiply(worker, &fc2);
    }
    meet(worker);
}

/* ---- What Python calls ------------------------------------------------------------------------------------------ */

struct task {
    const struct block *blocks;
    int64_t num_blocks;
    float *states; /* (images, tokens, width) */
    int64_t images, tokens;
    char *workspace;
    int64_t team_bytes;
    struct team *teams;
    int64_t num_teams;
    atomic_int start; /* 0: wait, 1: go, -1: not all threads could be made */
};

struct thread {
    struct task *task;
    int64_t number;
    pthread_t handle;
};

static void work(const struct task *task, int64_t number) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1}, before;
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = ROWS;
    _tile_storeconfig(&before); /* torch may count on finding its own again */
    FENCE();
    _tile_loadconfig(&config);
    const int64_t team = number % task->num_teams;
    const struct worker worker = {&task->teams[team], (int)(number / task->num_teams)};
    for (int64_t block = 0; block < task->num_blocks; block++)
        for (int64_t image = team; image < task->images; image += task->num_teams) {
            const struct block *b = &task->blocks[block];
            forward_block(&worker, b, task->states + image * task->tokens * b->width, task->tokens,
                          (bf16 *)(task->workspace + team * task->team_bytes));
        }
    if (before.palette)
        _tile_loadconfig(&before);
    else
        _tile_release();
}

static void *run(void *argument) {
    const struct thread *thread = argument;
    int start;
    while (!(start = atomic_load(&thread->task->start))) sched_yield();
    if (start > 0) work(thread->task, thread->number);
    return NULL;
}

/* The SHA-256 of this file as it was compiled. */
const char *eva_block_source(void) { return EVA_BLOCK_SOURCE; }

/* Asks Linux for the registers of AMX; 0 if it gives them. */
int eva_block_prepare(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return (int)syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

/* Bytes of workspace that so many threads need for images of so many tokens. */
int64_t eva_block_workspace(const struct block *block, int64_t images, int64_t tokens, int64_t threads) {
    const struct sizes s = sizes_of(block, tokens);
    const int64_t teams = images < threads ? images : threads, members = threads / teams;
    return teams * (s.narrow + s.wide + members * s.scratch) * TILE * (int64_t)sizeof(bf16);
}

/* States (images, tokens, width) through all blocks, in place, on `threads` threads of which this is one.
 * Blocks have the same sizes. Returns 0, or an error number of the system; the states are then as they were. */
int eva_block_forward(const struct block *blocks, int64_t num_blocks, float *states, int64_t images, int64_t tokens,
                      void *workspace, int64_t threads) {
    const int64_t teams = images < threads ? images : threads, members = threads / teams, others = teams * members - 1;
    struct task task = {.blocks = blocks, .num_blocks = num_blocks, .states = states, .images = images, .tokens = tokens,
                        .workspace = workspace, .num_teams = teams,
                        .team_bytes = eva_block_workspace(blocks, images, tokens, threads) / teams};
    task.teams = aligned_alloc(64, (size_t)teams * sizeof(struct team));
    struct thread *helpers = calloc((size_t)others + 1, sizeof(struct thread));
    int error = task.teams && helpers ? 0 : ENOMEM;
    int64_t made = 0;
    for (int64_t team = 0; team < teams && !error; team++) task.teams[team] = (struct team){.members = (int)members};
    for (; made < others && !error; made++) {
        helpers[made].task = &task, helpers[made].number = made + 1;
        error = pthread_create(&helpers[made].handle, NULL, run, &helpers[made]);
        if (error) break;
    }
    atomic_store(&task.start, error ? -1 : 1);
    if (!error) work(&task, 0);
    for (int64_t number = 0; number < made; number++) pthread_join(helpers[number].handle, NULL);
    free(helpers);
    free(task.teams);
    return error;
}
