/* Codes of affine.py moved in place and rounded at random: the fast twin of requantize.py, which defines every bit of it.
 *
 * Compiled once for each instruction set, with the names' ending in SUFFIX; nothing is fused or reordered (noise.c).
 */
#include "pieces.h"

enum { TILE = 512, LANES = 64, RANDOM_TILE = 256 }; /* RANDOM_TILE: elements that 64 counters serve, 32 bits each */
#define MOST 1024.0f /* steps that a code can be moved by; there are fewer codes */

/* A whole tensor, taken part by part by whoever calls: all threads get the same job. */
struct requantize {
    const struct affine *packed; /* to float32; its slices are written */
    const struct noise *move;    /* of float32: from the weights to what they are moved by */
    uint64_t key;
    int64_t part, next; /* part: elements, a multiple of PIECE; next: that nobody has taken yet */
};

/* floor(by / scale + u), u from the field's upper 24 bits; 0 where that is no number. */
INLINE int32_t steps(float by, float scale, uint32_t field)
{
    const float moved = by / scale + (float)(int32_t)(field >> 8) * 0x1p-24f;
    const float low = moved >= -MOST ? moved : (moved < -MOST ? -MOST : 0.0f);
    const float bounded = low <= MOST ? low : MOST;
    const int32_t toward_zero = (int32_t)bounded;
    return toward_zero - ((float)toward_zero > bounded);
}

static void move_codes(uint8_t *codes, const float *by, const struct requantize *job, int64_t first, int64_t n)
{
    const int32_t largest = (1 << job->packed->bits) - 1;
    uint32_t words[4][LANES];
    for (int64_t at = 0; at < n; at += LANES) {
        const int64_t group = job->packed->group, word = at / LANES % 4;
        if (word == 0)
            NAME(ssdtune_random_words, SUFFIX)(words, job->key, (uint64_t)(first + at) / 4, DOMAIN_CODES);
        for (int64_t from = 0; from < LANES && at + from < n; from += group) {
            uint16_t upper;
            memcpy(&upper, job->packed->scales + 2 * ((first + at + from) / group), 2);
            const float scale = float_of((uint32_t)upper << 16);
            const int64_t to = from + group < LANES ? from + group : LANES;
            for (int64_t i = from; i < (to < n - at ? to : n - at); i++) {
                const int32_t code = codes[at + i] + steps(by[at + i], scale, words[word][i]);
                codes[at + i] = (uint8_t)(code < 0 ? 0 : code > largest ? largest : code);
            }
        }
    }
}

/* A tile's codes to their slices. */
static void pack_tile(const struct affine *job, int64_t tile, const uint8_t *codes)
{
    int below = (int)job->bits;
    for (int64_t s = 0; s < job->num_slices; s++) {
        const int width = (int)(job->widths >> (4 * s) & 15), mask = (1 << width) - 1;
        uint8_t *to = (uint8_t *)job->slices[s] + tile * width * LANES;
        below -= width;
        for (int v = 0; v < width; v++, to += LANES) {
            uint8_t made[LANES] = {0};
            for (int j = 0; j < 8 / width; j++) {
                const uint8_t *from = codes + (v * (8 / width) + j) * LANES;
                for (int i = 0; i < LANES; i++)
                    made[i] |= (uint8_t)(((from[i] >> below) & mask) << (j * width));
            }
            memcpy(to, made, LANES);
        }
    }
}

static void move_piece(const struct requantize *job, int64_t first, int64_t n)
{
    _Alignas(64) uint8_t space[PIECE];
    _Alignas(64) float by[PIECE];
    const int64_t tile = first / TILE, num_tiles = (n + TILE - 1) / TILE;
    NAME(ssdtune_affine_piece, SUFFIX)(job->packed, by, first, n);
    NAME(ssdtune_noise_piece, SUFFIX)(job->move, by, by, first, n);
    const uint8_t *codes = NAME(ssdtune_affine_codes, SUFFIX)(job->packed, tile, num_tiles, space);
    if (codes != space) /* where they lie: whoever moves them there must not be read again */
        memcpy(space, codes, (size_t)(num_tiles * TILE));
    move_codes(space, by, job, first, n);
    for (int64_t t = 0; t < num_tiles; t++)
        pack_tile(job->packed, tile + t, space + t * TILE);
}

void NAME(ssdtune_requantize, SUFFIX)(struct requantize *job)
{
    const int64_t n = job->packed->n;
    for (int64_t first, stop; take_part(&job->next, job->part, n, &first, &stop);) {
        for (int64_t at = first; at < stop; at += PIECE)
            move_piece(job, at, stop - at < PIECE ? stop - at : PIECE);
    }
}
