/* base + directions, rounded: the fast twin of noise.py and philox.py, which define every bit of it.
 *
 * Compiled once for each instruction set, with the names' ending in SUFFIX. No operation may be fused or reordered
 * (-ffp-contract=off, no -ffast-math): all of them, and torch, give the same bits.
 */
#include "pieces.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum { LANES = 64 };
enum { FLOAT32 = 0, BFLOAT16 = 1 };

/* 32-bit words side by side, and their products with a constant, low and high halves. */
#if defined(__AVX512F__)
enum { WIDE = 16 };
typedef __m512i wide;
static inline wide all(uint32_t x) { return _mm512_set1_epi32((int)x); }
static inline wide add(wide a, wide b) { return _mm512_add_epi32(a, b); }
static inline wide xor3(wide a, wide b, wide c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
static inline wide numbers(void)
{
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
static inline void keep(uint32_t *to, wide a) { _mm512_storeu_si512(to, a); }
static inline wide product(wide a, wide m, wide *high)
{
    wide even = _mm512_mul_epu32(a, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), m);
    *high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
    return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}
#elif defined(__AVX2__)
enum { WIDE = 8 };
typedef __m256i wide;
static inline wide all(uint32_t x) { return _mm256_set1_epi32((int)x); }
static inline wide add(wide a, wide b) { return _mm256_add_epi32(a, b); }
static inline wide xor3(wide a, wide b, wide c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
static inline wide numbers(void) { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
static inline void keep(uint32_t *to, wide a) { _mm256_storeu_si256((__m256i *)to, a); }
static inline wide product(wide a, wide m, wide *high)
{
    wide even = _mm256_mul_epu32(a, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), m);
    *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
    return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
#else
enum { WIDE = 1 };
typedef uint32_t wide;
static inline wide all(uint32_t x) { return x; }
static inline wide add(wide a, wide b) { return a + b; }
static inline wide xor3(wide a, wide b, wide c) { return a ^ b ^ c; }
static inline wide numbers(void) { return 0; }
static inline void keep(uint32_t *to, wide a) { *to = a; }
static inline wide product(wide a, wide m, wide *high)
{
    uint64_t whole = (uint64_t)a * m;
    *high = (uint32_t)(whole >> 32);
    return (uint32_t)whole;
}
#endif

/* The outputs of counters start ... start + 63, start a multiple of 64: words[4][LANES]. */
static void philox(uint32_t words[4][LANES], uint64_t key, uint64_t start, uint32_t domain)
{
    const wide m0 = all(0xD2511F53u), m1 = all(0xCD9E8D57u);
    for (int at = 0; at < LANES; at += WIDE) {
        uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
        wide c0 = add(all((uint32_t)start + (uint32_t)at), numbers()); /* 64 of them never carry */
        wide c1 = all((uint32_t)(start >> 32)), c2 = all(domain), c3 = all(0);
        for (int round = 0; round < 10; round++) {
            wide high0, high2;
            wide low0 = product(c0, m0, &high0), low2 = product(c2, m1, &high2);
            c0 = xor3(high2, c1, all(k0));
            c1 = low2;
            c2 = xor3(high0, c3, all(k1));
            c3 = low0;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        keep(&words[0][at], c0);
        keep(&words[1][at], c1);
        keep(&words[2][at], c2);
        keep(&words[3][at], c3);
    }
}

static void add_gaussian(float *sum, uint64_t key, uint64_t first, int64_t n, const float *table)
{
    uint32_t words[4][LANES];
    float values[LANES];
    for (int64_t at = 0; at < n; at += 16 * LANES) {
        philox(words, key, (first + (uint64_t)at) / (16 * LANES) * LANES, DOMAIN_DIRECTION);
        for (int j = 0; j < 16; j++) {
            float *out = sum + at + j * LANES;
            const uint32_t *word = words[j / 4];
            const int shift = j % 4 * 8;
#pragma GCC unroll 8
            for (int l = 0; l < LANES; l++)
                values[l] = table[(word[l] >> shift) & 255];
            for (int l = 0; l < LANES; l++)
                out[l] += values[l];
        }
    }
}

/* table[0]: where the bit is not set, table[1]: where it is. They are each other's negative. */
static void add_rademacher(float *sum, uint64_t key, uint64_t first, int64_t n, const float *table)
{
    uint32_t words[4][LANES], step;
    memcpy(&step, &table[1], 4);
    for (int64_t at = 0; at < n; at += 128 * LANES) {
        philox(words, key, (first + (uint64_t)at) / (128 * LANES) * LANES, DOMAIN_DIRECTION);
        for (int j = 0; j < 128; j++) {
            float *out = sum + at + j * LANES;
            const uint32_t *word = words[j / 32];
            const int shift = j % 32;
            for (int l = 0; l < LANES; l++) {
                uint32_t bits = step ^ (~(word[l] >> shift) << 31);
                float value;
                memcpy(&value, &bits, 4);
                out[l] += value;
            }
        }
    }
}

static inline uint16_t nearest(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : (uint16_t)rounded;
}

/* field: 16 random bits, added below the last bit that stays; what is infinite or no number stays so. */
static inline uint16_t stochastic(float value, uint32_t field)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t is_finite = (bits & 0x7F800000u) != 0x7F800000u;
    uint32_t rounded = (bits + (is_finite ? field : 0u)) >> 16;
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : (uint16_t)rounded;
}

static void round_stochastic(uint16_t *to, const float *sum, uint64_t key, uint64_t first, int64_t n)
{
    uint32_t words[4][LANES];
    uint16_t made[8 * LANES];
    for (int64_t at = 0; at < n; at += 8 * LANES) {
        philox(words, key, (first + (uint64_t)at) / (8 * LANES) * LANES, DOMAIN_ROUNDING);
        for (int j = 0; j < 8; j++) {
            const uint32_t *word = words[j / 2];
            const int shift = j % 2 * 16;
            for (int l = 0; l < LANES; l++)
                made[j * LANES + l] =
                    stochastic(sum[at + j * LANES + l], (word[l] >> shift) & 0xFFFFu);
        }
        memcpy(to + at, made, 2 * (size_t)(n - at < 8 * LANES ? n - at : 8 * LANES));
    }
}

void NAME(ssdtune_random_words, SUFFIX)(uint32_t words[4][LANES], uint64_t key, uint64_t start, uint32_t domain)
{
    philox(words, key, start, domain);
}

static void get_sums(float *sum, const void *base, int64_t dtype, int64_t n, float decay)
{
    if (dtype == FLOAT32) {
        memcpy(sum, base, 4 * (size_t)n);
    } else {
        for (int64_t i = 0; i < n; i++)
            sum[i] = float_of((uint32_t)((const uint16_t *)base)[i] << 16);
    }
    if (decay != 1.0f)
        for (int64_t i = 0; i < n; i++)
            sum[i] *= decay;
}

/* Each product rounded, then its sum, a row's part at a time: `right` stays in the nearest cache. */
static void add_low_rank(float *sum, const struct noise *job, int64_t first, int64_t n)
{
    int64_t row = first / job->columns, column = first % job->columns;
    for (int64_t at = 0; at < n; row++, column = 0) {
        int64_t count = job->columns - column < n - at ? job->columns - column : n - at;
        for (int64_t r = 0; r < job->rank; r++) {
            const float u = job->left[r * job->rows + row], *v = job->right + r * job->columns + column;
            for (int64_t i = 0; i < count; i++)
                sum[at + i] += u * v[i];
        }
        at += count;
    }
}

/* first: a multiple of PIECE. n: at most PIECE. */
void NAME(ssdtune_noise_piece, SUFFIX)(const struct noise *job, void *to, const void *base, int64_t first, int64_t n)
{
    _Alignas(64) float sum[PIECE];
    const uint64_t position = (uint64_t)first;
    get_sums(sum, base, job->dtype, n, job->decay);
    for (int64_t d = 0; d < job->num_directions; d++) {
        const struct direction *along = &job->directions[d];
        if (along->kind == GAUSSIAN)
            add_gaussian(sum, along->key, position, n, along->table);
        else
            add_rademacher(sum, along->key, position, n, along->table);
    }
    if (job->rank)
        add_low_rank(sum, job, first, n);
    if (job->values)
        for (int64_t i = 0; i < n; i++)
            sum[i] += job->values[first + i];
    if (job->dtype == FLOAT32) {
        memcpy(to, sum, 4 * (size_t)n);
    } else if (job->is_stochastic) {
        round_stochastic(to, sum, job->rounding_key, position, n);
    } else {
        for (int64_t i = 0; i < n; i++)
            ((uint16_t *)to)[i] = nearest(sum[i]);
    }
}

void NAME(ssdtune_add_noise, SUFFIX)(struct noise *job)
{
    const int64_t size = job->dtype == FLOAT32 ? 4 : 2;
    for (int64_t first, stop; take_part(&job->next, job->part, job->n, &first, &stop);) {
        for (int64_t at = first; at < stop; at += PIECE)
            NAME(ssdtune_noise_piece, SUFFIX)(
                job, (char *)job->to + at * size, (const char *)job->base + at * size, at,
                stop - at < PIECE ? stop - at : PIECE);
    }
}
