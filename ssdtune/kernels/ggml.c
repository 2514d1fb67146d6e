/* ggml's quantized blocks to float32 or bfloat16: the fast twin of ggml.py, which defines every bit of it.
 *
 * Compiled once for each instruction set, with the names' ending in SUFFIX; nothing fused, nothing reordered, as noise.c.
 * Whatever the kind, TILE elements are brought to one form, small signed integers and a scale (and a minimum) for each RUN
 * of them, and computed from there in loops that compilers vectorize.
 */
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define JOIN(a, b) a##b
#define NAME(a, b) JOIN(a, b)
#define INLINE static inline __attribute__((always_inline))

enum { TILE = 256, RUN = 16, RUNS = TILE / RUN, SMALL = 32 }; /* elements; SMALL: of a block of the older kinds */
enum { FLOAT32 = 0, BFLOAT16 = 1, FINITE = 2 };
/* As ggml numbers its types. */
enum {
    Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8,
    Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14,
    IQ4_NL = 20, IQ4_XS = 23, MXFP4 = 39
};
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

/* w = code * scale - minimum, of RUN elements each. */
struct tile {
    _Alignas(64) int8_t codes[TILE];
    float scale[RUNS], minimum[RUNS];
};

INLINE float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE int is_finite(float value) { return (bits_of(value) & 0x7F800000u) != 0x7F800000u; }

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
INLINE float half_at(const uint8_t *at)
{
    const uint32_t bits = at[0] | (uint32_t)at[1] << 8, sign = (bits & 0x8000u) << 16;
    const uint32_t exponent = bits >> 10 & 31u, fraction = bits & 1023u;
    if (exponent == 0)
        return float_of(sign | bits_of((float)fraction * 0x1p-24f));
    return float_of(sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13);
}

/* ----------------------------------------------------------------------------------------------------------- the codes */

/* Nibbles of `run` bytes, less `zero`: the lower ones, then the upper ones. */
INLINE void take_nibbles(int8_t *restrict codes, const uint8_t *restrict from, int run, int zero)
{
    for (int i = 0; i < run; i++)
        codes[i] = (int8_t)((from[i] & 15) - zero);
    for (int i = 0; i < run; i++)
        codes[run + i] = (int8_t)((from[i] >> 4) - zero);
}

/* Adds fields of `width` bits of `run` bytes, shifted left: the lowest ones first. */
INLINE void add_fields(int8_t *restrict codes, const uint8_t *restrict from, int run, int width, int shift)
{
#pragma GCC unroll 8
    for (int j = 0; j < 8 / width; j++)
        for (int i = 0; i < run; i++)
            codes[j * run + i] = (int8_t)(codes[j * run + i] + ((from[i] >> (j * width) & ((1 << width) - 1)) << shift));
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
    const __m256i sum = _mm256_add_epi8(_mm256_loadu_si256((__m256i *)codes), _mm256_and_si256(is_set, _mm256_set1_epi8(16)));
    _mm256_storeu_si256((__m256i *)codes, sum);
    return;
#endif
    for (int i = 0; i < SMALL; i++)
        codes[i] = (int8_t)(codes[i] + (int)((word >> i & 1u) << 4));
}

/* What a table has for nibbles of 16 bytes. */
INLINE void look_up(int8_t *restrict codes, const uint8_t *restrict from, const int8_t *table)
{
#if defined(__AVX2__)
    const __m128i found = _mm_loadu_si128((const __m128i *)from), mask = _mm_set1_epi8(15);
    const __m128i of = _mm_loadu_si128((const __m128i *)table);
    const __m128i upper = _mm_and_si128(_mm_srli_epi16(found, 4), mask);
    _mm_storeu_si128((__m128i *)codes, _mm_shuffle_epi8(of, _mm_and_si128(found, mask)));
    _mm_storeu_si128((__m128i *)(codes + 16), _mm_shuffle_epi8(of, upper));
#else
    for (int i = 0; i < 16; i++) {
        codes[i] = table[from[i] & 15];
        codes[16 + i] = table[from[i] >> 4];
    }
#endif
}

/* ---------------------------------------------------------------------------------------------------------- the kinds */

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
    const float d = half_at(b + 80), dmin = half_at(b + 82);
    memset(t->codes, 0, TILE);
    for (int h = 0; h < 2; h++)
        add_fields(t->codes + 128 * h, b + 16 + 32 * h, 32, 2, 0);
    for (int j = 0; j < RUNS; j++) {
        t->scale[j] = d * (float)(b[j] & 15);
        t->minimum[j] = dmin * (float)(b[j] >> 4);
    }
}

