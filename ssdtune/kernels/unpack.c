/* Packed tensors to float32, bfloat16 or float16: the fast twin of affine.py, rotated.py and nibbles.py, which define
 * every bit of it.
 *
 * Compiled once for each instruction set, with the names' ending in SUFFIX; nothing is fused or reordered (noise.c).
 *
 * bfloat16 by looking up: the 16 values that a group's codes can stand for are made once, two groups at a time, then
 * found by code, many at an instruction (`vpermw`, or `pshufb` for the values' low and for their high bytes). Where a
 * code has more than four bits, and for float32, every element is computed. float16 is made of float32.
 */
#include "lookup.h"
#include "pieces.h"
#include "rotate.h"
#include "streams.h"

enum { TILE = 512 };         /* elements of a slice's tile */
enum { STRETCH = 8 * TILE }; /* elements that are prepared at a time */
enum { PAGE = 4096 };        /* bytes */
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

INLINE int is_finite(float value) { return (bits_of(value) & 0x7F800000u) != 0x7F800000u; }

/* Asks for one line of each page that is written after the next `num_bytes`: by then its address is known. Stores wait
 * for that, and everything behind them: an eighth of the time where two lines are stored in turn. (Where stores go from
 * one line to the next it costs more than it saves, and so does asking for what is read: measured.) */
INLINE void find_pages(const void *to, int64_t num_bytes)
{
    for (int64_t at = 0; at < num_bytes; at += PAGE)
        __builtin_prefetch((const char *)to + num_bytes + at);
}

/* The i-th of bfloat16 numbers at any address. */
INLINE float bfloat16_at(const uint8_t *from, int64_t i)
{
    uint16_t upper;
    memcpy(&upper, from + 2 * i, 2);
    return float_of((uint32_t)upper << 16);
}

/* ------------------------------------------------------------------------------------------------------- affine.py */

