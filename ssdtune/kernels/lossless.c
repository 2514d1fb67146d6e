/* Lossless bfloat16: the fast twin of lossless.py, which defines every bit of it, and what is damaged.
 *
 * Compiled once for each instruction set, with the names' ending in SUFFIX. Whatever the parts hold, nothing outside
 * them is read and nothing outside the output written: a code has an entry in the table whatever it is, and a group's
 * escapes are counted before any of them is taken.
 */
#include "streams.h"

enum { LANES = 64, TILE = 512, GROUPS = TILE / LANES, CHUNK = 4096 };
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum { AHEAD = 4 * TILE }; /* elements that are fetched before their turn: saves a tenth of the time with 4 bits */

/* A whole tensor, taken part by part by whoever calls: all threads get the same job. */
struct job {
    void *to;
    int64_t n, dtype, bits; /* bits: 4, all in codes[0]; 3, the upper two in codes[0], the lowest in codes[1] */
    const uint8_t *lower, *codes[2], *dictionary, *escapes;
    const int32_t *offsets;
    int64_t num_escapes;
    int64_t part, next;  /* part: elements, a multiple of CHUNK; next: that nobody has taken yet */
    int64_t is_streamed; /* whether stores go past the caches; `to` is aligned for it then */
    int64_t is_damaged;  /* set where the parts contradict each other */
};

/* A thread's own. */
struct state {
    _Alignas(16) uint8_t table[16]; /* the dictionary, 0 for the escape's code */
    const uint8_t *escape, *end;    /* the next escape, and where the chunk's end */
    const uint8_t *readable;        /* where all escapes end */
};

/* The next escapes, a group's, with eight readable bytes behind them; 0 where the chunk has fewer. */
INLINE const uint8_t *take(struct state *s, int64_t count, uint8_t copied[LANES + 8])
{
    const uint8_t *found = s->escape;
    if (count > s->end - found)
        return 0;
    s->escape += count;
    if (s->readable - found >= count + 8)
        return found;
    memset(copied + count, 0, 8);
    return memcpy(copied, found, (size_t)count);
}

/* ---------------------------------------------------------------- bytes side by side */

#if defined(__AVX512BW__)
enum { WIDE = 64 };
typedef __m512i wide;
INLINE wide load(const uint8_t *from) { return _mm512_loadu_si512(from); }
INLINE wide low_bits(wide a, int n) { return _mm512_and_si512(a, _mm512_set1_epi8((char)((1 << n) - 1))); }
INLINE wide either(wide a, wide b) { return _mm512_or_si512(a, b); }
INLINE wide right(wide a, int n) { return _mm512_srli_epi16(a, n); }
INLINE wide doubled(wide a) { return _mm512_add_epi8(a, a); }
INLINE uint64_t equal(wide a, int b) { return _mm512_cmpeq_epi8_mask(a, _mm512_set1_epi8((char)b)); }
INLINE wide repeated(const uint8_t *table)
{
    return _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)table));
}
INLINE wide lookup(wide table, wide a) { return _mm512_shuffle_epi8(table, a); }
INLINE __m128i sixteen(wide a, int i)
{
    return i < 2 ? (i == 0 ? _mm512_castsi512_si128(a) : _mm512_extracti32x4_epi32(a, 1))
                 : (i == 2 ? _mm512_extracti32x4_epi32(a, 2) : _mm512_extracti32x4_epi32(a, 3));
}
#elif defined(__AVX2__)
enum { WIDE = 32 };
typedef __m256i wide;
INLINE wide load(const uint8_t *from) { return _mm256_loadu_si256((const __m256i *)from); }
INLINE wide low_bits(wide a, int n) { return _mm256_and_si256(a, _mm256_set1_epi8((char)((1 << n) - 1))); }
INLINE wide either(wide a, wide b) { return _mm256_or_si256(a, b); }
INLINE wide right(wide a, int n) { return _mm256_srli_epi16(a, n); }
INLINE wide doubled(wide a) { return _mm256_add_epi8(a, a); }
INLINE uint64_t equal(wide a, int b)
{
    return (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(a, _mm256_set1_epi8((char)b)));
}
INLINE wide repeated(const uint8_t *table)
{
    return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)table));
}
INLINE wide lookup(wide table, wide a) { return _mm256_shuffle_epi8(table, a); }
INLINE __m128i sixteen(wide a, int i)
{
    return i ? _mm256_extracti128_si256(a, 1) : _mm256_castsi256_si128(a);
}
#else
enum { WIDE = 16 };
typedef uint8_t wide __attribute__((vector_size(16)));
INLINE wide load(const uint8_t *from)
{
    wide a;
    memcpy(&a, from, sizeof a);
    return a;
}
INLINE wide low_bits(wide a, int n) { return a & (uint8_t)((1 << n) - 1); }
INLINE wide either(wide a, wide b) { return a | b; }
INLINE wide right(wide a, int n) { return a >> n; }
INLINE wide doubled(wide a) { return a + a; }
#endif

