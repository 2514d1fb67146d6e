/* Integer codes and codes of a byte to float32, bfloat16 or float16: the fast twin of integers.py and float8.py, which
 * define every bit of it.
 *
 * Compiled once for each instruction set, with the names' ending in SUFFIX; nothing fused, nothing reordered, as noise.c.
 * Loops are such that compilers vectorize them; intrinsics are for what they don't find. Rows are taken BLOCK at a time and
 * TILE columns of them, so that words which lie across rows are brought together in the nearest cache.
 */
#include "streams.h"

enum { BLOCK = 32, TILE = 1024 }; /* rows; columns: whole words of a stream, whatever its codes' width */
enum { ALONG = 0, ACROSS = 1, AWQ = 2, INT8 = 3, FP8 = 4 };
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, FINITE = 3 };
/* Where in a word of AWQ's the outputs are: 4 bits from here on. */
static const int AWQ_SHIFTS[8] = {0, 16, 4, 20, 8, 24, 12, 28};

/* Rows, taken part by part by whoever calls: all threads get the same job.
 *
 * codes: ALONG: words of a row, one after the other. ACROSS: one below the other, row's beside row's. AWQ: the same, each
 * with a column's codes of eight rows. INT8, FP8: a byte for each element. stride: from one line of `codes` to the next,
 * in words or bytes. zeros, scales: [rows, groups]. order: the group of each column; null: column / group. */
struct integers {
    void *to;
    const void *codes;
    const float *zeros, *scales;
    const int32_t *order;
    int64_t n, width, stride, groups, group, bits, layout; /* n: rows */
    int64_t dtype, nan, is_streamed;
    int64_t part, next; /* part: rows, a multiple of BLOCK; next: that nobody has taken yet */
};

enum { NUM_PRODUCTS = 128 }; /* tables at a time */
/* Elements of a row that are worth a table: one that other rows share, and one of its own. */
enum { LEAST_SHARED = 64, LEAST_ALONE = 512 };

/* What codes of FP8 stand for, times a scale, in 16 bits. scale: its bits. */
struct products {
    _Alignas(64) uint16_t of[256];
    uint32_t scale;
};

struct space {
    _Alignas(64) uint8_t codes[BLOCK][TILE];
    _Alignas(64) uint32_t words[BLOCK][TILE / 4 + 2]; /* 8 bits a code; and what is read too much */
    _Alignas(64) float made[TILE];
    float values[256]; /* what codes of FP8 stand for */
    struct products products[NUM_PRODUCTS]; /* of the groups that were last used, by their number modulo NUM_PRODUCTS */
};

static inline int is_finite(float value) { return (bits_of(value) & 0x7F800000u) != 0x7F800000u; }

/* To bfloat16, ties to even, of what is a number. */
static inline uint16_t nearest_finite(float value)
{
    const uint32_t bits = bits_of(value);
    return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

/* The same of any: what is no number becomes `nan`, in which processors differ and torch with them. */
static inline uint16_t nearest(float value, uint16_t nan)
{
    return (bits_of(value) & 0x7FFFFFFFu) > 0x7F800000u ? nan : nearest_finite(value);
}

/* ----------------------------------------------------------------------------------------------- words to a byte a code */

/* Eight codes in so many bytes of x, to a byte each. */
INLINE uint64_t bytes_of(uint64_t x, int bits)
{
    if (bits == 2) {
        x = (x | x << 24) & 0x000000FF000000FFu;
        x = (x | x << 12) & 0x000F000F000F000Fu;
        return (x | x << 6) & 0x0303030303030303u;
    }
    if (bits == 4) {
        x = (x | x << 16) & 0x0000FFFF0000FFFFu;
        x = (x | x << 8) & 0x00FF00FF00FF00FFu;
        return (x | x << 4) & 0x0F0F0F0F0F0F0F0Fu;
    }
    uint64_t made = 0;
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++)
        made |= (x >> (bits * j) & ((1u << bits) - 1)) << (8 * j);
    return made;
}

INLINE void expand_by(uint8_t *to, const uint8_t *words, int64_t count, int bits)
{
    for (int64_t run = 0; run < (count + 7) / 8; run++) {
        uint64_t x = 0;
        if (bits == 2) {
            uint16_t found;
            memcpy(&found, words + 2 * run, 2);
            x = found;
        } else if (bits == 4) {
            uint32_t found;
            memcpy(&found, words + 4 * run, 4);
            x = found;
        } else {
            memcpy(&x, words + bits * run, 8);
        }
        x = bytes_of(x, bits);
        memcpy(to + 8 * run, &x, 8);
    }
}

