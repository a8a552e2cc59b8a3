/* Attention of one image, a head after the other. */
#pragma once

#include <math.h>

#include "products.h"

/* A tile of 16 rows by 16 pairs to 16 pairs by 16 rows. */
static void transpose_pairs(const bf16 *tile, bf16 *target) {
    const __m512i rows = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i column = _mm512_slli_epi32(rows, 4);
    for (int pair = 0; pair < 16; pair++)
        _mm512_storeu_si512(target + pair * COLUMNS, _mm512_i32gather_epi32(column, (const int *)tile + pair, 4));
}

/* `count` rows of 32 numbers each, to two tiles of pairs of rows by 16 numbers; rows behind `count` become zeros. */
static void pair_rows(const bf16 *upper, const bf16 *lower, int64_t count, bf16 *left, bf16 *right) {
    for (int64_t row = 0; row < 2 * ROWS; row += 2) {
        const bf16 *source = row < ROWS ? upper + row * COLUMNS : lower + (row - ROWS) * COLUMNS;
        for (int half = 0; half < 2; half++) {
            const __m256i *even = (const __m256i *)(source + half * 16), *odd = even + 2;
            __m512i pair = _mm512_setzero_si512();
            if (row < count) pair = _mm512_cvtepu16_epi32(_mm256_loadu_si256(even));
            if (row + 1 < count)
                pair = _mm512_or_si512(pair, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(odd)), 16));
            _mm512_storeu_si512((half ? right : left) + row / 2 * COLUMNS, pair);
        }
    }
}

/* Scores (row, [key tile][16 rows][16]) of `tokens` keys to probabilities not yet divided by their sum. */
static float soften(const float *scores, int64_t tokens, float scale, bf16 *target) {
    const int64_t tiles = tiles_of(tokens, ROWS), step = TILE / 2;
    const __mmask16 all = 0xFFFF, mask = tokens % ROWS ? (__mmask16)((1 << tokens % ROWS) - 1) : all;
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    __m512 top = _mm512_mask_loadu_ps(lowest, mask, scores + (tiles - 1) * step);
    for (int64_t tile = 0; tile + 1 < tiles; tile++) top = _mm512_max_ps(top, _mm512_loadu_ps(scores + tile * step));
    const __m512 factor = _mm512_set1_ps(scale), offset = _mm512_set1_ps(-scale * _mm512_reduce_max_ps(top));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t tile = 0; tile < tiles; tile += 2) {
        __m512 both[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int i = 0; i < 2 && tile + i < tiles; i++) {
            const __m512 exponent = _mm512_fmadd_ps(_mm512_loadu_ps(scores + (tile + i) * step), factor, offset);
            both[i] = _mm512_maskz_mov_ps(tile + i + 1 == tiles ? mask : all, exponential(exponent));
            sum = _mm512_add_ps(sum, both[i]);
        }
        store_bf16(target + tile / 2 * TILE, both[0], both[1]);
    }
    return _mm512_reduce_add_ps(sum);
}

/* Sizes in tiles, and where things are. */
struct attention {
    int64_t tokens, heads, head_width;
    int64_t rows, steps;           /* of tokens, as rows (16) and as inputs of a product (32) */
    int64_t depth, inner;          /* of a head's features, of those of all heads */
    int64_t key_tiles, value_tiles, weight_tiles, scratch_tiles; /* of what a worker needs for a head, and all of it */
    const bf16 *qkv;               /* [row tile][3][head][depth] */
    bf16 *result;                  /* [row tile][head][depth] */
    bf16 *keys, *values, *weights; /* scratch: [key tile][depth], [depth][step][2], [2 row tiles][step] */
    float *scores;                 /* scratch: [2 row tiles][key tile][16][16] */
};

static struct attention attention_of(int64_t tokens, int64_t heads, int64_t head_width) {
    struct attention a = {.tokens = tokens, .heads = heads, .head_width = head_width};
    a.rows = tiles_of(tokens, ROWS), a.steps = tiles_of(tokens, COLUMNS);
    a.depth = tiles_of(head_width, COLUMNS), a.inner = heads * a.depth;
    a.key_tiles = (a.rows + 1) * a.depth, a.value_tiles = 2 * a.depth * a.steps, a.weight_tiles = 2 * a.steps;
    a.scratch_tiles = a.key_tiles + a.value_tiles + a.weight_tiles + 2 * (a.rows + 1);
    return a;
}

