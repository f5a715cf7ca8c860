// Reads the attributes of a Python object by their names, into numbers.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>

namespace fused_optim {

// An interned string that never dies: names are compared by identity first.
inline PyObject* intern(const char* text) { return PyUnicode_InternFromString(text); }

// A reference that is given back at the end of its scope.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {}
  ~Owned() { Py_XDECREF(object_); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;

  PyObject* get() const { return object_; }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_;
};

// The attributes of one object, one after the other. Of what cannot be read the first counts: a Python error
// is set then, and good() says so in the end.
class Attributes {
 public:
  explicit Attributes(PyObject* object) : object_(object) {}

  void read(PyObject* name, double& out) {
    read(name, [&](PyObject* value) { out = PyFloat_AsDouble(value); });
  }
  void read(PyObject* name, bool& out) {
    read(name, [&](PyObject* value) { out = PyObject_IsTrue(value) == 1; });
  }
  void read(PyObject* name, int32_t& out) {
    read(name, [&](PyObject* value) { out = static_cast<int32_t>(PyLong_AsLong(value)); });
  }
  void read(PyObject* name, uint64_t& out) {
    read(name, [&](PyObject* value) { out = PyLong_AsUnsignedLongLong(value); });
  }
  // Calls f(value), for which the reference lasts.
  template <class F>
  void read(PyObject* name, const F& f) {
    if (!good_) return;
    const Owned value(PyObject_GetAttr(object_, name));
    if (value) f(value.get());
    good_ = value && !PyErr_Occurred();
  }

  bool good() const { return good_; }

 private:
  PyObject* object_;
  bool good_ = true;
};

}  // namespace fused_optim
