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
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "attention.h"

enum { CHUNK = 48 }; /* tiles of an MLP's hidden features that are computed, and used, before the next: second cache */

struct layer {
    const bf16 *weight; /* packed */
    const bf16 *bias;   /* (outputs) */
};

struct block {
    int64_t width, heads, head_width, hidden;
    float epsilon;
    const bf16 *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
    struct layer qkv, proj, fc1, fc2;
};

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

/* Sizes in tiles. */
struct sizes {
    struct attention attention;
    int64_t width, hidden, chunk; /* of features: of a token, of the MLP, of as many as are computed at a time */
    int64_t narrow, wide;         /* of activations of an image: between products, and the widest */
    int64_t scratch;              /* of what each worker needs for itself */
};

static struct sizes sizes_of(const struct block *b, int64_t tokens) {
    struct sizes s = {.attention = attention_of(tokens, b->heads, b->head_width)};
    const int64_t rows = s.attention.rows, inner = s.attention.inner, sums = 2 * rows;
    s.width = b->width / COLUMNS, s.hidden = b->hidden / COLUMNS, s.chunk = s.hidden < CHUNK ? s.hidden : CHUNK;
    s.narrow = rows * (inner > s.width ? inner : s.width);
    s.wide = rows * (3 * inner > s.chunk ? 3 * inner : s.chunk);
    s.scratch = s.attention.scratch_tiles > sums ? s.attention.scratch_tiles : sums;
    return s;
}

/* One image, states of (tokens, width), through one block, in place. */
static void forward_block(const struct worker *worker, const struct block *b, float *states, int64_t tokens,
                          bf16 *workspace) {
    struct sizes s = sizes_of(b, tokens);
    const int64_t inner = s.attention.inner;
    bf16 *narrow = workspace, *wide = narrow + s.narrow * TILE;
    bf16 *scratch = wide + (s.wide + worker->member * s.scratch) * TILE;
    const struct product product = {.row_tiles = s.attention.rows, .states = states, .rows = tokens, .width = b->width,
                                    .sums = (float *)scratch};

    layer_norm(worker, states, tokens, b->width, b->norm1_weight, b->norm1_bias, b->epsilon, narrow);
    meet(worker);
    struct product qkv = product;
    qkv.left = narrow, qkv.left_stride = qkv.right_stride = qkv.steps = s.width;
    qkv.right = b->qkv.weight, qkv.bias = b->qkv.bias, qkv.pairs = 3 * inner;
    qkv.finish = STORE, qkv.tiles = wide;
    multiply(worker, &qkv);
    meet(worker);
    s.attention.qkv = wide, s.attention.result = narrow;
    use_scratch(&s.attention, scratch);
    attend(worker, &s.attention);
    meet(worker);
    struct product proj = product;
    proj.left = narrow, proj.left_stride = proj.right_stride = proj.steps = inner;
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

struct registers {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16]; /* of a row, by register */
    uint8_t rows[16];
};

static const struct registers ALL_WHOLE = {
    .palette = 1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};

static void work(const struct task *task, int64_t number) {
    struct registers before; /* torch may count on finding its own again */
    _tile_storeconfig(&before);
    _tile_loadconfig(&ALL_WHOLE);
    const int64_t team = number % task->num_teams;
    const struct worker worker = {&task->teams[team], (int)(number / task->num_teams)};
    for (int64_t block = 0; block < task->num_blocks; block++)
        for (int64_t image = team; image < task->images; image += task->num_teams) {
            float *states = task->states + image * task->tokens * task->blocks[block].width;
            bf16 *workspace = (bf16 *)(task->workspace + team * task->team_bytes);
            forward_block(&worker, &task->blocks[block], states, task->tokens, workspace);
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

/* The SHA-256 of these files as they were compiled. */
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
    struct task task = {.blocks = blocks, .num_blocks = num_blocks, .states = states, .images = images,
                        .tokens = tokens, .workspace = workspace, .num_teams = teams,
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
