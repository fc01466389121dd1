/* Pillow's resize of RGB images, 32 values at a time: the same integers, so the same grey levels.

   Weights and rounding are those of `precompute_coeffs`, `normalize_coeffs_8bpc` and `ImagingResample*_8bpc` in
   https://github.com/python-pillow/Pillow, src/libImaging/Resample.c: weights in double precision, rounded to 22-bit
   fixed point, and sums of 32 bits, which are exact in any order. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define BITS (32 - 8 - 2)
#define HALF (1 << (BITS - 1))
#define ROWS 8 /* that are resized across at the same time */
#define LANES (4 * ROWS)

/* https://arrow.apache.org/docs/format/CDataInterface.html */
struct ArrowArray {
    int64_t length, null_count, offset, n_buffers, n_children;
    const void **buffers;
    struct ArrowArray **children, *dictionary;
    void (*release)(struct ArrowArray *);
    void *private_data;
};

/* Of each target position: its first source position, the number of source positions, and their weights. */
typedef struct {
    int count, most;
    int *first, *number;
    int32_t *weight; /* (count, most), of which `most` is even; 0 behind the last */
} Taps;

static double triangle(double x) {
    x = fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

static double cubic(double x) {
    const double a = -0.5;
    x = fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    return x < 2.0 ? (((x - 5) * x + 8) * x - 4) * a : 0.0;
}

static void free_taps(Taps *taps) {
    free(taps->first);
    free(taps->number);
    free(taps->weight);
}

/* Of the positions from `start` on of `target`, if `source` positions are resized to `target`; 0 if memory ended. */
static int make_taps(Taps *taps, int source, int target, int start, int count, int bicubic) {
    double (*filter)(double) = bicubic ? cubic : triangle;
    double scale = (double)source / target, filterscale = scale < 1.0 ? 1.0 : scale;
    double support = (bicubic ? 2.0 : 1.0) * filterscale, narrowing = 1.0 / filterscale;
    int most = (int)ceil(support) * 2 + 2;
    double *exact = malloc(most * sizeof(double));
    *taps = (Taps){count, most, malloc(count * sizeof(int)), malloc(count * sizeof(int)),
                   calloc((size_t)count * most, sizeof(int32_t))};
    if (!exact || !taps->first || !taps->number || !taps->weight) {
        free(exact);
        free_taps(taps);
        return 0;
    }
    for (int position = 0; position < count; position++) {
        double centre = (start + position + 0.5) * scale, total = 0.0;
        int first = (int)(centre - support + 0.5), last = (int)(centre + support + 0.5);
        if (first < 0) first = 0;
        if (last > source) last = source;
        for (int i = 0; i < last - first; i++) total += exact[i] = filter((i + first - centre + 0.5) * narrowing);
        for (int i = 0; i < last - first; i++) {
            double weight = (total != 0.0 ? exact[i] / total : exact[i]) * (1 << BITS);
            taps->weight[(size_t)position * most + i] = (int32_t)(weight < 0 ? weight - 0.5 : weight + 0.5);
        }
        taps->first[position] = first;
        taps->number[position] = last - first;
    }
    free(exact);
    return 1;
}

/* Levels of up to LANES sums: each is that of `number` weights times the bytes `stride` apart. */
static void sum_plain(const uint8_t *from, size_t stride, const int32_t *weight, int number, int lanes, uint8_t *to) {
    int32_t sums[LANES];
    for (int lane = 0; lane < lanes; lane++) sums[lane] = HALF;
    for (int i = 0; i < number; i++, from += stride)
        for (int lane = 0; lane < lanes; lane++) sums[lane] += weight[i] * from[lane];
    for (int lane = 0; lane < lanes; lane++) {
        int32_t level = sums[lane] >> BITS;
        to[lane] = level < 0 ? 0 : level > 255 ? 255 : level;
    }
}

#ifdef __x86_64__
#define LOW 11 /* bits: a weight is two numbers of 16 bits, because products of 16 bits are the fastest there are */

__attribute__((target("avx2"))) static void sum_avx2(const uint8_t *from, size_t stride, const int32_t *weight,
                                                     int number, uint8_t *to) {
    const __m256i zero = _mm256_setzero_si256(), mask = _mm256_set1_epi32((1 << LOW) - 1);
    __m256i high[4] = {zero, zero, zero, zero}, low[4], pixels[4];
    for (int part = 0; part < 4; part++) low[part] = _mm256_set1_epi32(HALF);
    for (int i = 0; i < number; i += 2, from += 2 * stride) { /* two weights, side by side in every 32 bits */
        int64_t both;
        memcpy(&both, weight + i, 8);
        __m256i weights = _mm256_set1_epi64x(both), highs = _mm256_srai_epi32(weights, LOW);
        __m256i lows = _mm256_and_si256(weights, mask);
        highs = _mm256_packs_epi32(highs, highs);
        lows = _mm256_packs_epi32(lows, lows);
        __m256i one = _mm256_loadu_si256((const __m256i *)from);
        __m256i two = i + 1 < number ? _mm256_loadu_si256((const __m256i *)(from + stride)) : zero;
        __m256i first = _mm256_unpacklo_epi8(one, two), second = _mm256_unpackhi_epi8(one, two);
        pixels[0] = _mm256_unpacklo_epi8(first, zero);
        pixels[1] = _mm256_unpackhi_epi8(first, zero);
        pixels[2] = _mm256_unpacklo_epi8(second, zero);
        pixels[3] = _mm256_unpackhi_epi8(second, zero);
        for (int part = 0; part < 4; part++) {
            high[part] = _mm256_add_epi32(high[part], _mm256_madd_epi16(pixels[part], highs));
            low[part] = _mm256_add_epi32(low[part], _mm256_madd_epi16(pixels[part], lows));
        }
    }
    for (int part = 0; part < 4; part++)
        low[part] = _mm256_srai_epi32(_mm256_add_epi32(low[part], _mm256_slli_epi32(high[part], LOW)), BITS);
    /* Packing clips to 0-255, and restores the order that unpacking has changed. */
    __m256i levels = _mm256_packus_epi16(_mm256_packs_epi32(low[0], low[1]), _mm256_packs_epi32(low[2], low[3]));
    _mm256_storeu_si256((__m256i *)to, levels);
}
#endif

static inline void sum(const uint8_t *from, size_t stride, const int32_t *weight, int number, int lanes, uint8_t *to) {
#ifdef __x86_64__
    if (lanes == LANES && __builtin_cpu_supports("avx2")) {
        sum_avx2(from, stride, weight, number, to);
        return;
    }
#endif
    sum_plain(from, stride, weight, number, lanes, to);
}

/* Pixels of four bytes, (rows, width, 4), to three, (rows, count, 3); `block` takes the pixels of ROWS rows side by side. */
static void resize_across(const uint8_t *from, int width, int rows, const Taps *taps, uint8_t *block, uint8_t *to) {
    for (int top = 0; top < rows; top += ROWS) {
        int here = rows - top < ROWS ? rows - top : ROWS;
        for (int row = 0; row < here; row++) {
            const uint8_t *line = from + 4 * (size_t)width * (top + row);
            for (size_t x = 0; x < (size_t)width; x++) memcpy(block + LANES * x + 4 * row, line + 4 * x, 4);
        }
        for (int x = 0; x < taps->count; x++) {
            uint8_t levels[LANES];
            sum(block + LANES * (size_t)taps->first[x], LANES, taps->weight + (size_t)x * taps->most, taps->number[x],
                LANES, levels);
            for (int row = 0; row < here; row++)
                memcpy(to + 3 * ((size_t)(top + row) * taps->count + x), levels + 4 * row, 3);
        }
    }
}

/* Lines of bytes, (rows, length), to (count, length). */
static void resize_down(const uint8_t *from, size_t length, const Taps *taps, uint8_t *to) {
    for (int y = 0; y < taps->count; y++, to += length) {
        const uint8_t *line = from + length * taps->first[y];
        const int32_t *weight = taps->weight + (size_t)y * taps->most;
        for (size_t x = 0; x < length; x += LANES)
            sum(line + x, length, weight, taps->number[y], length - x < LANES ? (int)(length - x) : LANES, to + x);
    }
}

/* The pixels of an image that Pillow exports, if there are as many as expected. */
static uint8_t *pixels_of(PyObject *capsule, int64_t count) {
    struct ArrowArray *array = PyCapsule_GetPointer(capsule, "arrow_array");
    if (!array) return NULL;
    if (array->n_children != 1 || array->length != count || array->children[0]->length != 4 * count ||
        array->children[0]->n_buffers != 2 || array->offset || array->children[0]->offset) {
        PyErr_SetString(PyExc_ValueError, "expected pixels of four bytes, as many as lines times width");
        return NULL;
    }
    return (uint8_t *)array->children[0]->buffers[1];
}

/* An array uint8, (n, m, 3), whose sides fit the target. */
static int view_of(PyObject *object, Py_buffer *view, int flags) {
    if (PyObject_GetBuffer(object, view, flags | PyBUF_C_CONTIGUOUS) < 0) return 0;
    if (view->ndim == 3 && view->itemsize == 1 && view->shape[2] == 3 && view->len && view->len < INT32_MAX) return 1;
    PyBuffer_Release(view);
    PyErr_SetString(PyExc_ValueError, "expected an array of uint8, (n, m, 3), of less than 2 GiB");
    return 0;
}

static int within(int source, int target, int start, Py_ssize_t count) {
    if (source > 0 && target > 0 && start >= 0 && start + count <= target) return 1;
    PyErr_SetString(PyExc_ValueError, "expected positions within the target");
    return 0;
}

static PyObject *across(PyObject *module, PyObject *arguments) {
    PyObject *capsule, *lines, *result = NULL;
    int width, target, start, bicubic;
    Py_buffer to;
    Taps taps;
    if (!PyArg_ParseTuple(arguments, "OiiipO", &capsule, &width, &target, &start, &bicubic, &lines)) return NULL;
    if (!view_of(lines, &to, PyBUF_WRITABLE)) return NULL;
    int rows = (int)to.shape[0], count = (int)to.shape[1];
    const uint8_t *from = pixels_of(capsule, (int64_t)width * rows);
    if (from && within(width, target, start, count)) {
        uint8_t *block = calloc(width, LANES);
        if (block && make_taps(&taps, width, target, start, count, bicubic)) {
            Py_BEGIN_ALLOW_THREADS
            resize_across(from, width, rows, &taps, block, to.buf);
            Py_END_ALLOW_THREADS
            free_taps(&taps);
            result = Py_NewRef(Py_None);
        } else PyErr_NoMemory();
        free(block);
    }
    PyBuffer_Release(&to);
    return result;
}

static PyObject *down(PyObject *module, PyObject *arguments) {
    PyObject *lines, *pixels, *result = NULL;
    int target, start, bicubic;
    Py_buffer from, to;
    Taps taps;
    if (!PyArg_ParseTuple(arguments, "OiipO", &lines, &target, &start, &bicubic, &pixels)) return NULL;
    if (!view_of(lines, &from, 0)) return NULL;
    if (!view_of(pixels, &to, PyBUF_WRITABLE)) { PyBuffer_Release(&from); return NULL; }
    int rows = (int)from.shape[0], count = (int)to.shape[0];
    if (from.shape[1] != to.shape[1]) PyErr_SetString(PyExc_ValueError, "expected arrays of the same width");
    else if (within(rows, target, start, count)) {
        if (make_taps(&taps, rows, target, start, count, bicubic)) {
            Py_BEGIN_ALLOW_THREADS
            resize_down(from.buf, 3 * (size_t)from.shape[1], &taps, to.buf);
            Py_END_ALLOW_THREADS
            free_taps(&taps);
            result = Py_NewRef(Py_None);
        } else PyErr_NoMemory();
    }
    PyBuffer_Release(&to);
    PyBuffer_Release(&from);
    return result;
}

static PyObject *memory(PyObject *module, PyObject *arguments) {
    PyObject *capsule;
    int width, height;
    if (!PyArg_ParseTuple(arguments, "Oii", &capsule, &width, &height)) return NULL;
    uint8_t *pixels = pixels_of(capsule, (int64_t)width * height);
    return pixels ? PyMemoryView_FromMemory((char *)pixels, 4 * (Py_ssize_t)width * height, PyBUF_WRITE) : NULL;
}

static PyMethodDef methods[] = {
    {"memory", memory, METH_VARARGS, "memory(arrow_array, width, height): the bytes of an image, which must outlive them."},
    {"across", across, METH_VARARGS, "across(arrow_array, width, target, start, bicubic, lines): fill lines, (rows, m, 3)."},
    {"down", down, METH_VARARGS, "down(lines, target, start, bicubic, pixels): fill pixels, (n, m, 3), from (rows, m, 3)."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_resize", NULL, -1, methods};

PyMODINIT_FUNC PyInit__resize(void) { return PyModule_Create(&definition); }
