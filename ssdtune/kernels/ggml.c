/* ggml's quantized blocks to float32, bfloat16 or float16: the fast twin of ggml.py, which defines every bit of it.
 *
 * Compiled once for each instruction set, with the names' ending in SUFFIX; nothing fused, nothing reordered, as
 * noise.c. Whatever the kind, TILE elements are brought to one form, small signed integers and a scale (and a minimum)
 * for each RUN of them, and computed from there. To bfloat16, those of four bits are looked up: the 16 values that
 * codes of the same scale can stand for are computed once.
 */
#include <stddef.h>
#include "streams.h"

enum { TILE = 256, RUN = 16, RUNS = TILE / RUN, SMALL = 32 }; /* elements; SMALL: of a block of the older kinds */
/* What comes out. FINITE: bfloat16 where nothing can be no number. NUMBERED: the same, of codes that are numbers of
 * meanings. */
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, FINITE = 3, NUMBERED = 4 };
/* As ggml numbers its types. */
enum {
    Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8,
    Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14,
    IQ4_NL = 20, IQ4_XS = 23, MXFP4 = 39
};
/* What nibbles stand for. */
static const int8_t UNSIGNED[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
static const int8_t SIGNED[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
static const int8_t IQ4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const int8_t DOUBLED_E2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/* A tensor, taken part by part by whoever calls: all threads get the same job.
 *
 * num_bytes, block: of a block, in bytes and elements. */
struct ggml {
    void *to;
    const uint8_t *blocks;
    int64_t n, kind, block, num_bytes;
    int64_t dtype, nan, is_streamed;
    int64_t part, next; /* part: elements, a multiple of TILE; next: that nobody has taken yet */
};

/* w = code * scale - minimum, of RUN elements each. meanings: 16, which codes are numbers of, where scales and minima
 * are of 32 elements; null: codes are what they are. is_wild: whether a scale or minimum is infinite or no number. */
struct tile {
    _Alignas(64) int8_t codes[TILE];
    float scale[RUNS], minimum[RUNS];
    const int8_t *meanings;
    int is_wild;
};

/* To bfloat16, ties to even, of what is a number. */
INLINE uint16_t nearest_finite(float value)
{
    const uint32_t bits = bits_of(value);
    return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

/* The same of any: what is no number becomes `nan`, in which processors differ and torch with them. */
INLINE uint16_t nearest(float value, uint16_t nan)
{
    return (bits_of(value) & 0x7FFFFFFFu) > 0x7F800000u ? nan : nearest_finite(value);
}

INLINE uint32_t word_at(const uint8_t *at)
{
    uint32_t word;
    memcpy(&word, at, 4);
    return word;
}

/* The float16 that lies there. */
INLINE float half_at(struct tile *t, const uint8_t *at)
{
    const uint32_t bits = at[0] | (uint32_t)at[1] << 8, sign = (bits & 0x8000u) << 16;
    const uint32_t exponent = bits >> 10 & 31u, fraction = bits & 1023u;
    if (exponent == 0)
        return float_of(sign | bits_of((float)fraction * 0x1p-24f));
    t->is_wild |= exponent == 31;
    return float_of(sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13);
}

/* -------------------------------------------------------------------------------------------------------- the codes */

/* Fields of `width` bits of 16 bytes, `at` bits up, times 2^shift. */
#if defined(__SSE2__)
typedef __m128i codes16;
INLINE codes16 codes_at(const int8_t *at) { return _mm_loadu_si128((const __m128i *)at); }
INLINE void keep(int8_t *to, codes16 codes) { _mm_storeu_si128((__m128i *)to, codes); }
INLINE codes16 all(int number) { return _mm_set1_epi8((char)number); }
INLINE codes16 sum(codes16 a, codes16 b) { return _mm_add_epi8(a, b); }
INLINE codes16 fields(const uint8_t *from, int at, int width, int shift)
{
    const __m128i found = _mm_srli_epi16(_mm_loadu_si128((const __m128i *)from), at);
    return _mm_slli_epi16(_mm_and_si128(found, _mm_set1_epi8((char)((1 << width) - 1))), shift);
}
#else
typedef struct { int8_t of[16]; } codes16;
INLINE codes16 codes_at(const int8_t *at) { codes16 c; memcpy(&c, at, 16); return c; }
INLINE void keep(int8_t *to, codes16 codes) { memcpy(to, &codes, 16); }
INLINE codes16 all(int number) { codes16 c; memset(&c, number, 16); return c; }
INLINE codes16 sum(codes16 a, codes16 b)
{
    for (int i = 0; i < 16; i++)
        a.of[i] = (int8_t)(a.of[i] + b.of[i]);
    return a;
}
INLINE codes16 fields(const uint8_t *from, int at, int width, int shift)
{
    codes16 c;
    for (int i = 0; i < 16; i++)
        c.of[i] = (int8_t)((from[i] >> at & ((1 << width) - 1)) << shift);
    return c;
}
#endif

/* Nibbles of `run` bytes, less `zero`: the lower ones, then the upper ones. */
INLINE void take_nibbles(int8_t *codes, const uint8_t *from, int run, int zero)
{
    for (int i = 0; i < run; i += 16) {
        keep(codes + i, sum(fields(from + i, 0, 4, 0), all(-zero)));
        keep(codes + run + i, sum(fields(from + i, 4, 4, 0), all(-zero)));
    }
}

/* Adds fields of `width` bits of 32 bytes, times 2^shift: the lowest ones, then those above them, to the highest. */
INLINE void add_fields(int8_t *codes, const uint8_t *from, int width, int shift)
{
#pragma GCC unroll 8
    for (int j = 0; j < 8 / width; j++)
        for (int i = 0; i < 32; i += 16) {
            int8_t *to = codes + 32 * j + i;
            keep(to, sum(codes_at(to), fields(from + i, j * width, width, shift)));
        }
}

/* Adds 16 for each bit that is set of a word, the lowest first. */
INLINE void add_bits(int8_t *restrict codes, const uint8_t *restrict from)
{
    const uint32_t word = word_at(from);
#if defined(__AVX2__)
    const __m256i numbers = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32((int)word), numbers);
    const __m256i bits = _mm256_set1_epi64x((long long)0x8040201008040201u);
    const __m256i is_set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bits), bits);
    const __m256i before = _mm256_loadu_si256((const __m256i *)codes);
    const __m256i added = _mm256_and_si256(is_set, _mm256_set1_epi8(16));
    _mm256_storeu_si256((__m256i *)codes, _mm256_add_epi8(before, added));
    return;
#endif
    for (int i = 0; i < SMALL; i++)
        codes[i] = (int8_t)(codes[i] + (int)((word >> i & 1u) << 4));
}

