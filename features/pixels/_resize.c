/* Pillow's resize of RGB images, many values at a time: the same integers, so the same grey levels.

   Weights and rounding are those of `precompute_coeffs`, `normalize_coeffs_8bpc` and `ImagingResample*_8bpc` in
   https://github.com/python-pillow/Pillow, src/libImaging/Resample.c: weights in double precision, rounded to 22-bit
   fixed point, and sums of 32 bits, which are exact in any order. The loops are plain; the compiler makes vectors of them. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BITS (32 - 8 - 2)
#define HALF (1 << (BITS - 1))
#define ROWS 8 /* that are resized across at the same time */
#define LANES (4 * ROWS)

/* Two versions of a function, of which the loader takes the one for this processor. Arm's vectors need none. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define FOR_PROCESSORS __attribute__((target_clones("avx2", "default")))
#endif
#endif
#ifndef FOR_PROCESSORS
#define FOR_PROCESSORS
#endif

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
    int32_t *weight; /* (count, most) */
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
    int most = (int)ceil(support) * 2 + 1;
    double *exact = malloc(most * sizeof(double));
    *taps = (Taps){count, most, malloc(count * sizeof(int)), malloc(count * sizeof(int)),
                   malloc((size_t)count * most * sizeof(int32_t))};
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

static inline uint8_t level(int32_t sum) {
    sum >>= BITS;
    return sum < 0 ? 0 : sum > 255 ? 255 : sum;
}

/* Pixels of four bytes, (rows, width, 4), to three, (rows, count, 3); `block` takes the pixels of ROWS rows side by side. */
FOR_PROCESSORS static void resize_across(const uint8_t *from, int width, int rows, const Taps *taps, uint8_t *block,
                                         uint8_t *to) {
    for (int top = 0; top < rows; top += ROWS) {
        int here = rows - top < ROWS ? rows - top : ROWS;
        for (int row = 0; row < here; row++) {
            const uint8_t *line = from + 4 * (size_t)width * (top + row);
            for (size_t x = 0; x < (size_t)width; x++) memcpy(block + LANES * x + 4 * row, line + 4 * x, 4);
        }
        for (int x = 0; x < taps->count; x++) {
            const uint8_t *pixels = block + LANES * (size_t)taps->first[x];
            const int32_t *weight = taps->weight + (size_t)x * taps->most;
            int32_t sums[LANES];
            uint8_t levels[LANES];
            for (int lane = 0; lane < LANES; lane++) sums[lane] = HALF;
            for (int i = 0; i < taps->number[x]; i++, pixels += LANES)
                for (int lane = 0; lane < LANES; lane++) sums[lane] += weight[i] * pixels[lane];
            for (int lane = 0; lane < LANES; lane++) levels[lane] = level(sums[lane]);
            for (int row = 0; row < here; row++)
                memcpy(to + 3 * ((size_t)(top + row) * taps->count + x), levels + 4 * row, 3);
        }
    }
}

/* Lines of bytes, (rows, length), to (count, length). */
FOR_PROCESSORS static void resize_down(const uint8_t *from, size_t length, const Taps *taps, int32_t *sums, uint8_t *to) {
    for (int y = 0; y < taps->count; y++, to += length) {
        const uint8_t *line = from + length * taps->first[y];
        const int32_t *weight = taps->weight + (size_t)y * taps->most;
        for (size_t x = 0; x < length; x++) sums[x] = HALF;
        for (int i = 0; i < taps->number[y]; i++, line += length)
            for (size_t x = 0; x < length; x++) sums[x] += weight[i] * line[x];
        for (size_t x = 0; x < length; x++) to[x] = level(sums[x]);
    }
}

/* The pixels of an image that Pillow exports, if there are as many as expected. */
static const uint8_t *pixels_of(PyObject *capsule, int64_t count) {
    struct ArrowArray *array = PyCapsule_GetPointer(capsule, "arrow_array");
    if (!array) return NULL;
    if (array->n_children != 1 || array->length != count || array->children[0]->length != 4 * count ||
        array->children[0]->n_buffers != 2 || array->offset || array->children[0]->offset) {
        PyErr_SetString(PyExc_ValueError, "expected pixels of four bytes, as many as lines times width");
        return NULL;
    }
    return array->children[0]->buffers[1];
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
        size_t length = 3 * from.shape[1];
        int32_t *sums = malloc(length * sizeof(int32_t));
        if (sums && make_taps(&taps, rows, target, start, count, bicubic)) {
            Py_BEGIN_ALLOW_THREADS
            resize_down(from.buf, length, &taps, sums, to.buf);
            Py_END_ALLOW_THREADS
            free_taps(&taps);
            result = Py_NewRef(Py_None);
        } else PyErr_NoMemory();
        free(sums);
    }
    PyBuffer_Release(&to);
    PyBuffer_Release(&from);
    return result;
}

static PyMethodDef methods[] = {
    {"across", across, METH_VARARGS, "across(arrow_array, width, target, start, bicubic, lines): fill lines, (rows, m, 3)."},
    {"down", down, METH_VARARGS, "down(lines, target, start, bicubic, pixels): fill pixels, (n, m, 3), from (rows, m, 3)."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_resize", NULL, -1, methods};

PyMODINIT_FUNC PyInit__resize(void) { return PyModule_Create(&definition); }
