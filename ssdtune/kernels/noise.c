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

/* 32-bit words side by side, each in the lower half of 64 bits: multiplied there, by a constant, they leave the product's
 * low word where the next round multiplies it. What the upper halves hold is not read otherwise. `mixed` is the
 * product's high word ^ a ^ key. */
#if defined(__AVX512F__)
enum { WIDE = 16 };
typedef struct { __m512i even, odd; } wide; /* of neighbours */
static inline wide all(uint32_t x)
{
    const __m512i a = _mm512_set1_epi64(x);
    return (wide){a, a};
}
static inline wide count_from(uint32_t x)
{
    const __m512i even = _mm512_add_epi32(_mm512_set1_epi64(x), _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14));
    return (wide){even, _mm512_add_epi32(even, _mm512_set1_epi64(1))};
}
static inline wide product(wide a, uint32_t by)
{
    const __m512i m = _mm512_set1_epi64(by);
    return (wide){_mm512_mul_epu32(a.even, m), _mm512_mul_epu32(a.odd, m)};
}
static inline wide mixed(wide product, wide a, uint32_t key)
{
    const __m512i k = _mm512_set1_epi64(key);
    return (wide){_mm512_ternarylogic_epi64(_mm512_srli_epi64(product.even, 32), a.even, k, 0x96),
                  _mm512_ternarylogic_epi64(_mm512_srli_epi64(product.odd, 32), a.odd, k, 0x96)};
}
static inline void keep(uint32_t *to, wide a)
{
    _mm512_storeu_si512(to, _mm512_mask_blend_epi32(0xAAAA, a.even, _mm512_slli_epi64(a.odd, 32)));
}
#elif defined(__AVX2__)
enum { WIDE = 8 };
typedef struct { __m256i even, odd; } wide; /* of neighbours */
static inline wide all(uint32_t x)
{
    const __m256i a = _mm256_set1_epi64x(x);
    return (wide){a, a};
}
static inline wide count_from(uint32_t x)
{
    const __m256i even = _mm256_add_epi32(_mm256_set1_epi64x(x), _mm256_setr_epi64x(0, 2, 4, 6));
    return (wide){even, _mm256_add_epi32(even, _mm256_set1_epi64x(1))};
}
static inline wide product(wide a, uint32_t by)
{
    const __m256i m = _mm256_set1_epi64x(by);
    return (wide){_mm256_mul_epu32(a.even, m), _mm256_mul_epu32(a.odd, m)};
}
static inline wide mixed(wide product, wide a, uint32_t key)
{
    const __m256i k = _mm256_set1_epi64x(key);
    return (wide){
        _mm256_xor_si256(_mm256_srli_epi64(product.even, 32), _mm256_xor_si256(a.even, k)),
        _mm256_xor_si256(_mm256_srli_epi64(product.odd, 32), _mm256_xor_si256(a.odd, k))};
}
static inline void keep(uint32_t *to, wide a)
{
    _mm256_storeu_si256((__m256i *)to, _mm256_blend_epi32(a.even, _mm256_slli_epi64(a.odd, 32), 0xAA));
}
#else
enum { WIDE = 1 };
typedef struct { uint32_t low, high; } wide;
static inline wide all(uint32_t x) { return (wide){x, 0}; }
static inline wide count_from(uint32_t x) { return (wide){x, 0}; }
static inline wide product(wide a, uint32_t by)
{
    const uint64_t whole = (uint64_t)a.low * by;
    return (wide){(uint32_t)whole, (uint32_t)(whole >> 32)};
}
static inline wide mixed(wide product, wide a, uint32_t key) { return (wide){product.high ^ a.low ^ key, 0}; }
static inline void keep(uint32_t *to, wide a) { *to = a.low; }
#endif

/* The outputs of counters start ... start + 63, start a multiple of 64: words[4][LANES]. */
static void philox(uint32_t words[4][LANES], uint64_t key, uint64_t start, uint32_t domain)
{
    for (int at = 0; at < LANES; at += WIDE) {
        uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
        wide c0 = count_from((uint32_t)start + (uint32_t)at); /* 64 of them never carry */
        wide c1 = all((uint32_t)(start >> 32)), c2 = all(domain), c3 = all(0);
        for (int round = 0; round < 10; round++) {
            const wide from0 = product(c0, 0xD2511F53u), from2 = product(c2, 0xCD9E8D57u);
            c0 = mixed(from2, c1, k0);
            c1 = from2;
            c2 = mixed(from0, c3, k1);
            c3 = from0;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        keep(&words[0][at], c0);
        keep(&words[1][at], c1);
        keep(&words[2][at], c2);
        keep(&words[3][at], c3);
    }
}

/* What the 8-bit fields of a tile's 1024 elements stand for, added. */
#if defined(__AVX512F__)
/* Values for the last eight bits of 16 words. upper: the table's upper half, in registers: the lower one is its negative,
 * mirrored. */
INLINE __m512 value_of(const __m512 upper[8], __m512i field)
{
    const __mmask16 is_lower = _mm512_testn_epi32_mask(field, _mm512_set1_epi32(128));
    const __m512i at = _mm512_mask_xor_epi32(field, is_lower, field, _mm512_set1_epi32(127));
    const __mmask16 is_32 = _mm512_test_epi32_mask(at, _mm512_set1_epi32(32));
    const __mmask16 is_64 = _mm512_test_epi32_mask(at, _mm512_set1_epi32(64));
    const __m512 below_64 = _mm512_mask_blend_ps(
        is_32, _mm512_permutex2var_ps(upper[0], at, upper[1]), _mm512_permutex2var_ps(upper[2], at, upper[3]));
    const __m512 from_64 = _mm512_mask_blend_ps(
        is_32, _mm512_permutex2var_ps(upper[4], at, upper[5]), _mm512_permutex2var_ps(upper[6], at, upper[7]));
    const __m512 found = _mm512_mask_blend_ps(is_64, below_64, from_64);
    return _mm512_mask_xor_ps(found, is_lower, found, _mm512_set1_ps(-0.0f));
}

INLINE void add_fields(float *sum, uint32_t words[4][LANES], const float *table)
{
    __m512 upper[8];
    for (int i = 0; i < 8; i++)
        upper[i] = _mm512_loadu_ps(table + 128 + 16 * i);
    for (int w = 0; w < 4; w++)
        for (int l = 0; l < LANES; l += 16) {
            __m512i field = _mm512_loadu_si512(&words[w][l]);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++, field = _mm512_srli_epi32(field, 8)) {
                float *out = sum + (4 * w + j) * LANES + l;
                _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), value_of(upper, field)));
            }
        }
}
#else
INLINE void add_fields(float *sum, uint32_t words[4][LANES], const float *table)
{
    float values[LANES];
    for (int j = 0; j < 16; j++) {
        float *out = sum + j * LANES;
        const uint32_t *word = words[j / 4];
        const int shift = j % 4 * 8;
#pragma GCC unroll 8
        for (int l = 0; l < LANES; l++)
            values[l] = table[(word[l] >> shift) & 255];
        for (int l = 0; l < LANES; l++)
            out[l] += values[l];
    }
}
#endif

static void add_gaussian(float *sum, uint64_t key, uint64_t first, int64_t n, const float *table)
{
    uint32_t words[4][LANES];
    for (int64_t at = 0; at < n; at += 16 * LANES) {
        philox(words, key, (first + (uint64_t)at) / (16 * LANES) * LANES, DOMAIN_DIRECTION);
        add_fields(sum + at, words, table);
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