/* Codes of WIDE elements of a tile, from `at` on in its group g. codes: of the tile. bits: a constant. */
INLINE wide code(const uint8_t *const codes[2], int g, int at, const int bits)
{
    if (bits == 4)
        return low_bits(right(load(codes[0] + g / 2 * LANES + at), g % 2 * 4), 4);
    wide upper = low_bits(right(load(codes[0] + g / 4 * LANES + at), g % 4 * 2), 2);
    return either(doubled(upper), low_bits(right(load(codes[1] + at), g), 1));
}

/* ---------------------------------------------------------------- a group of 64 elements */

#if defined(__AVX2__)
/* For each of eight elements the number of escapes before it, by their mask; for what is none 128: 0 when shuffled. */
#define PLACE(m, i) ((m) >> (i) & 1 ? __builtin_popcount((m) & ((1 << (i)) - 1)) : 128)
#define PLACES(m) \
    {PLACE(m, 0), PLACE(m, 1), PLACE(m, 2), PLACE(m, 3), PLACE(m, 4), PLACE(m, 5), PLACE(m, 6), PLACE(m, 7)}
#define PLACES4(m) PLACES(m), PLACES(m + 1), PLACES(m + 2), PLACES(m + 3)
#define PLACES16(m) PLACES4(m), PLACES4(m + 4), PLACES4(m + 8), PLACES4(m + 12)
#define PLACES64(m) PLACES16(m), PLACES16(m + 16), PLACES16(m + 32), PLACES16(m + 48)
static const uint8_t PLACES_OF[256][8] = {PLACES64(0), PLACES64(64), PLACES64(128), PLACES64(192)};

INLINE __m128i eight_and_eight(const uint8_t *a, const uint8_t *b)
{
    return _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i *)a), _mm_loadl_epi64((const __m128i *)b));
}

/* The escapes of 16 elements at their places, 0 elsewhere. Moves on to the next one; reads up to eight bytes more. */
INLINE __m128i escapes(const uint8_t **escape, unsigned mask)
{
    const __m128i second = _mm_set_epi64x(0x0808080808080808, 0); /* of two eights */
    const unsigned m = mask & 255, n = mask >> 8 & 255;
    const uint8_t *first = *escape, *after = first + __builtin_popcount(m);
    *escape = after + __builtin_popcount(n);
    __m128i places = _mm_or_si128(eight_and_eight(PLACES_OF[m], PLACES_OF[n]), second);
    return _mm_shuffle_epi8(eight_and_eight(first, after), places);
}

INLINE void put(uint8_t *to, __m128i values, const int is_streamed)
{
    if (is_streamed)
        _mm_stream_si128((__m128i *)to, values);
    else
        _mm_storeu_si128((__m128i *)to, values);
}

/* 16 values. */
INLINE void weave(uint8_t *to, __m128i upper, const uint8_t *lower, const int dtype, const int is_streamed)
{
    const __m128i zero = _mm_setzero_si128(), low = _mm_loadu_si128((const __m128i *)lower);
    const __m128i first = _mm_unpacklo_epi8(low, upper), second = _mm_unpackhi_epi8(low, upper);
    if (dtype == BFLOAT16) {
        put(to, first, is_streamed);
        put(to + 16, second, is_streamed);
    } else {
        put(to, _mm_unpacklo_epi16(zero, first), is_streamed);
        put(to + 16, _mm_unpackhi_epi16(zero, first), is_streamed);
        put(to + 32, _mm_unpacklo_epi16(zero, second), is_streamed);
        put(to + 48, _mm_unpackhi_epi16(zero, second), is_streamed);
    }
}

