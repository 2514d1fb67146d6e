/* Calls one function of a library on memory that lies in a file, as another process had it, and puts back what is there
 * afterwards. For processors that are emulated (test_native_elsewhere.py).
 *
 *     elsewhere LIBRARY FUNCTION FILE
 *
 * FILE: the numbers of regions and of pointers; of each region its size and its offset in a page; of each pointer the
 * region and place where it lies, and the region and place that it points to; the regions' bytes, one behind the other.
 * All numbers have 64 bits. The function gets the first region's address. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { PAGE = 4096 };
struct region { int64_t size, offset; };
struct pointer { int64_t in, at, to, place; };

static void *whole(int64_t num_bytes)
{
    void *made = aligned_alloc(PAGE, (size_t)((num_bytes / PAGE + 2) * PAGE));
    if (!made)
        exit(2);
    return made;
}

static void take(void *to, int64_t num_bytes, FILE *file)
{
    if (fread(to, 1, (size_t)num_bytes, file) != (size_t)num_bytes)
        exit(3);
}

int main(int count, char **arguments)
{
    if (count != 4)
        return 1;
    FILE *file = fopen(arguments[3], "r+b");
    void *library = dlopen(arguments[1], RTLD_NOW);
    if (!file || !library)
        return 4;
    void (*function)(void *) = (void (*)(void *))dlsym(library, arguments[2]);
    if (!function)
        return 5;

    int64_t counts[2];
    take(counts, sizeof counts, file);
    struct region *regions = whole(counts[0] * (int64_t)sizeof *regions);
    struct pointer *pointers = whole(counts[1] * (int64_t)sizeof *pointers);
    take(regions, counts[0] * (int64_t)sizeof *regions, file);
    take(pointers, counts[1] * (int64_t)sizeof *pointers, file);
    const long data = ftell(file);
    char **memory = whole(counts[0] * (int64_t)sizeof *memory);
    for (int64_t i = 0; i < counts[0]; i++) {
        memory[i] = (char *)whole(regions[i].size + PAGE) + regions[i].offset;
        take(memory[i], regions[i].size, file);
    }
    for (int64_t i = 0; i < counts[1]; i++) {
        const struct pointer p = pointers[i];
        *(char **)(memory[p.in] + p.at) = memory[p.to] + p.place;
    }

    function(memory[0]);

    fseek(file, data, SEEK_SET);
    for (int64_t i = 0; i < counts[0]; i++)
        fwrite(memory[i], 1, (size_t)regions[i].size, file);
    return fclose(file);
}
