/* SPDX-License-Identifier: Apache-2.0
 *
 * pbs_attn._C: what Python may ask of the C core besides the torch ops, and with PBS_CUDA_LIBRARY
 * pbs_attn._C_cuda: the same questions to the GPU's half. CPython limited API, 3.10. The ops of the
 * same library register themselves when it is loaded (csrc/torch/ops.cpp), so torch must have been
 * imported before: pbs_attn/_load.py sees to that.
 */
#include "module.h"

#include <stdlib.h>
#include <string.h>

#if defined(PBS_CUDA_LIBRARY)
#include "cuda/cuda.h"
#else
#include "torch/keep.h"
#endif

#ifndef PBS_BUILD_TORCH
#define PBS_BUILD_TORCH "unknown"
#endif

int pbs_python_raise(pbs_status status) {
    if (status == PBS_OK) return 0;
    PyObject *type = status == PBS_ERR_UNSUPPORTED ? PyExc_NotImplementedError : PyExc_ValueError;
    PyErr_SetString(type, pbs_last_error());
    return -1;
}

pbs_dtype pbs_python_dtype(const char *name) {
    if (strcmp(name, "float32") == 0) return PBS_DTYPE_FP32;
    if (strcmp(name, "float16") == 0) return PBS_DTYPE_FP16;
    if (strcmp(name, "bfloat16") == 0) return PBS_DTYPE_BF16;
    PyErr_Format(PyExc_ValueError, "dtype is '%s': float32, float16 or bfloat16 is allowed", name);
    return (pbs_dtype)0;
}

/* Steals value, so that a call can make it on the spot; value NULL = an error is already set. */
static int set_item(PyObject *dict, const char *key, PyObject *value) {
    int failed = value == NULL || PyDict_SetItemString(dict, key, value) < 0;
    Py_XDECREF(value);
    return failed ? -1 : 0;
}

/* NULL and "" are None. */
static PyObject *text_or_none(const char *text) {
    if (text && *text) return PyUnicode_FromString(text);
    Py_INCREF(Py_None);
    return Py_None;
}

PyDoc_STRVAR(abi_version_doc, "abi_version() -> int\n\nPBS_ABI_VERSION of the C core.");

static PyObject *abi_version(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyLong_FromLong(pbs_abi_version());
}

/* pbs_build_info() and the torch whose headers were used, as a dict. */
static PyObject *core_info(void) {
    PyObject *json = PyImport_ImportModule("json");
    if (!json) return NULL;
    PyObject *info = PyObject_CallMethod(json, "loads", "s", pbs_build_info());
    Py_DECREF(json);
    if (!info) return NULL;
    if (!PyDict_Check(info)) {
        PyErr_SetString(PyExc_RuntimeError, "pbs_build_info() is not a JSON object");
    } else if (set_item(info, "torch_headers", PyUnicode_FromString(PBS_BUILD_TORCH)) == 0) {
        return info;
    }
    Py_DECREF(info);
    return NULL;
}

PyDoc_STRVAR(last_error_doc,
             "last_error() -> str\n\nDetail of the last error of this thread in the C core.");

static PyObject *last_error(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyUnicode_FromString(pbs_last_error());
}

/* Through void: CPython's own way to keep -Wcast-function-type quiet about keyword functions. */
#define WITH_KEYWORDS(function) \
    ((PyCFunction)(void (*)(void))(function)), METH_VARARGS | METH_KEYWORDS

/* What both libraries answer. */
#define COMMON_METHODS                                                              \
    {"abi_version", abi_version, METH_NOARGS, abi_version_doc},                     \
        {"build_info", build_info, METH_NOARGS, build_info_doc},                    \
        {"last_error", last_error, METH_NOARGS, last_error_doc},                    \
        {"kv_packed_bytes", WITH_KEYWORDS(pbs_python_kv_packed_bytes),              \
         pbs_python_kv_packed_bytes_doc},                                           \
    {                                                                               \
        "prefill_workspace_size", WITH_KEYWORDS(pbs_python_prefill_workspace_size), \
            pbs_python_prefill_workspace_size_doc                                   \
    }