/* -------------------------------------------------------------------------------------------------------- the kinds */

/* Scales and minima of 6 bits in 12 bytes, for 32 elements each, times d and dmin. */
INLINE void take_scales(struct tile *t, const uint8_t *s, float d, float dmin)
{
    for (int j = 0; j < 8; j++) {
        const int scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
        const int minimum = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | (s[j] >> 6) << 4;
        t->scale[2 * j] = t->scale[2 * j + 1] = d * (float)scale;
        t->minimum[2 * j] = t->minimum[2 * j + 1] = dmin * (float)minimum;
    }
}

static void take_q2_k(struct tile *t, const uint8_t *b)
{
    const float d = half_at(t, b + 80), dmin = half_at(t, b + 82);
    memset(t->codes, 0, TILE);
    for (int h = 0; h < 2; h++)
        add_fields(t->codes + 128 * h, b + 16 + 32 * h, 2, 0);
    for (int j = 0; j < RUNS; j++) {
        t->scale[j] = d * (float)(b[j] & 15);
        t->minimum[j] = dmin * (float)(b[j] >> 4);
    }
}

static void take_q3_k(struct tile *t, const uint8_t *b)
{
    const float d = half_at(t, b + 108);
    memset(t->codes, -4, TILE);
    for (int h = 0; h < 2; h++)
        add_fields(t->codes + 128 * h, b + 32 + 32 * h, 2, 0);
    add_fields(t->codes, b, 1, 2);
    for (int j = 0; j < RUNS; j++) {
        const int low = b[96 + j % 8] >> j / 8 * 4 & 15, high = b[104 + j % 4] >> j / 4 * 2 & 3;
        t->scale[j] = d * (float)((low | high << 4) - 32);
    }
}

static void take_q4_k(struct tile *t, const uint8_t *b)
{
    t->meanings = UNSIGNED;
    for (int j = 0; j < 4; j++)
        take_nibbles(t->codes + 64 * j, b + 16 + 32 * j, 32, 0);
    take_scales(t, b + 4, half_at(t, b), half_at(t, b + 2));
}