static void take_q3_k(struct tile *t, const uint8_t *b)
{
    const float d = half_at(b + 108);
    memset(t->codes, -4, TILE);
    for (int h = 0; h < 2; h++)
        add_fields(t->codes + 128 * h, b + 32 + 32 * h, 32, 2, 0);
    add_fields(t->codes, b, 32, 1, 2);
    for (int j = 0; j < RUNS; j++) {
        const int low = b[96 + j % 8] >> j / 8 * 4 & 15, high = b[104 + j % 4] >> j / 4 * 2 & 3;
        t->scale[j] = d * (float)((low | high << 4) - 32);
    }
}

static void take_q4_k(struct tile *t, const uint8_t *b)
{
    for (int j = 0; j < 4; j++)
        take_nibbles(t->codes + 64 * j, b + 16 + 32 * j, 32, 0);
    take_scales(t, b + 4, half_at(b), half_at(b + 2));
}

static void take_q5_k(struct tile *t, const uint8_t *b)
{
    for (int j = 0; j < 4; j++)
        take_nibbles(t->codes + 64 * j, b + 48 + 32 * j, 32, 0);
    add_fields(t->codes, b + 16, 32, 1, 4);
    take_scales(t, b + 4, half_at(b), half_at(b + 2));
}

static void take_q6_k(struct tile *t, const uint8_t *b)
{
    const float d = half_at(b + 208);
    for (int h = 0; h < 2; h++) {
        take_nibbles(t->codes + 128 * h, b + 64 * h, 64, 32);
        add_fields(t->codes + 128 * h, b + 128 + 32 * h, 32, 2, 4);
    }
    for (int j = 0; j < RUNS; j++)
        t->scale[j] = d * (float)(int8_t)b[192 + j];
}

static void take_iq4_xs(struct tile *t, const uint8_t *b)
{
    const float d = half_at(b);
    const int high = b[2] | b[3] << 8;
    for (int j = 0; j < 8; j++) {
        const int low = b[4 + j / 2] >> j % 2 * 4 & 15;
        look_up(t->codes + 32 * j, b + 8 + 16 * j, IQ4);
        t->scale[2 * j] = t->scale[2 * j + 1] = d * (float)((low | (high >> 2 * j & 3) << 4) - 32);
    }
}

/* A block of 32, the number-th of a tile. */
INLINE void take_small(struct tile *t, const uint8_t *b, int number, int kind)
{
    int8_t *codes = t->codes + SMALL * number;
    float scale = kind == MXFP4 ? 0 : half_at(b), minimum = 0;
    switch (kind) {
    case Q4_0: take_nibbles(codes, b + 2, 16, 8); break;
    case Q4_1: take_nibbles(codes, b + 4, 16, 0); break;
    case Q5_0: take_nibbles(codes, b + 6, 16, 16); add_bits(codes, b + 2); break;
    case Q5_1: take_nibbles(codes, b + 8, 16, 0); add_bits(codes, b + 4); break;
    case Q8_0: memcpy(codes, b + 2, SMALL); break;
    case IQ4_NL: look_up(codes, b + 2, IQ4); break;
    case MXFP4:
        look_up(codes, b + 1, DOUBLED_E2M1);
        scale = float_of(b[0] < 2 ? 0x00200000u << b[0] : (b[0] - 1u) << 23);
        break;
    }
    if (kind == Q4_1 || kind == Q5_1)
        minimum = -half_at(b + 2);
    t->scale[2 * number] = t->scale[2 * number + 1] = scale;
    t->minimum[2 * number] = t->minimum[2 * number + 1] = minimum;
}

INLINE void take_smalls(struct tile *t, const struct ggml *job, const uint8_t *from, int64_t count, int kind)
{
    for (int i = 0; i < count / SMALL; i++)
        take_small(t, from + i * job->num_bytes, i, kind);
}

/* Elements first ... first + count - 1, whole blocks. Back: whether they have minima. */
static int take(struct tile *t, const struct ggml *job, int64_t first, int64_t count)
{
    const uint8_t *from = job->blocks + first / job->block * job->num_bytes;
    switch (job->kind) {
    case Q4_0: take_smalls(t, job, from, count, Q4_0); return 0;
    case Q4_1: take_smalls(t, job, from, count, Q4_1); return 1;
    case Q5_0: take_smalls(t, job, from, count, Q5_0); return 0;
    case Q5_1: take_smalls(t, job, from, count, Q5_1); return 1;
    case Q8_0: take_smalls(t, job, from, count, Q8_0); return 0;
    case Q2_K: take_q2_k(t, from); return 1;
    case Q3_K: take_q3_k(t, from); return 0;
    case Q4_K: take_q4_k(t, from); return 1;
    case Q5_K: take_q5_k(t, from); return 1;
    case Q6_K: take_q6_k(t, from); return 0;
    case IQ4_NL: take_smalls(t, job, from, count, IQ4_NL); return 0;
    case IQ4_XS: take_iq4_xs(t, from); return 0;
    default: take_smalls(t, job, from, count, MXFP4); return 0;
    }
}

