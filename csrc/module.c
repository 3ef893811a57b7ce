/* The abi3 module warploom._C. Loading it runs the static initialisers that register the
 * implementations with PyTorch's dispatcher; has_cuda says whether CUDA kernels are among them. */
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", NULL, -1, NULL};

PyMODINIT_FUNC PyInit__C(void) {
    PyObject* module = PyModule_Create(&definition);
    if (module == NULL) {
        return NULL;
    }
#ifdef WARPLOOM_WITH_CUDA
    const int has_cuda = 1;
#else
    const int has_cuda = 0;
#endif
    PyObject* value = PyBool_FromLong(has_cuda);
    const int failed = PyObject_SetAttrString(module, "has_cuda", value);
    Py_XDECREF(value);
    if (failed) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