static void take_q5_k(struct tile *t, const uint8_t *b)
{
    for (int j = 0; j < 4; j++)
        take_nibbles(t->codes + 64 * j, b + 48 + 32 * j, 32, 0);
    add_fields(t->codes, b + 16, 1, 4);
    take_scales(t, b + 4, half_at(t, b), half_at(t, b + 2));
}

static void take_q6_k(struct tile *t, const uint8_t *b)
{
    const float d = half_at(t, b + 208);
    for (int h = 0; h < 2; h++) {
        take_nibbles(t->codes + 128 * h, b + 64 * h, 64, 32);
        add_fields(t->codes + 128 * h, b + 128 + 32 * h, 2, 4);
    }
    for (int j = 0; j < RUNS; j++)
        t->scale[j] = d * (float)(int8_t)b[192 + j];
}

static void take_iq4_xs(struct tile *t, const uint8_t *b)
{
    const float d = half_at(t, b);
    const int high = b[2] | b[3] << 8;
    t->meanings = IQ4;
    for (int j = 0; j < 8; j++) {
        const int low = b[4 + j / 2] >> j % 2 * 4 & 15;
        take_nibbles(t->codes + 32 * j, b + 8 + 16 * j, 16, 0);
        t->scale[2 * j] = t->scale[2 * j + 1] = d * (float)((low | (high >> 2 * j & 3) << 4) - 32);
    }
}

/* A block of 32, the number-th of a tile. */
INLINE void take_small(struct tile *t, const uint8_t *b, int number, int kind)
{
    int8_t *codes = t->codes + SMALL * number;
    float scale = kind == MXFP4 ? 0 : half_at(t, b), minimum = 0;
    switch (kind) {
    case Q4_0: case IQ4_NL: take_nibbles(codes, b + 2, 16, 0); break;
    case Q4_1: take_nibbles(codes, b + 4, 16, 0); break;
    case Q5_0: take_nibbles(codes, b + 6, 16, 16); add_bits(codes, b + 2); break;
    case Q5_1: take_nibbles(codes, b + 8, 16, 0); add_bits(codes, b + 4); break;
    case Q8_0: memcpy(codes, b + 2, SMALL); break;
    case MXFP4:
        take_nibbles(codes, b + 1, 16, 0);
        scale = float_of(b[0] < 2 ? 0x00200000u << b[0] : (b[0] - 1u) << 23);
        break;
    }
    if (kind == Q4_1 || kind == Q5_1)
        minimum = -half_at(t, b + 2);
    t->scale[2 * number] = t->scale[2 * number + 1] = scale;
    t->minimum[2 * number] = t->minimum[2 * number + 1] = minimum;
}

INLINE void take_smalls(struct tile *t, const struct ggml *job, const uint8_t *from, int64_t count, int kind,
                        const int8_t *meanings)
{
    t->meanings = meanings;
    for (int i = 0; i < count / SMALL; i++)
        take_small(t, from + i * job->num_bytes, i, kind);
}

/* Elements first ... first + count - 1, whole blocks. Back: whether they have minima. */
static int take(struct tile *t, const struct ggml *job, int64_t first, int64_t count)
{
    const uint8_t *from = job->blocks + first / job->block * job->num_bytes;
    switch (job->kind) {
    case Q4_0: take_smalls(t, job, from, count, Q4_0, SIGNED); return 0;
    case Q4_1: take_smalls(t, job, from, count, Q4_1, UNSIGNED); return 1;
    case Q5_0: take_smalls(t, job, from, count, Q5_0, NULL); return 0;
    case Q5_1: take_smalls(t, job, from, count, Q5_1, NULL); return 1;
    case Q8_0: take_smalls(t, job, from, count, Q8_0, NULL); return 0;
    case Q2_K: take_q2_k(t, from); return 1;
    case Q3_K: take_q3_k(t, from); return 0;
    case Q4_K: take_q4_k(t, from); return 1;
    case Q5_K: take_q5_k(t, from); return 1;
    case Q6_K: take_q6_k(t, from); return 0;
    case IQ4_NL: take_smalls(t, job, from, count, IQ4_NL, IQ4); return 0;
    case IQ4_XS: take_iq4_xs(t, from); return 0;
    default: take_smalls(t, job, from, count, MXFP4, DOUBLED_E2M1); return 0;
    }
}

/* -------------------------------------------------------------------------------------------------- codes to values */

/* Codes become what they are numbers of. */
INLINE void settle(struct tile *t)
{
    if (!t->meanings)
        return;
#if defined(__AVX2__)
    const __m256i of = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)t->meanings));
    for (int i = 0; i < TILE; i += 32) {
        __m256i *at = (__m256i *)(t->codes + i);
        _mm256_store_si256(at, _mm256_shuffle_epi8(of, _mm256_load_si256(at)));
    }