enum { MAX_GROUPS = STRETCH / 32 };
static const float COUNT[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* Scales and zeros of a stretch as numbers; 0 where the tensor has no more.
 *
 * A code less its zero has nine bits at most, and so has the zero; a scale has eight: where scales are bounded, code * scale
 * and zero * scale are exact, so that one operation, code * scale - less, has the bits of the two of the definition. Only
 * a zero may have another sign. Where scales are usual, positive among other things, it has not, and no other product is
 * below 2^-126. */
struct groups {
    float zero[MAX_GROUPS], scale[MAX_GROUPS], less[MAX_GROUPS];
    int are_bounded, are_usual;
};

enum { LEAST_USUAL = 0x08800000, BOUND = 0x71000000 }; /* bits of 2^-110 and 2^99 */
INLINE int is_bounded(float scale) { return (bits_of(scale) & 0x7FFFFFFFu) < BOUND; }
INLINE int is_usual(float scale) { return bits_of(scale) - LEAST_USUAL < (uint32_t)BOUND - LEAST_USUAL; }

/* num: groups of whole tiles, whether or not the tensor goes on so far. first: its number. */
static void get_groups(struct groups *to, const struct affine *job, int64_t first, int64_t num)
{
    const int64_t all = (job->n + job->group - 1) / job->group, here = all - first < num ? all - first : num;
    const uint8_t *zeros = job->zeros + first, *scales = job->scales + 2 * first;
    const float step = float_of((uint32_t)(127 + job->bits - 8) << 23); /* 2^(bits - 8) */
    int not_bounded = 0, not_usual = 0;
    for (int64_t g = 0; g < here; g++)
        to->zero[g] = ((float)zeros[g] + 0.5f) * step - 0.5f;
    for (int64_t g = 0; g < here; g++) {
        to->scale[g] = bfloat16_at(scales, g);
        to->less[g] = to->zero[g] * to->scale[g];
        not_bounded |= !is_bounded(to->scale[g]);
        not_usual |= !is_usual(to->scale[g]);
    }
    for (int64_t g = here; g < num; g++)
        to->zero[g] = to->scale[g] = to->less[g] = 0;
    to->are_bounded = !not_bounded;
    to->are_usual = !not_usual;
}

/* Codes of tiles, a byte each. packed: the tiles' part of each slice. What says how wide slices are is constant where
 * it shall be fast. */
INLINE void join_bytes(uint8_t *codes, const uint8_t *packed[], int64_t num_tiles, int bits, int num_slices,
                       uint64_t widths)
{
    for (int64_t tile = 0; tile < num_tiles; tile++) {
#pragma GCC unroll 8
        for (int run = 0; run < TILE / LANES; run++, codes += LANES)
            for (int at = 0; at < LANES; at += BYTES) {
                bytes code = none();
                int below = bits;
#pragma GCC unroll 8
                for (int s = 0; s < num_slices; s++) {
                    const int width = (int)(widths >> (4 * s) & 15), from = run * width % 8;
                    const bytes vector = get(packed[s] + run * width / 8 * LANES + at);
                    below -= width;
                    code = with(code, from > below ? right(vector, from - below) : left(vector, below - from),
                                ((1 << width) - 1) << below);
                }
                keep(codes + at, code);
            }
        for (int s = 0; s < num_slices; s++)
            packed[s] += (widths >> (4 * s) & 15) * LANES;
    }
}

/* The same as a slice of width 4 has them: two runs of 64, one in the low halves of bytes and one in the high ones. Two
 * fields that are side by side go to their places at once. */
INLINE void join_halves(uint8_t *codes, const uint8_t *packed[], int64_t num_tiles, int bits, int num_slices,
                        uint64_t widths)
{
    uint8_t places[MAX_SLICES][16];
    for (int s = 0, below = bits; s < num_slices; s++) {
        const int width = (int)(widths >> (4 * s) & 15), mask = (1 << width) - 1;
        below -= width;
        for (int two = 0; two < 16; two++)
            places[s][two] = (uint8_t)((two & mask) << below | (two >> width & mask) << (4 + below));
    }
    for (int64_t tile = 0; tile < num_tiles; tile++) {
#pragma GCC unroll 4
        for (int run = 0; run < TILE / LANES; run += 2, codes += LANES)
            for (int at = 0; at < LANES; at += BYTES) {
                bytes code = none();
#pragma GCC unroll 8
                for (int s = 0; s < num_slices; s++) {
                    const int width = (int)(widths >> (4 * s) & 15), from = run * width % 8;
                    const bytes vector = get(packed[s] + run * width / 8 * LANES + at);
                    const bytes two = with(none(), right(vector, from), (1 << (2 * width)) - 1);
                    code = with(code, mapped(two, places[s]), 255);
                }
                keep(codes + at, code);
            }
        for (int s = 0; s < num_slices; s++)
            packed[s] += (widths >> (4 * s) & 15) * LANES;
    }
}

INLINE void find_slices(const uint8_t *packed[], const struct affine *job, int64_t tile)
{
    for (int s = 0; s < job->num_slices; s++)
        packed[s] = job->slices[s] + tile * (job->widths >> (4 * s) & 15) * LANES;
}

/* The two below: codes of tiles, in `space` or where they are if a slice has them so. Common orders are fast; where
 * BYTES is small they are not worth their code. */

/* Of at most four bits, as a slice of width 4 has them. */
static const uint8_t *halves_of(const struct affine *job, int64_t tile, int64_t num_tiles, uint8_t *space)
{
    const uint8_t *packed[MAX_SLICES];
    find_slices(packed, job, tile);
    if (job->widths == 0x4)
        return packed[0];
    switch (BYTES > 8 ? job->widths : 0) {
    case 0x1: join_halves(space, packed, num_tiles, 1, 1, 0x1); break;
    case 0x2: join_halves(space, packed, num_tiles, 2, 1, 0x2); break;
    case 0x12: join_halves(space, packed, num_tiles, 3, 2, 0x12); break;
    case 0x112: join_halves(space, packed, num_tiles, 4, 3, 0x112); break;
    default: join_halves(space, packed, num_tiles, (int)job->bits, (int)job->num_slices, (uint64_t)job->widths);
    }
    return space;
}

/* A byte each. */
static const uint8_t *bytes_of(const struct affine *job, int64_t tile, int64_t num_tiles, uint8_t *space)
{
    const uint8_t *packed[MAX_SLICES];
    find_slices(packed, job, tile);
    if (job->widths == 0x8)
        return packed[0];
    switch (BYTES > 8 ? job->widths : 0) {
    case 0x1: join_bytes(space, packed, num_tiles, 1, 1, 0x1); break;
    case 0x2: join_bytes(space, packed, num_tiles, 2, 1, 0x2); break;
    case 0x12: join_bytes(space, packed, num_tiles, 3, 2, 0x12); break;
    case 0x4: join_bytes(space, packed, num_tiles, 4, 1, 0x4); break;
    case 0x14: join_bytes(space, packed, num_tiles, 5, 2, 0x14); break;
    case 0x114: join_bytes(space, packed, num_tiles, 6, 3, 0x114); break;
    case 0x214: join_bytes(space, packed, num_tiles, 7, 3, 0x214); break;
    case 0x2114: join_bytes(space, packed, num_tiles, 8, 4, 0x2114); break;
    default: join_bytes(space, packed, num_tiles, (int)job->bits, (int)job->num_slices, (uint64_t)job->widths);
    }
    return space;
}

/* n: elements, a multiple of TILE. group: elements of one. */
INLINE void affine_floats(float *to, const uint8_t *codes, const struct groups *of, int64_t n, int64_t group,
                          int is_streamed)
{
    for (int64_t at = 0, g = 0; at < n; at += group, g++)
        for (int64_t i = at; i < at + group; i += STEP)
            compute_floats(to + i, codes + i, of->zero[g], of->scale[g], is_streamed);
}

INLINE void affine_computed(uint16_t *to, const uint8_t *codes, const struct groups *of, int64_t n, int64_t group,
                            int is_streamed)
{
    for (int64_t at = 0, g = 0; at < n; at += group, g++)
        for (int64_t i = at; i < at + group; i += STEP)
            compute_words(to + i, codes + i, of->zero[g], of->scale[g], is_streamed);
}

/* codes: as a slice of width 4 has them. */
INLINE void affine_looked_up(uint16_t *to, const uint8_t *codes, const struct groups *of, int64_t n, int64_t group,
                             int is_streamed)
{
    const entries values = spread(COUNT);
    const int64_t count = group < LANES ? group : LANES;
    for (int64_t at = 0; at < n; at += 2 * LANES, codes += LANES)
        for (int64_t i = 0; i < LANES; i += count) {
            const int64_t g = (at + i) / group, next = (at + i + LANES) / group;
            lookup in[2];
            make_two(in, values, of->zero[g], of->scale[g], of->zero[next], of->scale[next]);
            for (int64_t j = i; j < i + count; j += STEP)
                look_up(to + at + j, codes + j, in, is_streamed);
        }
}

/* Scales are usual. */
INLINE void affine_fused(uint16_t *to, const uint8_t *codes, const struct groups *of, int64_t n, int64_t group,
                         int at_once, int is_streamed)
{
    for (int64_t at = 0, g = 0; at < n; at += group, g++) {
        const line on = line_of(of->scale[g], of->less[g]);
        for (int64_t i = at; i < at + group; i += STEP)
            compute_fused(to + i, codes + i, on, at_once, is_streamed);
    }
}

static void affine_slowly(uint16_t *to, const uint8_t *codes, const struct groups *of, int64_t n, int64_t group,
                          uint16_t nan)
{
    for (int64_t i = 0; i < n; i++)
        to[i] = nearest(((float)codes[i] - of->zero[i / group]) * of->scale[i / group], nan);
}

/* Elements first ... first + n - 1, whole tiles. to: where they go, as `dtype`. */
INLINE void affine_tiles(const struct affine *job, void *to, int64_t first, int64_t n, int64_t dtype, int is_streamed)
{
    _Alignas(64) uint8_t space[STRETCH];
    struct groups of;
    get_groups(&of, job, first / job->group, n / job->group);
    const int is_looked_up = dtype == BFLOAT16 && job->bits <= LOOKUP_BITS && of.are_bounded;
    if (is_looked_up) {
        const uint8_t *codes = halves_of(job, first / TILE, n / TILE, space);
        switch (job->group) {
        case 32: affine_looked_up(to, codes, &of, n, 32, is_streamed); break;
        case 64: affine_looked_up(to, codes, &of, n, 64, is_streamed); break;
        default: affine_looked_up(to, codes, &of, n, 128, is_streamed);
        }
        return;
    }
    const uint8_t *codes = bytes_of(job, first / TILE, n / TILE, space);
    const int is_fused = dtype == BFLOAT16 && of.are_usual;
    if (is_fused && rounds_at_once())
        affine_fused(to, codes, &of, n, job->group, 1, is_streamed);
    else if (is_fused)
        affine_fused(to, codes, &of, n, job->group, 0, is_streamed);
    else if (dtype == FLOAT32)
        affine_floats(to, codes, &of, n, job->group, is_streamed);
    else if (of.are_bounded)
        affine_computed(to, codes, &of, n, job->group, is_streamed);
    else
        affine_slowly(to, codes, &of, n, job->group, (uint16_t)job->nan);
}

/* to: where the first of them goes. */
static void affine_stretch(const struct affine *job, void *to, int64_t first, int64_t n, int is_streamed)
{
    const int64_t size = job->dtype == FLOAT32 ? 4 : 2, whole = (n + TILE - 1) / TILE * TILE;
    if (n < whole) {
        _Alignas(64) float made[STRETCH];
        affine_tiles(job, made, first, whole, job->dtype, 0);
        memcpy(to, made, (size_t)(n * size));
    } else if (CAN_STREAM && is_streamed) {
        find_pages(to, n * size);
        affine_tiles(job, to, first, n, job->dtype, 1);
    } else {
        affine_tiles(job, to, first, n, job->dtype, 0);
    }
}

void NAME(ssdtune_affine_piece, SUFFIX)(const void *packed, void *to, int64_t first, int64_t n)
{
    const struct affine *job = packed;
    const int64_t size = job->dtype == FLOAT32 ? 4 : 2;
    for (int64_t at = 0; at < n; at += STRETCH)
        affine_stretch(job, (char *)to + at * size, first + at, n - at < STRETCH ? n - at : STRETCH, 0);
}

const uint8_t *NAME(ssdtune_affine_codes, SUFFIX)(
    const struct affine *job, int64_t tile, int64_t num_tiles, uint8_t *space)
{
    return bytes_of(job, tile, num_tiles, space);
}

/* n numbers, at most a stretch, as `dtype`. */
static void put_floats(void *to, const float *made, int64_t n, int64_t dtype, uint16_t nan, int64_t is_streamed)
{
    if (dtype == FLOAT32) {
        put_made(to, made, 4 * n, is_streamed);
    } else if (dtype == FLOAT16) {
        put_float16(to, made, n, is_streamed);
    } else {
        _Alignas(64) uint16_t words[STRETCH];
        for (int64_t i = 0; i < n; i++)
            words[i] = nearest(made[i], nan);
        put_made(to, words, 2 * n, is_streamed);
    }
}

/* The same by way of float32: of groups that are rotated, and to float16. */
static void affine_by_floats(const struct affine *job, void *to, int64_t first, int64_t n)
{
    _Alignas(64) float made[STRETCH];
    affine_tiles(job, made, first, (n + TILE - 1) / TILE * TILE, FLOAT32, 0);
    if (job->is_rotated)
        rotate_all(made, n, job->group);
    put_floats(to, made, n, job->dtype, (uint16_t)job->nan, job->is_streamed);
}

void NAME(ssdtune_unpack_affine, SUFFIX)(struct affine *job)
{
    const int64_t size = job->dtype == FLOAT32 ? 4 : 2;
    for (int64_t first, stop; take_part(&job->next, job->part, job->n, &first, &stop);) {
        for (int64_t at = first; at < stop; at += STRETCH) {
            const int64_t n = stop - at < STRETCH ? stop - at : STRETCH;
            if (job->is_rotated || job->dtype == FLOAT16)
                affine_by_floats(job, (char *)job->to + at * size, at, n);
            else
                affine_stretch(job, (char *)job->to + at * size, at, n, job->is_streamed != 0);
        }
    }
    finish(job->is_streamed);
}

/* ------------------------------------------------------------------------------------------------------ nibbles.py */

enum { SCALE_FLOAT32 = 0, SCALE_BFLOAT16 = 1, SCALE_FLOAT16 = 2, SCALE_BYTE = 3 };

struct nibbles {
    void *to;
    const uint8_t *codes;
    const uint8_t *scales; /* at any address */
    const float *table;    /* 16, finite */
    const void *by_scale;  /* for scales of a byte: 16 outputs for each of 256 scales; float32 for FLOAT16 */
    int64_t n, block, is_high_first, scale_kind, dtype, nan, is_streamed;
    int64_t part, next; /* part: elements, a multiple of the block and of 64; next: that nobody has taken yet */
};

static float half(uint16_t bits)
{
    const uint32_t sign = (uint32_t)(bits & 0x8000u) << 16, fraction = bits & 0x3FFu, exponent = bits >> 10 & 31u;
    if (exponent == 0) {
        const float value = (float)fraction * 0x1p-24f;
        return sign ? -value : value;
    }
    return float_of(sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | fraction << 13);
}

/* Of a block; 1 where scales are bytes, whose products are in tables. */
INLINE float scale_at(const uint8_t *scales, int64_t kind, int64_t block)
{
    float value;
    uint16_t word;
    switch (kind) {
    case SCALE_FLOAT32: memcpy(&value, scales + 4 * block, 4); return value;
    case SCALE_BFLOAT16: return bfloat16_at(scales, block);
    case SCALE_FLOAT16: memcpy(&word, scales + 2 * block, 2); return half(word);
    default: return 1;
    }
}

/* Elements first ... stop - 1, one by one. */
static void nibbles_slowly(const struct nibbles *job, int64_t first, int64_t stop)
{
    const int is_byte = job->scale_kind == SCALE_BYTE, is_float = job->dtype == FLOAT32;
    for (int64_t i = first; i < stop; i++) {
        const int64_t block = i / job->block, row = is_byte ? 16 * job->scales[block] : 0;
        const int64_t code = job->codes[i / 2] >> (((i & 1) != job->is_high_first) * 4) & 15;
        const float value = job->table[code] * scale_at(job->scales, job->scale_kind, block);
        if (is_float)
            ((float *)job->to)[i] = is_byte ? ((const float *)job->by_scale)[row + code] : value;
        else
            ((uint16_t *)job->to)[i] =
                is_byte ? ((const uint16_t *)job->by_scale)[row + code] : nearest(value, (uint16_t)job->nan);
    }
}

/* Whole steps of one block, from element `first` on. */
INLINE void nibbles_block(const struct nibbles *job, int64_t first, int64_t count, lookup in, int step, int is_streamed)
{
    uint16_t *to = (uint16_t *)job->to + first;
    const uint8_t *codes = job->codes + first / 2;
    const int is_high_first = job->is_high_first != 0;
    for (int64_t i = 0; i < count; i += step)
        look_up_nibbles(to + i, codes + i / 2, in, step, is_high_first, is_streamed);
}

/* Pairs of whole blocks, from element `first` on; returns where they end. tables: by a scale of a byte. */
INLINE int64_t nibbles_words(const struct nibbles *job, int64_t first, int64_t stop, const lookup *tables, int step,
                             int is_byte, int is_streamed)
{
    const int64_t block = job->block, kind = job->scale_kind;
    const entries values = spread(job->table);
    const uint8_t *scales = job->scales;
    for (int64_t b = first / block; first + 2 * block <= stop; b += 2, first += 2 * block) {
        lookup in[2];
        if (is_byte) {
            in[0] = tables[scales[b]];
            in[1] = tables[scales[b + 1]];
        } else {
            const float scale = scale_at(scales, kind, b), next = scale_at(scales, kind, b + 1);
            if (__builtin_expect(!is_finite(scale) || !is_finite(next), 0)) {
                nibbles_slowly(job, first, first + 2 * block);
                continue;
            }
            make_two(in, values, 0, scale, 0, next);
        }
        nibbles_block(job, first, block, in[0], step, is_streamed);
        nibbles_block(job, first + block, block, in[1], step, is_streamed);
    }
    return first;
}

/* The same for what is left of a part, less than two blocks, down to less than half a step. */
static int64_t nibbles_words_left(const struct nibbles *job, int64_t first, int64_t stop, const lookup *tables)
{
    while (first + HALF_STEP <= stop) {
        const int64_t b = first / job->block, here = stop - first < job->block ? stop - first : job->block;
        const int64_t count = here / HALF_STEP * HALF_STEP;
        const float scale = scale_at(job->scales, job->scale_kind, b);
        lookup in[2];
        if (job->scale_kind == SCALE_BYTE)
            in[0] = tables[job->scales[b]];
        else
            make_two(in, spread(job->table), 0, scale, 0, scale);
        if (is_finite(scale))
            nibbles_block(job, first, count, in[0], HALF_STEP, 0);
        else
            nibbles_slowly(job, first, first + count);
        first += count;
    }
    return first;
}

INLINE int64_t nibbles_floats(const struct nibbles *job, int64_t first, int64_t stop, int is_streamed)
{
    const int64_t block = job->block, kind = job->scale_kind;
    const int is_high_first = job->is_high_first != 0;
    const floats16 values = get_floats(job->table);
    while (first + HALF_STEP <= stop) {
        const int64_t b = first / block, end = (b + 1) * block < stop ? (b + 1) * block : stop;
        const floats16 in = kind == SCALE_BYTE ? get_floats((const float *)job->by_scale + 16 * job->scales[b])
                                               : times(values, scale_at(job->scales, kind, b));
        for (; first + HALF_STEP <= end; first += HALF_STEP)
            look_up_floats((float *)job->to + first, job->codes + first / 2, in, is_high_first, is_streamed);
    }
    return first;
}

/* Returns where it ended: less than half a step before `stop`, or at once where blocks are odd. */
INLINE int64_t nibbles_fast(const struct nibbles *job, int64_t first, int64_t stop, const lookup *tables,
                            int is_streamed)
{
    const int is_byte = job->scale_kind == SCALE_BYTE;
    if (job->block % HALF_STEP)
        return first;
    if (job->dtype == FLOAT32)
        return nibbles_floats(job, first, stop, is_streamed);
    if (job->block % STEP)
        first = is_byte ? nibbles_words(job, first, stop, tables, HALF_STEP, 1, is_streamed)
                        : nibbles_words(job, first, stop, tables, HALF_STEP, 0, is_streamed);
    else
        first = is_byte ? nibbles_words(job, first, stop, tables, STEP, 1, is_streamed)
                        : nibbles_words(job, first, stop, tables, STEP, 0, is_streamed);
    return nibbles_words_left(job, first, stop, tables);
}

static void get_tables(lookup tables[256], const struct nibbles *job)
{
    if (job->scale_kind == SCALE_BYTE && job->dtype == BFLOAT16)
        for (int i = 0; i < 256; i++)
            tables[i] = of_words((const uint16_t *)job->by_scale + 16 * i);
}

/* Blocks divide pieces. */
void NAME(ssdtune_nibbles_piece, SUFFIX)(const void *packed, void *to, int64_t first, int64_t n)
{
    _Alignas(64) lookup tables[256];
    struct nibbles job = *(const struct nibbles *)packed;
    job.to = (void *)((uintptr_t)to - (uintptr_t)(first * (job.dtype == FLOAT32 ? 4 : 2))); /* of element 0 */
    get_tables(tables, &job);
    nibbles_slowly(&job, nibbles_fast(&job, first, first + n, tables, 0), first + n);
}

/* To float16, by way of float32. */
static void nibbles_float16(const struct nibbles *job, int64_t first, int64_t stop)
{
    _Alignas(64) float made[STRETCH];
    struct nibbles floats = *job;
    floats.dtype = FLOAT32;
    for (int64_t at = first; at < stop; at += STRETCH) {
        const int64_t end = stop - at < STRETCH ? stop : at + STRETCH;
        floats.to = (void *)((uintptr_t)made - (uintptr_t)(4 * at)); /* of element 0 */
        const int64_t done = job->block % HALF_STEP ? at : nibbles_floats(&floats, at, end, 0);
        nibbles_slowly(&floats, done, end);
        put_float16((uint16_t *)job->to + at, made, end - at, job->is_streamed);
    }
}

void NAME(ssdtune_unpack_nibbles, SUFFIX)(struct nibbles *job)
{
    _Alignas(64) lookup tables[256];
    get_tables(tables, job);
    for (int64_t first, stop; take_part(&job->next, job->part, job->n, &first, &stop);) {
        if (job->dtype == FLOAT16) {
            nibbles_float16(job, first, stop);
            continue;
        }
        const int64_t done = CAN_STREAM && job->is_streamed ? nibbles_fast(job, first, stop, tables, 1)
                                                            : nibbles_fast(job, first, stop, tables, 0);
        nibbles_slowly(job, done, stop);
    }
    finish(job->is_streamed);
}

/* ------------------------------------------------------------------------------- signs, added while codes are decoded */

#if !defined(__AVX2__) /* one by one it takes as long as in two passes, or longer */
int NAME(ssdtune_affine_signs, SUFFIX)(const void *packed, const struct noise *move, void *to, int64_t first, int64_t n,
                                       int64_t position)
{
    return 0;
}

int NAME(ssdtune_nibbles_signs, SUFFIX)(const void *packed, const struct noise *move, void *to, int64_t first, int64_t n,
                                        int64_t position)
{
    return 0;
}
#else

/* Zeros have signs too, which sums with them keep. */
INLINE int is_step(float value) { return is_finite(value) && value != 0; }

/* The one direction that a move consists of, if it is one of signs and nothing else is done; 0: it is not so. */
static const struct direction *signs_alone(const struct noise *move)
{
    const struct direction *along = move->directions;
    const int is_one = move->num_directions == 1 && !move->rank && !move->values && !move->is_stochastic;
    return is_one && move->decay == 1.0f && along->kind == RADEMACHER && is_step(along->table[1]) ? along : 0;
}

/* A sum of a bfloat16 number and one of 2^-100 or more is a multiple of 2^-123: 0, or not below 2^-126. And whatever is
 * below 2^-126 makes no difference to it. */
static struct step step_of(const struct direction *along)
{
    const float unset = along->table[0], set = along->table[1], size = set < 0 ? -set : set;
    return (struct step){unset, set, size >= 0x1p-100f, 0};
}

/* A piece's signs: of a tile's run r of 64 elements bits r of 64 bytes. position: the first one's in the tensor. */
static void get_signs(uint8_t signs[PIECE / TILE][LANES], const struct direction *along, int64_t position)
{
    uint32_t words[4][LANES];
    NAME(ssdtune_random_words, SUFFIX)(words, along->key, (uint64_t)position / 128, DOMAIN_DIRECTION);
    for (int tile = 0; tile < PIECE / TILE; tile++)
        for (int i = 0; i < LANES; i++)
            signs[tile][i] = (uint8_t)(words[tile / 4][i] >> tile % 4 * 8);
}

/* Signs of a run as the fifth bits of bytes; others are to be cut off. */
INLINE bytes fifth_bits(const uint8_t *signs, int run)
{
    return run > 4 ? right(get(signs), run - 4) : left(get(signs), 4 - run);
}

/* A tile's codes, a byte each, their signs above them. halves: as a slice of width 4 has them. */
INLINE void join_signs(uint8_t codes[TILE], const uint8_t *halves, const uint8_t signs[LANES])
{
#pragma GCC unroll 8
    for (int run = 0; run < TILE / LANES; run++)
        for (int at = 0; at < LANES; at += BYTES) {
            const bytes two = get(halves + run / 2 * LANES + at);
            keep(codes + run * LANES + at, five(run % 2 ? right(two, 4) : two, fifth_bits(signs + at, run)));
        }
}

/* The same of codes one after the other. */
INLINE void join_signs_in_order(uint8_t codes[TILE], const uint8_t *halves, const uint8_t signs[LANES], int is_high_first)
{
#pragma GCC unroll 8
    for (int run = 0; run < TILE / LANES; run++)
        for (int at = 0; at < LANES; at += BYTES) {
            const bytes code = in_order(halves + (run * LANES + at) / 2, is_high_first);
            keep(codes + run * LANES + at, five(code, fifth_bits(signs + at, run)));
        }
}

/* A tile that is to be decoded and moved. codes: a byte each. values: 16 that codes stand for before zero and scale, a
 * fifth bit of codes says then which way the value moves; 0: any codes. first: the first group. */
struct tile {
    const uint8_t *codes;
    const float *values;
    const struct groups *of;
    int64_t first, group;
    const uint8_t *signs;
    struct step by;
};

INLINE void put_groups(uint16_t *to, const struct tile *tile, int64_t group, struct step by, int is_streamed)
{
    const entries all = spread(tile->values);
    const float *zero = tile->of->zero + tile->first, *scale = tile->of->scale + tile->first;
    for (int64_t at = 0, g = 0; at < TILE; at += 2 * group, g += 2) {
        lookup_32 in[2];
        make_moved(in, all, zero[g], scale[g], zero[g + 1], scale[g + 1], by);
        for (int64_t i = at; i < at + group; i += STEP)
            look_up_32(to + i, tile->codes + i, in[0], is_streamed);
        for (int64_t i = at + group; i < at + 2 * group; i += STEP)
            look_up_32(to + i, tile->codes + i, in[1], is_streamed);
    }
}

INLINE void put_computed(uint16_t *to, const struct tile *tile, int64_t group, struct step by, int is_streamed)
{
    const sign_words signs = widened(tile->signs);
    const float *scale = tile->of->scale + tile->first, *less = tile->of->less + tile->first;
    const uint8_t *codes = tile->codes;
#pragma GCC unroll 16
    for (int at = 0; at < TILE; at += group) {
        const line on = line_of(*scale++, *less++);
#pragma GCC unroll 4
        for (int i = at; i < at + group; i += STEP)
            compute_moved(to + i, codes + i, on, &signs, i % LANES, i / LANES, by, is_streamed);
    }
}

INLINE void put_of(uint16_t *to, const struct tile *tile, int64_t group, struct step by, int is_streamed)
{
    if (tile->values)
        put_groups(to, tile, group, by, is_streamed);
    else
        put_computed(to, tile, group, by, is_streamed);
}

INLINE void put_any(uint16_t *to, const struct tile *tile, int at_once, int is_streamed)
{
    struct step by = tile->by;
    by.at_once = at_once;
    switch (tile->group) {
    case 32: put_of(to, tile, 32, by, is_streamed); break;
    case 64: put_of(to, tile, 64, by, is_streamed); break;
    default: put_of(to, tile, 128, by, is_streamed);
    }
}

/* The first n elements. */
static void put_moved(uint16_t *to, const struct tile *tile, int64_t n, int64_t is_streamed)
{
    if (n < TILE) {
        _Alignas(64) uint16_t made[TILE];
        put_moved(made, tile, TILE, 0);
        memcpy(to, made, (size_t)(2 * n));
        return;
    }
    const int at_once = tile->values ? rounds_at_once() && tile->by.is_large : moves_at_once(tile->by);
    switch ((CAN_STREAM && is_streamed) + 2 * (at_once != 0)) {
    case 0: put_any(to, tile, 0, 0); break;
    case 1: put_any(to, tile, 0, 1); break;
    case 2: put_any(to, tile, 1, 0); break;
    default: put_any(to, tile, 1, 1);
    }
}

/* Decodes and moves a stretch; back: whether its scales are bounded. signs: of each of its tiles. */
typedef int stretch_decoder(const void *packed, const uint8_t signs[][LANES], struct step by, uint16_t *to, int64_t first,
                            int64_t n);

/* The same of a piece, as sign_decoder. */
static int by_stretches(stretch_decoder *decode, const void *packed, const struct direction *along, uint16_t *to,
                        int64_t first, int64_t n, int64_t position)
{
    const struct step by = step_of(along);
    _Alignas(64) uint8_t signs[PIECE / TILE][LANES];
    get_signs(signs, along, position);
    for (int64_t at = 0; at < n; at += STRETCH) {
        const int64_t here = n - at < STRETCH ? n - at : STRETCH;
        if (!decode(packed, signs + at / TILE, by, to + at, first + at, here))
            return 0;
    }
    return 1;
}

/* Asks for the codes of a tile. */
INLINE void find_codes(const struct affine *job, int64_t tile)
{
    const uint8_t *packed[MAX_SLICES];
    find_slices(packed, job, tile);
    for (int s = 0; s < job->num_slices; s++)
        for (int v = 0; v < (int)(job->widths >> (4 * s) & 15); v++)
            __builtin_prefetch(packed[s] + v * LANES);
}

static int affine_signs_stretch(const void *packed, const uint8_t signs[][LANES], struct step by, uint16_t *to,
                                int64_t first, int64_t n)
{
    const struct affine *job = packed;
    _Alignas(64) uint8_t space[STRETCH], codes[TILE];
    struct groups of;
    const int64_t num_tiles = (n + TILE - 1) / TILE, per_tile = TILE / job->group;
    get_groups(&of, job, first / job->group, num_tiles * per_tile);
    if (!of.are_bounded)
        return 0;
    if (job->is_streamed)
        find_pages(to, 2 * n);
    const int is_looked_up = job->bits <= 4;
    const uint8_t *from = is_looked_up ? halves_of(job, first / TILE, num_tiles, space)
                                       : bytes_of(job, first / TILE, num_tiles, space);
    struct tile tile = {codes, COUNT, &of, 0, job->group, 0, by};
    for (int64_t t = 0; t < num_tiles; t++, to += TILE, n -= TILE) {
        tile.first = t * per_tile;
        tile.signs = signs[t];
        if (is_looked_up) {
            join_signs(codes, from + t * (TILE / 2), signs[t]);
        } else {
            find_codes(job, first / TILE + t + STRETCH / TILE); /* of the next stretch, while this one is computed */
            tile.codes = from + t * TILE;
            tile.values = 0;
        }
        put_moved(to, &tile, n, job->is_streamed);
    }
    return 1;
}

int NAME(ssdtune_affine_signs, SUFFIX)(const void *packed, const struct noise *move, void *to, int64_t first, int64_t n,
                                       int64_t position)
{
    const struct affine *job = packed;
    const struct direction *along = signs_alone(move);
    if (!along || job->dtype != BFLOAT16)
        return 0;
    return by_stretches(affine_signs_stretch, job, along, to, first, n, position);
}

/* Scales of blocks as of groups. num: blocks, whether or not the tensor goes on so far. first: its number. */
static void get_blocks(struct groups *to, const struct nibbles *job, int64_t first, int64_t num)
{
    const int64_t all = (job->n + job->block - 1) / job->block, here = all - first < num ? all - first : num;
    to->are_bounded = 1;
    for (int64_t b = 0; b < num; b++) {
        to->zero[b] = 0;
        to->scale[b] = b < here ? scale_at(job->scales, job->scale_kind, first + b) : 0;
        to->are_bounded &= is_bounded(to->scale[b]);
    }
}

static int nibbles_signs_stretch(const void *packed, const uint8_t signs[][LANES], struct step by, uint16_t *to,
                                 int64_t first, int64_t n)
{
    const struct nibbles *job = packed;
    _Alignas(64) uint8_t codes[TILE], rest[TILE / 2];
    struct groups of;
    const int64_t num_tiles = (n + TILE - 1) / TILE, per_tile = TILE / job->block;
    get_blocks(&of, job, first / job->block, num_tiles * per_tile);
    if (!of.are_bounded)
        return 0;
    if (job->is_streamed)
        find_pages(to, 2 * n);
    const uint8_t *halves = job->codes + first / 2;
    for (int64_t t = 0; t < num_tiles; t++, halves += TILE / 2, to += TILE, n -= TILE) {
        if (n < TILE)
            halves = memcpy(rest, halves, (size_t)((n + 1) / 2));
        if (job->is_high_first)
            join_signs_in_order(codes, halves, signs[t], 1);
        else
            join_signs_in_order(codes, halves, signs[t], 0);
        put_moved(to, &(struct tile){codes, job->table, &of, t * per_tile, job->block, signs[t], by}, n, job->is_streamed);
    }
    return 1;
}

int NAME(ssdtune_nibbles_signs, SUFFIX)(const void *packed, const struct noise *move, void *to, int64_t first, int64_t n,
                                        int64_t position)
{
    const struct nibbles *job = packed;
    const struct direction *along = signs_alone(move);
    const int is_looked_up = job->block == 32 || job->block == 64 || job->block == 128;
    if (!along || !is_looked_up || job->scale_kind == SCALE_BYTE || job->dtype != BFLOAT16)
        return 0;
    return by_stretches(nibbles_signs_stretch, job, along, to, first, n, position);
}
#endif