/* A stream of `count` codes, and the few that fill up their last byte. 8 bytes after the last one are read. */
static void expand(uint8_t *to, const uint32_t *from, int64_t count, int64_t bits)
{
    const uint8_t *words = (const uint8_t *)from;
    switch (bits) {
    case 1: expand_by(to, words, count, 1); break;
    case 2: expand_by(to, words, count, 2); break;
    case 3: expand_by(to, words, count, 3); break;
    case 4: expand_by(to, words, count, 4); break;
    case 5: expand_by(to, words, count, 5); break;
    case 6: expand_by(to, words, count, 6); break;
    case 7: expand_by(to, words, count, 7); break;
    default: memcpy(to, words, (size_t)count);
    }
}

/* Codes of rows first ... first + rows - 1 in columns from ... from + count - 1. */
static void take_codes(struct space *s, const struct integers *job, int64_t first, int64_t rows, int64_t from,
                       int64_t count)
{
    const uint32_t *codes = job->codes;
    const int64_t stride = job->stride, num_words = (count * job->bits + 31) / 32, word = from * job->bits / 32;
    if (job->layout == AWQ) {
        uint32_t column[TILE];
        for (int64_t at = 0; at < rows; at += 8) {
            for (int64_t i = 0; i < count; i++)
                column[i] = codes[(from + i) * stride + (first + at) / 8];
            for (int j = 0; j < 8; j++)
                for (int64_t i = 0; i < count; i++)
                    s->codes[at + j][i] = column[i] >> AWQ_SHIFTS[j] & 15;
        }
        return;
    }
    if (job->layout == ACROSS)
        for (int64_t k = 0; k < num_words; k++)
            for (int64_t r = 0; r < rows; r++)
                s->words[r][k] = codes[(word + k) * stride + first + r];
    else
        for (int64_t r = 0; r < rows; r++)
            memcpy(s->words[r], codes + (first + r) * stride + word, (size_t)num_words * 4);
    for (int64_t r = 0; r < rows; r++)
        expand(s->codes[r], s->words[r], count, job->bits);
}

/* ------------------------------------------------------------------------------------------------------ codes to values */

/* Of FP8 without float32's numbers below the normal ones, which are slow, and without branches. */
INLINE float value_of(uint8_t code, int layout)
{
    if (layout == INT8)
        return (float)(int8_t)code;
    if (layout != FP8)
        return (float)code;
    const uint32_t size = code & 127u, sign = (uint32_t)(code & 128u) << 24;
    const uint32_t small = bits_of((float)(int32_t)size * 0x1p-9f), is_small = 0u - (size < 8);
    const uint32_t large = (size << 20) + (120u << 23), no_number = (0u - (size == 127)) & 0x7FC00000u;
    return float_of(sign | no_number | (small & is_small) | (large & ~is_small));
}

/* What comes out, in `to`. kind: FLOAT32, BFLOAT16, FLOAT16, or FINITE for bfloat16 where nothing can be no number. */
INLINE void keep(void *to, int64_t i, float value, int kind, uint16_t nan)
{
    if (kind == FLOAT32)
        ((float *)to)[i] = value;
    else if (kind == FLOAT16)
        ((uint16_t *)to)[i] = half_of(value);
    else
        ((uint16_t *)to)[i] = kind == FINITE ? nearest_finite(value) : nearest(value, nan);
}

/* One row's columns of a group. */
INLINE void scale_run(void *restrict to, const uint8_t *restrict codes, int64_t count, float zero, float scale,
                      int layout, int kind, uint16_t nan)
{
    for (int64_t i = 0; i < count; i++)
        keep(to, i, (value_of(codes[i], layout) - zero) * scale, kind, nan);
}

/* The same to 16 bits and for codes below 16, which stand for as many values. Back: how many were looked up in a table.
 * kind: FLOAT16 or FINITE. */