static void use_scratch(struct attention *a, bf16 *scratch) {
    a->keys = scratch, a->values = a->keys + a->key_tiles * TILE, a->weights = a->values + a->value_tiles * TILE;
    a->scores = (float *)(a->weights + a->weight_tiles * TILE);
}

/* Keys and values of a head as the right factors of products. */
static void fetch_head(const struct attention *a, int64_t head) {
    const bf16 *key = a->qkv + (a->inner + head * a->depth) * TILE, *value = key + a->inner * TILE;
    const int64_t stride = 3 * a->inner;
    for (int64_t tile = 0; tile < a->rows; tile++)
        for (int64_t part = 0; part < a->depth; part++)
            transpose_pairs(key + (tile * stride + part) * TILE, a->keys + (tile * a->depth + part) * TILE);
    for (int64_t part = 0; part < a->depth; part++)
        for (int64_t step = 0; step < a->steps; step++) {
            const bf16 *upper = value + (2 * step * stride + part) * TILE;
            bf16 *pairs = a->values + (part * a->steps + step) * 2 * TILE;
            pair_rows(upper, upper + stride * TILE, a->tokens - step * COLUMNS, pairs, pairs + TILE);
        }
    FENCE();
}

/* What one or two tiles of queries see of a head. */
static void attend_rows(const struct attention *a, int64_t head, int64_t row_tile) {
    const int64_t rows = row_tile + 1 < a->rows ? 2 : 1, depth = a->depth; /* a lone tile is computed twice */
    const int64_t row_stride = 3 * a->inner * TILE, score_stride = (a->rows + 1) * TILE / 2;
    const bf16 *upper = a->qkv + row_tile * row_stride + head * depth * TILE, *lower = upper + (rows - 1) * row_stride;
    for (int64_t tile = 0; tile < a->rows; tile += 2) { /* behind a lone tile of keys another is read, but not used */
        const bf16 *left = a->keys + tile * depth * TILE, *right = left + depth * TILE;
        zero_sums();
        for (int64_t part = 0; part < depth; part++)
            add_product(upper + part * TILE, lower + part * TILE, left + part * TILE, right + part * TILE);
        store_sums(a->scores + tile * TILE / 2, a->scores + score_stride + tile * TILE / 2);
    }

    const float scale = 1.0f / sqrtf((float)a->head_width);
    float shares[2 * ROWS];
    for (int64_t row = 0; row < rows * ROWS; row++) {
        bf16 *weights = a->weights + row / ROWS * a->steps * TILE + row % ROWS * COLUMNS;
        shares[row] = 1.0f / soften(a->scores + row / ROWS * score_stride + row % ROWS * 16, a->tokens, scale, weights);
    }
    FENCE();

    const bf16 *weights = a->weights, *below = weights + (rows - 1) * a->steps * TILE;
    for (int64_t part = 0; part < depth; part++) {
        const bf16 *values = a->values + part * a->steps * 2 * TILE;
        zero_sums();
        for (int64_t step = 0; step < a->steps; step++, values += 2 * TILE)
            add_product(weights + step * TILE, below + step * TILE, values, values + TILE);
        store_sums(a->scores, a->scores + TILE);
        for (int64_t row = 0; row < rows * ROWS; row++) {
            const float *sums = a->scores + row / ROWS * TILE + row % ROWS * 16;
            const __m512 share = _mm512_set1_ps(shares[row]);
            bf16 *target = a->result + ((row_tile + row / ROWS) * a->inner + head * depth + part) * TILE;
            store_bf16(target + row % ROWS * COLUMNS, _mm512_mul_ps(_mm512_loadu_ps(sums), share),
                       _mm512_mul_ps(_mm512_loadu_ps(sums + TILE / 2), share));
        }
        FENCE();
    }
}

static void attend(const struct worker *worker, const struct attention *a) {
    const int64_t end = end_of(worker, a->heads);
    for (int64_t head = first_of(worker, a->heads); head < end; head++) {
        fetch_head(a, head);
        for (int64_t row_tile = 0; row_tile < a->rows; row_tile += 2) attend_rows(a, head, row_tile);
    }
}
