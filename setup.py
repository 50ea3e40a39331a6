"""Builds the optional C extension, which pyproject.toml cannot declare for every setuptools version."""

import platform

from setuptools import Extension, setup


def loops(name: str, *flags: str) -> Extension:
    """One build of the kernels. It is not a Python module: engine/native/kernels.py loads it with ctypes."""
    return Extension(
        f"engine.native._{name}",
        sources=[f"engine/native/{name}.c"],
        depends=["engine/native/kernels.c", "engine/native/xxhash.h"],
        extra_compile_args=["-O3", "-fvisibility=hidden", *flags],
        extra_link_args=["-pthread"],
        optional=True,
    )


wide = [loops("kernels_avx2", "-mavx2")] if platform.machine() in ("x86_64", "AMD64") else []
setup(ext_modules=[loops("kernels"), *wide])
