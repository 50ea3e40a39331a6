"""What pyproject.toml cannot say in every setuptools: the loops in C, and that they are optional."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            # No Python module: engine/native/kernels.py opens it with ctypes.
            "engine.native._kernels",
            sources=["engine/native/kernels.c"],
            depends=["engine/native/xxhash.h"],
            extra_compile_args=["-O3", "-fvisibility=hidden"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
