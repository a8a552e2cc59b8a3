/* Matrix products of tiles, and what is done with each tile of a result while it is in the first cache. */
#pragma once

#include "numbers.h"
#include "teams.h"

enum { TILE = 512, ROWS = 16, COLUMNS = 32 }; /* numbers in a tile of bfloat16; its shape */
enum { STEPS = 8 }; /* tiles of inputs after which sums are set aside: what is read again then fits the first cache */

static inline int64_t tiles_of(int64_t numbers, int64_t size) { return (numbers + size - 1) / size; }

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
    const __m512 zero = _mm512_setzero_ps(), left_bias = p->bias ? from_bf16(p->bias + pair * COLUMNS) : zero;
    const __m512 right_bias = p->bias ? from_bf16(p->bias + pair * COLUMNS + 16) : zero;
    const int64_t rows = p->finish == ADD && p->rows - row_tile * ROWS < ROWS ? p->rows - row_tile * ROWS : ROWS;
    for (int64_t row = 0; row < rows; row++) {
        __m512 left = _mm512_add_ps(_mm512_loadu_ps(sums + row * 16), left_bias);
        __m512 right = _mm512_add_ps(_mm512_loadu_ps(sums + TILE / 2 + row * 16), right_bias);
        if (p->finish == ADD) {
            float *states = p->states + (row_tile * ROWS + row) * p->width + pair * COLUMNS;
            _mm512_storeu_ps(states, _mm512_add_ps(_mm512_loadu_ps(states), left));
            _mm512_storeu_ps(states + 16, _mm512_add_ps(_mm512_loadu_ps(states + 16), right));
            continue;
        }
        if (p->finish == STORE_GELU) left = gelu(left), right = gelu(right);
        store_bf16(p->tiles + (row_tile * p->pairs + pair) * TILE + row * COLUMNS, left, right);
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

/* Two tiles of rows by a pair of outputs. `next` to `end` is what the following ones will need of the weights, which
 * come from far: it is asked for while these are multiplied. Returns what is left to ask for. */
static inline const bf16 *multiply_rows(const bf16 *upper, const bf16 *lower, const bf16 *right, int64_t steps,
                                        float *sums, int continued, const bf16 *next, const bf16 *end) {
    if (continued)
        load_sums(sums, sums + TILE);
    else
        zero_sums();
    for (int64_t step = 0; step < steps; step++, upper += TILE, lower += TILE, right += 2 * TILE) {
        for (int line = 0; line < 4 && next < end; line++, next += COLUMNS)
            _mm_prefetch((const char *)next, _MM_HINT_T1);
        add_product(upper, lower, right, right + TILE);
    }
    store_sums(sums, sums + TILE);
    return next;
}

/* The last tile of rows, if their number is odd. */
static inline void multiply_last_row(const bf16 *left, const bf16 *right, int64_t steps, float *sums, int continued) {
    _tile_zero(0);
    _tile_zero(1);
    if (continued) {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + TILE / 2, 64);
    }
    for (int64_t step = 0; step < steps; step++, left += TILE, right += 2 * TILE) {
        _tile_loadd(4, left, 64);
        _tile_loadd(6, right, 64);
        _tile_loadd(7, right + TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + TILE / 2, 64);
    FENCE();
}

static void multiply(const struct worker *worker, const struct product *p) {
    const int64_t end_pair = end_of(worker, p->pairs);
    for (int64_t pair = first_of(worker, p->pairs); pair < end_pair; pair++)
        for (int64_t begin = 0; begin < p->steps; begin += STEPS) {
            const int64_t count = p->steps - begin < STEPS ? p->steps - begin : STEPS;
            const int last = begin + count == p->steps, very_last = last && pair + 1 == end_pair;
            const bf16 *right = p->right + (pair * p->right_stride + begin) * 2 * TILE;
            const bf16 *next = last ? p->right + (pair + 1) * p->right_stride * 2 * TILE : right + count * 2 * TILE;
            const bf16 *const end = next + (very_last ? 0 : STEPS * 2 * TILE);
            for (int64_t row_tile = 0; row_tile < p->row_tiles; row_tile += 2) {
                const bf16 *upper = p->left + (row_tile * p->left_stride + begin) * TILE;
                const bf16 *lower = upper + p->left_stride * TILE;
                float *sums = p->sums + row_tile * TILE;
                const int both = row_tile + 1 < p->row_tiles;
                if (both)
                    next = multiply_rows(upper, lower, right, count, sums, begin > 0, next, end);
                else
                    multiply_last_row(upper, right, count, sums, begin > 0);
                if (!last) continue;
                finish_tile(p, row_tile, pair);
                if (both) finish_tile(p, row_tile + 1, pair);
                FENCE();
            }
        }
}