#else
    if (t->meanings == UNSIGNED)
        return;
    if (t->meanings == SIGNED)
        for (int i = 0; i < TILE; i++)
            t->codes[i] = (int8_t)(t->codes[i] - 8);
    else
        for (int i = 0; i < TILE; i++)
            t->codes[i] = t->meanings[t->codes[i] & 15];
#endif
}

INLINE float value_of(int8_t code, float scale, float minimum, int has_minima)
{
    const float product = (float)code * scale;
    return has_minima ? product - minimum : product;
}

/* A RUN of values to `to`, of any kind but NUMBERED. */
INLINE void put_any_run(void *to, const int8_t *codes, float scale, float minimum, int has_minima, int kind,
                        uint16_t nan)
{
    for (int i = 0; i < RUN; i++) {
        const float value = value_of(codes[i], scale, minimum, has_minima);
        if (kind == FLOAT32)
            ((float *)to)[i] = value;
        else
            ((uint16_t *)to)[i] = kind == FINITE ? nearest_finite(value) : nearest(value, nan);
    }
}

/* put_run: the same of FLOAT32 and FINITE. look_up: 64 elements of NUMBERED, which have two scales. is_streamed: past
 * the caches; `to` is aligned then. */
#if defined(__AVX2__)
INLINE __m256 eight_values(const int8_t *codes, __m256 scale, __m256 minimum, int has_minima)
{
    const __m256i code = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)codes));
    const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(code), scale);
    return has_minima ? _mm256_sub_ps(product, minimum) : product;
}

/* To bfloat16, in the lower halves of words; the upper ones are zero. */
INLINE __m256i eight_nearest(__m256 values)
{
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), is_odd), 16);
}

INLINE void put_bytes(void *to, __m256i made, int is_streamed)
{
    if (is_streamed)
        _mm256_stream_si256(to, made);
    else
        _mm256_storeu_si256(to, made);
}

INLINE void put_run(void *to, const int8_t *codes, float scale, float minimum, int has_minima, int kind,
                    int is_streamed)
{
    const __m256 s = _mm256_set1_ps(scale), m = _mm256_set1_ps(minimum);
    const __m256 low = eight_values(codes, s, m, has_minima), high = eight_values(codes + 8, s, m, has_minima);
    if (kind == FLOAT32) {
        put_bytes(to, _mm256_castps_si256(low), is_streamed);
        put_bytes((float *)to + 8, _mm256_castps_si256(high), is_streamed);
    } else { /* packed within halves of a register, then brought into order */
        const __m256i both = _mm256_packus_epi32(eight_nearest(low), eight_nearest(high));
        put_bytes(to, _mm256_permute4x64_epi64(both, 0xD8), is_streamed);
    }
}

/* The lower half to `to`, the upper one 32 elements after it. */
INLINE void put_halves(uint16_t *to, __m256i made, int is_streamed)
{
    const __m128i first = _mm256_castsi256_si128(made), second = _mm256_extracti128_si256(made, 1);
    if (is_streamed) {
        _mm_stream_si128((__m128i *)to, first);
        _mm_stream_si128((__m128i *)(to + 32), second);
    } else {
        _mm_storeu_si128((__m128i *)to, first);
        _mm_storeu_si128((__m128i *)(to + 32), second);
    }
}

INLINE __m256 halves(float first, float second)
{
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_set1_ps(first)), _mm_set1_ps(second), 1);
}

/* Four meanings, times two scales: of the first 32 elements in the lower half, of the next ones in the upper half. */
INLINE __m256i two_times_four(const int8_t *meanings, __m256 scale, __m256 minimum, int has_minima)
{
    int32_t four;
    memcpy(&four, meanings, 4);
    const __m256 of = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_set1_epi32(four)));
    const __m256 product = _mm256_mul_ps(of, scale);
    return eight_nearest(has_minima ? _mm256_sub_ps(product, minimum) : product);
}