/* Group g of a tile; back: whether the chunk has its escapes. to, lower: of the group; codes: of the tile. */
INLINE int decode_group(
    struct state *s, uint8_t *to, const uint8_t *lower, const uint8_t *const codes[2], wide table, int g,
    const int bits, const int dtype, const int is_streamed)
{
    const int size = dtype == BFLOAT16 ? 2 : 4;
    wide upper[LANES / WIDE];
    uint64_t mask = 0;
    for (int at = 0; at < LANES; at += WIDE) {
        wide found = code(codes, g, at, bits);
        upper[at / WIDE] = lookup(table, found);
        mask |= equal(found, (1 << bits) - 1) << at;
    }
    if (bits == 4 && !mask) { /* with 3 bits nearly every group has escapes */
#pragma GCC unroll 4
        for (int at = 0; at < LANES; at += 16)
            weave(to + at * size, sixteen(upper[at / WIDE], at % WIDE / 16), lower + at, dtype, is_streamed);
        return 1;
    }
    uint8_t copied[LANES + 8];
    const uint8_t *escape = take(s, __builtin_popcountll(mask), copied);
    if (!escape)
        return 0;
#pragma GCC unroll 4
    for (int at = 0; at < LANES; at += 16) {
        __m128i known = sixteen(upper[at / WIDE], at % WIDE / 16);
        __m128i rest = escapes(&escape, (unsigned)(mask >> at));
        weave(to + at * size, _mm_or_si128(known, rest), lower + at, dtype, is_streamed);
    }
    return 1;
}
#else
INLINE wide repeated(const uint8_t *table) { return load(table); }

INLINE int decode_group(
    struct state *s, uint8_t *to, const uint8_t *lower, const uint8_t *const codes[2], wide table, int g,
    const int bits, const int dtype, const int is_streamed)
{
    (void)table, (void)is_streamed;
    uint8_t found[LANES], upper[LANES], copied[LANES + 8];
    int64_t count = 0;
    for (int at = 0; at < LANES; at += WIDE) {
        wide here = code(codes, g, at, bits);
        memcpy(found + at, &here, sizeof here);
    }
    for (int i = 0; i < LANES; i++)
        upper[i] = s->table[found[i]];
    for (int i = 0; i < LANES; i++)
        count += found[i] == (1 << bits) - 1;
    if (count) {
        const uint8_t *escape = take(s, count, copied);
        if (!escape)
            return 0;
        for (int i = 0; i < LANES; i++) {
            const int is_escape = found[i] == (1 << bits) - 1;
            upper[i] |= (uint8_t)(-is_escape & *escape);
            escape += is_escape;
        }
    }
    for (int i = 0; i < LANES; i++) {
        const uint32_t value = (uint32_t)upper[i] << 8 | lower[i];
        if (dtype == BFLOAT16)
            ((uint16_t *)to)[i] = (uint16_t)value;
        else
            ((uint32_t *)to)[i] = value << 16;
    }
    return 1;
}
#endif

/* ---------------------------------------------------------------- tiles, chunks, a tensor */

/* What lies AHEAD of these bytes; beyond the part's end it does nothing. */
INLINE void fetch(const uint8_t *from, int64_t ahead, int64_t num_bytes)
{
    for (int64_t at = 0; at < num_bytes; at += 64)
        __builtin_prefetch((const void *)((uintptr_t)from + (uintptr_t)(ahead + at)));
}

INLINE int decode_groups(
    struct state *s, uint8_t *to, const uint8_t *lower, const uint8_t *const codes[2],
    const int bits, const int dtype, const int is_streamed)
{
    const wide table = repeated(s->table);
    fetch(lower, AHEAD, TILE);
    fetch(codes[0], AHEAD / TILE * LANES * (bits == 4 ? 4 : 2), LANES * (bits == 4 ? 4 : 2));
    for (int g = 0; g < GROUPS; g++) {
        const int at = g * LANES;
        uint8_t *here = to + at * (dtype == BFLOAT16 ? 2 : 4);
        if (!decode_group(s, here, lower + at, codes, table, g, bits, dtype, is_streamed))
            return 0;
    }
    return 1;
}

/* A tile, where all pointers point, to bfloat16 if that is the dtype, else to float32; back: whether the chunk has its
 * escapes. */