#if defined(PBS_CUDA_LIBRARY)

#ifndef PBS_BUILD_ARCHS
#define PBS_BUILD_ARCHS "unknown"
#endif
#ifndef PBS_BUILD_NVCC
#define PBS_BUILD_NVCC "unknown"
#endif

PyDoc_STRVAR(
    build_info_doc,
    "build_info() -> dict\n\nCompilers, flags and targets of the CUDA library, the torch "
    "whose headers were used, and the kernels of attend: (dtype, head_dim, BLOCK_M, BLOCK_N).");

/* [(dtype, head_dim, BLOCK_M, BLOCK_N)]: a call takes the first that holds its own sizes. */
static PyObject *attend_kernels(void) {
    static const struct {
        const char *dtype;
        int head_dim, block_m, block_n;
    } kernels[] = {
#define INSTANCE(dtype, type, head_dim, block_m, block_n, warps, blocks_per_sm, with_means) \
    {#type, head_dim, block_m, block_n},
#include "cuda/attend_instances.inc"
#undef INSTANCE
    };
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < sizeof kernels / sizeof *kernels; i++) {
        PyObject *kernel = Py_BuildValue("(siii)", kernels[i].dtype, kernels[i].head_dim,
                                         kernels[i].block_m, kernels[i].block_n);
        int failed = !kernel || PyList_Append(list, kernel) < 0;
        Py_XDECREF(kernel);
        if (failed) Py_CLEAR(list);
    }
    return list;
}

static PyObject *build_info(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    PyObject *info = core_info();
    if (!info) return NULL;
    if (PyDict_DelItemString(info, "isas") == 0 && /* the CPU's */
        set_item(info, "archs", PyUnicode_FromString(PBS_BUILD_ARCHS)) == 0 &&
        set_item(info, "nvcc", PyUnicode_FromString(PBS_BUILD_NVCC)) == 0 &&
        set_item(info, "kernels", attend_kernels()) == 0) {
        return info;
    }
    Py_DECREF(info);
    return NULL;
}

PyDoc_STRVAR(capability_doc, "capability(device) -> int\n\nCompute capability of a CUDA device: 90 "
                             "is 9.0. 0 if it cannot be asked.");

static PyObject *capability(PyObject *self, PyObject *device) {
    (void)self;
    int ordinal;
    if (!PyArg_Parse(device, "i:capability", &ordinal)) return NULL;
    return PyLong_FromLong(pbs_cuda_capability(ordinal));
}

PyDoc_STRVAR(refuses_doc, "refuses(device) -> str | None\n\nWhy no kernel of this library runs on "
                          "that CUDA device, or None.");

static PyObject *refuses(PyObject *self, PyObject *device) {
    (void)self;
    int ordinal;
    if (!PyArg_Parse(device, "i:refuses", &ordinal)) return NULL;
    return text_or_none(pbs_cuda_refuses(ordinal));
}

static PyMethodDef methods[] = {
    COMMON_METHODS,
    {"capability", capability, METH_O, capability_doc},
    {"refuses", refuses, METH_O, refuses_doc},
    {NULL, NULL, 0, NULL},
};

#define MODULE "_C_cuda"
#define MODULE_INIT PyInit__C_cuda

#else

#ifndef PBS_BUILD_NO_CUDA
#define PBS_BUILD_NO_CUDA "not recorded"
#endif

static const char *const ISA_VARIABLE = "PBS_ATTN_ISA";

PyDoc_STRVAR(
    build_info_doc,
    "build_info() -> dict\n\nCompiler, flags and instruction sets of the C core, the torch "
    "whose headers were used, and why there is no CUDA library (None if there is one).");

static PyObject *build_info(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    PyObject *info = core_info();
    if (info && set_item(info, "no_cuda", text_or_none(PBS_BUILD_NO_CUDA)) == 0) return info;
    Py_XDECREF(info);
    return NULL;
}

PyDoc_STRVAR(
    cpu_capabilities_doc,
    "cpu_capabilities() -> dict[str, bool]\n\nInstruction set -> compiled in, and this CPU "
    "can run it.");