/* --------------------------------------------------------------------------------------------------- codes to values */

INLINE float value_of(int8_t code, float scale, float minimum, int has_minima)
{
    const float product = (float)code * scale;
    return has_minima ? product - minimum : product;
}

/* A RUN of values to `to`. kind: FLOAT32, BFLOAT16, or FINITE for bfloat16 where nothing can be no number. */
INLINE void put_any_run(void *to, const int8_t *codes, float scale, float minimum, int has_minima, int kind, uint16_t nan)
{
    for (int i = 0; i < RUN; i++) {
        const float value = value_of(codes[i], scale, minimum, has_minima);
        if (kind == FLOAT32)
            ((float *)to)[i] = value;
        else
            ((uint16_t *)to)[i] = kind == FINITE ? nearest_finite(value) : nearest(value, nan);
    }
}

/* The same of FLOAT32 and FINITE. is_streamed: past the caches; `to` is aligned then. */
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
    const __m256i bits = _mm256_castps_si256(values), is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), is_odd), 16);
}

INLINE void put_bytes(void *to, __m256i made, int is_streamed)
{
    if (is_streamed)
        _mm256_stream_si256(to, made);
    else
        _mm256_storeu_si256(to, made);
}

INLINE void put_run(void *to, const int8_t *codes, float scale, float minimum, int has_minima, int kind, int is_streamed)
{
    const __m256 s = _mm256_set1_ps(scale), m = _mm256_set1_ps(minimum);
    const __m256 low = eight_values(codes, s, m, has_minima), high = eight_values(codes + 8, s, m, has_minima);
    if (kind == FLOAT32) {
        put_bytes(to, _mm256_castps_si256(low), is_streamed);
        put_bytes((float *)to + 8, _mm256_castps_si256(high), is_streamed);
    } else { /* which takes turns between halves of registers */
        const __m256i both = _mm256_packus_epi32(eight_nearest(low), eight_nearest(high));
        put_bytes(to, _mm256_permute4x64_epi64(both, 0xD8), is_streamed);
    }
}
#else
INLINE void put_run(void *to, const int8_t *codes, float scale, float minimum, int has_minima, int kind, int is_streamed)
{
    put_any_run(to, codes, scale, minimum, has_minima, kind, 0);
}
#endif

INLINE void put_runs(void *to, const struct tile *t, int64_t count, int has_minima, int kind, int is_streamed)
{
    const int64_t size = kind == FLOAT32 ? 4 : 2;
    for (int r = 0; r < count / RUN; r++)
        put_run((uint8_t *)to + r * RUN * size, t->codes + RUN * r, t->scale[r], t->minimum[r], has_minima, kind, is_streamed);
}

INLINE void put_values(void *to, const struct tile *t, int64_t count, int has_minima, int kind, int64_t is_streamed)
{
    if (is_streamed)
        has_minima ? put_runs(to, t, count, 1, kind, 1) : put_runs(to, t, count, 0, kind, 1);
    else
        has_minima ? put_runs(to, t, count, 1, kind, 0) : put_runs(to, t, count, 0, kind, 0);
}

/* Whether no scale or minimum is infinite or no number: then no value is no number. */
INLINE int is_tame(const struct tile *t, int64_t count, int has_minima)
{
    int all = 1;
    for (int r = 0; r < count / RUN; r++) {
        all &= is_finite(t->scale[r]);
        if (has_minima)
            all &= is_finite(t->minimum[r]);
    }
    return all;
}

static void put_tile(struct tile *t, const struct ggml *job, int64_t first, int64_t count)
{
    const int has_minima = take(t, job, first, count);
    void *to = (uint8_t *)job->to + first * (job->dtype == FLOAT32 ? 4 : 2);
    if (job->dtype == FLOAT32)
        put_values(to, t, count, has_minima, FLOAT32, job->is_streamed);
    else if (is_tame(t, count, has_minima))
        put_values(to, t, count, has_minima, FINITE, job->is_streamed);
    else
        for (int r = 0; r < count / RUN; r++)
            put_any_run((uint16_t *)to + RUN * r, t->codes + RUN * r, t->scale[r], t->minimum[r], has_minima, BFLOAT16,
                        (uint16_t)job->nan);
}

void NAME(ssdtune_unpack_ggml, SUFFIX)(struct ggml *job)
{
    struct tile t = {0};
    for (;;) {
        const int64_t begin = __atomic_fetch_add(&job->next, job->part, __ATOMIC_RELAXED);
        if (begin >= job->n)
            break;
        const int64_t end = begin + job->part < job->n ? begin + job->part : job->n;
        for (int64_t first = begin; first < end; first += TILE)
            put_tile(&t, job, first, end - first < TILE ? end - first : TILE);
    }
#if defined(__AVX2__)
    _mm_sfence(); /* streamed stores, before whoever waits for this thread reads them */
#endif
}