/* Nothing goes from one half of a register to the other but where it is loaded: that is dear on many processors. */
INLINE void look_up(uint16_t *to, const int8_t *codes, const int8_t *meanings, const float *scale, const float *minimum,
                    int has_minima, int is_streamed)
{
    const __m256 s = halves(scale[0], scale[2]), m = halves(minimum[0], minimum[2]);
    const __m256i a = _mm256_packus_epi32(two_times_four(meanings, s, m, has_minima),
                                          two_times_four(meanings + 4, s, m, has_minima));
    const __m256i b = _mm256_packus_epi32(two_times_four(meanings + 8, s, m, has_minima),
                                          two_times_four(meanings + 12, s, m, has_minima));
    const __m256i mask = _mm256_set1_epi16(255);
    const __m256i low = _mm256_packus_epi16(_mm256_and_si256(a, mask), _mm256_and_si256(b, mask));
    const __m256i high = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
    for (int i = 0; i < 32; i += 16) {
        const __m128i *at = (const __m128i *)(codes + i);
        const __m256i first = _mm256_castsi128_si256(_mm_load_si128(at));
        const __m256i code = _mm256_inserti128_si256(first, _mm_load_si128(at + 2), 1);
        const __m256i lows = _mm256_shuffle_epi8(low, code), highs = _mm256_shuffle_epi8(high, code);
        put_halves(to + i, _mm256_unpacklo_epi8(lows, highs), is_streamed);
        put_halves(to + i + 8, _mm256_unpackhi_epi8(lows, highs), is_streamed);
    }
}
enum { CAN_LOOK_UP = 1 };
#else
enum { CAN_LOOK_UP = 0 };
INLINE void look_up(uint16_t *to, const int8_t *codes, const int8_t *meanings, const float *scale, const float *minimum,
                    int has_minima, int is_streamed)
{
}

INLINE void put_run(void *to, const int8_t *codes, float scale, float minimum, int has_minima, int kind,
                    int is_streamed)
{
    put_any_run(to, codes, scale, minimum, has_minima, kind, 0);
}
#endif

INLINE void put_runs(void *to, const struct tile *t, int64_t count, int has_minima, int kind, int is_streamed)
{
    if (kind == NUMBERED) {
        for (int r = 0; r < count / RUN; r += 4)
            look_up((uint16_t *)to + RUN * r, t->codes + RUN * r, t->meanings, t->scale + r, t->minimum + r, has_minima,
                    is_streamed);
        return;
    }
    const int64_t size = kind == FLOAT32 ? 4 : 2;
    for (int r = 0; r < count / RUN; r++)
        put_run((uint8_t *)to + r * RUN * size, t->codes + RUN * r, t->scale[r], t->minimum[r], has_minima, kind,
                is_streamed);
}

INLINE void put_values(void *to, const struct tile *t, int64_t count, int has_minima, int kind, int64_t is_streamed)
{
    if (is_streamed)
        has_minima ? put_runs(to, t, count, 1, kind, 1) : put_runs(to, t, count, 0, kind, 1);
    else
        has_minima ? put_runs(to, t, count, 1, kind, 0) : put_runs(to, t, count, 0, kind, 0);
}

static void put_tile(struct tile *t, const struct ggml *job, int64_t first, int64_t count)
{
    t->is_wild = 0;
    t->meanings = NULL;
    const int has_minima = take(t, job, first, count);
    void *to = (uint8_t *)job->to + first * (job->dtype == FLOAT32 ? 4 : 2);
    if (CAN_LOOK_UP && job->dtype == BFLOAT16 && !t->is_wild && t->meanings && count % 64 == 0) {
        put_values(to, t, count, has_minima, NUMBERED, job->is_streamed);
        return;
    }
    settle(t);
    if (job->dtype == FLOAT16) {
        _Alignas(64) float made[TILE];
        put_values(made, t, count, has_minima, FLOAT32, 0);
        put_float16(to, made, count, job->is_streamed);
        return;
    }
    if (job->dtype == FLOAT32)
        put_values(to, t, count, has_minima, FLOAT32, job->is_streamed);
    else if (!t->is_wild)
        put_values(to, t, count, has_minima, FINITE, job->is_streamed);
    else
        for (int r = 0; r < count / RUN; r++)
            put_any_run((uint16_t *)to + RUN * r, t->codes + RUN * r, t->scale[r], t->minimum[r], has_minima, BFLOAT16,
                        (uint16_t)job->nan);
}

void NAME(ssdtune_unpack_ggml, SUFFIX)(struct ggml *job)
{
    struct tile t = {0};
    for (int64_t begin, end; take_part(&job->next, job->part, job->n, &begin, &end);) {
        for (int64_t first = begin; first < end; first += TILE)
            put_tile(&t, job, first, end - first < TILE ? end - first : TILE);
    }
    finish(job->is_streamed);
}