static int on_gpu(int isa) { return isa == PBS_ISA_SM80 || isa == PBS_ISA_SM90; }

static PyObject *cpu_capabilities(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    PyObject *dict = PyDict_New();
    if (!dict) return NULL;
    for (int isa = PBS_ISA_AUTO + 1; isa < PBS_ISA_COUNT; isa++) {
        const char *name = on_gpu(isa) ? NULL : pbs_isa_name((pbs_isa)isa);
        if (!name) continue;
        if (set_item(dict, name, PyBool_FromLong(pbs_isa_available((pbs_isa)isa))) < 0) {
            Py_DECREF(dict);
            return NULL;
        }
    }
    return dict;
}

PyDoc_STRVAR(missing_isas_doc,
             "missing_isas() -> dict[str, str]\n\nInstruction sets of CPUs that do not run here -> "
             "why not.");

static PyObject *missing_isas(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    PyObject *dict = PyDict_New();
    if (!dict) return NULL;
    for (int isa = PBS_ISA_AUTO + 1; isa < PBS_ISA_COUNT; isa++) {
        const char *name = on_gpu(isa) ? NULL : pbs_isa_name((pbs_isa)isa);
        const char *why = pbs_isa_missing((pbs_isa)isa);
        if (!name || !why) continue;
        if (set_item(dict, name, PyUnicode_FromString(why)) < 0) {
            Py_DECREF(dict);
            return NULL;
        }
    }
    return dict;
}

PyDoc_STRVAR(
    isa_doc,
    "isa(dtype='bfloat16') -> str\n\nThe instruction set that a call with this dtype would "
    "run now. NotImplementedError if PBS_ATTN_ISA forces one that this CPU lacks.");

static PyObject *isa(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    static char *names[] = {"dtype", NULL};
    const char *dtype_name = "bfloat16";
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|s:isa", names, &dtype_name)) return NULL;
    pbs_dtype dtype = pbs_python_dtype(dtype_name);
    if (!dtype) return NULL;
    const char *name = pbs_isa_name(pbs_isa_for(PBS_ISA_AUTO, dtype));
    if (name) return PyUnicode_FromString(name);
    const char *forced = getenv(ISA_VARIABLE);
    return PyErr_Format(PyExc_NotImplementedError, "%s is '%s', which this build on this CPU lacks",
                        ISA_VARIABLE, forced ? forced : "");
}

PyDoc_STRVAR(forced_isa_doc,
             "forced_isa() -> str | None\n\nThe environment variable PBS_ATTN_ISA, if set.");

static PyObject *forced_isa(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return text_or_none(getenv(ISA_VARIABLE));
}

PyDoc_STRVAR(keep_workspace_doc,
             "keep_workspace(bytes) -> int\n\nThe largest workspace that calls on a CPU leave for "
             "the next one. Returns the bytes given back.");

static PyObject *keep_workspace(PyObject *self, PyObject *bytes) {
    (void)self;
    size_t limit = PyLong_AsSize_t(bytes);
    if (limit == (size_t)-1 && PyErr_Occurred()) return NULL;
    return PyLong_FromSize_t(pbs_torch_keep_workspace(limit));
}

static PyMethodDef methods[] = {
    COMMON_METHODS,
    {"keep_workspace", keep_workspace, METH_O, keep_workspace_doc},
    {"cpu_capabilities", cpu_capabilities, METH_NOARGS, cpu_capabilities_doc},
    {"missing_isas", missing_isas, METH_NOARGS, missing_isas_doc},
    {"isa", WITH_KEYWORDS(isa), isa_doc},
    {"forced_isa", forced_isa, METH_NOARGS, forced_isa_doc},
    {NULL, NULL, 0, NULL},
};

#define MODULE "_C"
#define MODULE_INIT PyInit__C

#endif

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "pbs_attn." MODULE,
    .m_doc = "The C core of pbs_attn. Importing it after torch registers torch.ops.pbs_attn.*",
    .m_size = 0,
    .m_methods = methods,
};

PyMODINIT_FUNC MODULE_INIT(void) { return PyModuleDef_Init(&module); }