static int decode_tile(
    struct state *s, void *to, const uint8_t *lower, const uint8_t *const codes[2], const struct job *job,
    int64_t is_streamed)
{
    switch ((job->bits == 4) * 4 + (job->dtype == BFLOAT16) * 2 + (is_streamed != 0)) {
    case 0: return decode_groups(s, to, lower, codes, 3, FLOAT32, 0);
    case 1: return decode_groups(s, to, lower, codes, 3, FLOAT32, 1);
    case 2: return decode_groups(s, to, lower, codes, 3, BFLOAT16, 0);
    case 3: return decode_groups(s, to, lower, codes, 3, BFLOAT16, 1);
    case 4: return decode_groups(s, to, lower, codes, 4, FLOAT32, 0);
    case 5: return decode_groups(s, to, lower, codes, 4, FLOAT32, 1);
    case 6: return decode_groups(s, to, lower, codes, 4, BFLOAT16, 0);
    default: return decode_groups(s, to, lower, codes, 4, BFLOAT16, 1);
    }
}

/* A copy of a tile's slice of some width in which the codes from element `count` on are 0. */
static void copy_beginning(uint8_t *to, const uint8_t *from, int width, int64_t count)
{
    memcpy(to, from, (size_t)(LANES * width));
    for (int64_t i = count; i < TILE; i++) {
        const int64_t field = i / LANES % (8 / width), vector = i / LANES / (8 / width);
        to[vector * LANES + i % LANES] &= (uint8_t)~(((1 << width) - 1) << field * width);
    }
}

/* The last tile's first `count` elements; the other codes may be anything. As `decode_tile`. */
static int decode_beginning(
    struct state *s, void *to, const uint8_t *lower, const uint8_t *const codes[2], const struct job *job,
    int64_t count)
{
    _Alignas(64) uint8_t some[TILE] = {0}, upper[LANES * 4], lowest[LANES], made[4 * TILE];
    const uint8_t *const copies[2] = {upper, lowest};
    memcpy(some, lower, (size_t)count);
    copy_beginning(upper, codes[0], job->bits == 4 ? 4 : 2, count);
    if (job->bits == 3)
        copy_beginning(lowest, codes[1], 1, count);
    if (!decode_tile(s, made, some, copies, job, 0))
        return 0;
    memcpy(to, made, (size_t)(count * (job->dtype == BFLOAT16 ? 2 : 4)));
    return 1;
}

/* back: whether its parts agree. */
static int decode_chunk(struct state *s, const struct job *job, int64_t chunk)
{
    const int64_t begin = job->offsets[chunk], end = job->offsets[chunk + 1];
    if (begin < 0 || begin > end || end > job->num_escapes)
        return 0;
    s->escape = job->escapes + begin;
    s->end = job->escapes + end;
    _Alignas(64) float made[TILE]; /* on the way to float16 */
    const int64_t stop = (chunk + 1) * CHUNK < job->n ? (chunk + 1) * CHUNK : job->n;
    for (int64_t at = chunk * CHUNK; at < stop; at += TILE) {
        const int64_t vectors = at / TILE * LANES;
        const uint8_t *const codes[2] = {
            job->codes[0] + vectors * (job->bits == 4 ? 4 : 2), job->bits == 4 ? 0 : job->codes[1] + vectors};
        const int64_t count = stop - at < TILE ? stop - at : TILE;
        void *to = job->dtype == FLOAT16 ? (void *)made : (uint8_t *)job->to + at * (job->dtype == BFLOAT16 ? 2 : 4);
        const int is_sound =
            count < TILE ? decode_beginning(s, to, job->lower + at, codes, job, count)
                         : decode_tile(s, to, job->lower + at, codes, job, job->dtype != FLOAT16 && job->is_streamed);
        if (!is_sound)
            return 0;
        if (job->dtype == FLOAT16)
            put_float16((uint16_t *)job->to + at, made, count, job->is_streamed);
    }
    return s->escape == s->end;
}

void NAME(ssdtune_decode_lossless, SUFFIX)(struct job *job)
{
    struct state s = {.readable = job->escapes + job->num_escapes};
    memcpy(s.table, job->dictionary, (size_t)(1 << job->bits) - 1);
    for (int64_t first, stop; take_part(&job->next, job->part, job->n, &first, &stop);) {
        for (int64_t at = first; at < stop; at += CHUNK)
            if (!decode_chunk(&s, job, at / CHUNK))
                __atomic_store_n(&job->is_damaged, 1, __ATOMIC_RELAXED);
    }
    finish(job->is_streamed);
}
