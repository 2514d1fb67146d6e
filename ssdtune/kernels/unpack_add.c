/* Packed tensors decoded and moved along random directions on their way: the fast twin of unpack_add.py.
 *
 * A piece is decoded to where it shall be and moved there before the next one is begun: it is in the nearest caches
 * meanwhile, so that only the last step's bytes go to memory. The decoders and the noise are those of unpack.c and
 * noise.c, with their roundings in between: the bits are theirs. Signs alone are added while decoding, and may be stored
 * past the caches, as packed->is_streamed says.
 */
#include "pieces.h"
#include "streams.h"

/* A whole tensor, taken part by part by whoever calls: all threads get the same job. */
struct unpack_add {
    void *to;
    decoder *decode;
    sign_decoder *decode_signs;
    const void *packed;
    const struct noise *const *moves; /* one after the other, each rounded */
    int64_t num_moves, n, size;       /* size: bytes of an element */
    int64_t start;                    /* number of to[0] in the tensor that moves, a multiple of PIECE */
    int64_t part, next;               /* part: elements, a multiple of PIECE; next: that nobody has taken yet */
};

static void make_piece(const struct unpack_add *job, int64_t first, int64_t n)
{
    void *to = (char *)job->to + first * job->size;
    if (job->num_moves == 1 && job->decode_signs(job->packed, job->moves[0], to, first, n, job->start + first))
        return;
    job->decode(job->packed, to, first, n);
    for (int64_t m = 0; m < job->num_moves; m++)
        NAME(ssdtune_noise_piece, SUFFIX)(job->moves[m], to, to, job->start + first, n);
}

void NAME(ssdtune_unpack_add, SUFFIX)(struct unpack_add *job)
{
    for (int64_t first, stop; take_part(&job->next, job->part, job->n, &first, &stop);) {
        for (int64_t at = first; at < stop; at += PIECE)
            make_piece(job, at, stop - at < PIECE ? stop - at : PIECE);
    }
    finish(1);
}