#if defined(__AVX2__)
INLINE int64_t look_up_run(uint16_t *to, const uint8_t *codes, int64_t count, float zero, float scale, int kind)
{
    _Alignas(32) uint16_t values[16];
    for (int q = 0; q < 16; q++)
        keep(values, q, ((float)q - zero) * scale, kind, 0);
    const __m256i all = _mm256_load_si256((const __m256i *)values);
    const __m256i halves = _mm256_packus_epi16(_mm256_and_si256(all, _mm256_set1_epi16(255)), _mm256_srli_epi16(all, 8));
    /* Of either half of the 16 values: their low bytes, their high bytes. */
    const __m256i low = _mm256_permute4x64_epi64(halves, 0x88), high = _mm256_permute4x64_epi64(halves, 0xDD);
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m256i code = _mm256_loadu_si256((const __m256i *)(codes + i));
        const __m256i lower = _mm256_shuffle_epi8(low, code), upper = _mm256_shuffle_epi8(high, code);
        const __m256i a = _mm256_unpacklo_epi8(lower, upper), b = _mm256_unpackhi_epi8(lower, upper);
        _mm256_storeu_si256((__m256i *)(to + i), _mm256_permute2x128_si256(a, b, 0x20));
        _mm256_storeu_si256((__m256i *)(to + i + 16), _mm256_permute2x128_si256(a, b, 0x31));
    }
    return i;
}
#else
INLINE int64_t look_up_run(uint16_t *to, const uint8_t *codes, int64_t count, float zero, float scale, int kind)
{
    return 0;
}
#endif

/* FP8 to 16 bits: what each code stands for, times a scale, is found in a table that is made once for as many rows as
 * have the scale. AVX-512 holds the half of it without sign in registers. nan: of codes that are no number; a sign goes
 * with it where has_sign. */
#if defined(__AVX512BW__)
INLINE void look_up_fp8(uint16_t *to, const uint8_t *codes, int64_t count, const uint16_t *products, uint16_t nan,
                        int has_sign)
{
    const __m512i a = _mm512_load_si512(products), b = _mm512_load_si512(products + 32);
    const __m512i c = _mm512_load_si512(products + 64), d = _mm512_load_si512(products + 96);
    const __m512i largest = _mm512_set1_epi16(127), sign = _mm512_set1_epi16((short)0x8000);
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(codes + i)));
        const __mmask32 is_upper = _mm512_test_epi16_mask(code, _mm512_set1_epi16(64));
        const __m512i lower = _mm512_permutex2var_epi16(a, code, b), upper = _mm512_permutex2var_epi16(c, code, d);
        const __m512i found = _mm512_mask_blend_epi16(is_upper, lower, upper);
        __m512i value = _mm512_ternarylogic_epi32(found, _mm512_slli_epi16(code, 8), sign, 0x78); /* a ^ (b & c) */
        if (!has_sign) {
            const __mmask32 is_none = _mm512_cmpeq_epi16_mask(_mm512_and_si512(code, largest), largest);
            value = _mm512_mask_mov_epi16(value, is_none, _mm512_set1_epi16((short)nan));
        }
        _mm512_storeu_si512(to + i, value);
    }
    for (; i < count; i++)
        to[i] = products[codes[i]];
}
#else
/* Four are stored at a time: compilers make less of one by one, and of eight. */
INLINE void look_up_fp8(uint16_t *to, const uint8_t *codes, int64_t count, const uint16_t *products, uint16_t nan,
                        int has_sign)
{
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        const uint64_t four = products[codes[i]] | (uint64_t)products[codes[i + 1]] << 16 |
                              (uint64_t)products[codes[i + 2]] << 32 | (uint64_t)products[codes[i + 3]] << 48;
        memcpy(to + i, &four, 8);
    }
    for (; i < count; i++)
        to[i] = products[codes[i]];
}
#endif

/* Of a scale that is finite. dtype: BFLOAT16 or FLOAT16. */
INLINE const uint16_t *products_of(struct space *s, int64_t group, float scale, int dtype, uint16_t nan)
{
    struct products *found = &s->products[group % NUM_PRODUCTS];
    if (found->scale != bits_of(scale)) {
        found->scale = bits_of(scale);
        for (int q = 0; q < 256; q++)
            keep(found->of, q, s->values[q] * scale, dtype, nan);
    }
    return found->of;
}

/* The same, each column with its group's zero and scale. */
INLINE void scale_ordered(void *restrict to, const uint8_t *restrict codes, int64_t count, const int32_t *order,
                          const float *zeros, const float *scales, int kind, uint16_t nan)
{
    for (int64_t i = 0; i < count; i++)
        keep(to, i, ((float)codes[i] - zeros[order[i]]) * scales[order[i]], kind, nan);
}

/* How many of a group's columns in a row are looked up, the first ones. least: columns that are worth a table of FP8.
 * dtype: BFLOAT16 or FLOAT16. */
INLINE int64_t look_up(struct space *s, uint16_t *to, const struct integers *job, const uint8_t *codes, int64_t count,
                       int64_t group, float zero, float scale, int64_t least, int layout, int dtype)
{
    const int is_number = is_finite(scale), is_half = dtype == FLOAT16;
    const uint16_t nan = (uint16_t)job->nan;
    if (layout < INT8 && job->bits <= 4 && (is_number || is_half))
        return look_up_run(to, codes, count, zero, scale, is_half ? FLOAT16 : FINITE);
    if (layout == FP8 && count >= least && is_number && bits_of(zero) == 0) {
        look_up_fp8(to, codes, count, products_of(s, group, scale, dtype, nan), nan, is_half);
        return count;
    }
    return 0;
}

