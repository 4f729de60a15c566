/* SPDX-License-Identifier: Apache-2.0
 *
 * What the files of the CPython module share.
 */
#ifndef PBS_PYTHON_MODULE_H
#define PBS_PYTHON_MODULE_H

#include <Python.h>

#include "pbs/pbs.h"

/* Sets a Python error for a status that is not PBS_OK; returns -1 then, 0 otherwise. */
int pbs_python_raise(pbs_status status);

/* 0 is no dtype: it stands for "unknown, and the error is set". */
pbs_dtype pbs_python_dtype(const char *name);

/* sizes.c */
extern const char pbs_python_prefill_workspace_size_doc[], pbs_python_kv_packed_bytes_doc[];
PyObject *pbs_python_prefill_workspace_size(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *pbs_python_kv_packed_bytes(PyObject *self, PyObject *args, PyObject *kwargs);

#endif /* PBS_PYTHON_MODULE_H */
