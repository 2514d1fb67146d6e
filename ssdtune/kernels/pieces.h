/* What one source makes piece by piece and another uses: pieces stay in the nearest caches from one step to the next. */
#ifndef SSDTUNE_PIECES_H
#define SSDTUNE_PIECES_H
#include "native.h"

enum { PIECE = 8192 }; /* elements; pieces of a tensor begin at its multiples. Of one-bit fields, philox.py's tile */
enum { MAX_SLICES = 8 };
enum { GAUSSIAN = 0, RADEMACHER = 1 };
enum { DOMAIN_DIRECTION = 0, DOMAIN_ROUNDING = 1, DOMAIN_CODES = 2 }; /* of philox.py */

/* A packed tensor of affine.py, taken part by part by whoever calls: all threads get the same job. */
struct affine {
    void *to;
    const uint8_t *slices[MAX_SLICES];
    int64_t num_slices, widths; /* widths: of slices, a hexadecimal digit each, the first one's the lowest */
    const uint8_t *scales;      /* bfloat16, at any address */
    const uint8_t *zeros;
    int64_t n, group, bits, is_rotated, dtype, nan, is_streamed;
    int64_t part, next; /* part: elements, a multiple of 4096; next: that nobody has taken yet */
};

/* One direction's share, as noise.Direction. table: 256 values (Gaussian) or two (Rademacher), scaled; the last is the
 * first one's negative, and so on inwards. */
struct direction {
    uint64_t key;
    const float *table;
    int64_t kind;
};

/* to[i] = round(base[i] * decay + sum of directions + sum over r of left[r, i / columns] right[r, i % columns] +
 * values[i]), i < n; `to` may be `base`. A whole tensor, taken part by part by whoever calls: all threads get the same
 * job. */
struct noise {
    void *to;
    const void *base;
    int64_t n, dtype;
    const struct direction *directions;
    int64_t num_directions, is_stochastic; /* is_stochastic: rounded by the key's bits, not to nearest */
    const float *left, *right;             /* [rank, rows], [rank, columns] */
    int64_t rank, rows, columns;           /* rank: 0 where there are no factors */
    const float *values;                   /* 0: none */
    uint64_t rounding_key;
    int64_t part, next; /* part: elements, a multiple of PIECE; next: that nobody has taken yet */
    float decay;
};

/* Makes elements first ... first + n - 1 of a packed tensor, n <= PIECE, where `to` points. */
typedef void decoder(const void *packed, void *to, int64_t first, int64_t n);

/* The noise of elements first ... first + n - 1 of a tensor, added to those at `base`. */
void NAME(ssdtune_noise_piece, SUFFIX)(const struct noise *job, void *to, const void *base, int64_t first, int64_t n);

/* Philox's outputs of counters start ... start + 63, start a multiple of 64. */
void NAME(ssdtune_random_words, SUFFIX)(uint32_t words[4][64], uint64_t key, uint64_t start, uint32_t domain);

decoder NAME(ssdtune_affine_piece, SUFFIX), NAME(ssdtune_nibbles_piece, SUFFIX);

/* Both at once: a packed tensor's elements first ... first + n - 1, n <= PIECE, moved by a sign each, where `to` points.
 * position: number of the first one in the tensor that moves. Back: whether it was done; it can be to bfloat16, with finite
 * scales that are no bytes, by a move that is one direction of signs and nothing else. */
typedef int sign_decoder(const void *packed, const struct noise *move, void *to, int64_t first, int64_t n,
                         int64_t position);

sign_decoder NAME(ssdtune_affine_signs, SUFFIX), NAME(ssdtune_nibbles_signs, SUFFIX);

/* Codes of tiles, a byte each, in `space` or where they lie. */
const uint8_t *NAME(ssdtune_affine_codes, SUFFIX)(
    const struct affine *job, int64_t tile, int64_t num_tiles, uint8_t *space);

#endif