/* One row's columns from ... from + count - 1. */
INLINE void scale_row(struct space *s, const struct integers *job, const uint8_t *codes, int64_t row, int64_t from,
                      int64_t count, int layout, int dtype)
{
    const float *zeros = job->zeros + row * job->groups, *scales = job->scales + row * job->groups;
    const float *beside = row + 1 < job->n ? scales + job->groups : scales - (row > 0) * job->groups;
    const uint16_t nan = (uint16_t)job->nan;
    if (job->order) {
        scale_ordered(s->made, codes, count, job->order + from, zeros, scales, dtype, nan);
        return;
    }
    const int64_t size = dtype == FLOAT32 ? 4 : 2;
    for (int64_t i = 0; i < count;) {
        const int64_t g = (from + i) / job->group, end = (g + 1) * job->group - from;
        const int64_t num = (end < count ? end : count) - i;
        uint8_t *to = (uint8_t *)s->made + i * size;
        const int64_t done = dtype == FLOAT32
            ? 0
            : look_up(s, (uint16_t *)to, job, codes + i, num, g, zeros[g], scales[g],
                      bits_of(scales[g]) == bits_of(beside[g]) ? LEAST_SHARED : LEAST_ALONE, layout, dtype);
        const int is_number = dtype == BFLOAT16 && layout != FP8 && is_finite(scales[g]);
        if (is_number)
            scale_run(to + done * size, codes + i + done, num - done, zeros[g], scales[g], layout, FINITE, nan);
        else
            scale_run(to + done * size, codes + i + done, num - done, zeros[g], scales[g], layout, dtype, nan);
        i += num;
    }
}

/* The same, to where they go. codes: a byte each. */
INLINE void put_row(struct space *s, const struct integers *job, const uint8_t *codes, int64_t row, int64_t from,
                    int64_t count, int layout)
{
    const int64_t size = job->dtype == FLOAT32 ? 4 : 2;
    if (job->dtype == FLOAT32)
        scale_row(s, job, codes, row, from, count, layout, FLOAT32);
    else if (job->dtype == FLOAT16)
        scale_row(s, job, codes, row, from, count, layout, FLOAT16);
    else
        scale_row(s, job, codes, row, from, count, layout, BFLOAT16);
    put_made((uint8_t *)job->to + (row * job->width + from) * size, s->made, count * size, job->is_streamed);
}

/* So many rows, at most BLOCK, whose codes are in words. */
static void put_words(struct space *s, const struct integers *job, int64_t first, int64_t rows)
{
    for (int64_t from = 0; from < job->width; from += TILE) {
        const int64_t count = job->width - from < TILE ? job->width - from : TILE;
        take_codes(s, job, first, rows, from, count);
        for (int64_t r = 0; r < rows; r++)
            put_row(s, job, s->codes[r], first + r, from, count, ALONG);
    }
}

/* The same of codes that are bytes: row after row, as they are stored. */
static void put_bytes(struct space *s, const struct integers *job, int64_t first, int64_t rows)
{
    for (int64_t row = first; row < first + rows; row++)
        for (int64_t from = 0; from < job->width; from += TILE) {
            const int64_t count = job->width - from < TILE ? job->width - from : TILE;
            const uint8_t *codes = (const uint8_t *)job->codes + row * job->stride + from;
            if (job->layout == FP8)
                put_row(s, job, codes, row, from, count, FP8);
            else
                put_row(s, job, codes, row, from, count, INT8);
        }
}

static void start(struct space *s)
{
    for (int q = 0; q < 256; q++)
        s->values[q] = value_of((uint8_t)q, FP8);
    for (int i = 0; i < NUM_PRODUCTS; i++)
        s->products[i].scale = 0x7F800000; /* infinity, which no products have */
}

void NAME(ssdtune_unpack_integers, SUFFIX)(struct integers *job)
{
    struct space s;
    if (job->layout == FP8)
        start(&s);
    for (int64_t begin, end; take_part(&job->next, job->part, job->n, &begin, &end);) {
        for (int64_t first = begin; first < end; first += BLOCK) {
            const int64_t rows = end - first < BLOCK ? end - first : BLOCK;
            if (job->layout < INT8)
                put_words(&s, job, first, rows);
            else
                put_bytes(&s, job, first, rows);
        }
    }
    finish(job->is_streamed);
}
