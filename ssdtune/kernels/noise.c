/* base + directions, rounded: the fast twin of noise.py and philox.py, which define every bit of it.
 *
 * Compiled once for each instruction set, with the names' ending in SUFFIX. No operation may be fused or reordered
 * (-ffp-contract=off, no -ffast-math): all of them, and torch, give the same bits.
 */
#include <stdint.h>
#include <string.h>

#define JOIN(a, b) a##b
#define NAME(a, b) JOIN(a, b)

enum { LANES = 64, TILE = 8192 }; /* TILE: of one-bit fields; a multiple of the other tiles */
enum { FLOAT32 = 0, BFLOAT16 = 1 };
enum { GAUSSIAN = 0, RADEMACHER = 1 };
enum { DOMAIN_DIRECTION = 0, DOMAIN_ROUNDING = 1 };

/* The outputs of counters start ... start + 63: words[4][LANES]. */
static inline __attribute__((always_inline)) void
philox(uint32_t words[4][LANES], uint64_t key, uint64_t start, uint32_t domain)
{
    uint32_t c0[LANES], c1[LANES], c2[LANES], c3[LANES];
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int l = 0; l < LANES; l++) {
        uint64_t counter = start + (uint64_t)l;
        c0[l] = (uint32_t)counter;
        c1[l] = (uint32_t)(counter >> 32);
        c2[l] = domain;
        c3[l] = 0;
    }
    for (int round = 0; round < 10; round++) {
        for (int l = 0; l < LANES; l++) {
            uint64_t low = (uint64_t)c0[l] * 0xD2511F53u, high = (uint64_t)c2[l] * 0xCD9E8D57u;
            c0[l] = (uint32_t)(high >> 32) ^ c1[l] ^ k0;
            c1[l] = (uint32_t)high;
            c2[l] = (uint32_t)(low >> 32) ^ c3[l] ^ k1;
            c3[l] = (uint32_t)low;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    memcpy(words[0], c0, sizeof c0);
    memcpy(words[1], c1, sizeof c1);
    memcpy(words[2], c2, sizeof c2);
    memcpy(words[3], c3, sizeof c3);
}

static void add_gaussian(float *sum, uint64_t key, uint64_t first, int64_t n, const float *table)
{
    uint32_t words[4][LANES];
    for (int64_t at = 0; at < n; at += 16 * LANES) {
        philox(words, key, (first + (uint64_t)at) / (16 * LANES) * LANES, DOMAIN_DIRECTION);
        for (int j = 0; j < 16; j++) {
            float *out = sum + at + j * LANES;
            const uint32_t *word = words[j / 4];
            const int shift = j % 4 * 8;
            for (int l = 0; l < LANES; l++)
                out[l] += table[(word[l] >> shift) & 255];
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

/* One direction's share, as noise.Direction. table: 256 values (Gaussian) or two (Rademacher), scaled. */
struct direction {
    uint64_t key;
    const float *table;
    int64_t kind;
};

/* to[i] = round(base[i] * decay + sum of directions), element by element, i < n; `to` may be `base`.
 *
 * first: number of to[0] within its tensor, a multiple of TILE. rounding: 0 to nearest; else the key's bits are random.
 */
void NAME(ssdtune_add_noise, SUFFIX)(
    void *to, const void *base, int64_t n, int64_t first, int64_t dtype, float decay,
    const struct direction *directions, int64_t num_directions, int64_t is_stochastic, uint64_t rounding_key)
{
    _Alignas(64) float sum[TILE];
    for (int64_t at = 0; at < n; at += TILE) {
        const int64_t count = n - at < TILE ? n - at : TILE;
        const uint64_t position = (uint64_t)(first + at);
        if (dtype == FLOAT32) {
            memcpy(sum, (const float *)base + at, 4 * (size_t)count);
        } else {
            const uint16_t *from = (const uint16_t *)base + at;
            for (int64_t i = 0; i < count; i++) {
                uint32_t bits = (uint32_t)from[i] << 16;
                memcpy(&sum[i], &bits, 4);
            }
        }
        if (decay != 1.0f)
            for (int64_t i = 0; i < count; i++)
                sum[i] *= decay;
        for (int64_t d = 0; d < num_directions; d++) {
            if (directions[d].kind == GAUSSIAN)
                add_gaussian(sum, directions[d].key, position, count, directions[d].table);
            else
                add_rademacher(sum, directions[d].key, position, count, directions[d].table);
        }
        if (dtype == FLOAT32) {
            memcpy((float *)to + at, sum, 4 * (size_t)count);
        } else if (is_stochastic) {
            round_stochastic((uint16_t *)to + at, sum, rounding_key, position, count);
        } else {
            uint16_t *out = (uint16_t *)to + at;
            for (int64_t i = 0; i < count; i++)
                out[i] = nearest(sum[i]);
        }
    }
}
